"""JSON of the store comes back as what it was written from, or is refused by the name of what is wrong."""

import json
from dataclasses import asdict, dataclass, field

import pytest

from infra import records
from infra.errors import TesseraError
from infra.store import open_store


@dataclass(frozen=True)
class Inner:
    name: str
    size: tuple[int, int] = (1, 2)


@dataclass(frozen=True)
class Outer:
    number: int
    share: float
    inner: tuple[Inner, ...]
    by: dict[str, float | None] = field(default_factory=dict)
    named: str | None = None


WHOLE = Outer(3, 0.5, (Inner("a"), Inner("b", (3, 4))), {"all": None, "things": 1}, "x")
GIVEN = asdict(WHOLE)


def parse(value):
    return records.parse(Outer, json.dumps(value), "s3://b/k.json")


def test_what_was_written_is_read():
    assert parse(GIVEN) == records.restore(Outer, GIVEN, "x") == WHOLE


def test_of_another_version_more_is_left_and_less_takes_its_default():
    assert parse(GIVEN | {"new": [1], "inner": [{"name": "a", "more": {}}]}) == Outer(
        3, 0.5, (Inner("a"),), WHOLE.by, "x"
    )
    assert parse({k: v for k, v in GIVEN.items() if k not in ("by", "named")}) == Outer(3, 0.5, WHOLE.inner)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"number": 1.9}, "number"),
        ({"number": "1"}, "number"),
        ({"number": True}, "number"),
        ({"number": None}, "number"),
        ({"share": "x"}, "share"),
        ({"inner": {}}, "inner"),
        ({"inner": [{}]}, "inner.0.name"),
        ({"inner": [{"name": "a", "size": [1]}]}, "inner.0.size"),
        ({"by": {"all": "1"}}, "by.all"),
        ({"named": 3}, "named"),
    ],
)
def test_what_is_wrong_is_named_with_what_was_expected(change, named):
    with pytest.raises(TesseraError, match=rf"^s3://b/k\.json: .*{named}"):
        parse(GIVEN | change)


@pytest.mark.parametrize("value", [None, [], 3, "x", {}])
def test_another_shape_is_refused(value):
    with pytest.raises(TesseraError, match=r"^s3://b/k\.json: "):
        parse(value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"number": NaN}', b"null x"])
def test_what_is_no_json_is_refused(data):
    with pytest.raises(TesseraError, match=r"^s3://b/k\.json: "):
        records.parse(Outer, data, "s3://b/k.json")


def test_half_a_character_is_read_as_it_is_shown():
    """As names that are no UTF-8 have them; a text that looks like one stays as it is."""
    for text in ("\udcff", "a\ud800b", "\\udcff", "\\\udcff", "😀", '"\\"', "\n\udcff"):
        found = parse(GIVEN | {"named": text}).named
        assert found == "".join(c.encode("unicode_escape").decode() if "\ud800" <= c <= "\udfff" else c for c in text)


def test_a_long_value_is_cut():
    with pytest.raises(TesseraError) as caught:
        parse(GIVEN | {"number": "\x1b[31m" + "9" * 1_000_000})
    assert len(str(caught.value)) < 1100
    assert str(caught.value).isprintable()


def test_an_object_is_named_by_its_url(tmp_path):
    store = open_store(str(tmp_path))
    store.write("a.json", json.dumps(GIVEN).encode())
    assert records.read(store, "a.json", Outer) == WHOLE
    store.write("a.json", b"{}")
    with pytest.raises(TesseraError, match=f"^{tmp_path}/a.json: lacks 'number'"):
        records.read(store, "a.json", Outer)
