"""Which code this is."""

import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_COMMIT = Path(__file__).with_name("COMMIT")  # `git archive` and the Dockerfile write the commit there
_UNWRITTEN = ("", "$Format:%h$")
SHIPPED = "_TESSERA_CODE"
"""Variable with the version of code that came from elsewhere, without its repository."""


@cache
def code_version() -> str:
    """The package's version, and its commit where one can be told; "+" marks uncommitted changes.

    Images and archives have no repository: their commit stands in a file. On a node of a Ray cluster it is the
    driver's.
    """
    if SHIPPED in os.environ:
        return os.environ[SHIPPED]
    try:
        named = version("tessera-panoptic")
    except PackageNotFoundError:
        named = "not installed"
    found = _COMMIT.read_text().strip() if _COMMIT.exists() else ""
    if found in _UNWRITTEN:
        found = _described(Path(__file__).parents[1])
    return f"{named} ({found})" if found else named


def _described(folder: Path) -> str:
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
