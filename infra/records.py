"""JSON that lies on a store, read back as the dataclass that it was written from.

What is on a store may have been written by another version, cut short by a disk or changed by hand. So fields that are
unknown are left, fields that are missing take their default or are named, and values of another type are refused by
their dotted name. No other code of ours takes apart a JSON of the store.
"""

import json
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from infra.errors import TesseraError
from infra.store import Store
from infra.text import quoted

T = TypeVar("T")
_NAMED = 3
"""Of many problems in one JSON, so many are named."""


def parse(kind: type[T], data: bytes | str, source: str) -> T:
    """JSON -> the dataclass (or any other type that pydantic knows), checked as its annotations say.

    Tuples are lists in JSON; nothing else is converted: 1.9, "1" and true are no integers, NaN is no number. source:
    what errors call the JSON. Raises TesseraError: no JSON, another shape, a missing field, a value of another type.
    """
    try:
        from_json(data, allow_inf_nan=False)
        hashable: Any = kind  # mypy holds no type for one
        found: T = _adapter(hashable).validate_json(data, strict=True)
    except ValidationError as error:
        raise TesseraError(f"{source}: {_told(error)}") from error
    except ValueError as error:
        raise TesseraError(f"{source}: damaged, expected JSON ({error})") from error
    return found


def restore(kind: type[T], value: Any, source: str) -> T:
    """As `parse`, of what a JSON held: dicts, lists, texts, numbers."""
    return parse(kind, json.dumps(value), source)


def read(store: Store, key: str, kind: type[T]) -> T:
    """As `parse`, of an object on the store, which errors name by its URL. Raises StoreError, too."""
    return parse(kind, store.read(key), store.url_for(key))


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
