"""LabelTable: the only place that knows categories."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import TesseraError
from infra.text import quoted
from preprocessing.json_values import flag, whole


@dataclass(frozen=True)
class Category:
    """One category of a data set."""

    dataset_id: int
    """The data set's own id; not contiguous in COCO."""
    name: str
    is_thing: bool
    color: tuple[int, int, int] = field(compare=False)
    """RGB, 0-255. It teaches nothing: categories that differ in it alone are the same."""

    def __str__(self) -> str:
        return f"{self.dataset_id} {quoted(self.name)} ({'thing' if self.is_thing else 'stuff'})"


@dataclass(frozen=True)
class LabelTable:
    """Dataset id <-> contiguous id <-> name <-> is_thing <-> colour, in the order of the annotation file.

    The contiguous id of a category is its position in `categories`, 0-based; every array inside Tessera
    holds contiguous ids, every file in COCO's layout holds dataset ids.
    """

    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        counts = Counter(c.dataset_id for c in self.categories)
        repeated = sorted(i for i, times in counts.items() if times > 1)
        if repeated:
            raise TesseraError(f"categories: ids {repeated} are listed more than once")
        if not self.categories:
            raise TesseraError("categories: the list is empty")

    @classmethod
    def from_coco(cls, categories: Iterable[Mapping[str, Any]], source: str = "categories") -> "LabelTable":
        """Read the `categories` list of a COCO panoptic JSON.

        Raises TesseraError naming `source` when an entry lacks `id`, `name` or `isthing` (an ordinary
        detection JSON has no `isthing`), or has another type in them. A missing colour is derived from the position.
        """
        table = []
        for position, entry in enumerate(categories):
            if not isinstance(entry, Mapping):
                raise TesseraError(f"{source}: category {quoted(entry)} is no object")
            missing = {"id", "name", "isthing"} - entry.keys()
            if missing:
                hint = " (is this the detection JSON?)" if "isthing" in missing else ""
                raise TesseraError(f"{source}: category {quoted(entry)} lacks {sorted(missing)}{hint}")
            number, is_thing, color = whole(entry["id"]), flag(entry["isthing"]), _color(entry.get("color"), position)
            if number is None or color is None:
                expected = "expected an integer id, and three integers from 0 to 255 as color"
                raise TesseraError(f"{source}: category {quoted(entry)}: {expected}")
            if not _is_name(entry["name"]):  # it stands in logs, tables and pages
                raise TesseraError(f"{source}: category {quoted(entry)}: expected a printable name")
            if is_thing is None:
                raise TesseraError(f"{source}: category {quoted(entry)}: isthing must be 0 or 1")
            table.append(Category(number, str(entry["name"]), is_thing, color))
        try:
            return cls(tuple(table))
        except TesseraError as error:
            raise TesseraError(f"{source}: {error}") from error

    def difference(self, other: "LabelTable") -> str:
        """The first category that the other table has not, or has otherwise; empty if they are equal but for order."""
        ours, theirs = ({c.dataset_id: c for c in table.categories} for table in (self, other))
        for number in ours | theirs:
            if ours.get(number) != theirs.get(number):
                return f"{ours.get(number, 'nothing')} against {theirs.get(number, 'nothing')}"
        return ""

    def to_coco(self) -> list[dict[str, Any]]:
        """The `categories` list of a COCO panoptic JSON."""
        return [
            {"id": c.dataset_id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)}
            for c in self.categories
        ]

    def __len__(self) -> int:
        return len(self.categories)

    @cached_property
    def contiguous(self) -> dict[int, int]:
        """Contiguous id by dataset id."""
        return {c.dataset_id: i for i, c in enumerate(self.categories)}

    @cached_property
    def is_thing(self) -> NDArray[np.bool_]:
        """bool, (categories,)."""
        return np.array([c.is_thing for c in self.categories])

    @cached_property
    def colors(self) -> NDArray[np.uint8]:
        """uint8 RGB, (categories, 3)."""
        return np.array([c.color for c in self.categories], np.uint8)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """By contiguous id."""
        return tuple(c.name for c in self.categories)

    @cached_property
    def unique_names(self) -> tuple[str, ...]:
        """By contiguous id, no two alike: what reports call categories.

        A name that several have, or that says nothing, has its dataset id behind it, "wall (17)", as often as it takes
        to be no name of another category.
        """
        times, given = Counter(self.names), list[str]()
        taken = set(self.names)
        for category in self.categories:
            name = category.name if category.name.strip() else "category"
            if times[category.name] > 1 or name != category.name:
                while (name := f"{name} ({category.dataset_id})") in taken:
                    pass
                taken.add(name)
            given.append(name)
        return tuple(given)


def _color(written: Any, position: int) -> tuple[int, int, int] | None:
    """As it is written, one of the position where there is none; None for what is no colour."""
    if not written:
        return _spread_color(position)
    channels = [whole(value) for value in written] if isinstance(written, list | tuple) else []
    if len(channels) != 3 or not all(value is not None and 0 <= value <= 255 for value in channels):
        return None
    red, green, blue = channels
    return red or 0, green or 0, blue or 0


def _is_name(written: Any) -> bool:
    """Texts, and integers, which are their digits."""
    return isinstance(written, str | int) and not isinstance(written, bool) and str(written).isprintable()


def _spread_color(position: int) -> tuple[int, int, int]:
    """Well separated colours for neighbouring positions: multiples of large primes modulo 256."""
    return (67 + 109 * position) % 256, (131 + 71 * position) % 256, (197 + 173 * position) % 256
