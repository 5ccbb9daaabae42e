"""The flow predict in a process of its own: a temporary Prefect server, a local Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.predict import main
from pipelines.predict_job import Predict
from tests.support.finished_run import finished_run
from tests.support.odd_images import encoded, readable, scene, write

SCRIPT = """
import asyncio, json, sys
from pathlib import Path
from infra.errors import TesseraError
from pipelines.predict_job import Predict
from pipelines.server import prefect_server

with prefect_server(Path("prefect")):
    from prefect.client.orchestration import get_client
    from prefect.logging.handlers import APILogHandler
    from pipelines.predict_flow import predict
    try:
        predict(Predict.model_validate_json(sys.argv[1]))
    except TesseraError as error:
        print("FAILED", error)
    async def artifacts():
        async with get_client() as client:
            return [a.data for a in await client.read_artifacts() if a.key == "predictions"]
    print("ARTIFACTS", json.dumps(asyncio.run(artifacts())))
    APILogHandler().flush()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_flow_does_what_the_command_left_and_tells_what_failed(tmp_path):
    run = finished_run(tmp_path, str(tmp_path / "store"))
    files = {f"{i:03d}.jpg": encoded(scene(20, 20 + i), "JPEG") for i in range(40)}
    source, output = write(tmp_path / "in", dict(list(files.items())[:5])), tmp_path / "out"
    assert main([run, str(source), str(output)]) == 0
    done = {path: path.stat().st_mtime_ns for path in (output / "predictions").iterdir()}
    write(source, {name: data for name, data in files.items() if not (source / name).exists()})
    write(source, {"text.jpg": b"no picture", "alpha.png": readable()["alpha.png"]})
    said = run_flow(tmp_path, {"run": run, "input": str(source), "output": str(output)})
    assert said["FAILED"] == f"1 images failed, the others are done: {output}/problems.json"
    (shown,) = json.loads(said["ARTIFACTS"])
    assert "### 41 images predicted, 36 of them now" in shown
    assert "- text.jpg: no image of a kind that is read here" in shown
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(json.loads((output / "predictions.json").read_text())["annotations"]) == 41
    assert len(list((output / "predictions").iterdir())) == 41


def run_flow(folder, job):
    """Lines of SCRIPT by their first word."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_AUTH_MODE": "disabled"}
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-c", SCRIPT, json.dumps(job)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0].isupper())


@pytest.mark.parametrize("wrong", [{"bogus": 1}, {"algorithm": "a/b"}, {"gpus": "perhaps"}, {"run": None}])
def test_a_wrong_parameter_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Predict(**({"run": "a", "input": "b", "output": "c"} | wrong))


def test_the_command_loads_neither_ray_nor_prefect():
    told = "import sys, pipelines.predict; print(sorted({'ray', 'prefect'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", told], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
