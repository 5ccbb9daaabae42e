"""All single mutations of a JSON: what another version, a disk or a hand may have made of it."""

import json
from collections.abc import Iterator
from typing import Any

LONG = "\x1b[31m\u202e" + "x" * 100_000
DEEP = "[" * 2000 + "]" * 2000
OF_VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "a fraction": 1.9,
    "a text of a number": "1",
    "negative": -1,
    "huge": 10**30,
    "huge float": 1e308,
    "an empty text": "",
    "a long text": LONG,
    "an empty list": [],
    "an empty object": {},
    "a list": [None],
    "an object": {"other": 1},
}
_MARK = "@@here@@"


def mutations(data: bytes, other: bytes) -> Iterator[tuple[str, bytes]]:
    """(what was done, the mutated JSON): to the whole, and to each value at any depth; of a long list to its ends.

    other: a JSON of another kind of object.
    """
    yield from [
        ("empty", b""),
        ("cut short", data[: len(data) // 2]),
        ("no UTF-8", b"\xff" + data),
        ("of another kind", other),
    ]
    yield from [(f"all {what}", json.dumps(value).encode()) for what, value in OF_VALUES.items()]
    yield "nested deeply", DEEP.encode()
    content = json.loads(data)
    for place in _places(content):
        yield f"{place}: not a number", _with(content, place, _MARK).replace(f'"{_MARK}"'.encode(), b"NaN")
        yield f"{place}: nested deeply", _with(content, place, _MARK).replace(f'"{_MARK}"'.encode(), DEEP.encode())
        for what, value in OF_VALUES.items():
            now = _at(content, place)
            alike = now is None or (type(value) is type(now) and isinstance(value, str | bool | list | dict))
            yield f"{place}: {'another of its type' if alike else what}", _with(content, place, value)
        yield f"{place}: dropped", _with(content, place)
    for place in [(), *_places(content)]:
        if isinstance(_at(content, place), dict):
            yield f"{place}: one more", _with(content, (*place, "added by a later version"), [1])


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        steps: list[Any] = [*value]
        steps = steps if len(steps) <= 40 else steps[:2]
    else:
        steps = [*range(len(value))][:: max(1, len(value) - 1)] if isinstance(value, list) else []
    for step in steps:
        yield (*above, step)
        yield from _places(value[step], (*above, step))


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        value = value[step]
    return value


_GONE = object()


def _with(content: Any, place: tuple[Any, ...], value: Any = _GONE) -> bytes:
    copy = json.loads(json.dumps(content))
    parent = _at(copy, place[:-1])
    if value is _GONE:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return json.dumps(copy).encode()
