"""Performance claims as lines: `bar <name> <value> <at-least|at-most> <target> <ok|short>`."""

import sys
from typing import Literal

_short: list[str] = []


def bar(name: str, value: float, direction: Literal["at-least", "at-most"], target: float) -> None:
    """Print one figure beside its target and remember whether it falls short."""
    reached = value >= target if direction == "at-least" else value <= target
    if not reached:
        _short.append(name)
    print(f"bar {name} {value:.3g} {direction} {target:g} {'ok' if reached else 'short'}", flush=True)


def finish() -> None:
    """End the program: exit status 1 if any bar was short."""
    sys.exit(1 if _short else 0)
