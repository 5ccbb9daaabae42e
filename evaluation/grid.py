"""A grid of runs as one table: means and differences over seeds, charts, a parquet file, runs beside one another."""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import compare, facts, grid_plots
from evaluation.compare import Evaluated, read_evaluation
from evaluation.grid_stats import Difference, Pair, Stated, paired, ranked, summed_up
from infra import artifacts, page
from infra.page import percent
from infra.store import Store
from infra.text import SENTENCE, markdown
from infra.version import code_version

SCHEMA_VERSION = 2
"""Part of every grid's path: raise it when the same trials would be written down differently."""

FIGURES = {
    "PQ": ("pq", "all"),
    "things": ("pq", "things"),
    "things without classes": ("agnostic", "pq"),
    "stuff": ("pq", "stuff"),
    "SQ": ("sq", "all"),
    "RQ": ("rq", "all"),
    "boundary": ("boundary", "all"),
}
"""Column -> where a summary has it."""
_COMPARED = 8
"""Trials up to which the comparison shows all of them, not one a row."""


@dataclass(frozen=True)
class Outcome:
    """What became of one trial: one row of a grid with one seed."""

    row: str
    """The row's title."""
    seed: int
    options: dict[str, Any]
    """What the trial has of every option that some row changes."""
    published: float | None
    """PQ that a paper states for the row."""
    run: str
    evaluation: str
    """Their folders under the store's root."""
    error: str | None
    """Why it has failed; None where both are finished."""


@dataclass(frozen=True)
class Measured:
    """An outcome with what was measured."""

    outcome: Outcome
    evaluated: Evaluated | None
    """None if it has failed."""

    def figure(self, name: str) -> float | None:
        """One of FIGURES in percent; None where it was not measured."""
        measure, group = FIGURES[name]
        return None if self.evaluated is None else self.evaluated.summary[measure][group]

    @property
    def worker_hours(self) -> float | None:
        """Of the training."""
        return None if self.evaluated is None else self.evaluated.worker_hours


@dataclass(frozen=True)
class Mean:
    """A figure over seeds."""

    value: float
    spread: float | None
    """Standard deviation (n - 1 in the denominator); None of one alone."""

    def __str__(self) -> str:
        return percent(self.value) if self.spread is None else f"{self.value:.1f} ± {self.spread:.1f}"


@dataclass(frozen=True)
class Line:
    """One row of the grid with all of its seeds."""

    title: str
    trials: tuple[Measured, ...]

    @property
    def finished(self) -> tuple[Measured, ...]:
        """Those that have not failed."""
        return tuple(trial for trial in self.trials if trial.evaluated is not None)

    def by_seed(self, figure: str) -> dict[int, float]:
        """Of the finished trials; empty where one of them has no such figure."""
        found = {trial.outcome.seed: trial.figure(figure) for trial in self.finished}
        known = {seed: value for seed, value in found.items() if value is not None}
        return known if len(known) == len(found) else {}

    def over_seeds(self, figure: str) -> Mean | None:
        """Mean and spread over the finished trials; None where there are none, or one has no such figure."""
        found = [*self.by_seed(figure).values()]
        if not found:
            return None
        return Mean(float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else None)

    @property
    def worker_hours(self) -> float:
        """Of all finished trials."""
        return sum(trial.worker_hours or 0.0 for trial in self.trials)

    @property
    def published(self) -> float | None:
        """See Outcome."""
        return self.trials[0].outcome.published

    @property
    def options(self) -> dict[str, Any]:
        """See Outcome."""
        return self.trials[0].outcome.options


@dataclass(frozen=True)
class Written:
    """A grid on the store."""

    url: str
    """Of report.html."""
    markdown: str
    lines: tuple[Line, ...]


