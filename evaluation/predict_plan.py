"""What there is to predict: a file, all pictures under a folder or an S3 prefix, or the images of a COCO list."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from evaluation.images import SUFFIXES
from infra import artifacts, records
from infra.errors import StoreError, TesseraError
from infra.opening import check_size
from infra.store import Entry, Store, open_store
from infra.text import quoted
from preprocessing.files import is_litter
from preprocessing.geometry import Size
from preprocessing.json_values import whole
from preprocessing.source import BadSample, known_id, known_size

SCHEMA_VERSION = 1
"""Part of every record: raise it when the same weights and image would give another prediction."""

CLAIM = "tessera-predict.json"
"""Says whose predictions an output holds. What an output holds beside it is never an input; see Claim."""

RECORDS = "records"
_LARGEST_CLAIM = 1 << 16  # bytes


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
class Claim:
    """What a claim says."""

    run: str
    input: str
    predictions: str
    """Folder of the PNGs."""

    def holds(self, key: str) -> bool:
        """Whether this file of the claim's folder was written with it, and not put there by somebody."""
        listings = (CLAIM, "problems.json", f"{self.predictions}.json", f"{self.predictions}.zip")
        return key in listings or key.startswith(("overlays/", f"{RECORDS}/", f"{self.predictions}/"))


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
    png: str = ""
    """Name of its PNG, which no other image of the input has."""

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
    """Images of a COCO list that are not there, or entries of a folder that cannot be listed."""
    ignored: tuple[str, ...] = ()
    """Files whose names are not those of pictures, and pictures whose names are hidden."""
    outputs: tuple[str, ...] = ()
    """Folders of the input that hold what earlier calls wrote: that is left out."""
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
    found = _found(source, target)
    folder, items, missing = "predictions", found.items, found.faults
    if images is not None:
        items, missing = _matched(_read_list(images), items, found.store.url.rpartition("/")[2])
        stem = PurePosixPath(images).stem.removeprefix("image_info_")
        folder = f"panoptic_{stem}_{algorithm}_results"
        found = replace(found, ignored=(), outputs=())
    if not items and images is not None:
        raise TesseraError(f"{source}: none of the {len(missing)} images of {images} is there")
    if not items:
        named = (
            f"; {len(found.ignored)} files are none by their names, as {found.ignored[0]!r}" if found.ignored else ""
        )
        left = f"; what predict wrote into {found.outputs[0]} is left out" if found.outputs else ""
        unlisted = "".join(f"; {fault.file_name}: {fault.why}" for fault in found.faults[:1])
        raise TesseraError(f"{source}: no images found{named}{left}{unlisted}")
    decoding = json.dumps(options or {}, sort_keys=True)
    work = Work(storage, run_path, found.store.url, target, folder, overlays, images is None, decoding)
    return Plan(work, tuple(items), missing, found.ignored, found.outputs, listed=images is not None)


@dataclass(frozen=True)
class _Found:
    """What there is at a source."""

    store: Store
    items: list[Item]
    ignored: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    faults: tuple[Failure, ...] = ()
    """Entries of a folder that cannot be listed."""


def _found(source: str, output: str) -> _Found:
    """A single file, or all of a folder."""
    root = open_store(source)
    folder, _, name = root.url.rpartition("/")
    parent = open_store(folder or "/") if folder != "s3:/" else None
    if parent is not None and parent.exists(name):
        version = hashlib.sha256(parent.read_named(name)).hexdigest()
        return _Found(parent, [Item(name, version, png=png_name(name, parent.exists))])
    if root.url == output:
        raise TesseraError(f"{source}: INPUT is OUTPUT, too; choose another folder")
    listing = root.look(nothing=True)
    listed = listing.entries
    if not listed and not listing.faults:
        raise TesseraError(f"{source}: no such file, nor a folder with any")
    claims = {entry.key.removesuffix(CLAIM): _claim_of(root, entry) for entry in listed if _is_claim(entry.key)}
    outputs = {place: claim for place, claim in claims.items() if claim is not None}
    entries = [entry for entry in listed if not _written(entry.key, outputs)]
    names = {e.key for e in entries if PurePosixPath(e.key).suffix.lower() in SUFFIXES and not _hidden(e.key)}
    items = [
        Item(e.key, _version(e), bytes=e.size, png=png_name(e.key, names.__contains__))
        for e in entries
        if e.key in names
    ]
    ignored = sorted(e.key for e in entries if e.key not in names and not is_litter(e.key))
    places = tuple(f"{root.url}/{place}".rstrip("/") for place in sorted(outputs))
    return _Found(root, items, tuple(ignored), places, tuple(Failure(*fault) for fault in listing.faults))


