"""Reports of one evaluation: JSON for programs, Markdown for flows, one HTML file for people."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from evaluation import facts, plots
from evaluation.evaluate import Scores
from evaluation.summary import read_summary, summary_of
from infra import artifacts, page, records
from infra.page import interval, percent
from infra.records import Count, Key, Percent
from infra.store import Store, open_store
from infra.text import markdown
from infra.version import code_version
from preprocessing.labels import LabelTable
from preprocessing.pictures import Panel
from preprocessing.shards import ShardSet
from training.metrics import STARVED, Row, read_metrics, training_seconds, worker_hours
from training.recipe import Recipe
from training.run import TrainedRun

GROUPS = ("all", "things", "stuff")
METRICS = ("pq", "sq", "rq")


class GroupPQ(TypedDict):
    """PQ, percent; None where no category of the group occurs."""

    all: Percent | None
    things: Percent | None
    stuff: Percent | None


@dataclass(frozen=True)
class Finished:
    """What the manifest of an evaluation says."""

    recipe: str
    """Its name."""
    decode: dict[str, Any]
    run: Key
    val_set: Key
    images: Count
    pq: GroupPQ


@dataclass(frozen=True)
class Report:
    """A written report."""

    url: str
    """Of the HTML file."""
    summary: dict[str, Any]
    """As summary.summary_of gives it."""
    markdown: str


@dataclass(frozen=True)
class Gallery:
    """Pictures of some images."""

    kinds: dict[str, list[int]]
    """Image ids by what they are examples of."""
    pictures: dict[int, Panel]
    """By image id."""


def read_report(recipe: Recipe, store_url: str, path: str) -> Report | None:
    """The report at `path`, or None if it is not finished."""
    store = open_store(store_url)
    manifest = artifacts.read_manifest(store, path, Finished)
    if manifest is None:
        return None
    summary = read_summary(store, path)
    return Report(store.url_for(f"{path}/report.html"), summary, to_markdown(recipe, summary, manifest.images))


def write_report(
    recipe: Recipe, run: TrainedRun, val_set: ShardSet, store_url: str, path: str, scores: Scores, gallery: Gallery
) -> Report:
    """Write predictions.json, images.json, report.json, report.md, report.html and the manifest under `path`.

    `predictions.json` and the folder `predictions` are what the COCO panoptic API reads; `images.json` has the
    statistics of every image, from which runs are compared.
    """
    store = open_store(store_url)
    rows, summary = read_metrics(store, run.path), summary_of(scores, val_set.labels)
    markdown = to_markdown(recipe, summary, scores.images)
    images = [{"id": i, "file_name": name} for i, name in scores.names.items()]
    predictions = {"images": images, "annotations": scores.annotations, "categories": val_set.labels.to_coco()}
    files = {
        "predictions.json": records.to_json(predictions, indent=None),
        "images.json": records.to_json({str(i): s.to_sparse_json() for i, s in scores.by_image.items()}, indent=None),
        "report.json": records.to_json(summary),
        "report.md": markdown.encode(),
        "report.html": to_html(recipe, store, run, rows, val_set, summary, gallery).encode(),
    }
    for name, content in files.items():
        store.write(f"{path}/{name}", content)
    manifest = {
        "recipe": recipe.name,
        "decode": asdict(recipe.method.decode),
        "run": run.path,
        "val_set": val_set.path,
        "images": scores.images,
        "pq": {g: summary["pq"][g] for g in GROUPS},
        "code": code_version(),
    }
    artifacts.write_manifest(store, path, manifest)
    return Report(store.url_for(f"{path}/report.html"), summary, markdown)


def to_markdown(recipe: Recipe, summary: dict[str, Any], images: int) -> str:
    """The headline table."""
    lines = [
        f"### {markdown(recipe.name)}: panoptic quality on {images} images",
        "",
        "| | PQ | 95 % | SQ | RQ |",
        "|---|---:|---:|---:|---:|",
    ]
    for group in GROUPS:
        pq, sq, rq = (percent(summary[metric][group]) for metric in METRICS)
        lines.append(f"| {group} | {pq} | {interval(summary['intervals'][group])} | {sq} | {rq} |")
    return "\n".join(lines)


def pace(rows: Sequence[Row]) -> str:
    """How fast a run was, what held it up, and its best PQ on the way; of the steps before its last row.

    Means are over the time of training: each step has as many images, so a row weighs its steps over images/s.
    """
    if not rows:
        return "not known"
    spent = training_seconds(rows, batch=1)  # shares and rates are those of any batch
    wait = sum(row.data_wait * time for row, time in zip(rows, spent, strict=True)) / sum(spent)
    starved = " (data-starved)" if wait > STARVED else ""
    memory = max(row.memory_gib for row in rows)
    told = (
        f"{rows[-1].step / sum(spent):.1f} images/s, {wait:.0%} of the time waiting for data{starved}, {memory:.1f} GiB"
    )
    checked = [row for row in rows if "pq" in row.figures]
    if checked:
        best = max(checked, key=lambda row: (row.figures["pq"], row.step))
        told += f"; best PQ on the checked val images {best.figures['pq']:.1f} after step {best.step}"
    return told


def to_html(
    recipe: Recipe,
    store: Store,
    run: TrainedRun,
    rows: Sequence[Row],
    val_set: ShardSet,
    summary: dict[str, Any],
    gallery: Gallery,
) -> str:
    """One file: figures, pictures and curves are inside."""
    head = facts.evaluated_facts(val_set, len(summary["images"])) | {
        "written": f"{page.date()}, by code {code_version()}",
        **facts.trained_facts(store, run.path),
        "cost": f"{worker_hours(rows, recipe.train.batch):.2f} worker-hours; last attempt: {run.seconds:.0f} s in all",
        "pace": pace(rows),
    }
    return page.page(
        Path(__file__).with_name("report.html"),
        f"PQ {percent(summary['pq']['all'])}: {recipe.name} on {facts.title_of(val_set)}",
        head,
        summary=summary,
        categories=category_rows(val_set.labels, summary),
        gallery=gallery,
        curves=plots.curves(rows),
        sizes=plots.sizes({recipe.name: summary["sizes"]}),
        recipe=json.dumps(dataclasses.asdict(recipe), indent=2),
    )


def category_rows(labels: LabelTable, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Categories in the label table's order; the summary's keys are in that order too."""
    rows = []
    named = zip(labels.categories, summary["pq"]["per_category"], summary["semantic"]["per_category"], strict=True)
    for category, name, iou in named:
        values = {metric: summary[metric]["per_category"][name] for metric in METRICS}
        kind = "thing" if category.is_thing else "stuff"
        counts = summary["counts"]["per_category"][name]
        rows.append({"name": name, "kind": kind, "color": category.color, "iou": iou, **values, **counts})
    return rows
