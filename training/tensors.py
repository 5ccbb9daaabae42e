"""Tensors as one object of safetensors, with their checksum among its metadata."""

import json
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from infra import checksums
from infra.errors import TesseraError

_LENGTH, _ALIGNED = 8, 8
_METADATA, _CHECKSUM = "__metadata__", "crc32"


def pack(tensors: dict[str, Tensor]) -> bytes:
    """Bytes of a safetensors file; the same for the same tensors."""
    plain = save({name: value.contiguous() for name, value in tensors.items()})
    header, values = _parts(plain)
    text = json.dumps({_METADATA: {_CHECKSUM: _checksum(header, values)}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return b"".join((len(text).to_bytes(_LENGTH, "little"), text, values))


def unpack(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors, on the CPU; of other writers, too, which leave no checksum.

    Raises TesseraError, naming the source: it is no safetensors; DamagedObject: it is not what `pack` gave.
    """
    try:
        tensors = load(data)
        header, values = _parts(data)
    except (SafetensorError, ValueError) as error:
        raise TesseraError(f"{source}: expected safetensors ({error})") from error
    told = header.pop(_METADATA, {}).get(_CHECKSUM)
    checksums.require(told is None or told == _checksum(header, values), source)
    return tensors


def _parts(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """(name to dtype, shape and place of each tensor; the tensors' bytes)."""
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    return json.loads(data[_LENGTH:end]), memoryview(data)[end:]


def _checksum(header: dict[str, Any], values: memoryview) -> str:
    return f"{checksums.crc32(values, checksums.crc32(json.dumps(header, sort_keys=True).encode())):08x}"
