"""Commands in the documentation ask for what there is."""

import re
from pathlib import Path

import pytest

from pipelines.ablate_job import Ablate
from pipelines.doctor import Doctor
from pipelines.evaluate_job import Evaluate
from pipelines.job import TrainCoco
from pipelines.predict_job import Predict
from pipelines.retrain_job import Retrain

ROOT = Path(__file__).parents[1]
JOBS = {"ablate": Ablate, "doctor": Doctor, "evaluate": Evaluate, "predict": Predict, "retrain": Retrain}
JOBS |= {"train-coco": TrainCoco, "": TrainCoco}
COMMANDS = [
    pytest.param(flow, job, id=f"{page.name} {flow or 'train-coco'}")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for pattern in (r"deployment run [\w-]+/([\w-]+) .*?job='(\{.*?\})'", r"pipelines\.embedded ?([\w-]*) '(\{.*?\})'")
    for flow, job in re.findall(pattern, page.read_text())
]


@pytest.mark.parametrize(("flow", "job"), COMMANDS)
def test_a_documented_job_is_one(flow: str, job: str):
    JOBS[flow].model_validate_json(job)


def test_documented_jobs_are_found():
    assert {param.values[0] for param in COMMANDS} >= {"ablate", "evaluate", "predict", "train-coco", ""}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_of_a_page_lead_somewhere(page: str):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    missing = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert not missing
