"""What train-coco is asked to do. Imports no Prefect, so that a job can be refused before anything starts."""

import sys
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from infra import artifacts
from infra.errors import TesseraError
from infra.store import open_store
from pipelines.fields import Epochs, Options, Share, Text
from pipelines.jobs import TrainingJob
from preprocessing import layouts
from preprocessing.synthetic import SyntheticConfig
from training.recipe import Recipe
from training.recipes import RECIPES, recipe

SYNTHETIC = "synthetic"


class TrainCoco(TrainingJob):
    """Parameters of train-coco."""

    data: Text = Field(
        SYNTHETIC,
        description="Folder of the data set, which every Ray worker can read, s3://bucket/prefix, or 'synthetic': made "
        "here.",
    )
    layout: Annotated[Text, AfterValidator(layouts.known)] = Field(
        "coco",
        description="How the data set is laid out; see docs/data.md.",
        json_schema_extra={"enum": [*layouts.LAYOUTS]},
    )
    train_split: Text = Field("train2017", description="The split that is trained on.")
    val_split: Text = Field("val2017", description="The split that PQ is measured on.")
    method: Text = Field(
        "generalist", description="A method of training/methods.", json_schema_extra={"enum": [*RECIPES]}
    )
    recipe: Text = Field(
        "demo",
        description="A recipe of the method: options and training; see training/recipes.",
        json_schema_extra={"enum": [*dict.fromkeys(name for named in RECIPES.values() for name in named)]},
    )
    epochs: Epochs | None = Field(None, description="Passes over the train split, if not the recipe's.")
    options: Options = Field(
        {}, description='Other options of the recipe by dotted name, as {"method.eds_distance": 0, "train.seed": 1}.'
    )
    name: str | None = Field(
        None,
        pattern="^[a-z0-9][a-z0-9._-]{0,62}$",
        description="A name for the run: refused with the difference if it has trained another config so far.",
    )
    anew: bool = Field(False, description="Give the name to this config; what it has trained so far stays as it is.")
    init: Text | None = Field(
        None, description="URL of a finished run, <storage>/train/<hash>, whose weights to start with (fine-tuning)."
    )
    bad_share: Share = Field(0.01, description="Share of unusable samples that fails the run.")
    synthetic: SyntheticConfig = Field(SyntheticConfig(), description="Size of the set if data is 'synthetic'.")

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainCoco":
        self.resolved()
        if self.anew and self.name is None:
            raise TesseraError("anew: expected a name to give to this config")
        return self

    def check(self) -> None:
        """Raise TesseraError for more workers than can ever share the batch, a store that cannot be written, and for
        `init` outside of it."""
        chosen = self.resolved()
        self.crew.told(chosen.reader.plan(chosen.train.batch, shards=sys.maxsize), chosen.train.micro_batch)
        open_store(self.storage).check()
        _ = self.init_path

    @property
    def init_path(self) -> str | None:
        """Folder under the storage's root of the run whose weights to start with. TesseraError if it is elsewhere."""
        if self.init is None:
            return None
        root, path = artifacts.split_url(self.init, "train")
        if root != open_store(self.storage).url:
            raise TesseraError(f"init {self.init}: expected a run of this storage, {open_store(self.storage).url}")
        return path

    def resolved(self) -> Recipe:
        """The method's recipe with all that this job changes; TesseraError if there is no such recipe or option."""
        chosen = recipe(self.method, self.recipe).changed(self.options)
        return chosen if self.epochs is None else chosen.lasting(self.epochs)
