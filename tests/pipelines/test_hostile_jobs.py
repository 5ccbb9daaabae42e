"""Every field of every job with hostile values: refused in one sentence, or a job; never a traceback."""

import json
import math
import sys
from collections import Counter

import pytest
from pydantic import BaseModel, ValidationError

from infra.errors import TesseraError
from pipelines import embedded, predict
from pipelines.ablate_job import Ablate
from pipelines.doctor import Doctor
from pipelines.doctor import main as doctor_main
from pipelines.evaluate_job import Evaluate
from pipelines.fields import told
from pipelines.job import TrainCoco
from pipelines.predict_job import Predict
from pipelines.retrain_job import Retrain

JOBS: dict[type[BaseModel], dict] = {
    TrainCoco: {"recipe": "debug"},
    Ablate: {"recipe": "debug", "grid": {"method.eds_distance": [0]}},
    Retrain: {},
    Evaluate: {"run": "store/train/0", "data": "data"},
    Predict: {"run": "store/train/0", "input": "photos", "output": "out"},
    Doctor: {},
}
TEXTS = ["", " ", "\0", "a\nb", "a\r", "\x1b[31mred", "\u202egpj", "\ud800", "\udcff", "x" * 1001, "x" * 1_000_000]
TEXTS += ["../..", "/", "s3://", "s3://a\nb", "http://127.0.0.1:9/", "~nobody-of-this-name/x", "file:///\0", "é" * 300]
TEXTS += ["'; rm -rf /", "{}", "%s"]
NUMBERS = [0, -1, 1, 1.5, 1e308, -1e308, math.inf, -math.inf, math.nan, 1e-320, 2**63, 10**30, -(10**30)]
DEEP: object = 1
for _ in range(300):
    DEEP = [DEEP]
OTHERS = [None, True, [], {}, [1], [None], {"a": 1}, ["x"] * 2000, DEEP, {"": 0}, {"a.b.c": math.nan}]
NAMES = ["train.lr", "train.batch", "train", "method.decode", "\n", "a" * 5000, "__class__", "train.lr.x"]
NAMES += ["method.backbone.weights"]
SETTINGS = [math.nan, math.inf, -1, 10**30, "x\ny", None, {}, [[]], True, "__import__('os')", DEEP]
OPTIONS = [{name: value} for name in NAMES for value in SETTINGS]


def values(field: str) -> list:
    return [*TEXTS, *NUMBERS, *OTHERS, *(OPTIONS if field in ("options", "grid") else [])]


def outcome(kind: type[BaseModel], job: object, as_json: bool) -> str:
    """refused or valid; anything else is raised."""
    try:
        if as_json:
            kind.model_validate_json(json.dumps(job))
        else:
            kind.model_validate(job)
    except ValidationError as error:
        sentence = told(error)
    except TesseraError as error:
        sentence = str(error)
    else:
        return "valid"
    assert sentence
    assert sentence.isprintable(), sentence
    assert len(sentence) < 1100
    return "refused"


def test_each_field_with_each_hostile_value_is_refused_or_valid(capsys: pytest.CaptureFixture):
    counts = Counter[str]()
    for kind, plain in JOBS.items():
        assert outcome(kind, plain, as_json=True) == outcome(kind, plain, as_json=False) == "valid"
        for field in (*kind.model_fields, "no_field"):
            for value in values(field):
                counts[outcome(kind, plain | {field: value}, as_json=True)] += 1
                if kind not in (TrainCoco, Ablate):  # as Prefect reads them
                    counts[outcome(kind, plain | {field: value}, as_json=False)] += 1
    with capsys.disabled():
        sys.stdout.write(f"\njobs: tried {counts.total()}, {dict(counts)}, traceback 0\n")
    assert counts.total() >= 1800
    assert counts["refused"] > counts["valid"] > 100


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1, 1e308, True, "1", 2**70])
def test_numbers_that_cannot_be_are_refused(value: object):
    for kind in (TrainCoco, Retrain):
        assert outcome(kind, JOBS[kind] | {"epochs": value}, as_json=False) == "refused"
    assert outcome(Retrain, {"margin": value}, as_json=False) == ("valid" if value == 0 else "refused")


NO_JOBS = ["", "{", "null", "[]", "3", '"x"', "[" * 100_000, "\ud800", '{"epochs": NaN}', '{"x\\n": 1}']


@pytest.mark.parametrize("text", NO_JOBS, ids=lambda text: text[:9])
def test_what_is_no_job_is_one_line_on_every_way_in(text: str, capsys: pytest.CaptureFixture):
    ways = [lambda: embedded.main([text]), lambda: embedded.main(["ablate", text]), lambda: doctor_main([text])]
    for way in ways:
        assert way() == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert len(err) < 1200
    with pytest.raises(SystemExit) as caught:
        sys.exit(predict.main(["a", "b", "c", "--options", text]))
    assert caught.value.code == 2