def _version(entry: Entry) -> str:
    return artifacts.digest(entry.size, entry.modified.isoformat())


def png_name(name: str, there: Callable[[str], bool]) -> str:
    """Of an image's PNG: a.jpg and a.png -> a.png, any other a.x -> a.x.png; no two images of an input share one.

    there: whether the input has an image of a name. A PNG's own name is its prediction's, so others make way.
    """
    path = PurePosixPath(name)
    if path.suffix == ".png":
        return name
    plain = path.suffix == ".jpg" and "." not in path.stem
    found = f"{path.with_suffix('') if plain else path}{'' if path.suffix else '.file'}.png"
    if plain and there(found):
        found = f"{name}.png"
    while there(found):
        found += ".png"
    return found


def _is_claim(key: str) -> bool:
    return PurePosixPath(key).name == CLAIM


def _claim_of(root: Store, entry: Entry) -> Claim | None:
    """None for a file of somebody else's that has the claim's name."""
    try:
        check_size(entry.size, _LARGEST_CLAIM)
        claim = records.read(root, entry.key, Claim)
    except (OSError, TesseraError):
        return None
    return claim if claim.predictions not in ("", ".", "..") and "/" not in claim.predictions else None


def _written(key: str, outputs: Mapping[str, Claim]) -> bool:
    """Whether a call of predict wrote it."""
    return any(key.startswith(place) and claim.holds(key.removeprefix(place)) for place, claim in outputs.items())


def _hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _matched(entries: Sequence[Item], found: Sequence[Item], folder: str) -> tuple[list[Item], tuple[Failure, ...]]:
    """The list's entries with the versions of their files, and those that have none; folder: the input's name, which
    names in the list may have before them."""
    by_name = {_composed(item.name): item for item in found}
    pairs = [
        (entry, by_name.get(_composed(entry.name)) or by_name.get(_inside(entry.name, folder))) for entry in entries
    ]
    there = [replace(item, image_id=entry.image_id, size=entry.size) for entry, item in pairs if item is not None]
    absent = "the list has it, the input does not"
    return there, tuple(Failure(entry.name, absent) for entry, item in pairs if item is None)


def _composed(name: str) -> str:
    """Accents are written in two ways, and disks and lists do not agree on one; ./a is a."""
    return unicodedata.normalize("NFC", PurePosixPath(name).as_posix())


def _inside(name: str, folder: str) -> str:
    return _composed(name).removeprefix(f"{_composed(folder)}/")


def _read_list(url: str) -> list[Item]:
    """The `images` of a COCO image info JSON, by name. TesseraError naming what is wrong with it."""
    folder, _, name = open_store(url).url.rpartition("/")
    try:
        items = [_listed(row) for row in json.loads(open_store(folder or "/").read_named(name))["images"]]
    except (BadSample, KeyError, RecursionError, TypeError, ValueError) as error:
        expected = "expected `images` with id, file_name, height and width"
        raise TesseraError(f"{url}: no list of images ({expected}): {type(error).__name__} {error}") from error
    for what in ("image_id", "name"):
        if len({getattr(item, what) for item in items}) < len(items):
            raise TesseraError(f"{url}: an image's {what} occurs more than once")
    return sorted(items, key=lambda item: item.name)


def _listed(row: dict[str, Any]) -> Item:
    number, name = whole(row["id"]), row["file_name"]
    if number is None or not isinstance(name, str):
        raise BadSample(f"id {quoted(row['id'])} and file_name {quoted(name)}, expected an integer and a name")
    return Item(name, "", known_id(number), known_size(row))


def claim(work: Work) -> None:
    """Write into the output whose predictions it holds. TesseraError if they are another run's or of other images."""
    target = open_store(work.output)
    ours = Claim(f"{work.storage}/{work.run}", work.source, work.folder)
    if target.create(CLAIM, records.to_json(ours)):
        return
    try:
        theirs = records.read(target, CLAIM, Claim)
    except StoreError:
        raise
    except TesseraError as error:
        raise TesseraError(f"{error}; delete it to go on into this OUTPUT, or choose another") from error
    differing = [f"{name} {value}" for name, value in asdict(theirs).items() if value != getattr(ours, name)]
    if differing:
        raise TesseraError(f"{target.url} holds the predictions of {', '.join(differing)}; choose another OUTPUT")
