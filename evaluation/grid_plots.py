"""Charts of a grid of runs, as SVG text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.plots import literal, svg

PANELS = ("PQ", "things", "things without classes", "stuff")
"""Figures that are drawn."""
_BLUE = "#0b6e99"
_CURVE = 3  # values of an option from which on a curve says more than the table
_WIDE = 20.0  # largest over smallest value from which on the axis is logarithmic
_BANDS = 4  # rows up to which the spread of seeds can be told apart
_COLORS = (_BLUE, "#d95f02", "#1b9e77", "#cc79a7", "#5b6670", "#b8860b")
_STROKES = (("-", "o"), ("--", "s"), (":", "^"))


@dataclass(frozen=True)
class Points:
    """One row of a grid."""

    title: str
    options: Mapping[str, Any]
    figures: Mapping[str, Sequence[float]]
    """By panel, the value of each seed."""
    sizes: Sequence[Sequence[Mapping[str, Any]]]
    """Of each seed, summary_of's `sizes`."""


def charts(rows: Sequence[Points]) -> list[str]:
    """All rows beside one another, IoU over size, and PQ over each option that has three numbers or more."""
    measured = any(row.figures[PANELS[0]] for row in rows)
    found = [_dots(rows)] if measured else []
    if any(size["iou"] is not None for row in rows for of_seed in row.sizes for size in of_seed):
        found.append(_sizes(rows))
    curved = [name for name in rows[0].options if measured and len(_numbers(name, rows)) >= _CURVE]
    return found + [_curve(name, rows) for name in curved]


def _dots(rows: Sequence[Points]) -> str:
    """A dot a seed; the bar is the mean."""
    figure = Figure(figsize=(11, 1.1 + 0.34 * len(rows)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        for place, row in enumerate(rows):
            values = row.figures[name]
            axes.plot(values, [place] * len(values), "o", color=_BLUE, alpha=0.5, markersize=5, markeredgewidth=0)
            if values:
                axes.plot([np.mean(values)], [place], "|", color=_BLUE, markersize=16, markeredgewidth=2)
        axes.set_title(name, fontsize=10)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _tidy(axes)
    axes = figure.axes[0]
    axes.set_yticks(range(len(rows)), [_short(row.title) for row in rows], fontsize=8)
    return svg(figure)


def _sizes(rows: Sequence[Points]) -> str:
    """Mean best IoU of true things over their size (G, figures 5 and 6), of the seeds' mean; a line a row."""
    figure = Figure(figsize=(11, max(4.2, 0.9 + 0.22 * len(rows))), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        if row.sizes:
            _size_line(axes, row, number, band=len(rows) <= _BANDS)
    sizes = next(row.sizes[0] for row in rows if row.sizes)  # the truth, and so the counts, is that of all rows
    there = [(place, size) for place, size in enumerate(sizes) if size["instances"]]
    ticks = [f"{size['size']}\n({size['instances']})" for _, size in there]
    axes.set_xticks([place for place, _ in there], ticks, fontsize=8)
    axes.set_title("mean IoU of things by size", fontsize=10)
    axes.set(xlabel="square root of the area, px (how many)", ylabel="%", ylim=(0, None))
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    _tidy(axes)
    return svg(figure)


def _size_line(axes: Axes, row: Points, number: int, band: bool) -> None:
    """Sizes without instances are left out. The band is from the least to the greatest seed."""
    iou_NS = np.array([[size["iou"] for size in of_seed] for of_seed in row.sizes], float)
    known = np.flatnonzero(~np.isnan(iou_NS).any(axis=0))
    color, (stroke, marker) = _COLORS[number % len(_COLORS)], _STROKES[number // len(_COLORS) % len(_STROKES)]
    style: dict[str, Any] = {"color": color, "linestyle": stroke, "marker": marker, "markersize": 4, "linewidth": 1.4}
    axes.plot(known, iou_NS[:, known].mean(axis=0), label=_short(row.title), **style)
    if band:
        low_S, high_S = iou_NS[:, known].min(axis=0), iou_NS[:, known].max(axis=0)
        axes.fill_between(known, low_S, high_S, color=color, alpha=0.15, linewidth=0)


def _curve(name: str, rows: Sequence[Points]) -> str:
    """PQ over one option, mean and standard deviation; a line for each combination of the others."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes, values = figure.subplots(), _numbers(name, rows)
    for label, members in _lines(name, rows).items():
        known = sorted((row.options[name], row.figures[PANELS[0]]) for row in members if row.figures[PANELS[0]])
        spreads = [float(np.std(found, ddof=1)) if len(found) > 1 else 0.0 for _, found in known]
        axes.errorbar(
            [x for x, _ in known],
            [float(np.mean(found)) for _, found in known],
            spreads,
            marker="o",
            capsize=3,
            linewidth=1.2,
            label=literal(label) or None,
        )
    if min(values) > 0 and max(values) / min(values) >= _WIDE:
        axes.set_xscale("log")
    axes.set(xlabel=name, ylabel="PQ, %")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)
    _tidy(axes)
    return svg(figure)


def _numbers(name: str, rows: Sequence[Points]) -> set[float]:
    values = [row.options[name] for row in rows]
    plain = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return {*values} if plain else set()


def _lines(name: str, rows: Sequence[Points]) -> dict[str, list[Points]]:
    """The rows by what else differs between them."""
    others = [o for o in rows[0].options if o != name and len({json.dumps(row.options[o]) for row in rows}) > 1]
    found: dict[str, list[Points]] = {}
    for row in rows:
        label = ", ".join(f"{o.rpartition('.')[2]}={json.dumps(row.options[o])}" for o in others)
        found.setdefault(label, []).append(row)
    return found


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _short(title: str) -> str:
    return literal(title if len(title) <= 40 else f"{title[:39]}…")
