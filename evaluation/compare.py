"""`python -m evaluation.compare EVALUATION EVALUATION ...`: runs beside one another, what differs and how surely.

EVALUATION is the URL of an evaluation's folder, `<storage>/evaluate/<hash>`; the first one is what others are compared
with. All are of the same images.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from evaluation import facts, plots
from evaluation.bootstrap import Interval, Table, difference_intervals, image_pq
from evaluation.coco_format import Annotation, read_map
from evaluation.evaluate import load_samples, read_images
from evaluation.report import GROUPS, Finished, category_rows
from evaluation.summary import fits, read_summary
from infra import artifacts, page, records
from infra.errors import TesseraError
from infra.page import percent
from infra.store import Store, open_store
from infra.version import code_version
from preprocessing.panoptic_map import PanopticMap
from preprocessing.pictures import Panel, overlay_panel
from preprocessing.sample import Sample, decode_image
from preprocessing.shards import ShardSet, read_set
from training.metrics import read_metrics, worker_hours
from training.recipes import PUBLISHED
from training.run import RunFacts

_DRAWN = 6
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluated:
    """One finished evaluation."""

    name: str
    """Of the recipe."""
    store: Store
    path: str
    summary: dict[str, Any]
    table: Table
    val_set: ShardSet
    options: dict[str, Any]
    """All of the recipe's options by dotted name."""
    worker_hours: float
    """Of the training: metrics.worker_hours."""
    facts: dict[str, str]
    """Of the training, and when it was evaluated: for its page."""


def read_evaluation(url: str) -> Evaluated:
    """From the store alone. TesseraError if there is no finished evaluation or its run or data set is gone."""
    root, path = artifacts.split_url(url, "evaluate")
    store = open_store(root)
    manifest = _manifest(store, path, Finished)
    run, val_set = _manifest(store, manifest.run, RunFacts), read_set(store, manifest.val_set)
    if val_set is None:
        raise TesseraError(f"{url}: its data set {manifest.val_set} has no manifest any more")
    by_image = read_images(store, path, val_set.labels)
    table = Table.of(by_image)
    hours = worker_hours(read_metrics(store, manifest.run), run.batch(store.url_for(manifest.run)))
    summary, options = read_summary(store, path), _flat(run.recipe)
    if not fits(summary, by_image, val_set.labels):
        raise TesseraError(f"{url}: its report.json has other figures than follow from its images.json")
    options |= _flat(manifest.decode, "method.decode.")  # another than the run's, where it was evaluated again
    told = facts.trained_facts(store, manifest.run) | {"evaluated": f"{facts.written(store, path)}, {path}"}
    return Evaluated(manifest.recipe, store, path, summary, table, val_set, options, hours, told)


def _manifest(store: Store, path: str, kind: type[T]) -> T:
    content = artifacts.read_manifest(store, path, kind)
    if content is None:
        raise TesseraError(f"{store.url_for(path)}: not finished, or not there")
    return content


