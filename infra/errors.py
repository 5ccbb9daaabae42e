"""The one error that users see."""

from infra.text import sentence


class TesseraError(Exception):
    """Bad input, configuration or environment, told in one sentence that names the culprit.

    Entry points print its text alone and exit with 1; every other exception is a bug of ours and keeps
    its traceback. Its text is one line of bounded length, whatever names of strangers stand in it (infra.text).
    """

    def __init__(self, text: object = "", *facts: object) -> None:
        super().__init__(sentence(text), *facts)


class StoreError(TesseraError):
    """The object store did not do what it was asked to: it is away, full, or refuses. No fault of what was stored."""


class NoSuchObject(StoreError):
    """The store answers, and has no object of this key."""


class DamagedObject(TesseraError):
    """What the store gives is not what was written there."""
