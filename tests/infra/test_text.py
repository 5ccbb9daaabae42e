"""Texts of strangers stay on one line, act upon nothing, and are bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import NoSuchObject, StoreError, TesseraError
from infra.text import NAME, SENTENCE, markdown, quoted, sentence, shown
from preprocessing.source import BadSample, Defect, Rejected, TooManyBad

ROOM = len(" [...] ")
strange = st.text(st.characters(codec="utf-8") | st.sampled_from("\0\n\r\x1b\u202e\u2028\x9b\u0085"), max_size=900)


@given(strange | st.binary(max_size=900) | st.integers() | st.lists(st.integers(), max_size=400))
def test_any_value_is_one_printable_line_of_bounded_length(value):
    for text, most in ((shown(value), NAME), (quoted(value), NAME), (sentence(value), SENTENCE)):
        assert text.isprintable()
        assert len(text) <= most + ROOM


@given(st.text(st.characters(categories=("L", "N", "P", "S")), max_size=NAME))
def test_a_printable_text_stays_as_it_is(text):
    assert shown(text) == text


def test_of_a_long_text_beginning_and_end_remain():
    text = shown("culprit " + "x" * 10_000_000 + " expected")
    assert text.startswith("culprit ")
    assert text.endswith(" expected")


def test_lone_surrogates_are_escaped():
    assert shown("a\udcffb") == "a\\udcffb"


@given(strange)
def test_markdown_of_it_holds_no_syntax(text):
    told = markdown(text)
    plain = told.replace("\\\\", "")
    for character in "`*_[]()<>#|!":
        assert plain.count(character) == plain.count(f"\\{character}")


@pytest.mark.parametrize("kind", [TesseraError, StoreError, NoSuchObject, BadSample])
def test_errors_bound_and_escape_what_they_are_given(kind):
    area = "\x1b[31m" + "x" * 10_000_000
    text = str(kind(f"a.json: area is {area}\nINFO all is well, expected a number"))
    assert text.isprintable()
    assert len(text) < 1100
    assert text.startswith("a.json: area is ")
    assert text.endswith("expected a number")


def test_defects_and_rejections_do_too():
    long = "\x1b]0;" + "y" * 100_000
    defect, rejected = Defect(long, long), Rejected(None, long, long)
    for text in (defect.problem, defect.file, rejected.file, rejected.reason, str(TooManyBad(long, (rejected,)))):
        assert text.isprintable()
        assert len(text) < 1100
