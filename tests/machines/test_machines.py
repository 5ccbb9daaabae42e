"""The whole story on three machines that share a host. Slow, and only for root."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machines.net import ROOT


def cannot() -> str:
    """Why this host cannot hold machines; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if any(shutil.which(tool) is None for tool in ("ip", "nsenter", "unshare", "tar")):
        return "iproute2 and util-linux are missing"
    probe = "ip netns add tessera-probe && ip netns del tessera-probe"
    tried = subprocess.run(probe, shell=True, capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"this host has no network namespaces: {tried.stderr.strip()}"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_train_coco_runs_across_machines_and_one_of_them_leaves_and_comes_back(tmp_path: Path):
    if reason := cannot():
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.machines", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in (tmp_path / "story.md").read_text()
    assert (tmp_path / "traffic.png").stat().st_size > 10_000
