"""The one error that users see."""


class TesseraError(Exception):
    """Bad input, configuration or environment, told in one sentence that names the culprit.

    Entry points print its text alone and exit with 1; every other exception is a bug of ours and keeps
    its traceback.
    """


class StoreError(TesseraError):
    """The object store did not do what it was asked to: it is away, full, or refuses. No fault of what was stored."""


class NoSuchObject(StoreError):
    """The store answers, and has no object of this key."""
