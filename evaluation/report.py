"""Reports of one evaluation: JSON for programs, Markdown for flows, one HTML file for people."""

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from evaluation.evaluate import Scores
from evaluation.pq import summarise
from infra import artifacts
from infra.store import open_store
from preprocessing.shards import ShardSet
from training.recipe import Recipe
from training.run import TrainedRun

GROUPS = ("all", "things", "stuff")
METRICS = ("pq", "sq", "rq")


@dataclass(frozen=True)
class Report:
    """A written report."""

    url: str
    """Of the HTML file."""
    summary: dict[str, Any]
    """As pq.summarise gives it."""
    markdown: str


def read_report(recipe: Recipe, store_url: str, path: str) -> Report | None:
    """The report at `path`, or None if it is not finished."""
    store = open_store(store_url)
    manifest = artifacts.read_manifest(store, path)
    if manifest is None:
        return None
    summary = json.loads(store.read(f"{path}/report.json"))
    return Report(store.url_for(f"{path}/report.html"), summary, to_markdown(recipe, summary, manifest["images"]))


def write_report(
    recipe: Recipe, run: TrainedRun, val_set: ShardSet, store_url: str, path: str, scores: Scores
) -> Report:
    """Write predictions.json, report.json, report.md, report.html and the manifest under `path`.

    `predictions.json` and the folder `predictions` are what the COCO panoptic API reads.
    """
    store, summary = open_store(store_url), summarise(scores.stats, val_set.labels)
    markdown = to_markdown(recipe, summary, scores.images)
    predictions = {"annotations": scores.annotations, "categories": val_set.labels.to_coco()}
    files = {
        "predictions.json": json.dumps(predictions),
        "report.json": json.dumps(summary, indent=1),
        "report.md": markdown,
        "report.html": to_html(recipe, run, val_set, summary, scores),
    }
    for name, text in files.items():
        store.write(f"{path}/{name}", text.encode())
    manifest = {
        "run": run.path,
        "val_set": val_set.path,
        "images": scores.images,
        "pq": {g: summary["pq"][g] for g in GROUPS},
    }
    artifacts.write_manifest(store, path, manifest)
    return Report(store.url_for(f"{path}/report.html"), summary, markdown)


def to_markdown(recipe: Recipe, summary: dict[str, Any], images: int) -> str:
    """The headline table."""
    lines = [
        f"### {recipe.name}: panoptic quality on {images} images",
        "",
        "| | PQ | SQ | RQ |",
        "|---|---:|---:|---:|",
    ]
    for group in GROUPS:
        cells = " | ".join(percent(summary[metric][group]) for metric in METRICS)
        lines.append(f"| {group} | {cells} |")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """One decimal, or a dash where there is no value."""
    return "-" if value is None else f"{value:.1f}"


def to_html(recipe: Recipe, run: TrainedRun, val_set: ShardSet, summary: dict[str, Any], scores: Scores) -> str:
    """One file that opens from disk without a network: pictures and curves are inside."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    templates.filters["percent"] = percent
    subtitle = (
        f"{scores.images} images, {len(val_set.labels)} categories; trained {run.steps} steps of "
        f"{recipe.train.batch} images on {run.workers} workers in {run.seconds:.0f} s; {run.path}"
    )
    return templates.get_template("report.html").render(
        title=f"Tessera: {recipe.name}",
        subtitle=subtitle,
        summary=summary,
        categories=_category_rows(val_set, summary),
        pictures=scores.pictures,
        curves=_curves(run),
        recipe=json.dumps(dataclasses.asdict(recipe), indent=2),
    )


def _category_rows(val_set: ShardSet, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Categories in the label table's order; the summary's keys are in that order too."""
    rows = []
    for category, name in zip(val_set.labels.categories, summary["pq"]["per_category"], strict=True):
        values = {metric: summary[metric]["per_category"][name] for metric in METRICS}
        kind = "thing" if category.is_thing else "stuff"
        counts = summary["counts"]["per_category"][name]
        rows.append({"name": name, "kind": kind, "color": category.color, **values, **counts})
    return rows


def _curves(run: TrainedRun) -> str:
    """Losses over steps, as SVG."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    names = sorted({name for row in run.history for name in row["losses"]})
    for name in names:
        rows = [row for row in run.history if name in row["losses"]]
        axes.plot([row["step"] for row in rows], [row["losses"][name] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="weighted loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
