"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import Any

import httpx

from infra.errors import TesseraError


def until(happened: Callable[[], Any], seconds: float, what: str) -> None:
    """Wait for it. TesseraError if it takes longer."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TesseraError(f"after {seconds:.0f} s still waiting for {what}")
        time.sleep(0.5)


def healthy(url: str) -> bool:
    """Whether a Prefect server answers there; not yet is no error."""
    try:
        return httpx.get(f"{url}/api/health", timeout=5).is_success
    except httpx.HTTPError:
        return False
