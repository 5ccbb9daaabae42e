"""Texts of strangers as text of ours: what data sets, uploads, jobs, stores and servers call things.

All of it passes through here before it stands in an error, a defect, a log, a page or Prefect's database: one line,
nothing that a terminal or a reader of logs acts upon, and of bounded length.
"""

import re

NAME = 200
"""Characters that a name, an id or a value of theirs may take."""
SENTENCE = 1000
"""Characters that a sentence about it may take."""

_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~:@&$])")
_CUT = " [...] "


def shown(value: object, most: int = NAME) -> str:
    """The value's text on one line of at most `most` characters: others than printable ones are escaped, of a longer
    text the beginning and the end remain. Users and passwords in URLs are left out."""
    text = _PASSWORD.sub("***@", value if isinstance(value, str) else str(value))
    if len(text) > most:  # cut first: it may be of any length
        tail = most // 3
        text = text[: most - tail] + _CUT + text[len(text) - tail :]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most + len(_CUT) else shown(text, most)


def quoted(value: object, most: int = NAME) -> str:
    """As `shown`, of the value's repr: texts stand in quotes, so that "1" is told from 1."""
    # a list of millions is not written out to be cut
    return shown(repr(value[:most] if isinstance(value, str | bytes | list | tuple) else value), most)


def sentence(text: object) -> str:
    """An error or a defect: as `shown`, with room for a sentence."""
    return shown(text, SENTENCE)


def markdown(value: object, most: int = NAME) -> str:
    """As `shown`, for Markdown: no character of it formats, links, embeds or ends a table's cell."""
    return _MARKDOWN.sub(r"\\\1", shown(value, most))