def write_grid(store: Store, title: str, outcomes: Sequence[Outcome]) -> Written:
    """Write table.parquet, report.html, report.md, compare.html (of two trials or more) and the manifest.

    The folder is `ablate/<hash>` of the trials and of which ones have failed, so a grid that is tried again after a
    failure has another. Reads the evaluations; TesseraError as read_evaluation and compare raise it.
    """
    path = _path(title, outcomes)
    lines = read_lines(store, outcomes)
    compared = _compared(lines)
    markdown = to_markdown(title, lines)
    more = ["compare.html"] if len(compared) > 1 else []
    if artifacts.read_manifest(store, path) is None or artifacts.lost(store, path, *more):
        store.write(f"{path}/table.parquet", to_parquet(lines))
        store.write(f"{path}/report.md", markdown.encode())
        if len(compared) > 1:
            store.write(f"{path}/compare.html", compare.to_html(compare.compare(compared)).encode())
        store.write(f"{path}/report.html", to_html(title, lines, with_comparison=len(compared) > 1).encode())
        done = [outcome for outcome in outcomes if outcome.error is None]
        content = {
            "title": title,
            "trials": [{"row": one.row, "seed": one.seed, "failed": one.error is not None} for one in outcomes],
            "runs": sorted({one.run for one in done}),
            "evaluations": sorted({one.evaluation for one in done}),
            "code": code_version(),
        }
        artifacts.write_manifest(store, path, content)
    return Written(store.url_for(f"{path}/report.html"), markdown, lines)


def _path(title: str, outcomes: Sequence[Outcome]) -> str:
    facts = [(one.row, one.seed, one.options, one.published, one.run, one.error) for one in outcomes]
    return artifacts.step_path("ablate", SCHEMA_VERSION, [title, facts], [one.evaluation for one in outcomes])


def read_lines(store: Store, outcomes: Sequence[Outcome]) -> tuple[Line, ...]:
    """The rows in the order of their first trials, with their evaluations."""
    trials = [
        Measured(one, read_evaluation(store.url_for(one.evaluation)) if one.error is None else None) for one in outcomes
    ]
    titles = dict.fromkeys(one.row for one in outcomes)
    return tuple(Line(title, tuple(t for t in trials if t.outcome.row == title)) for title in titles)


def _compared(lines: Sequence[Line]) -> list[Evaluated]:
    """All finished trials where they are few, else the first of each row; named by their rows."""
    few = sum(len(line.finished) for line in lines) <= _COMPARED
    chosen = [(line, trial) for line in lines for trial in line.finished[: None if few else 1]]
    return [dataclasses.replace(t.evaluated, name=line.title) for line, t in chosen if t.evaluated is not None]


def to_parquet(lines: Sequence[Line]) -> bytes:
    """One row a trial: its options, figures in percent, worker-hours, where run and evaluation lie, the error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    trials = [trial for line in lines for trial in line.trials]
    options = {name: _column([t.outcome.options[name] for t in trials]) for name in trials[0].outcome.options}
    columns = {
        "row": pa.array([t.outcome.row for t in trials]),
        "seed": pa.array([t.outcome.seed for t in trials]),
        **{name: pa.array(values) for name, values in options.items()},
        **{name: pa.array([t.figure(name) for t in trials], pa.float64()) for name in FIGURES},
        "worker-hours": pa.array([t.worker_hours for t in trials], pa.float64()),
        "published PQ": pa.array([t.outcome.published for t in trials], pa.float64()),
        "run": pa.array([t.outcome.run for t in trials]),
        "evaluation": pa.array([t.outcome.evaluation for t in trials]),
        "error": pa.array([t.outcome.error for t in trials], pa.string()),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, write_page_checksum=True)
    return buffer.getvalue()


def _column(values: Sequence[Any]) -> list[Any]:
    """As they are where they are of one type, else as JSON: an option may be a number here and a group there."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    return [*values] if len(kinds) <= 1 and kinds <= {bool, int, float, str} else [json.dumps(v) for v in values]


