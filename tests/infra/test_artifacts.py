import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from infra.artifacts import digest, read_manifest, step_path, write_manifest
from infra.store import Store


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    names: tuple[str, ...] = ("ä", "b")


@dataclass(frozen=True)
class Config:
    size: tuple[int, int] | None = (2, 3)
    count: int = 1
    word: str = "x"
    flag: bool = False
    inner: Inner = Inner()
    table: Any = None


CHANGES = [
    {"size": (3, 2)},
    {"size": None},
    {"count": 2},
    {"count": 1.5},
    {"word": "y"},
    {"flag": True},
    {"inner": Inner(rate=0.10000001)},
    {"inner": Inner(names=("b", "ä"))},
    {"inner": Inner(names=("äb",))},
    {"table": {"a": [1, None]}},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_digest_changes_with_any_field(change: dict):
    assert digest(replace(Config(), **change)) != digest(Config())


def test_every_field_is_among_the_changes():
    assert {name for change in CHANGES for name in change} == {field.name for field in fields(Config)}


def test_a_digest_is_the_same_in_every_process():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_artifacts as t; print(t.facts())"
    for seed in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == facts()


def facts() -> str:
    return digest(Config(table={"b": 1, "a": {"y", "x"} and [2]}), [Inner(), Inner(2.0)], "step")


def test_a_digest_does_not_depend_on_the_order_of_a_dict():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


@pytest.mark.parametrize("value", [{1, 2}, Path("/tmp"), b"bytes", object(), Config], ids=lambda v: type(v).__name__)
def test_what_has_no_stable_text_is_refused(value):
    with pytest.raises(TypeError):
        digest(value)


def test_a_steps_path_depends_on_step_schema_config_and_inputs():
    paths = [
        step_path("train", 1, Config()),
        step_path("train", 2, Config()),
        step_path("train", 1, Config(count=2)),
        step_path("train", 1, Config(), ["precompute/1"]),
        step_path("train", 1, Config(), ["precompute/1", "precompute/2"]),
        step_path("evaluate", 1, Config()),
    ]
    assert len({path.split("/")[1] for path in paths}) == len(paths)
    assert paths[0].startswith("train/")


def test_the_first_of_racing_manifests_stays(store: Store):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_manifest(store, "step/1", {"writer": number}), range(8)))
    first = read_manifest(store, "step/1")
    write_manifest(store, "step/1", {"writer": "late"})
    assert read_manifest(store, "step/1") == first


def test_a_manifest_holds_plain_json(store: Store):
    assert read_manifest(store, "step/1") is None
    write_manifest(store, "step/1", {"config": Config(), "samples": 3})
    content = json.loads(store.read("step/1/manifest.json"))
    assert content == read_manifest(store, "step/1")
    assert content["config"]["inner"] == {"rate": 0.1, "names": ["ä", "b"]}
