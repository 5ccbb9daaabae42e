"""The table and the picture of all cases."""

import math
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.judge import Outcome
from tests.chaos.picture import picture
from tests.chaos.plan import STEPS

_HEAD = ("", "case", "steps done twice", "seconds to go on", "losses differ by", "weights differ by", "seconds in all")


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown, its columns aligned, and a line for each problem below."""
    rows = [_HEAD, *(_cells(outcome) for outcome in outcomes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    problems = [f"{outcome.case.name}: {problem}" for outcome in outcomes for problem in outcome.problems]
    return "\n".join([*lines, *(["", *problems] if problems else [])])


def write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """chaos.md and chaos.png."""
    folder.mkdir(parents=True, exist_ok=True)
    text, image = folder / "chaos.md", folder / "chaos.png"
    note = (
        f"{STEPS} steps each; every row of a run's metrics is compared with the undisturbed run's at the same step, "
        "and every final weight. Seconds to go on: from the fault to the first row after it; where the store was away, "
        "the longest time between two rows."
    )
    text.write_text(f"# Training under disturbances\n\n{table(outcomes)}\n\n{note}\n\n![curves]({image.name})\n")
    picture(outcomes).savefig(image, dpi=110)


def _cells(outcome: Outcome) -> tuple[str, ...]:
    case, disturbed = outcome.case, bool(outcome.marks)
    away = f"{outcome.away:.1f}" if disturbed and math.isfinite(outcome.away) else ""
    if not case.restarts and disturbed:
        away += f", went on ({outcome.during} steps meanwhile)" if outcome.during > _FEW else ", waited"
    return (
        "RED" if outcome.problems else "green",
        case.title,
        str(outcome.redone) if disturbed else "",
        away,
        f"{outcome.losses:.1g}" if disturbed else "",
        f"{outcome.weights:.1g}" if disturbed else "",
        f"{outcome.seconds:.0f}",
    )


_FEW = 50  # steps: what was in the readers' buffers
