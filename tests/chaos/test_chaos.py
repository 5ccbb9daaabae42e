"""Training survives a dead worker, a dead node and a minute without its store; `make chaos` does more to it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_disturbed_runs_end_as_the_undisturbed_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--out", str(tmp_path), "worker", "node", "store"]
    told = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert told.returncode == 0, told.stdout
    table = (tmp_path / "chaos.md").read_text()
    assert table.count("| green |") == 4, table  # with the undisturbed run
    assert (tmp_path / "chaos.png").stat().st_size > 10_000
