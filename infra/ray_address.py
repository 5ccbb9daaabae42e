"""Where Ray may be. Imports no Ray, so that a job can be refused before anything starts."""

import os
import re

from infra.errors import TesseraError
from infra.text import quoted

LOCAL = "local"
AUTO = "auto"
_HOST_AND_PORT = re.compile(r"([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:]+\]):([0-9]{1,5})")


def from_environment() -> str:
    """TESSERA_RAY, else local."""
    return os.environ.get("TESSERA_RAY") or LOCAL


def chosen(asked: str) -> str:
    """The address that a job asks for. TesseraError unless it is local, auto, or what this worker's TESSERA_RAY says.

    Whoever answers there gets our code and our keys, and runs code in this process: that is no matter for a job.
    """
    here = from_environment()
    if asked not in {LOCAL, AUTO, here}:
        others = "" if here in {LOCAL, AUTO} else f", or {quoted(here)}"
        raise TesseraError(
            f"ray {quoted(asked)}: expected {LOCAL} or {AUTO}{others}; a cluster elsewhere is named by TESSERA_RAY in "
            "the environment of the worker, never by a job"
        )
    return checked(asked)


def checked(address: str) -> str:
    """The address as Ray is to be asked for it; TesseraError unless it is local, auto or host:port.

    `auto` is what RAY_ADDRESS says, where that is set: so Ray has it. A URL is none: of ray://, Ray unpickles what the
    server answers; for any other scheme it imports the module of that name.
    """
    if address == AUTO:
        address = os.environ.get("RAY_ADDRESS") or AUTO
    found = _HOST_AND_PORT.fullmatch(address)
    if address in {LOCAL, AUTO} or (found and 0 < int(found[2]) < 1 << 16):
        return address
    name = "TESSERA_RAY (for auto: RAY_ADDRESS)"
    raise TesseraError(f"Ray at {quoted(address)}: expected {LOCAL}, {AUTO} or host:port; correct {name}")


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of a checked address; None for local and auto."""
    found = _HOST_AND_PORT.fullmatch(address)
    return None if found is None else (found[1].strip("[]"), int(found[2]))
