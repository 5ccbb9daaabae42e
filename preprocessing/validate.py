"""`python -m preprocessing.validate DATA`: what a data set holds, all that is wrong with it, whether it can be used.

Ends with 0 if every split can be trained on, with 1 if not. Reads every file once, computes nothing that lasts.
"""

import argparse
import io
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from infra.errors import TesseraError
from infra.page import date, page
from infra.store import open_store
from infra.text import shown
from infra.version import code_version
from preprocessing.labels import LabelTable
from preprocessing.layouts import LAYOUTS, read_index
from preprocessing.pictures import Panel, overlay_panel
from preprocessing.source import Defect, Examined, Index, Record

_CHUNK = 32
_PICTURES = 12
_SHOWN = 500
"""Defects that the page lists one by one, of each split."""


@dataclass
class Findings:
    """What was found in one split, or in a part of it; parts add up."""

    images: int = 0
    """Those that an annotation is there for."""
    usable: int = 0
    rejected: int = 0
    """Entries and files that are not even a sample."""
    segments: Counter[int] = field(default_factory=Counter)
    """By contiguous category id, in usable images, as the next two."""
    in_images: Counter[int] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)
    void_pixels: int = 0
    crowds: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Height, width."""
    contents: dict[tuple[int, int], list[tuple[str, int]]] = field(default_factory=dict)
    """Image files and their ids by length and CRC-32."""
    defects: list[Defect] = field(default_factory=list)
    panels: dict[int, Panel] = field(default_factory=dict)
    """Pictures of some samples by image id, as the next."""
    notes: dict[int, str] = field(default_factory=dict)
    """Size and void."""

    def __iadd__(self, other: "Findings") -> "Findings":
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            elif isinstance(value, list):
                getattr(self, name).extend(value)
            elif name == "contents":
                for content, files in value.items():
                    self.contents.setdefault(content, []).extend(files)
            else:
                getattr(self, name).update(value)
        return self

    @property
    def bad_share(self) -> float:
        """Samples that would be set aside, of all."""
        samples = self.images + self.rejected
        return (samples - self.usable) / max(1, samples)  # 1 - 99/100 would be more than 0.01

    @property
    def void_share(self) -> float:
        """Of the pixels of usable images."""
        return self.void_pixels / max(1, self.void_pixels + sum(self.pixels.values()))

    @property
    def extremes(self) -> str:
        """Width and height of the smallest and the largest usable image, and of how many sizes they are."""
        if not self.sizes:
            return "none"
        ordered = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        least, most = (f"{width}x{height}" for height, width in (ordered[0], ordered[-1]))
        return f"{least} px" if least == most else f"{least} to {most} px, {len(ordered)} sizes"


def examine_index(index: Index, split: str, workers: int, progress: Any = print) -> tuple[LabelTable, Findings]:
    """Read every sample of a split, in so many processes."""
    total = Findings(rejected=len(index.rejected))
    total.defects += [Defect(r.reason, r.file, r.image_id) for r in index.rejected] + list(index.unused)
    drawn = frozenset(r.image_id for r in index.records[:: max(1, len(index.records) // _PICTURES)][:_PICTURES])
    chunks = [index.records[i : i + _CHUNK] for i in range(0, len(index.records), _CHUNK)]
    for findings in _each([(chunk, index.labels, drawn) for chunk in chunks], workers):
        total += findings
        progress(f"{split}: {total.images} of {len(index.records)} images, {len(total.defects)} defects")
    if problem := void_background(index.labels, total):
        total.defects.append(Defect(problem, split, usable=True))
    return index.labels, total


def _each(jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Findings]:
    if workers == 1:
        yield from (_examine(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        yield from pool.map(_examine, *zip(*jobs, strict=True))


def _examine(records: Iterable[Record], labels: LabelTable, drawn: frozenset[int]) -> Findings:
    total = Findings()
    for record in records:
        found = record.examine(labels)
        good = all(defect.usable for defect in found.defects)
        part = Findings(images=1, usable=int(good), defects=list(found.defects))
        if found.picture:
            part.contents = {(len(found.data), zlib.crc32(found.data)): [(str(record.image), record.image_id)]}
        if good and found.truth is not None:
            part += _counted(found)
        if record.image_id in drawn:
            part += _drawn(record, found, labels)
        total += part
    return total


def _counted(found: Examined) -> Findings:
    assert found.truth is not None
    segments = found.truth.segments
    part = Findings(crowds=sum(s.is_crowd for s in segments), sizes=Counter([found.truth.size]))
    part.void_pixels = found.truth.ids.size - sum(s.area for s in segments)
    for s in segments:
        part.segments[s.category] += 1
        part.pixels[s.category] += s.area
    part.in_images.update({s.category for s in segments})
    return part


def _drawn(record: Record, found: Examined, labels: LabelTable) -> Findings:
    """The image beside its segments, where it can be drawn."""
    if found.picture is None or found.truth is None:
        return Findings()
    height, width = found.truth.size
    image_HW3 = np.asarray(found.picture)
    if image_HW3.shape[:2] != (height, width):
        return Findings()
    panel = Panel(record.image.name, overlay_panel(image_HW3, {"segments": found.truth}, labels))
    note = f"{width}x{height}, {np.mean(found.truth.ids == 0):.1%} void"
    return Findings(panels={record.image_id: panel}, notes={record.image_id: note})


def compare_splits(found: Sequence[Findings]) -> None:
    """Add to the defects of each split its pictures that occur before, in itself or in an earlier split."""
    first: dict[tuple[int, int], str] = {}
    for findings in found:
        for content, files in findings.contents.items():
            again = files if content in first else files[1:]
            same = first.setdefault(content, files[0][0])
            findings.defects += [Defect(f"the same picture as {same}", file, i, usable=True) for file, i in again]


def kinds(defects: Iterable[Defect]) -> list[tuple[str, bool, int]]:
    """What is wrong without numbers and names, whether it can be lived with, and how often; the worst first."""
    counts = Counter((re.sub(r"/\S+|-?\d+(\.\d+)?", "…", d.problem), d.usable) for d in defects)
    return sorted(((kind, usable, n) for (kind, usable), n in counts.items()), key=lambda row: (row[1], -row[2]))


_MUCH_VOID, _VOID_WITHOUT_STUFF = 0.4, 0.05
"""Shares of void that are no leftovers between labels any more: in any set, and where no stuff is labelled."""


def void_background(labels: LabelTable, findings: Findings) -> str:
    """The warning for so much void that it may be a background which somebody left out; empty if it is not."""
    labelled = sum(findings.pixels.values())
    share = findings.void_pixels / max(1, findings.void_pixels + labelled)
    has_stuff = any(not labels.is_thing[category] for category in findings.pixels)
    if not labelled or share < (_MUCH_VOID if has_stuff else _VOID_WITHOUT_STUFF):
        return ""
    return (
        f"{share:.0%} of the pixels are void{'' if has_stuff else ' and no stuff is labelled'}: void means "
        "'not labelled', it is neither learned nor scored; a background that is meant is a category of stuff"
    )


def verdict(found: dict[str, tuple[LabelTable, Findings]], bad_share: float) -> list[str]:
    """Why the data set cannot be trained on; empty if it can."""
    reasons = []
    for split, (_, findings) in found.items():
        if findings.bad_share > bad_share or not findings.usable:
            bad = findings.images + findings.rejected - findings.usable
            of = f"{bad} of {findings.images + findings.rejected} samples"
            reasons.append(f"{split}: {of} are unusable, above the limit of {bad_share:.1%}")
        elif not findings.segments:
            reasons.append(f"{split}: every pixel is void, there is nothing to learn or to measure")
    tables = [labels for labels, _ in found.values()]
    if differ := next((d for table in tables if (d := tables[0].difference(table))), ""):
        reasons.append(f"{', '.join(found)} list different categories: {differ}")
    return reasons


def to_html(
    title: str, facts: dict[str, str], found: dict[str, tuple[LabelTable, Findings]], reasons: Sequence[str]
) -> str:
    """One file that opens from disk without a network. facts: which data, as its head says it."""
    head = facts | {"looked at": f"{date()}, by code {code_version()}"}
    called: dict[str, Any] = {"kinds": kinds, "histogram": histogram, "split_facts": split_facts, "shown": _SHOWN}
    template = Path(__file__).with_name("validate.html")
    return page(template, title, head, found=found, reasons=reasons, **called)


def split_facts(labels: LabelTable, findings: Findings) -> dict[str, str]:
    """The head of a split on the page."""
    things = sum(n for i, n in findings.segments.items() if labels.is_thing[i])
    segments, occur = sum(findings.segments.values()), len(findings.segments)
    return {
        "samples": f"{findings.usable} of {findings.images + findings.rejected} can be used",
        "sizes": findings.extremes,
        "segments": f"{segments}: {things} of things, {segments - things} of stuff; {findings.crowds} are crowds",
        "categories": f"{occur} of {len(labels)} occur",
        "void": f"{findings.void_share:.1%} of the pixels",
    }


def histogram(labels: LabelTable, findings: Findings) -> list[dict[str, Any]]:
    """One row a category, in the label table's order."""
    total = max(1, sum(findings.pixels.values()) + findings.void_pixels)
    return [
        {
            "name": category.name,
            "dataset_id": category.dataset_id,
            "kind": "thing" if category.is_thing else "stuff",
            "color": category.color,
            "images": findings.in_images[i],
            "segments": findings.segments[i],
            "share": findings.pixels[i] / total,
        }
        for i, category in enumerate(labels.categories)
    ]


