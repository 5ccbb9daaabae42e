"""JSON that lies on a store, read back as the dataclass that it was written from.

What is on a store may have been written by another version, cut short by a disk or changed by hand. So fields that are
unknown are left, fields that are missing take their default or are named, and values of another type are refused by
their dotted name. No other code of ours takes apart a JSON of the store.
"""

import dataclasses
import json
import re
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from infra import checksums
from infra.errors import TesseraError
from infra.store import Store
from infra.text import quoted

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Of objects, pixels, bytes, images; ids are counts, too."""
Flag = Annotated[int, Field(ge=0, le=1)]
"""COCO's 0 or 1."""
Amount = Annotated[float, Field(ge=0, lt=1e15)]
"""Seconds, hours, rates."""
Percent = Annotated[float, Field(ge=-1e-6, le=100 + 1e-6)]
"""With room for rounding."""
Key = Annotated[str, Field(pattern=r"^[^/\p{C}]+(/[^/\p{C}]+)+$", max_length=1000)]
"""Of an object or a folder, under the store's root."""

T = TypeVar("T")
_LONE = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)
"""Escapes of half a character, as names that are no UTF-8 have them: only Python reads them. They are read as shown."""
_NAMED = 3
"""Of many problems in one JSON, so many are named."""


def parse(kind: type[T], data: bytes | str, source: str) -> T:
    """JSON -> the dataclass (or any other type that pydantic knows), checked as its annotations say.

    Tuples are lists in JSON; nothing else is converted: 1.9, "1" and true are no integers, NaN is no number. source:
    what errors call the JSON. Raises TesseraError: no JSON, another shape, a missing field, a value of another type, or
    what the dataclass says of its values; DamagedObject: other bytes than `to_json` gave.
    """
    text = _LONE.sub(lambda found: b"\\" + found[0] if found[1] else found[0], _bytes(data))
    try:
        from_json(text, allow_inf_nan=False)
        hashable: Any = kind  # mypy holds no type for one
        found: T = _adapter(hashable).validate_json(text, strict=True)
    except ValidationError as error:
        raise TesseraError(f"{source}: {_told(error)}") from error
    except ValueError as error:
        raise TesseraError(f"{source}: damaged, expected JSON ({error})") from error
    except TesseraError as error:  # a dataclass's own checks
        raise TesseraError(f"{source}: {error}") from error
    if isinstance(data, bytes):
        checksums.check(data, source)  # last: what is of another version is told as that, also if edited by hand
    return found


def restore(kind: type[T], value: Any, source: str) -> T:
    """As `parse`, of what a JSON held: dicts, lists, texts, numbers."""
    return parse(kind, json.dumps(value), source)


def read(store: Store, key: str, kind: type[T]) -> T:
    """As `parse`, of an object on the store, which errors name by its URL. Raises StoreError, too."""
    return parse(kind, store.read(key), store.url_for(key))


def to_json(value: Any, indent: int | None = 1) -> bytes:
    """What `parse` reads: dataclasses and plain values as JSON, with its checksum (infra.checksums)."""
    return checksums.seal(json.dumps(value, indent=indent, default=plain).encode())


def plain(value: Any) -> Any:
    """A dataclass as a dict, for json.dumps. Raises TypeError for what JSON does not know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no place in a config or manifest")


def _bytes(data: bytes | str) -> bytes:
    return data.encode(errors="surrogatepass") if isinstance(data, str) else data


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _told(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return "; ".join(map(_problem, problems[:_NAMED])) + more


def _problem(one: ErrorDetails) -> str:
    name = ".".join(map(str, one["loc"])) or "it"
    if one["type"] in ("missing", "missing_argument"):
        return f"lacks {quoted(name)}, as Tessera writes it"
    return f"{quoted(name)} is {quoted(one['input'])}, expected {one['msg'].removeprefix('Input should be ')}"
