"""The whole flow in a process of its own, on a real S3 server."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from panopticapi.evaluation import PQStat, pq_compute_single_core

from infra.store import open_store
from preprocessing.synthetic import SyntheticConfig, write_set
from training.metrics import read_metrics

pytestmark = pytest.mark.timeout(1300)
SET = SyntheticConfig(train=24, val=10, size=(48, 48), seed=7)


def run_flow(folder, job, **popen):
    """Start `python -m pipelines.embedded JOB` in a folder of its own."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "pipelines.embedded", json.dumps(job)]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen
    )


def last_line(folder, job) -> str:
    """What the flow ends with."""
    run = run_flow(folder, job)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    return output.strip().splitlines()[-1]


@pytest.fixture
def coco(tmp_path):
    return write_set(tmp_path, SET)


def test_from_coco_files_to_a_pq_report_that_the_panoptic_api_confirms(coco, tmp_path, s3_env):
    storage = f"s3://{s3_env.bucket}/{tmp_path.name}"
    checks = {"upkeep.check_epochs": 2, "upkeep.check_images": 4}
    job = {"data": str(coco), "storage": storage, "recipe": "debug", "workers": 1, "options": checks}
    last = last_line(tmp_path, job)
    assert last.startswith("PQ ")
    assert last.endswith("report.html")
    store = open_store(storage)
    (report_key,) = [e.key for e in store.list("evaluate/") if e.key.endswith("report.json")]
    report, folder = json.loads(store.read(report_key)), report_key.rsplit("/", 1)[0]
    assert {"pq", "sq", "rq"} <= report.keys()
    assert all({"all", "things", "stuff", "per_category"} <= report[m].keys() for m in ("pq", "sq", "rq"))
    check_against_panoptic_api(report, store, folder, coco, tmp_path / "predictions")
    html = store.read(f"{folder}/report.html").decode()
    titles = ("image", "predicted semantic", "decoded centroids", "predicted panoptic", "ground truth")
    assert all(f"<figcaption>{title}</figcaption>" in html for title in titles)
    check_what_training_left(store, tmp_path)


@pytest.mark.slow
def test_the_same_job_again_finds_all_done(coco, tmp_path, s3_env):
    storage = f"s3://{s3_env.bucket}/{tmp_path.name}"
    job = {"data": str(coco), "storage": storage, "recipe": "debug", "workers": 1}
    last = last_line(tmp_path, job)
    before = {e.key: e.modified for e in open_store(storage).list()}
    assert last_line(tmp_path, job) == last
    assert {e.key: e.modified for e in open_store(storage).list()} == before


def check_what_training_left(store, home):
    """36 steps in 6 epochs: rows of all of them, PQ after every second epoch, the bar at its end."""
    keys = [entry.key for entry in store.list("train/")]
    found = {key.removesuffix("/manifest.json"): json.loads(store.read(key)) for key in keys if "manifest" in key}
    ((run, manifest),) = [(folder, content) for folder, content in found.items() if "best_of" not in content]
    rows = read_metrics(store, run)
    assert [row.step for row in rows] == [*range(1, 37)]
    assert [row.step for row in rows if row.figures] == [12, 24, 36]
    best = manifest["best"]
    assert best["pq"] == max(row.figures["pq"] for row in rows if row.figures)
    assert found[best["run"]]["steps"] == best["step"]
    assert f"{best['run']}/model.safetensors" in keys
    kinds = [key.split("/")[3] for key in keys if key.startswith(f"{run}/tensorboard/")]
    assert sorted(kinds) == ["panels"] * 3 + ["scalars"]
    with sqlite3.connect(home / ".tessera/prefect/prefect.db") as database:
        artifacts = dict(database.execute("select key, data from artifact"))
    assert float(artifacts["training"]) == 100
    assert {"training", "pq-report"} <= artifacts.keys()


def check_against_panoptic_api(report, store, folder, coco, predictions):
    """Score predictions.json and its PNGs with the reference implementation."""
    predictions.mkdir()
    listed = json.loads(store.read(f"{folder}/predictions.json"))["annotations"]
    for entry in listed:
        (predictions / entry["file_name"]).write_bytes(store.read(f"{folder}/predictions/{entry['file_name']}"))
    masks = coco / "annotations" / "panoptic_val2017"
    truth = json.loads(masks.with_suffix(".json").read_text())
    categories = {c["id"]: c for c in truth["categories"]}
    by_image = {entry["image_id"]: entry for entry in listed}
    pairs = [(entry, by_image[entry["image_id"]]) for entry in truth["annotations"]]
    stat: PQStat = pq_compute_single_core(0, pairs, str(masks), str(predictions), categories)
    for group, is_thing in (("all", None), ("things", True), ("stuff", False)):
        average, per_class = stat.pq_average(categories, isthing=is_thing)
        for metric in ("pq", "sq", "rq"):
            assert report[metric][group] == pytest.approx(100 * average[metric], abs=1e-9)
            for category_id, values in per_class.items():
                ours = report[metric]["per_category"][categories[category_id]["name"]]
                assert (ours or 0.0) == pytest.approx(100 * values[metric], abs=1e-9)


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ({"bogus": 1}, "bogus"),
        ({"recipe": "debug", "workers": 5}, "5 training workers cannot share a batch of 4 images exactly"),
        ({"storage": "s3://tessera-absent/x", "recipe": "debug"}, "tessera-absent"),
    ],
)
def test_a_bad_job_ends_with_one_clear_error(tmp_path, s3_env, job, told):
    run = run_flow(tmp_path, job)
    output, _ = run.communicate(timeout=600)
    assert run.returncode != 0
    assert told in output.strip().splitlines()[-1]
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("job", "told"),
    [({"method": "nope"}, "unknown method 'nope'"), ({"recipe": "nope"}, "unknown recipe 'nope' of generalist")],
)
def test_a_method_or_recipe_that_there_is_not_is_refused_before_anything_starts(tmp_path, job, told):
    run = run_flow(tmp_path, job)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 1
    (line,) = output.splitlines()
    assert line.startswith(f"error: {told}")
    assert not [*tmp_path.iterdir()]  # neither server nor Ray, data or store


def test_wrong_credentials_are_named(tmp_path, s3_env, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    run = run_flow(tmp_path, {"storage": f"s3://{s3_env.bucket}/x", "recipe": "debug"})
    output, _ = run.communicate(timeout=600)
    assert run.returncode != 0
    assert "AWS_SECRET_ACCESS_KEY" in output.strip().splitlines()[-1]
    assert "Traceback" not in output


def test_splits_with_different_categories_are_refused_before_training(coco, tmp_path):
    listed = coco / "annotations" / "panoptic_val2017.json"
    content = json.loads(listed.read_text())
    content["categories"][1]["name"] = "crate"
    listed.write_text(json.dumps(content))
    run = run_flow(tmp_path, {"data": str(coco), "recipe": "debug"})
    output, _ = run.communicate(timeout=600)
    assert run.returncode != 0
    assert "list different categories" in output.strip().splitlines()[-1]
    assert "Traceback" not in output
    assert not (tmp_path / ".tessera/store/train").exists()
