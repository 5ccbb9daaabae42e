"""Small failing inputs that others handed over: read where they lie, never copied into the project."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).resolve().parents[3] / "shared/data/cases"


def case(name: str) -> Path:
    """The folder of a case; skips the test where it is not there."""
    if not (CASES / name).exists():
        pytest.skip(f"{CASES / name} is not there")
    return CASES / name


def made(name: str, folder: Path) -> Path:
    """What a case's program makes of a folder."""
    subprocess.run([sys.executable, case(name) / "make.py", folder], check=True)
    return folder
