import re
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import TesseraError
from training.shares import Plan, Share

PLANS = st.builds(Plan.of, st.integers(1, 300), st.integers(1, 64), st.integers(0, 16), st.integers(1, 2000))
MICRO_BATCHES = st.integers(1, 40)


def shares(plan: Plan, world: int, micro_batch: int) -> list[Share]:
    return [plan.share(rank, world, micro_batch) for rank in range(world)]


def refusal(plan: Plan, world: int, micro_batch: int) -> str:
    """What every worker and `told` answer, in the same words."""
    said = []
    for rank in range(world):
        with pytest.raises(TesseraError) as caught:
            plan.share(rank, world, micro_batch)
        said.append(str(caught.value))
    with pytest.raises(TesseraError) as caught:
        plan.told(world, micro_batch)
    assert {str(caught.value)} == set(said)
    return said[0]


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 16), st.integers(0, 2000))
def test_streams_divide_the_batch_and_are_as_many_as_can_have_a_shard_each(
    batch: int, streams: int, processes: int, shards: int
):
    plan = Plan.of(batch, streams, processes, shards)
    assert plan.streams * plan.images == plan.batch == batch
    assert plan.phases == max(1, min(processes, shards))
    most = min(streams, shards // plan.phases)
    assert 1 <= plan.streams <= max(1, most)
    assert all(batch % n for n in range(plan.streams + 1, most + 1))


@given(PLANS, st.data())
def test_workers_take_every_stream_once_and_images_add_up_to_the_batch(plan: Plan, data: st.DataObject):
    taken = shares(plan, data.draw(st.integers(1, plan.streams)), plan.batch)
    assert sorted(chain.from_iterable(share.streams for share in taken)) == list(range(plan.streams))
    assert all(share.images == len(share.streams) * plan.images for share in taken)
    assert sum(share.images for share in taken) == plan.batch
    counts = {len(share.streams) for share in taken}
    assert max(counts) - min(counts) <= 1


@given(PLANS, MICRO_BATCHES, st.data())
def test_passes_are_as_few_as_fit_and_equally_many_on_all_workers(plan: Plan, micro_batch: int, data: st.DataObject):
    """Or the workers are refused: only where one would have fewer images than passes."""
    world = data.draw(st.integers(1, plan.streams))
    images = [share.images for share in shares(plan, world, plan.batch)]
    passes = -(-max(images) // micro_batch)
    if passes > min(images):
        told = f"in passes of {micro_batch} at most (train.micro_batch): the largest share, {max(images)}, needs"
        assert f"{told} {passes} passes, the smallest has {min(images)}" in refusal(plan, world, micro_batch)
        return
    taken = shares(plan, world, micro_batch)
    assert [share.images for share in taken] == images
    for share in taken:
        assert len(share.passes) == passes
        assert 1 <= min(share.passes) <= max(share.passes) <= min(micro_batch, min(share.passes) + 1)


@given(PLANS, MICRO_BATCHES, st.data())
def test_slices_cover_a_workers_images_in_passes(plan: Plan, micro_batch: int, data: st.DataObject):
    rank = data.draw(st.integers(0, plan.streams - 1))
    share = plan.share(rank, plan.streams, micro_batch)  # one stream each: never refused
    images = list(range(share.images))
    assert [len(images[part]) for part in share.slices] == list(share.passes)
    assert [i for part in share.slices for i in images[part]] == images


@given(PLANS, MICRO_BATCHES, st.integers(1, 5))
def test_more_workers_than_streams_are_refused(plan: Plan, micro_batch: int, more: int):
    world = plan.streams + more
    told = refusal(plan, world, micro_batch)
    assert told.startswith(f"{world} training workers cannot share a batch of {plan.batch} images exactly")
    assert f"drawn from {plan.streams} streams" in told
    assert f"use {plan.streams} workers at most" in told


def test_the_answer_to_too_many_workers_names_all_that_would_help():
    told = refusal(Plan.of(6, 8, 2, 5), 3, 32)
    assert "drawn from 2 streams" in told
    for plan in (Plan.of(6, 8, 1, 5), Plan.of(6, 8, 2, 6)):  # fewer processes, more shards
        assert len(shares(plan, 3, 32)) == 3
    assert len(shares(Plan.of(9, 8, 0, 5), 3, 32)) == 3  # another batch
    for option in ("train.batch", "reader.streams", "reader.workers", "shards.samples"):
        assert option in told


def test_a_worker_with_fewer_images_than_passes_is_refused():
    assert refusal(Plan.of(3, 3, 0, 3), 2, 1) == (
        "2 training workers cannot share a batch of 3 images in passes of 1 at most (train.micro_batch): the largest "
        "share, 2, needs 2 passes, the smallest has 1"
    )


def parsed(told: str) -> tuple[int, list[int], list[int]]:
    """Images of the batch, of each worker, and of each of the largest worker's passes, as a reader would count."""
    if alike := re.fullmatch(r"(\d+) images = (\d+) workers x \((.+) images\)", told):
        batch, workers, text = alike.groups()
        passes = counted(text)
        return int(batch), [sum(passes)] * int(workers), passes
    differing = re.fullmatch(r"(\d+) images = ([\d +]+) of (\d+) workers, the largest in (.+) images", told)
    assert differing, told
    batch, sums, workers, text = differing.groups()
    images = counted(sums)
    assert len(images) == int(workers)
    return int(batch), images, counted(text)


def counted(text: str) -> list[int]:
    """Summands of "3 x 4" and of "3 + 4"."""
    if " x " in text:
        times, images = map(int, text.split(" x "))
        return [images] * times
    return [int(images) for images in text.split(" + ")]


@given(PLANS, MICRO_BATCHES, st.data())
def test_the_arithmetic_adds_up(plan: Plan, micro_batch: int, data: st.DataObject):
    world = data.draw(st.integers(1, plan.streams))
    try:
        taken = shares(plan, world, micro_batch)
    except TesseraError:
        refusal(plan, world, micro_batch)
        return
    batch, images, passes = parsed(plan.told(world, micro_batch))
    assert batch == sum(images) == plan.batch
    assert images == [share.images for share in taken]
    assert passes == list(max(taken, key=lambda share: share.images).passes)
    assert sum(passes) == max(images)


@pytest.mark.parametrize(
    ("plan", "world", "micro_batch", "told"),
    [
        (Plan.of(256, 8, 8, 924), 8, 32, "256 images = 8 workers x (1 x 32 images)"),
        (Plan.of(256, 8, 8, 924), 2, 32, "256 images = 2 workers x (4 x 32 images)"),
        (Plan.of(16, 8, 0, 8), 2, 3, "16 images = 2 workers x (3 + 3 + 2 images)"),
        (Plan.of(8, 8, 0, 8), 3, 3, "8 images = 3 + 3 + 2 of 3 workers, the largest in 1 x 3 images"),
        (Plan.of(8, 8, 0, 8), 3, 2, "8 images = 3 + 3 + 2 of 3 workers, the largest in 2 + 1 images"),
    ],
)
def test_the_arithmetic_is_told_in_one_line(plan: Plan, world: int, micro_batch: int, told: str):
    assert plan.told(world, micro_batch) == told
