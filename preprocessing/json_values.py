"""Values as strangers' JSON writes them: which are integers, which are yes or no. Nothing is cut, nothing guessed."""

from collections.abc import Mapping
from typing import Any

_EXACT = 1 << 53
"""Up to here a float64 that is whole is the number that was meant."""


def whole(value: Any) -> int | None:
    """The integer that it is, 3.0 as well as 3; None for 1.9, "1", true and all else."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer() and abs(value) <= _EXACT:
        return int(value)
    return None


def flag(value: Any) -> bool | None:
    """What 0, 1, 0.0, 1.0, false and true say; None for all else."""
    number = value if isinstance(value, bool) else whole(value)
    return bool(number) if number in (0, 1) else None


def is_crowd(row: Mapping[str, Any]) -> bool | None:
    """A segment's `iscrowd`, no where it is left out or null; None for what is neither yes nor no."""
    written = row.get("iscrowd")
    return False if written is None else flag(written)


def image_key(value: Any) -> int | str | None:
    """An image's id as the lists of one JSON have it: 3 and 3.0 are one image, "3" another, true is none."""
    return value if isinstance(value, str) else whole(value)
