"""evaluate reports on any data with a run's categories what train-coco would, and refuses the rest before Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra import artifacts
from infra.errors import TesseraError
from infra.store import Store, open_store
from pipelines import evaluate_flow
from pipelines.evaluate_flow import check_job, evaluate_run, precompute_split
from pipelines.evaluate_job import Evaluate
from preprocessing.coco import read_index
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.finished_run import finished_run
from tests.support.ray_local import ray_local  # noqa: F401
from tests.support.shard_sets import make_set
from training.metrics import read_metrics, write_metrics
from training.recipes.generalist import debug
from training.run import WEIGHTS

IMAGES = 10
OPTIONS = {"method.decode.min_stuff_area": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def run(folder: Path) -> str:
    return finished_run(folder, str(folder / "store"))


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write_set(folder / "other", SyntheticConfig(train=1, val=IMAGES, size=(40, 48), seed=9))


@pytest.fixture
def store(folder: Path) -> Store:
    return open_store(str(folder / "store"))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The artifacts that a step makes; there is no server here."""
    found: list[str] = []
    monkeypatch.setattr(evaluate_flow, "create_markdown_artifact", lambda text, **_: found.append(text))
    return found


def evaluated(job: Evaluate):
    """The flow without its server."""
    recipe = check_job.fn(job)
    return evaluate_run.fn(job, recipe, precompute_split.fn(job, recipe))


@pytest.mark.usefixtures("ray_local")
def test_images_that_train_coco_has_precomputed_are_reported_on_from_the_same_shards(run, data, store, shown):
    made = make_set(store, read_index(data, "val2017"), debug().val_shards)
    before = {entry.key for entry in store.list("precompute/")}
    report = evaluated(Evaluate(run=run, data=str(data)))
    assert {entry.key for entry in store.list("precompute/")} == before
    assert len(report.summary["images"]) == IMAGES
    folder = report.url.removeprefix(f"{store.url}/").removesuffix("/report.html")
    manifest = artifacts.read_manifest(store, folder)
    assert manifest is not None
    assert store.url_for(manifest["run"]) == run
    assert (manifest["val_set"], manifest["images"]) == (made.path, IMAGES)
    assert shown == [f"{report.markdown}\n\n{report.url}"]


@pytest.mark.usefixtures("ray_local")
def test_a_second_time_makes_nothing_and_other_decoding_makes_another_report(run, data, store, shown):
    job = Evaluate(run=run, data=str(data))
    first = evaluated(job)
    before = {entry.key: entry.modified for entry in store.list()}
    assert evaluated(job) == first
    assert {entry.key: entry.modified for entry in store.list()} == before
    other = evaluated(job.model_copy(update={"options": OPTIONS}))
    assert other.url != first.url
    manifest = artifacts.read_manifest(store, other.url.removeprefix(f"{store.url}/").removesuffix("/report.html"))
    assert manifest is not None
    assert manifest["decode"]["min_stuff_area"] == 0.2


@pytest.mark.usefixtures("ray_local")
def test_the_best_weights_of_a_run_are_a_run(run, data, store, shown):
    path = run.removeprefix(f"{store.url}/")
    content = artifacts.read_manifest(store, path)
    assert content is not None
    best = artifacts.step_path("train", 1, {"best": 40}, [path])
    store.write(f"{best}/{WEIGHTS}", store.read(f"{path}/{WEIGHTS}"))
    write_metrics(store, best, read_metrics(store, path)[:40])
    artifacts.write_manifest(store, best, content | {"steps": 40, "best_of": path})
    whole, theirs = (evaluated(Evaluate(run=store.url_for(p), data=str(data))) for p in (path, best))
    assert whole.url != theirs.url
    assert json.dumps(whole.summary, sort_keys=True) == json.dumps(theirs.summary, sort_keys=True)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"run": "store/train"}, "expected the URL of what is finished, <storage>/train/<hash>"),
        ({"run": "{storage}/train/0123456789abcdef"}, "train/0123456789abcdef: no finished run"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"split": "test"}, "panoptic_test"),
        ({"options": {"train.seed": 1}}, "of a finished run only method.decode can be changed"),
        ({"run": "s3://b/train/0", "options": {}}, "AWS_"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(run, data, store, wrong, told, monkeypatch):
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    fields = {"run": run, "data": str(data)} | wrong
    fields["run"] = fields["run"].format(storage=store.url)
    with pytest.raises(TesseraError, match=told):
        check_job.fn(Evaluate(**fields))


def test_data_with_other_categories_are_refused_with_the_difference(run, data, tmp_path):
    listed = "annotations/panoptic_val2017.json"
    content = json.loads((data / listed).read_text())
    (tmp_path / "annotations").mkdir()
    for name in ("val2017", "annotations/panoptic_val2017"):
        (tmp_path / name).symlink_to(data / name)
    content["categories"][2]["name"] = "tram"
    (tmp_path / listed).write_text(json.dumps(content))
    with pytest.raises(
        TesseraError, match=r"val2017 lists other categories than .* knows: 4 'tram' \(thing\) against 4 'triangle'"
    ):
        check_job.fn(Evaluate(run=run, data=str(tmp_path)))


@pytest.mark.parametrize("wrong", [{"bogus": 1}, {"layout": "nope"}, {"bad_share": 2}, {"data": None}])
def test_a_wrong_parameter_is_refused(wrong):
    with pytest.raises((ValidationError, TesseraError), match=next(iter(wrong))):
        Evaluate(**({"run": "a", "data": "b"} | wrong))


SCRIPT = """
import asyncio, json, sys
from pathlib import Path
from infra.errors import TesseraError
from pipelines.evaluate_job import Evaluate
from pipelines.server import prefect_server

with prefect_server(Path("prefect")):
    from prefect.client.orchestration import get_client
    from prefect.logging.handlers import APILogHandler
    from pipelines.evaluate_flow import evaluate
    for job in sys.argv[1:]:
        try:
            print("RESULT", json.dumps(evaluate(Evaluate.model_validate_json(job))))
        except TesseraError as error:
            print("FAILED", error)
    async def artifacts():
        async with get_client() as client:
            return [a.data for a in await client.read_artifacts() if a.key == "pq-report"]
    print("ARTIFACTS", json.dumps(asyncio.run(artifacts())))
    APILogHandler().flush()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_flow_returns_its_report_and_refuses_before_ray(run, data, tmp_path):
    jobs = [{"run": run, "data": str(data), "split": "train2017"}, {"run": run, "data": "/nowhere"}]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_AUTH_MODE": "disabled"}
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-c", SCRIPT, *map(json.dumps, jobs)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0].isupper())
    result = json.loads(said["RESULT"])
    assert {"all", "things", "stuff"} <= result["pq"].keys()
    assert Path(result["report"]).is_file()
    assert said["FAILED"].startswith("/nowhere")
    (shown,) = json.loads(said["ARTIFACTS"])
    assert shown.endswith(result["report"])
