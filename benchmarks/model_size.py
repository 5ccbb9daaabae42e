"""Parameters and multiply-adds of what mirrors a paper, beside the paper's: `python -m benchmarks.model_size`.

Multiply-adds are those of convolutions and matrix products of one image, by torch's own counter, on no device.
Panoptic-DeepLab's 419.5 G and 575.0 G are from PISR's table, 1024 x 2048, Cityscapes' 19 categories. What is known of
the difference: its authors' code has a deeper stem, three 3x3 convolutions of 64, 64 and 128 channels, for 56.6 G more
(DEEP_STEM); how the other 28 G of the base come about we do not know. PISR itself is added for 155.5 G in the paper and
for 144.5 G here, where F_pan is computed without its relation maps (parts/pisr.py).
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bars import bar, finish
from preprocessing.geometry import Size
from preprocessing.labels import Category, LabelTable
from training.recipe import Recipe
from training.recipes.generalist import base_420, large_420
from training.recipes.panoptic_deeplab import cityscapes, cityscapes_pisr


def labels_of(things: int, stuff: int) -> LabelTable:
    """A table of that many categories."""
    return LabelTable(tuple(Category(i + 1, str(i), i < things, (0, 0, 0)) for i in range(things + stuff)))


COCO, CITYSCAPES = labels_of(80, 53), labels_of(8, 11)
"""As many things and stuff as the data sets have; other benchmarks use COCO too."""
PAPER = ((base_420, 91.9e6), (large_420, 310e6))
DEEP_STEM = 56.6e9
DEEPLAB = ((cityscapes, 419.5e9), (cityscapes_pisr, 575.0e9))


def parameters(built: Recipe, labels: LabelTable) -> int:
    """Trainable and not; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in built.build(labels).parameters())


def multiply_adds(built: Recipe, labels: LabelTable, size: Size) -> int:
    """Of one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        built.build(labels).eval().network(torch.zeros(1, 3, *size))
    return counter.get_total_flops() // 2


if __name__ == "__main__":
    for make, papers in PAPER:
        built = make()
        count = parameters(built, COCO)
        print(f"{built.name}: {count / 1e6:.2f}M parameters, the paper's {papers / 1e6:.1f}M")
        bar(f"model_size.{make.__name__}_off_percent", abs(count / papers - 1) * 100, "at-most", 1.5)
    for make, papers in DEEPLAB:
        built = make()
        cost = multiply_adds(built, CITYSCAPES, (1024, 2048))
        deeper = f"{(cost + DEEP_STEM) / 1e9:.1f} G with the deeper stem"
        count = parameters(built, CITYSCAPES)
        print(f"{built.name}: {count / 1e6:.2f}M parameters, {cost / 1e9:.1f} G, {deeper}, paper {papers / 1e9:.1f} G")
        bar(f"model_size.{make.__name__}_off_percent", abs((cost + DEEP_STEM) / papers - 1) * 100, "at-most", 10)
    finish()
