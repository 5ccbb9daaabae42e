"""Charts of reports, as SVG text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


def curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Losses over steps; history: rows of loop.Progress."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for name in sorted({name for row in history for name in row["losses"]}):
        rows = [row for row in history if name in row["losses"]]
        axes.plot([row["step"] for row in rows], [row["losses"][name] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="weighted loss", yscale="log")
    axes.grid(alpha=0.3)
    if history:
        axes.legend(frameon=False)
    return _svg(figure)


def sizes(series: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Mean best IoU of true instances, and PQ of things, by size (G, figures 5 and 6).

    series: rows of summary_of's `sizes` by the name of the run; sizes without instances are left out.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, title, value in zip(
        figure.subplots(1, 2, sharey=True),
        ("mean IoU of instances", "PQ of things"),
        (lambda row: row["iou"], lambda row: row["pq"]["things"]),
        strict=True,
    ):
        for name, rows in series.items():
            known = [(place, value(row)) for place, row in enumerate(rows) if value(row) is not None]
            axes.plot([place for place, _ in known], [v for _, v in known], marker="o", label=name)
        rows = next(iter(series.values()))
        axes.set(title=title, xlabel="square root of the area, px", ylim=(0, 100))
        axes.set_xticks(range(len(rows)), [f"{row['size']}\n({row['instances']})" for row in rows], fontsize=8)
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
