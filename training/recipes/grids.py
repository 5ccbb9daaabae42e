"""Grids by name: the options that a paper's table compares, or that we do; `pipelines.ablate` runs them.

A row says all that its title presupposes, so it means the same on any recipe of its method, and rows of a grid differ
in nothing else. The paper's figures are those of its Base model at 420 x 420 after 200 epochs, on COCO val2017.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from infra.errors import TesseraError


@dataclass(frozen=True)
class GridRow:
    """One line of an ablation's table."""

    title: str
    options: Mapping[str, Any]
    """What it changes, as Recipe.changed takes it."""
    published: float | None = None
    """PQ that the paper states for it."""


_ABSOLUTE = {"method.relative": False, "method.half_period": False}


def _embedding(length: int) -> dict[str, Any]:
    return {"method.encoding": "embedding", "method.frequencies": length}


def paper_table_2() -> tuple[GridRow, ...]:
    """G, table 2: Edge Distance Sampling and void pixels in the instance task.

    Published PQ: neither 44.91, void kept 46.74, EDS 46.04, both 48.61. EDS is at the recipe's D, or off (D = 0).
    """
    without = {"method.eds_distance": 0}
    return (
        GridRow("no EDS, void left out", without | {"method.void_kept": False}, 44.91),
        GridRow("no EDS, void kept", without | {"method.void_kept": True}, 46.74),
        GridRow("EDS, void left out", {"method.void_kept": False}, 46.04),
        GridRow("EDS, void kept", {"method.void_kept": True}, 48.61),
    )


def paper_table_3() -> tuple[GridRow, ...]:
    """G, table 3: what the instance head says of a centroid.

    Published PQ: direct 41.61; 80 + 80 classes 39.87; positional embedding of L = 2, 3, 4, 5: 46.58, 47.38, 48.28,
    48.12. All with the paper's head, absolute and of whole periods, as neither direct regression nor classes could have
    another; classes have no squared distance.
    """
    classes = {"method.encoding": "classes", "method.cells": 80, "method.squared": False}
    return (
        GridRow("direct centroid", _ABSOLUTE | {"method.encoding": "direct"}, 41.61),
        GridRow("80 + 80 classes", _ABSOLUTE | classes, 39.87),
        *(
            GridRow(f"embedding, L = {length}", _ABSOLUTE | _embedding(length), published)
            for length, published in ((2, 46.58), (3, 47.38), (4, 48.28), (5, 48.12))
        ),
    )


def relative_table_3() -> tuple[GridRow, ...]:
    """Ours: table 3 with a head relative to the pixel, which classes cannot have; direct regression then says offsets.

    Does the embedding still earn its place once the head need not know where a pixel is?
    """
    relative = _ABSOLUTE | {"method.relative": True}
    return (
        GridRow("offset", relative | {"method.encoding": "direct"}),
        *(GridRow(f"embedding, L = {length}", relative | _embedding(length)) for length in (2, 3, 4, 5)),
    )


def ours() -> tuple[GridRow, ...]:
    """What we added to the embedding: half a period as base, and a head relative to the pixel; each off and on.

    No paper has these figures.
    """
    return tuple(
        GridRow(title, {"method.half_period": half, "method.relative": relative, "method.encoding": "embedding"})
        for title, half, relative in (
            ("neither", False, False),
            ("half period", True, False),
            ("relative head", False, True),
            ("both", True, True),
        )
    )


def ours_by_backbone() -> tuple[GridRow, ...]:
    """`ours` on a backbone that knows where it is (the recipe's own ViT) and on two that have no absolute positions.

    G reports that a Swin could hardly learn centroids; the relative head should cure just that.
    """
    kinds: dict[str, dict[str, Any]] = {
        "ViT": {},
        "ResNet": {"method.backbone": {"name": "resnet-18"}},
        "Swin": {"method.backbone": {"name": "swin-nano"}},
    }
    return tuple(
        GridRow(f"{kind}, {row.title}", {**row.options, **backbone})
        for kind, backbone in kinds.items()
        for row in ours()
    )


GRIDS: dict[str, Callable[[], tuple[GridRow, ...]]] = {
    g.__name__: g for g in (paper_table_2, paper_table_3, relative_table_3, ours, ours_by_backbone)
}


def grid(name: str) -> tuple[GridRow, ...]:
    """The rows of the grid of that name; TesseraError listing what there is instead if there is none."""
    if name not in GRIDS:
        raise TesseraError(f"unknown grid {name!r}; there are {', '.join(GRIDS)}")
    return GRIDS[name]()
