"""What is trained under all disturbances, and what a driver is told of it."""

import json
from dataclasses import asdict, dataclass

from preprocessing.synthetic import SyntheticConfig
from training.recipe import Recipe
from training.recipes import recipe

IMAGES, BATCH, STEPS, EVERY = 120, 8, 400, 20
"""EVERY: steps between checkpoints; the workers say where they are at the same steps."""
DATA = SyntheticConfig(train=IMAGES, val=1, size=(48, 48), seed=5)


@dataclass(frozen=True)
class Job:
    """What a driver process does: one run. As JSON it is the driver's only argument."""

    ray: str
    storage: str
    data: str
    """Folder of the synthetic set."""
    whereabouts: str
    """Folder where the workers leave word of themselves."""
    workers: int = 2
    least: int | None = None

    def to_json(self) -> str:
        """Inverse of from_json."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Of the driver's argument."""
        return cls(**json.loads(text))


def trained() -> Recipe:
    """The generalist's debug recipe in float32, without anything random but the order of images.

    Both tasks in every batch and squared distances: its losses fall so that a curve shows it. The rate is low because
    each step magnifies the last bits in which sums of another order differ.
    """
    options = {
        "train.bf16": False,
        "train.batch": BATCH,
        "train.lr": 1e-4,
        "method.tasks": "joint",
        "method.squared": True,
        "method.half_period": True,
        "method.relative": True,
        "method.dice": 0.0,
        "reader.shuffle": 32,
        "upkeep.checkpoints": STEPS // EVERY,
        "upkeep.check_epochs": EVERY * BATCH / IMAGES,
        "upkeep.keep": 3,
    }
    return recipe("generalist", "debug").changed(options).lasting(STEPS * BATCH / IMAGES)
