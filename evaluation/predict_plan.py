"""What there is to predict: a file, all pictures under a folder or an S3 prefix, or the images of a COCO list."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from evaluation.images import SUFFIXES
from infra import artifacts
from infra.errors import TesseraError
from infra.store import Store, open_store
from preprocessing.geometry import Size

SCHEMA_VERSION = 1
"""Part of every record: raise it when the same weights and image would give another prediction."""

CLAIM = "tessera-predict.json"
"""Says whose predictions an output holds; a folder that has one is never an input."""

RECORDS = "records"


@dataclass(frozen=True)
class Work:
    """What holds for all images of one call; every URL is a store's root."""

    storage: str
    run: str
    """Folder of the finished run under `storage`."""
    source: str
    output: str
    folder: str
    """Of the PNGs under `output`; `<folder>.json` lists them."""
    overlays: bool
    upright: bool
    """Whether images are turned as EXIF says."""
    options: str = "{}"
    """JSON of the options of decoding that are not the run's."""


@dataclass(frozen=True)
class Item:
    """One image to predict."""

    name: str
    """Key under the source."""
    version: str
    """Changes when the file does."""
    image_id: int | None = None
    """As a COCO list has it."""
    size: Size | None = None
    """Height, width as a COCO list has them."""
    bytes: int = 0
    """As they were listed; of a single file it is not known."""

    @property
    def png(self) -> str:
        """Name of its PNG: a.jpg -> a.png; any other a.x -> a.x.png, so that no two images of a folder share one."""
        path = PurePosixPath(self.name)
        plain = path.suffix == ".jpg" and "." not in path.stem
        return f"{path.with_suffix('') if plain else path}{'' if path.suffix else '.file'}.png"

    def key(self, work: Work) -> str:
        """Hash of all that its prediction depends on."""
        of_work = (work.storage, work.run, work.overlays, work.upright, work.options)
        return artifacts.digest(SCHEMA_VERSION, *of_work, self.name, self.version)


@dataclass(frozen=True)
class Failure:
    """An image that could not be done."""

    file_name: str
    why: str


@dataclass(frozen=True)
class Plan:
    """All that one call is to do."""

    work: Work
    items: tuple[Item, ...]
    missing: tuple[Failure, ...] = ()
    """Images of a COCO list that are not there."""
    ignored: tuple[str, ...] = ()
    """Files whose names are not those of pictures."""
    listed: bool = False
    """Whether a COCO list says which images there are: then the result is a submission to COCO's server."""

    def chunks(self, size: int) -> list[tuple[Item, ...]]:
        """The items in groups, one for each task."""
        return [self.items[start : start + size] for start in range(0, len(self.items), size)]


def plan_prediction(
    run: str,
    source: str,
    output: str,
    images: str | None = None,
    algorithm: str = "tessera",
    overlays: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """What a call is to do; writes nothing.

    run: URL of a finished run's folder. source: URL of a file, a folder or a prefix; of a folder all files are
    taken, in all its folders, whose names end in one of images.SUFFIXES. images: URL of a COCO image info JSON.
    options: of decoding, see Predictor.load. Raises TesseraError if there is nothing to do, and for a list that is
    none.
    """
    storage, run_path = artifacts.split_url(run, "train")
    target = open_store(output).url
    root, items, ignored = _found(source, target)
    folder, missing = "predictions", tuple[Failure, ...]()
    if images is not None:
        items, missing = _matched(_read_list(images), items)
        stem = PurePosixPath(images).stem.removeprefix("image_info_")
        folder, ignored = f"panoptic_{stem}_{algorithm}_results", []
    if not items and images is not None:
        raise TesseraError(f"{source}: none of the {len(missing)} images of {images} is there")
    if not items:
        named = f"; {len(ignored)} files are none by their names, as {ignored[0]!r}" if ignored else ""
        raise TesseraError(f"{source}: no images found{named}")
    decoding = json.dumps(options or {}, sort_keys=True)
    work = Work(storage, run_path, root.url, target, folder, overlays, images is None, decoding)
    return Plan(work, tuple(items), missing, tuple(ignored), listed=images is not None)


def _found(source: str, output: str) -> tuple[Store, list[Item], list[str]]:
    """(store, images, other files) of a single file, or of a folder."""
    root = open_store(source)
    folder, _, name = root.url.rpartition("/")
    parent = open_store(folder or "/") if folder != "s3:/" else None
    if parent is not None and parent.exists(name):
        return parent, [Item(name, hashlib.sha256(parent.read_named(name)).hexdigest())], []
    listed = [entry for entry in root.list() if not _hidden(entry.key)]
    outputs = tuple(entry.key.removesuffix(CLAIM) for entry in listed if PurePosixPath(entry.key).name == CLAIM)
    if root.url == output or "" in outputs:
        raise TesseraError(f"{source}: INPUT is an OUTPUT; choose another folder")
    entries = [entry for entry in listed if not entry.key.startswith(outputs)]
    if not entries:
        raise TesseraError(f"{source}: no such file, nor a folder with any")
    pictures = [e for e in entries if PurePosixPath(e.key).suffix.lower() in SUFFIXES]
    items = [Item(e.key, artifacts.digest(e.size, e.modified.isoformat()), bytes=e.size) for e in pictures]
    return root, items, sorted({e.key for e in entries} - {item.name for item in items})


def _hidden(key: str) -> bool:
    """.DS_Store, and the ._photo.jpg that macOS leaves beside photo.jpg."""
    return any(part.startswith(".") for part in key.split("/"))


def _matched(entries: Sequence[Item], found: Sequence[Item]) -> tuple[list[Item], tuple[Failure, ...]]:
    """The list's entries with the versions of their files, and those that have none."""
    by_name = {item.name: item for item in found}
    there = [replace(by_name[e.name], image_id=e.image_id, size=e.size) for e in entries if e.name in by_name]
    absent = "the list has it, the input does not"
    return there, tuple(Failure(e.name, absent) for e in entries if e.name not in by_name)


def _read_list(url: str) -> list[Item]:
    """The `images` of a COCO image info JSON, by name. TesseraError naming what is wrong with it."""
    folder, _, name = open_store(url).url.rpartition("/")
    try:
        rows: list[Any] = json.loads(open_store(folder or "/").read_named(name))["images"]
        items = [Item(str(r["file_name"]), "", int(r["id"]), (int(r["height"]), int(r["width"]))) for r in rows]
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        expected = "expected `images` with id, file_name, height and width"
        raise TesseraError(f"{url}: no list of images ({expected}): {type(error).__name__} {error}") from error
    for what in ("image_id", "name"):
        if len({getattr(item, what) for item in items}) < len(items):
            raise TesseraError(f"{url}: an image's {what} occurs more than once")
    return sorted(items, key=lambda item: item.name)


def claim(work: Work) -> None:
    """Write into the output whose predictions it holds. TesseraError if they are another run's or of other images."""
    target = open_store(work.output)
    ours = {"run": f"{work.storage}/{work.run}", "input": work.source, "predictions": work.folder}
    if target.create(CLAIM, json.dumps(ours, indent=1).encode()):
        return
    try:
        theirs = json.loads(target.read(CLAIM))
    except ValueError as error:
        raise TesseraError(
            f"{target.url_for(CLAIM)}: damaged ({error}); delete it to go on into this OUTPUT"
        ) from error
    differing = [f"{name} {theirs.get(name)}" for name in ours if theirs.get(name) != ours[name]]
    if differing:
        raise TesseraError(f"{target.url} holds the predictions of {', '.join(differing)}; choose another OUTPUT")
