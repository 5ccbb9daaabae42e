"""Which code this is."""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def code_version() -> str:
    """The package's version, and the commit where the code lies in its repository; "+" marks uncommitted changes."""
    try:
        named = version("tessera-panoptic")
    except PackageNotFoundError:
        named = "not installed"
    git = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return named
    return f"{named} ({found})"
