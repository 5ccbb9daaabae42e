"""Parameters of the paper's two models with COCO's 133 categories: `python -m benchmarks.model_size`."""

import torch

from benchmarks.bars import bar, finish
from preprocessing.labels import Category, LabelTable
from training.recipe import Recipe
from training.recipes.generalist import base_420, large_420

COCO = LabelTable(tuple(Category(i + 1, str(i), i < 80, (0, 0, 0)) for i in range(133)))
"""As many things and stuff as COCO has; other benchmarks use it too."""
PAPER = ((base_420, 91.9e6), (large_420, 310e6))


def parameters(built: Recipe) -> int:
    """Trainable and not; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in built.build(COCO).parameters())


if __name__ == "__main__":
    for make, papers in PAPER:
        built = make()
        count = parameters(built)
        print(f"{built.name}: {count / 1e6:.2f}M parameters, the paper's {papers / 1e6:.1f}M")
        bar(f"model_size.{make.__name__}_off_percent", abs(count / papers - 1) * 100, "at-most", 1.5)
    finish()