def _flat(options: dict[str, Any], place: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= _flat(value, f"{place}{name}.") if isinstance(value, dict) else {f"{place}{name}": value}
    return found


@dataclass(frozen=True)
class Row:
    """One run in the table."""

    title: str
    evaluated: Evaluated
    differs: dict[str, Any]
    """Options that not all of the runs have alike."""
    differences: dict[str, tuple[float, Interval] | None]
    """By group: PQ minus that of the first run, and its interval; None where either has none."""
    published: float | None


@dataclass(frozen=True)
class Repeated:
    """Runs that differ in their seeds alone."""

    name: str
    """Of their recipe."""
    runs: tuple[Row, ...]

    def over_seeds(self, measure: str, group: str) -> tuple[float, float] | None:
        """Mean and standard deviation over the runs of a figure of the summary; None where a run has none."""
        found = [run.evaluated.summary[measure][group] for run in self.runs]
        return None if None in found else (float(np.mean(found)), float(np.std(found, ddof=1)))


def repeated(rows: Sequence[Row]) -> list[Repeated]:
    """The runs by all of their options but name and seeds, where at least two are alike."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        own = {n: v for n, v in row.evaluated.options.items() if n != "name" and not n.endswith(".seed")}
        alike.setdefault(json.dumps(own, sort_keys=True), []).append(row)
    return [Repeated(found[0].evaluated.name, tuple(found)) for found in alike.values() if len(found) > 1]


def compare(found: Sequence[Evaluated]) -> list[Row]:
    """TesseraError unless all are of the same images and categories."""
    first = found[0]
    for other in found[1:]:
        if other.table.image_ids != first.table.image_ids or other.val_set.labels != first.val_set.labels:
            raise TesseraError(f"{other.store.url_for(other.path)}: of other images or categories than the first one")
    names = sorted({name for one in found for name in one.options})
    varying = [n for n in names if any(one.options.get(n) != first.options.get(n) for one in found)]
    rows = []
    for number, one in enumerate(found, start=1):
        differs = {name: one.options[name] for name in varying if name in one.options and name != "name"}
        title = f"{number} {one.name}"
        rows.append(Row(title, one, differs, _differences(first, one), PUBLISHED.get(one.name)))
    return rows


def _differences(first: Evaluated, other: Evaluated) -> dict[str, tuple[float, Interval] | None]:
    ends = difference_intervals(first.table, other.table, first.val_set.labels)
    found: dict[str, tuple[float, Interval] | None] = {}
    for group in GROUPS:
        before, after, interval = first.summary["pq"][group], other.summary["pq"][group], ends[group]
        known = before is not None and after is not None and interval is not None and other is not first
        found[group] = (after - before, interval) if known and interval else None
    return found


def disputed(rows: Sequence[Row]) -> list[int]:
    """Ids of the images whose PQ differs most between the runs, the most disputed first."""
    pq_RI = np.stack([np.nan_to_num(image_pq(row.evaluated.table)) for row in rows])
    spread_I = pq_RI.max(axis=0) - pq_RI.min(axis=0)
    ids = rows[0].evaluated.table.image_ids
    return [ids[i] for i in np.argsort(-spread_I, kind="stable")[:_DRAWN]]


def draw(rows: Sequence[Row], image_ids: Sequence[int]) -> dict[int, Panel]:
    """Pictures of those images: image, truth, and what each run predicted."""
    first = rows[0].evaluated
    samples: dict[int, Sample] = {}
    for shard in first.val_set.shards:
        if set(image_ids).intersection(shard.image_ids):
            batches = load_samples(first.store.url, shard)
            samples |= {s.image_id: s for batch in batches for s in batch if s.image_id in image_ids}
    predicted = [_predictions(row.evaluated, image_ids) for row in rows]
    return {i: _pictures(rows, samples[i], [of_run[i] for of_run in predicted]) for i in image_ids}


@dataclass(frozen=True)
class _Predictions:
    annotations: tuple[Annotation, ...]


def _predictions(one: Evaluated, image_ids: Sequence[int]) -> dict[int, PanopticMap]:
    listed = records.read(one.store, f"{one.path}/predictions.json", _Predictions).annotations
    entries = {entry["image_id"]: entry for entry in listed if entry["image_id"] in image_ids}
    if lost := {*image_ids} - entries.keys():
        raise TesseraError(f"{one.store.url_for(one.path)}/predictions.json: image {min(lost)} is not in it")
    pngs = {i: one.store.read(f"{one.path}/predictions/{entry['file_name']}") for i, entry in entries.items()}
    return {i: read_map(pngs[i], entry, one.val_set.labels) for i, entry in entries.items()}


def _pictures(rows: Sequence[Row], sample: Sample, predictions: Sequence[PanopticMap]) -> Panel:
    maps = {"ground truth": sample.panoptic}
    for row, panoptic in zip(rows, predictions, strict=True):
        maps[f"{row.title}, PQ {percent(row.evaluated.summary['images'][str(sample.image_id)])}"] = panoptic
    return Panel(sample.file_name, overlay_panel(decode_image(sample.image), maps, rows[0].evaluated.val_set.labels))


def to_html(rows: Sequence[Row]) -> str:
    """One file that opens from disk without a network."""
    labels = rows[0].evaluated.val_set.labels
    named = {name: sum(name in row.differs for row in rows) for row in rows for name in row.differs}
    tables = [category_rows(labels, row.evaluated.summary) for row in rows]
    categories = [
        {**same[0], "values": [one["pq"] for one in same], "spread": _spread([one["pq"] for one in same])}
        for same in zip(*tables, strict=True)
        if any(one["pq"] is not None for one in same)
    ]
    categories.sort(key=lambda row: -row["spread"])
    val_set, ids = rows[0].evaluated.val_set, rows[0].evaluated.table.image_ids
    head = facts.evaluated_facts(val_set, len(ids)) | {"written": f"{page.date()}, by code {code_version()}"}
    return page.page(
        Path(__file__).with_name("compare.html"),
        f"{len(rows)} runs on {facts.title_of(val_set)}",
        head,
        rows=rows,
        repeated=repeated(rows),
        shared=[name for name in sorted(named) if named[name] == len(rows)],
        own=[name for name in sorted(named) if named[name] < len(rows)],
        seeded=[*(("pq", group) for group in GROUPS), ("boundary", "all"), ("agnostic", "pq")],
        groups=GROUPS,
        sizes=plots.sizes({row.title: row.evaluated.summary["sizes"] for row in rows}),
        categories=categories,
        pictures=draw(rows, disputed(rows)),
    )


def _spread(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return max(known) - min(known) if known else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.compare", description=__doc__)
    parser.add_argument("evaluations", nargs="+", help="<storage>/evaluate/<hash>, the first is compared with")
    parser.add_argument("--page", type=Path, default=Path("compare.html"), help="where the page goes (compare.html)")
    options = parser.parse_args(arguments)
    try:
        rows = compare([read_evaluation(url) for url in options.evaluations])
        options.page.write_text(to_html(rows), encoding="utf-8")
    except (TesseraError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for row in rows:
        figures = " ".join(f"{group} {row.evaluated.summary['pq'][group] or 0:.1f}" for group in GROUPS)
        sys.stdout.write(f"{row.title}: {figures}\n")
    sys.stdout.write(f"page: {options.page.resolve()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