def to_text(split: str, labels: LabelTable, findings: Findings) -> str:
    """What the terminal shows of a split."""
    never = [c.name for i, c in enumerate(labels.categories) if not findings.segments[i]]
    names = ", ".join(map(shown, never[:8])) + (", ..." if len(never) > 8 else "")
    segments = sum(findings.segments.values())
    lines = [
        f"{split}: {findings.usable} of {findings.images + findings.rejected} samples can be used; {findings.extremes}",
        f"  {len(labels) - len(never)} of {len(labels)} categories occur" + (f"; never: {names}" if never else ""),
        f"  {segments} segments, {findings.crowds} of them crowds; {findings.void_share:.1%} of the pixels void",
    ]
    lines += [f"  {'warning' if usable else 'ERROR'} {n} x {kind}" for kind, usable, n in kinds(findings.defects)]
    for defect in findings.defects[:_SHOWN]:
        named = "" if defect.image_id is None else f" (image {defect.image_id})"
        lines.append(f"    {'-' if defect.usable else '!'} {defect.file}{named}: {defect.problem}")
    if len(findings.defects) > _SHOWN:
        lines.append(f"    and {len(findings.defects) - _SHOWN} more")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m preprocessing.validate", description=__doc__)
    parser.add_argument("data", type=_place, help="folder of the data set, or s3://bucket/prefix")
    parser.add_argument("--split", action="append", help="a split; may be repeated (train2017 and val2017)")
    parser.add_argument("--layout", choices=[*LAYOUTS], default="coco")
    parser.add_argument("--bad-share", type=_share, default=0.01, help="share of unusable samples that is borne (0.01)")
    parser.add_argument("--page", type=Path, default=Path("validate.html"), help="where the page of overlays goes")
    parser.add_argument("--workers", type=_count, default=os.cpu_count(), help="processes (all cores)")
    options = parser.parse_args(arguments)
    try:  # before an hour of reading
        options.page.open("a").close()
    except OSError as error:
        parser.error(f"--page {options.page}: cannot be written ({error.strerror})")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    found, reasons = {}, list[str]()
    options.split = options.split or ["train2017", "val2017"]
    for split in options.split:
        try:
            index = read_index(options.data, split, options.layout)
            found[split] = examine_index(index, split, options.workers, _tell)
        except TesseraError as error:
            reasons += [str(error)] if str(error) not in reasons else []
    compare_splits([findings for _, findings in found.values()])
    for split, (labels, findings) in found.items():
        sys.stdout.write(to_text(split, labels, findings) + "\n")
    reasons += verdict(found, options.bad_share)
    splits = ", ".join(options.split)
    facts = {"data set": options.data, "layout": options.layout, "splits": splits}
    options.page.write_text(to_html(f"{options.data}: {splits}", facts, found, reasons), encoding="utf-8")
    can = "cannot be trained on: " + "; ".join(reasons) if reasons else "can be trained on"
    sys.stdout.write(f"{options.data} {can}\npage: {options.page.resolve()}\n")
    return 1 if reasons else 0


def _place(text: str) -> str:
    try:
        return open_store(text).url
    except TesseraError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _share(text: str) -> float:
    if not 0 <= (share := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share, expected 0 to 1")
    return share


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return count


def _tell(line: str) -> None:
    sys.stderr.write(f"\r\033[K{line}" if sys.stderr.isatty() else f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
