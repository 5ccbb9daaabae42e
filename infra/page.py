"""Pages for people: each is one HTML file that opens from disk without a network. Their head, their pictures and their
tables are those of page.html.

Whatever stands in them passes through text.shown, so that no name of a data set, an upload or a file can break one.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from infra.text import SENTENCE, shown

_HERE = Path(__file__).parent
UNKNOWN = "not recorded"
"""What a fact is that nobody wrote down."""


def page(template: Path | str, title: str, facts: Mapping[str, str], **content: Any) -> str:
    """The page of a template that extends page.html. facts: its head, by name, what the page is about."""
    path = _HERE / template
    folders = jinja2.FileSystemLoader([path.parent, _HERE])
    templates = jinja2.Environment(loader=folders, autoescape=True, finalize=_finalize)
    templates.filters |= {"percent": percent, "interval": interval, "picture": _picture, "whole": _whole}
    return templates.get_template(path.name).render(title=title, facts=facts, **content)


def percent(value: float | None) -> str:
    """One decimal, or a dash where there is no value."""
    return "-" if value is None else f"{value:.1f}"


def interval(ends: tuple[float, float] | None) -> str:
    """One decimal each, or a dash."""
    return "-" if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}"


def date(when: datetime | None = None) -> str:
    """To the minute, UTC; without one now."""
    return f"{(when or datetime.now(UTC)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _finalize(value: Any) -> Any:
    return shown(value, SENTENCE) if type(value) is str else value


def _picture(data: str) -> Markup:
    """Base64 of WebP as an image's address; of any length, so it is not shown."""
    if not re.fullmatch(r"[A-Za-z0-9+/]*=*", data):
        raise ValueError("a picture that is no base64")
    return Markup("data:image/webp;base64,") + Markup(data)


def _whole(text: str) -> Markup:
    """Our own text of several lines, of any length."""
    return escape(text)
