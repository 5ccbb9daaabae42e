"""What disturbed runs did, as one picture."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.chaos.judge import Outcome
from tests.chaos.plan import STEPS
from tests.chaos.scene import Event, goes_on

_COLORS = ("#0b6e99", "#d95f02", "#3a8f4d", "#a23b72", "#8a6d00", "#5e4fa2", "#c0392b", "#138d90", "#7f5539")
_REFERENCE, _FAULT = "#c3c9cf", "#b00020"
_COLUMNS, _DASH, _MEAN = 5, 5, 10
_EXACT = 1e-9  # where the difference's axis ends: float32 cannot tell losses near 1 from each other


def picture(outcomes: Sequence[Outcome]) -> Figure:
    """Losses by step over the undisturbed run's, how far they are from it, and each run's way through time."""
    reference, disturbed = outcomes[0], outcomes[1:]
    lines = max(1, -(-len(disturbed) // _COLUMNS))
    figure = Figure(figsize=(15, 4.6 + 2.7 * lines), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=(4.6, 2.7 * lines), hspace=0.03, squeeze=False)
    upper, lower = parts.ravel()
    left, right = upper.subplots(1, 2, width_ratios=(3, 2))
    _losses(left, reference, disturbed)
    _differences(right, reference, disturbed)
    lower.suptitle(
        "steps over wall-clock time, in seconds from the first step; grey: undisturbed, red: fault",
        fontsize=11,
    )
    columns = min(_COLUMNS, max(1, len(disturbed)))
    panels = lower.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes in panels[len(disturbed) :]:
        axes.set_visible(False)
    for place, outcome in enumerate(disturbed):
        _way(panels[place], outcome, reference, _COLORS[place % len(_COLORS)])
        if place % columns == 0:
            panels[place].set_ylabel("step")
    return figure


def _losses(axes: Axes, reference: Outcome, disturbed: Sequence[Outcome]) -> None:
    """All runs lie on each other if all is well: each is dashed so that those below it show through."""
    axes.plot(*_curve(reference), color=_REFERENCE, linewidth=6, label=reference.case.title, solid_capstyle="round")
    for place, outcome in enumerate(disturbed):
        style = (place * _DASH, (_DASH, _DASH * max(0, len(disturbed) - 1)))
        color = _COLORS[place % len(_COLORS)]
        axes.plot(*_curve(outcome), color=color, linewidth=1.8, linestyle=style)
        axes.plot([], [], color=color, linewidth=1.8, label=outcome.case.title)  # whole, for the legend
        points = dict(zip(*_curve(outcome), strict=True))
        struck = [mark.step for mark in outcome.marks if mark.step in points]
        axes.plot(struck, [points[step] for step in struck], "x", color=color, markersize=8, markeredgewidth=2)
    axes.set(title=f"sum of losses, means of {_MEAN} steps, of each run's final metrics; x: fault", xlabel="step")
    axes.legend(frameon=False, fontsize=8.5)
    _plain(axes)
    axes.set_xlim(0, STEPS)


def _differences(axes: Axes, reference: Outcome, disturbed: Sequence[Outcome]) -> None:
    """The largest of any loss at each step; what is zero lies on the axis."""
    expected = {row.step: row.losses for row in reference.rows}
    for place, outcome in enumerate(disturbed):
        rows = [row for row in outcome.rows if row.step in expected]
        far = [max(abs(v - expected[row.step].get(n, 0.0)) for n, v in row.losses.items()) for row in rows]
        color, exact = _COLORS[place % len(_COLORS)], not any(far)
        if exact:
            far = [_EXACT] * len(far)
        label = None if exact else outcome.case.title
        axes.plot([row.step for row in rows], [max(d, _EXACT) for d in far], color=color, linewidth=1.2, label=label)
    alike = sum(1 for o in disturbed if o.rows and o.losses == 0 and o.weights == 0)
    axes.set(yscale="log", ylim=(_EXACT, 1e-1), xlabel="step", title="largest difference of a loss from undisturbed")
    for tolerance in sorted({outcome.case.tolerance for outcome in disturbed}):
        axes.axhline(tolerance, color=_FAULT, linewidth=1, linestyle=":")
        axes.text(STEPS * 0.99, tolerance * 1.15, f"allowed: {tolerance:g}", color=_FAULT, fontsize=8.5, ha="right")
    told = f"{alike} of {len(disturbed)} runs: every loss and weight the same"
    axes.text(0.02, 0.8, told, transform=axes.transAxes, fontsize=8.5)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    _plain(axes)
    axes.set_xlim(0, STEPS)


def _way(axes: Axes, outcome: Outcome, reference: Outcome, color: str) -> None:
    """One run's steps over time: it falls back where it went on from a checkpoint."""
    axes.plot(*_times(reference.events), color=_REFERENCE, linewidth=4, solid_capstyle="round")
    axes.plot(*_times(outcome.events), color=color, linewidth=1.8)
    start = next((event["time"] for event in outcome.events if "step" in event), 0.0)
    for mark in outcome.marks:
        axes.axvline(mark.time - start, color=_FAULT, linewidth=1.2, linestyle="--")
        if mark.end is not None:
            axes.axvspan(mark.time - start, mark.end - start, color=_FAULT, alpha=0.12, linewidth=0)
    axes.set_title(textwrap.fill(outcome.case.title, 34), fontsize=9)
    told = f"{outcome.redone} steps done twice,\nwent on after {outcome.away:.0f} s"
    if not outcome.case.restarts:
        told = f"no step done twice,\nlongest rest {outcome.away:.1f} s"
    axes.text(0.97, 0.05, told, transform=axes.transAxes, ha="right", fontsize=8.5, color="#444c54")
    _plain(axes)
    axes.set_ylim(0, STEPS * 1.05)
    axes.set_xlim(0, None)


def _curve(outcome: Outcome) -> tuple[list[int], list[float]]:
    """(steps, means over the steps up to each): single batches are noisy."""
    rows = outcome.rows
    ends = range(_MEAN, len(rows) + 1)
    sums = [sum(row.losses.values()) for row in rows]
    return [rows[end - 1].step for end in ends], [sum(sums[end - _MEAN : end]) / _MEAN for end in ends]


def _times(events: Sequence[Event]) -> tuple[list[float], list[float]]:
    """(seconds, steps) of what was heard, with a gap where the run went on from a checkpoint."""
    start = next((event["time"] for event in events if "step" in event), 0.0)
    times, steps = [], []
    for event in events:
        if "step" in event:
            times.append(event["time"] - start)
            steps.append(float(event["step"]))
        elif (step := goes_on(event)) is not None:
            times += [event["time"] - start] * 2
            steps += [float("nan"), float(step)]
    return times, steps


def _plain(axes: Axes) -> None:
    axes.title.set_fontsize(min(10.5, axes.title.get_fontsize()))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
