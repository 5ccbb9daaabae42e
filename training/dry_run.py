"""A pass at the largest shape before the first step: lack of memory shows in seconds, not after hours."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from infra.errors import TesseraError
from preprocessing.geometry import Size
from preprocessing.labels import LabelTable
from training.batch import Batch

_SEGMENTS = 255  # more than nearly any image has; their table is small beside the maps
KNOBS = (
    "lower train.micro_batch (the total batch stays), make the images smaller (shards.grid, or reader.crop.size), or "
    "spread the model over more workers (workers with sharded)"
)
_LACK = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")  # torch, drivers, libraries


def largest_batch(images: int, size: Size, labels: LabelTable, distances: bool) -> Batch:
    """A batch of noise of `images` images of a height and width, with as many segments as real ones hardly have."""
    generator = torch.Generator().manual_seed(0)  # the run's own noise stays as it is
    images_BHW3 = torch.randint(0, 256, (images, *size, 3), generator=generator, dtype=torch.uint8)
    rows, is_thing_C = (images, 1 + _SEGMENTS), torch.from_numpy(labels.is_thing)
    category_BN = torch.randint(0, len(labels), rows, generator=generator)
    area = size[0] * size[1] / _SEGMENTS
    return Batch(
        keys=tuple(f"dry run {i}" for i in range(images)),
        images_B3HW=images_BHW3.permute(0, 3, 1, 2),
        labels_BHW=torch.randint(1, 1 + _SEGMENTS, (images, *size), generator=generator, dtype=torch.uint8),
        d2_BH2W=torch.zeros(images, size[0], 2, size[1], dtype=torch.int16) if distances else None,
        category_BN=category_BN,
        thing_BN=is_thing_C[category_BN],
        crowd_BN=torch.zeros(rows, dtype=torch.bool),
        area_BN=torch.full(rows, area),
        centroid_BN2=2 * torch.rand(*rows, 2, generator=generator) - 1,
    )


class DoesNotFit(TesseraError):
    """There is not enough memory for a pass; its text names what helps."""


@contextmanager
def optimizer_room(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A context that holds as much memory as AdamW is still to take: two numbers a weight without moments."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    held = [torch.empty_like(p).fill_(0) for p in trained for _ in range(2)]
    yield
    del held


@contextmanager
def keeping_buffers(method: nn.Module) -> Iterator[None]:
    """A context after which the statistics of norms are what they were."""
    before = [buffer.clone() for buffer in method.buffers()]
    yield
    for buffer, value in zip(method.buffers(), before, strict=True):
        buffer.copy_(value)


@contextmanager
def telling_knobs(shape: str) -> Iterator[None]:
    """Turn lack of memory into DoesNotFit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error) or type(error).__name__
        lacking = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not lacking and not any(words in text for words in _LACK):
            raise
        told = re.sub(r"^\[enforce fail [^\]]*\][^.]*\. ", "", text.split("\n")[0])  # where in torch's code
        first = ". ".join(told.split(". ")[:2])
        raise DoesNotFit(f"{shape} does not fit into memory: {KNOBS} ({first})") from error
