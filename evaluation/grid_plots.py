"""Charts of a grid of runs, as SVG text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.plots import svg

PANELS = ("PQ", "things", "stuff")
"""Figures that are drawn."""
_BLUE = "#0b6e99"
_CURVE = 3  # values of an option from which on a curve says more than the table
_WIDE = 20.0  # largest over smallest value from which on the axis is logarithmic


@dataclass(frozen=True)
class Points:
    """One row of a grid."""

    title: str
    options: Mapping[str, Any]
    figures: Mapping[str, Sequence[float]]
    """By panel, the value of each seed."""


def charts(rows: Sequence[Points]) -> list[str]:
    """All rows beside one another, and PQ over each option that has three numbers or more."""
    found = [_dots(rows)] if any(row.figures[PANELS[0]] for row in rows) else []
    return found + [_curve(name, rows) for name in rows[0].options if len(_numbers(name, rows)) >= _CURVE]


def _dots(rows: Sequence[Points]) -> str:
    """A dot a seed; the bar is the mean."""
    figure = Figure(figsize=(9, 1.1 + 0.34 * len(rows)), layout="constrained")
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
            label=label or None,
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
    return title if len(title) <= 40 else f"{title[:39]}…"
