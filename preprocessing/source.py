"""What every kind of annotations offers: an index of records, each of which can be read by itself."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from PIL import Image, UnidentifiedImageError

from infra.errors import TesseraError
from infra.records import Count
from infra.text import quoted, sentence, shown
from preprocessing.files import File
from preprocessing.geometry import Size
from preprocessing.image_file import read_image
from preprocessing.json_values import whole
from preprocessing.labels import LabelTable
from preprocessing.opening import BROKEN, NoMemory, within_memory
from preprocessing.panoptic_map import PanopticMap


class BadSample(Exception):
    """A sample that cannot be used; its text is the reason kept in the manifest."""

    def __init__(self, reason: object) -> None:
        super().__init__(sentence(reason))


@dataclass(frozen=True)
class Defect:
    """One thing wrong with a data set: what is, and what was expected."""

    problem: str
    file: str
    image_id: int | None = None
    segment: int | None = None
    usable: bool = False
    """The sample can be trained on all the same."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "problem", sentence(self.problem))
        object.__setattr__(self, "file", shown(self.file))


@dataclass(frozen=True)
class Rejected:
    """A sample set aside."""

    image_id: Count | None
    file: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", shown(self.file))
        object.__setattr__(self, "reason", sentence(self.reason))

    def __str__(self) -> str:
        named = "" if self.image_id is None else f"image {self.image_id}, "
        told = self.reason if self.reason.startswith(self.file) else f"{self.file}: {self.reason}"
        return f"{named}{told}"


class TooManyBad(TesseraError):
    """More samples of a set had to be set aside than it may lose, or all."""

    def __init__(self, text: str, rejected: tuple[Rejected, ...]) -> None:
        super().__init__(text, rejected)
        self.rejected = rejected

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Examined:
    """A sample as it was found, and all that is wrong with it."""

    data: bytes
    """The image file, empty if it cannot be read."""
    picture: Image.Image | None
    """The same, as `read_image` has it: 8-bit RGB, EXIF rotation not applied."""
    truth: PanopticMap | None
    defects: tuple[Defect, ...]


@dataclass(frozen=True)
class Record(ABC):
    """What a task needs to read one sample: places of files, and what the driver read of it."""

    image_id: int
    image: File
    size: Size | None
    """Height, width that the annotations state, if they do."""

    @property
    @abstractmethod
    def masks(self) -> tuple[File, ...]:
        """The files that the truth is read from."""

    @abstractmethod
    def read_truth(self, labels: LabelTable, defects: list[Defect]) -> PanopticMap | None:
        """The panoptic map with ids 1..N. Adds all that is wrong to `defects`; None if there is no map at all."""

    def facts(self) -> Any:
        """What the truth depends on besides the files, as JSON."""
        return None

    def fingerprint(self) -> str:
        """Changes when the sample does, and is the same for files on disk and in a zip.

        Masks are known by their contents. For images the size stands for them: people mend masks, and to read
        a full COCO only to find out that nothing changed would cost as much as computing the targets.

        Raises TesseraError for facts that are nested so deeply that they could just be read.
        """
        masks = [(mask.name, _or_minus_one(mask.crc)) for mask in self.masks]
        facts = [self.image_id, self.image.name, _or_minus_one(self.image.size), masks, self.size, self.facts()]
        try:
            return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        except RecursionError as error:
            named = f"{self.masks[0]}: image {self.image_id}"
            raise TesseraError(f"{named} is nested too deeply in the JSON, expected segments_info") from error

    def defect(
        self, problem: str, file: File | None = None, segment: int | None = None, usable: bool = False
    ) -> Defect:
        """A defect of this sample, by default in its first mask."""
        return Defect(problem, str(file or self.masks[0]), self.image_id, segment, usable)

    def examine(self, labels: LabelTable) -> Examined:
        """Read everything and say all that is wrong with it."""
        try:
            with within_memory():
                return self._examined(labels)
        except NoMemory as error:
            return Examined(b"", None, None, (self.defect(str(error), self.image),))

    def _examined(self, labels: LabelTable) -> Examined:
        defects: list[Defect] = []
        data, picture = self._read_image(defects)
        truth = self.read_truth(labels, defects)
        expected, by = (self.size, "the JSON says") if self.size else (truth and truth.size, "its annotation is")
        image_size = picture and (picture.height, picture.width)
        for what, size, file in (("image", image_size, self.image), ("PNG", truth and truth.size, self.masks[0])):
            if size and expected and size != expected:
                problem = f"the {what} is {size[1]}x{size[0]}, {by} {expected[1]}x{expected[0]}"
                defects.append(self.defect(problem, file))
        return Examined(data, picture, truth, tuple(defects))

    def _read_image(self, defects: list[Defect]) -> tuple[bytes, Image.Image | None]:
        data = read_file(self, self.image, defects)
        if data is None:
            return b"", None
        try:
            found = read_image(data)
        except BROKEN as error:
            why = "of no format that is known" if isinstance(error, UnidentifiedImageError) else error
            defects.append(self.defect(f"not a readable image ({why})", self.image))
            return data, None
        for note in found.notes:
            defects.append(self.defect(note.refused or note.text, self.image, usable=not note.refused))
        return data, found.rgb


