import json

import pytest
import torch

from infra import checksums, records
from infra.errors import DamagedObject, TesseraError
from training.tensors import pack, unpack

CONTENT = {"run": "train/0123456789abcdef", "pq": {"all": 61.5, "stuff": None}, "uploads": ["a", "b"], "steps": 3}
TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.int64), "none": torch.empty(0, 4)}


def flips(data: bytes, every: int = 1) -> list[bytes]:
    """The data with one bit of it turned, each bit or one of some."""
    spoilt = []
    for bit in range(0, 8 * len(data), every):
        copy = bytearray(data)
        copy[bit // 8] ^= 1 << bit % 8
        spoilt.append(bytes(copy))
    return spoilt


@pytest.mark.parametrize("content", [CONTENT, [], {}, [1.5, "x"]])
def test_any_reader_of_json_reads_what_is_sealed(content: object):
    data = records.to_json(content)
    assert json.loads(data) == content
    assert records.parse(type(content), data, "here") == content


def test_every_flipped_bit_of_a_json_is_noticed_or_changes_nothing():
    noticed = 0
    for spoilt in flips(records.to_json(CONTENT)):
        try:
            assert records.parse(dict, spoilt, "here.json") == CONTENT
        except TesseraError:
            noticed += 1
    assert noticed > 8 * len(json.dumps(CONTENT))


def test_what_a_program_or_an_earlier_version_wrote_has_no_seal_and_is_taken():
    changed = json.loads(records.to_json(CONTENT)) | {"steps": 4}
    for data in (json.dumps(changed), json.dumps(changed, indent=1), records.to_json(changed)):
        assert records.parse(dict, data if isinstance(data, bytes) else data.encode(), "here") == changed
    with pytest.raises(DamagedObject, match=r"^here: damaged"):
        checksums.check(records.to_json(CONTENT).replace(b"61.5", b"62.5"), "here")


def test_every_flipped_bit_of_weights_is_noticed_or_changes_nothing():
    data = pack(TENSORS)
    assert data == pack(dict(TENSORS))
    noticed = 0
    for spoilt in flips(data):
        try:
            found = unpack(spoilt, "here")
            assert found.keys() == TENSORS.keys()
            assert all(
                torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items()
            )
        except TesseraError:
            noticed += 1
    assert noticed > 8 * (12 * 4 + 2 * 8)