def difference(line: Line, first: Line) -> Difference | None:
    """PQ of a row minus that of the first one; None for that one, and where they have no seed in common."""
    return None if line is first else paired(line.by_seed("PQ"), first.by_seed("PQ"))


def published_difference(line: Line, first: Line) -> float | None:
    """The same of the published figures."""
    known = line.published is not None and first.published is not None and line is not first
    return (line.published or 0.0) - (first.published or 0.0) if known else None


def papers_order(lines: Sequence[Line]) -> list[Pair]:
    """The pairs of rows that the published figures rank."""
    known = [(line, line.published) for line in lines]
    return ranked([Stated(line.title, pq, line.by_seed("PQ")) for line, pq in known if pq is not None])


def to_markdown(title: str, lines: Sequence[Line]) -> str:
    """The table, the paper's order if there is one, and the trials that failed."""
    published = any(line.published is not None for line in lines)
    first, *others = FIGURES
    heads = ["", "runs", first, "to the first", *others, "worker-hours", *(["paper's PQ"] if published else [])]
    rows = []
    for line in lines:
        pq, *figures = [str(line.over_seeds(name) or "-") for name in FIGURES]
        cells = [markdown(line.title), str(len(line.finished)), pq, str(difference(line, lines[0]) or "-"), *figures]
        rows.append([*cells, f"{line.worker_hours:.2f}", *([percent(line.published)] if published else [])])
    parts = [f"### {markdown(title)}", _table(heads, rows), *_order_told(papers_order(lines))]
    parts += [
        f"- **{markdown(failed.row)}, seed {failed.seed}** failed: {markdown(failed.error or '', SENTENCE)}"
        for failed in failures(lines)
    ]
    return "\n\n".join(parts)


def _order_told(pairs: Sequence[Pair]) -> list[str]:
    heads = ["higher in the paper", "lower", "the paper", "ours", "verdict"]
    rows = [
        [markdown(p.higher), markdown(p.lower), f"{p.published:+.1f}", str(p.ours or "-"), p.verdict] for p in pairs
    ]
    return ["#### The paper's order", summed_up(pairs), _table(heads, rows)] if pairs else []


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells to the right, those of the first column to the left."""
    listed = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}", *listed])


def failures(lines: Sequence[Line]) -> list[Outcome]:
    """The trials that have failed."""
    return [trial.outcome for line in lines for trial in line.trials if trial.outcome.error is not None]


def to_html(title: str, lines: Sequence[Line], with_comparison: bool) -> str:
    """One file that opens from disk without a network; its links lead to what lies beside it on the store."""
    hours = sum(line.worker_hours for line in lines)
    trials = [trial for line in lines for trial in line.trials]
    pairs = papers_order(lines)
    done = [t.evaluated for t in trials if t.evaluated is not None]
    head = facts.evaluated_facts(done[0].val_set, len(done[0].table.image_ids)) if done else {}
    head |= {
        "trials": f"{len(trials)}, {len(failures(lines))} failed, {hours:.2f} worker-hours",
        "written": f"{page.date()}, by code {code_version()}",
    }
    return page.page(
        Path(__file__).with_name("grid.html"),
        title,
        head,
        lines=[(line, difference(line, lines[0]), published_difference(line, lines[0])) for line in lines],
        figures=[*FIGURES],
        published=any(line.published is not None for line in lines),
        pairs=pairs,
        summed_up=summed_up(pairs) if pairs else "",
        failures=failures(lines),
        charts=grid_plots.charts(points_of(lines)),
        trials=trials,
        options=[*trials[0].outcome.options],
        with_comparison=with_comparison,
    )


def points_of(lines: Sequence[Line]) -> list[grid_plots.Points]:
    """What the charts show of each row."""
    return [
        grid_plots.Points(
            line.title,
            line.options,
            {name: [v for t in line.finished if (v := t.figure(name)) is not None] for name in grid_plots.PANELS},
            [t.evaluated.summary["sizes"] for t in line.trials if t.evaluated is not None],
        )
        for line in lines
    ]
