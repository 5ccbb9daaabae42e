"""What all pages share."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from infra.page import date, page

SCRIPT = "</td><script>alert(1)</script>"


def test_the_head_says_what_the_page_is_about():
    text = page("page.html", "a title", {"data set": "coco, val2017", "epochs": "12"})
    assert "<title>a title</title>" in text
    assert "<h1>a title</h1>" in text
    for name, value in (("data set", "coco, val2017"), ("epochs", "12")):
        assert f'<th scope="row">{name}</th><td>{value}</td>' in text


@pytest.mark.parametrize("odd", [SCRIPT, "\ud800\udcff", "a\nb\x1b[2J", "x" * 10_000_000, '"><img src=x>'])
def test_no_text_breaks_a_page(odd: str):
    text = page("page.html", odd, {odd: odd})
    plain = page("page.html", "", {"": ""})
    assert text.encode().count(b"<") == plain.count("<")
    assert len(text) < len(plain) + 20_000


def test_dates_are_utc():
    when = datetime(2026, 11, 30, 23, 30, tzinfo=timezone(timedelta(hours=-2)))
    assert date(when) == "2026-12-01 01:30 UTC"
    assert date()[:13] in {f"{datetime.now(UTC) - timedelta(minutes=m):%Y-%m-%d %H}" for m in (0, 1)}
