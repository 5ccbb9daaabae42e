"""Logs of flows: ours in them, and errors that are ours told in one line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.logging.handlers import APILogHandler

from infra.errors import TesseraError
from infra.logs import Plain


class _OneLine(logging.Filter):
    """Prefect logs every failure with its traceback; a TesseraError says all there is to know."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, TesseraError):
            record.msg, record.args, record.exc_info, record.exc_text = str(error), (), None, None
        return True


@contextmanager
def flow_logs() -> Iterator[None]:
    """Send the loggers under `tessera` to the flow run's log and the console."""
    ours, one_line, plain = logging.getLogger("tessera"), _OneLine(), Plain()
    handlers = [APILogHandler(), *logging.getLogger("prefect").handlers]
    engines = [logging.getLogger(f"prefect.{name}") for name in ("flow_runs", "task_runs")]
    ours.setLevel(logging.INFO)
    for handler in handlers:
        handler.addFilter(plain)
        ours.addHandler(handler)
    for engine in engines:
        engine.addFilter(one_line)  # stays: the flow's own failure is logged after this context
    try:
        yield
    finally:
        for handler in handlers:
            ours.removeHandler(handler)
            handler.removeFilter(plain)