@dataclass(frozen=True)
class Origin:
    """Where a split was read from: what reports say of it. No part of what shards or runs are known by."""

    root: str
    """Folder or URL of the data set."""
    split: str
    layout: str

    @property
    def title(self) -> str:
        """The data set's own name, and the split."""
        return f"{shown(PurePath(self.root).name or self.root)} {shown(self.split)}"

    def __str__(self) -> str:
        return f"{shown(self.root)}, layout {self.layout}, split {shown(self.split)}"


@dataclass(frozen=True)
class Index:
    """One split of a data set, read once by the driver."""

    labels: LabelTable
    records: tuple[Record, ...]
    rejected: tuple[Rejected, ...]
    """Samples that could not become a record."""
    unused: tuple[Defect, ...] = ()
    """Files that belong to no sample."""
    origin: Origin | None = field(default=None, compare=False)

    def under(self, labels: LabelTable) -> "Index":
        """The same samples by another table of the same categories, so that each has the place that it has there.

        Records know categories by their dataset id. TesseraError naming the first category that is not in both alike.
        """
        if differ := self.labels.difference(labels):
            raise TesseraError(f"other categories: {differ}")
        return replace(self, labels=labels)


def read_sample(record: Record, labels: LabelTable) -> tuple[bytes, PanopticMap]:
    """The image file's bytes, checked to decode, and the panoptic map. Raises BadSample."""
    found = usable(record.examine(labels))
    assert found.truth is not None
    return found.data, found.truth


def usable(found: Examined) -> Examined:
    """The same, if the sample can be trained on. Raises BadSample with all that forbids it."""
    problems = [f"{d.file}: {d.problem}" for d in found.defects if not d.usable]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BadSample("; ".join(problems[:3]) + more)
    return found


def read_file(record: Record, file: File, defects: list[Defect]) -> bytes | None:
    """The bytes, or None and a defect."""
    try:
        return file.read()
    except OSError as error:
        defects.append(record.defect(f"cannot be read ({error.strerror or error})", file))
        return None


def known_id(written: Any) -> int:
    """The id of an image as an annotation has it: a number is itself, a name gets one. Raises BadSample."""
    if isinstance(written, str) and written.isprintable():
        return stable_id(written)
    number = whole(written)
    if number is None:
        raise BadSample(f"image_id is {quoted(written)}, expected an integer or a name")
    if not 0 <= number < 1 << 63:  # others are no seed, and give a name that a shard cannot hold
        raise BadSample(f"image_id is {str(number)[:20]}, expected 0 to 2^63 - 1")
    return number


def known_size(entry: Mapping[str, Any]) -> Size | None:
    """Height, width that a JSON's image has; None where both are missing or null. Raises BadSample."""
    written = [entry.get(name) for name in ("height", "width")]
    if written == [None, None]:
        return None
    height, width = map(whole, written)
    if height is None or width is None or min(height, width) < 1:
        told = " and ".join(map(quoted, written))
        raise BadSample(f"height and width are {told}, expected positive integers, or neither")
    return height, width


def stable_id(name: str) -> int:
    """An image id for data sets whose images have names only: the same wherever and whenever it is computed."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 10**12


def shared_pictures(index: Index, other: Index) -> list[Record]:
    """The records of an index whose image `other` has, too: a file of this name with the same bytes."""
    by_name = {record.image.name: record.image for record in other.records}
    return [r for r in index.records if (same := by_name.get(r.image.name)) and _is_same(r.image, same)]


def _is_same(one: File, two: File) -> bool:
    """Most are told apart by their sizes, without being read."""
    sizes = _or_minus_one(one.size), _or_minus_one(two.size)
    return sizes[0] == sizes[1] != -1 and _or_minus_one(one.crc) == _or_minus_one(two.crc)


def without_repeats(records: Iterable[Record]) -> tuple[list[Record], list[Rejected]]:
    """Records of ids that occur once; all of an id that occurs twice are rejected, since none is known to be right."""
    by_id: dict[int, list[Record]] = {}
    for record in records:
        by_id.setdefault(record.image_id, []).append(record)
    single = [same[0] for same in by_id.values() if len(same) == 1]
    repeated = [
        Rejected(i, str(record.masks[0]), f"{len(same)} entries have the image id {i}, expected one")
        for i, same in by_id.items()
        if len(same) > 1
        for record in same
    ]
    return single, repeated


def _or_minus_one(ask: Any) -> int:
    """Missing files have a fingerprint too: the shard task rejects the sample with its reason."""
    try:
        return int(ask())
    except OSError:
        return -1
