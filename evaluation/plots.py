"""Charts of reports, as SVG text."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from training.metrics import STARVED, Row

_BLUE, _ORANGE, _GREY = "#0b6e99", "#d95f02", "#5b6670"  # of the pages, and one that nobody mixes up with them
_PQ = {"pq": ("all", _BLUE), "pq_things": ("things", _ORANGE), "pq_stuff": ("stuff", _GREY)}
_FEW = 30  # points that are marked, so that one alone can be seen


def curves(rows: Sequence[Row]) -> str:
    """Losses, learning rate and pace over steps, and PQ where it was measured."""
    checked = any("pq" in row.figures for row in rows)
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    panels = figure.subplot_mosaic([["losses", "pq" if checked else "losses"], ["lr", "pace"]], sharex=True)
    _losses(panels["losses"], rows)
    if checked:
        _pq(panels["pq"], rows)
    _line(panels["lr"], [(row.step, row.lr) for row in rows], color=_BLUE)
    panels["lr"].set(title="learning rate of the heads", xlabel="step", ylim=(0, None))
    panels["lr"].ticklabel_format(axis="y", scilimits=(-2, 3))
    _pace(panels["pace"], rows)
    for axes in panels.values():
        axes.set_xlim(0, 1.02 * max((row.step for row in rows), default=1))
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def _line(axes: Axes, points: Sequence[tuple[int, float]], **style: Any) -> None:
    marker = "o" if len(points) < _FEW else None
    axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.2, marker=marker, markersize=3, **style)


def _losses(axes: Axes, rows: Sequence[Row]) -> None:
    names = sorted({name for row in rows for name in row.losses})
    for name in names:
        _line(axes, [(row.step, row.losses[name]) for row in rows if name in row.losses], label=name)
    axes.set_title("weighted losses")
    logs = [math.log10(value) for row in rows for value in row.losses.values() if 0 < value < math.inf]
    if logs:
        axes.set_yscale("log")
        wide = max(logs) - min(logs) > 2  # of powers of ten alone there would be too few
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if names:
        axes.legend(framealpha=0.8, edgecolor="none", fontsize=8, ncols=-(-len(names) // 4))


def _pq(axes: Axes, rows: Sequence[Row]) -> None:
    for name, (label, color) in _PQ.items():
        if points := [(row.step, row.figures[name]) for row in rows if name in row.figures]:
            _line(axes, points, label=label, color=color)
    axes.set(title="PQ on the fixed val images, %", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def _pace(axes: Axes, rows: Sequence[Row]) -> None:
    """images/s, and behind it the share of the time without data; dotted: from where on that is too much."""
    _line(axes, [(row.step, row.images_per_s) for row in rows], color=_BLUE)
    waits = axes.twinx()
    waits.fill_between(
        [row.step for row in rows], [100 * row.data_wait for row in rows], color=_ORANGE, alpha=0.25, linewidth=0
    )
    waits.axhline(100 * STARVED, color=_ORANGE, linewidth=1, linestyle=":")
    waits.set_ylim(0, 100)
    waits.set_ylabel("waiting for data, % of the time", color=_ORANGE)
    waits.spines["top"].set_visible(False)
    axes.set(title="pace", xlabel="step", ylim=(0, None))
    axes.set_ylabel("images/s", color=_BLUE)
    axes.set_zorder(waits.get_zorder() + 1)  # the line lies over the filled area
    axes.patch.set_visible(False)


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
            axes.plot([place for place, _ in known], [v for _, v in known], marker="o", label=literal(name))
        rows = next(iter(series.values()))
        axes.set(title=title, xlabel="square root of the area, px", ylim=(0, 100))
        axes.set_xticks(range(len(rows)), [f"{row['size']}\n({row['instances']})" for row in rows], fontsize=8)
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def literal(text: str) -> str:
    """Text as a chart is to show it: what stands between two dollars would be taken for a formula, and may be none."""
    return text.replace("$", r"\$")


def svg(figure: Figure) -> str:
    """The figure as an element to be put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
