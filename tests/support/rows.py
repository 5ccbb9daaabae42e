"""Rows of a run, any and plausible ones."""

import math

from hypothesis import strategies as st

from training.metrics import Row

NAMES = st.text("abcdefghij_", min_size=1, max_size=8)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SHARES = st.floats(0, 1)


def rows(losses: st.SearchStrategy[float]) -> st.SearchStrategy[list[Row]]:
    """Up to six rows, some without losses or figures, with losses of these values."""
    return st.lists(
        st.builds(
            Row,
            step=st.integers(0, 2**62),
            epoch=NUMBERS,
            losses=st.dictionaries(NAMES, losses, max_size=3),
            lr=NUMBERS,
            grad_norm=NUMBERS,
            images_per_s=NUMBERS,
            data_wait=SHARES,
            memory_gib=NUMBERS,
            workers=st.integers(1, 4096),
            time=NUMBERS,
            figures=st.dictionaries(NAMES, NUMBERS, max_size=3),
        ),
        max_size=6,
    )


def course(steps: int = 200, every: int = 1, checked: int = 40, wait: float = 0.1) -> list[Row]:
    """A run that goes well: two losses in turn, PQ every `checked` steps, a share `wait` of the time without data."""
    found = []
    for step in range(every, steps + 1, every):
        past = step / steps
        name = ("instance", "semantic")[step // every % 2]
        noise = math.sin(7.3 * step) * math.cos(1.7 * step)
        pq = 60 * (1 - math.exp(-3 * past)) + noise
        figures = {"pq": pq, "sq": pq + 20, "rq": pq + 8, "pq_things": pq - 9, "pq_stuff": pq + 5}
        found.append(
            Row(
                step=step,
                epoch=12 * past,
                losses={name: (3 if name == "instance" else 1.2) * math.exp(-2 * past + 0.1 * noise)},
                lr=1e-3 * min(1, 20 * past) * (1 + math.cos(math.pi * past)) / 2,
                grad_norm=2 + noise / 3,
                images_per_s=100 + 8 * noise,
                data_wait=min(1, max(0, wait + 0.05 * noise)),
                memory_gib=11.5,
                workers=2,
                time=1.8e9 + step / 4,
                figures=figures if step % checked == 0 or step == steps else {},
            )
        )
    return found
