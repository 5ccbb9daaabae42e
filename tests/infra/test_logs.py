"""Names of strangers in a message forge no other one and reach no terminal raw."""

import io
import logging

from infra.logs import Plain


def logged(name: str, text: str, *facts: object) -> str:
    stream = io.StringIO()
    handlers = [logging.StreamHandler(stream) for _ in range(2)]  # as a flow's: the second leaves it as it is
    log = logging.getLogger(name)
    for handler in handlers:
        handler.addFilter(Plain())
        log.addHandler(handler)
    try:
        log.warning(text, *facts)
    finally:
        for handler in handlers:
            log.removeHandler(handler)
    first, second = stream.getvalue()[: len(stream.getvalue()) // 2], stream.getvalue()[len(stream.getvalue()) // 2 :]
    assert first == second
    return first.removesuffix("\n")


def test_a_line_that_a_name_would_forge_is_indented():
    for ending in ("\n", "\r", "\r\n", "\u2028", "\x0b", "\x85"):
        told = logged("tessera.flow", "upload %s is bad", f"a{ending}12:00:00 | INFO | all is well")
        assert told == "upload a\n    12:00:00 | INFO | all is well is bad"


def test_nothing_reaches_a_terminal_raw_or_without_bound():
    told = logged("tessera.flow", "%s", "\x1b[31m\u202e\x07" + "x" * 10_000_000)
    assert told.isprintable()
    assert len(told) < 1100
    assert len(logged("tessera.flow", "%s", "\n" * 1_000_000)) < 10_000


def test_messages_of_others_are_theirs():
    assert logged("elsewhere", "%s", "a\nb") == "a\nb"
