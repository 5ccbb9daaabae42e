"""Log lines of ours: names of strangers may stand in them, and must forge no other line, nor reach a terminal raw."""

import logging
from typing import TextIO

from infra.text import SENTENCE, shown

_MOST_LINES = 500


class Plain(logging.Filter):
    """For handlers: of messages of the loggers under `tessera` each line is printable, cut, and all after the first are
    indented, so that none of them looks like a message of its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets all pass."""
        if record.name.partition(".")[0] == "tessera" and not hasattr(record, "plain"):
            lines = record.getMessage().splitlines()[:_MOST_LINES]
            record.msg, record.args, record.plain = "\n    ".join(shown(line, SENTENCE) for line in lines), (), True
        return True


def to_stream(stream: TextIO, level: int = logging.INFO) -> None:
    """Messages of this process, without times or names. level: of what is not ours."""
    logging.basicConfig(level=level, format="%(message)s", stream=stream)
    logging.getLogger("tessera").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Plain())
