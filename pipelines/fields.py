"""The types of jobs' fields: what no text, number or option of a job may be, whoever sent it.

Texts are one printable line of bounded length, numbers are finite and bounded, and true is no number.
"""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from infra.text import quoted, sentence, shown

_DEEP = 8
_LONG = 1000
_MANY = 1000


def told(error: ValidationError) -> str:
    """What is wrong with a job, in one sentence without what the job holds."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [f"{_place(one['loc'])}: {one['msg']}" for one in problems[:3]]
    return sentence("; ".join(lines) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else ""))


def _place(loc: tuple[int | str, ...]) -> str:
    """Of a value, without pydantic's names of its own validators."""
    return shown(".".join(str(part) for part in loc if "[" not in str(part)) or "job")


def _plain(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError(f"{quoted(text)}, expected printable characters on one line")
    return text


def bounded(value: Any, deep: int = 0) -> Any:
    """The value of an option, as it is. ValueError for what no option ever has."""
    if deep > _DEEP:
        raise ValueError(f"nested more than {_DEEP} deep")
    if isinstance(value, dict):
        for name, below in value.items():
            bounded(name, deep)
            bounded(below, deep + 1)
    elif isinstance(value, list | tuple):
        for below in value:
            bounded(below, deep + 1)
    elif isinstance(value, str) and (len(value) > _LONG or not value.isprintable()):
        raise ValueError(f"{quoted(value)}, expected at most {_LONG} printable characters")
    elif isinstance(value, int | float) and not (math.isfinite(value) if isinstance(value, float) else _fits(value)):
        raise ValueError(f"{quoted(value)}, expected a finite number of at most 64 bits")
    if isinstance(value, dict | list | tuple) and len(value) > _MANY:
        raise ValueError(f"{len(value)} values, expected at most {_MANY}")
    return value


def _fits(number: int) -> bool:
    return -(1 << 63) <= number < 1 << 63


Text = Annotated[str, Field(max_length=_LONG), AfterValidator(_plain)]
"""Names, paths, URLs."""
Options = Annotated[dict[str, Any], AfterValidator(bounded)]
"""By dotted name."""
Count = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
Epochs = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False, strict=True)]
Seconds = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False, strict=True)]
Gigabytes = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False, strict=True)]
