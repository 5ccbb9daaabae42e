"""What train-coco is asked to do. Imports no Prefect, so that a job can be refused before anything starts."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from infra.store import open_store
from preprocessing import layouts
from preprocessing.synthetic import SyntheticConfig
from training.recipe import Recipe
from training.recipes import RECIPES, recipe

SYNTHETIC = "synthetic"


class TrainCoco(BaseModel):
    """Parameters of train-coco."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(
        SYNTHETIC, description="Folder of the data set, which every Ray worker can read, or 'synthetic': made here."
    )
    layout: Annotated[str, AfterValidator(layouts.known)] = Field(
        "coco",
        description="How the data set is laid out; see docs/data.md.",
        json_schema_extra={"enum": [*layouts.LAYOUTS]},
    )
    train_split: str = Field("train2017", description="The split that is trained on.")
    val_split: str = Field("val2017", description="The split that PQ is measured on.")
    storage: str = Field(
        ".tessera/store", description="Root of all results: a folder, or s3://bucket/prefix (server and keys: AWS_*)."
    )
    method: str = Field(
        "generalist", description="A method of training/methods.", json_schema_extra={"enum": [*RECIPES]}
    )
    recipe: str = Field(
        "demo",
        description="A recipe of the method: options and training; see training/recipes.",
        json_schema_extra={"enum": [*dict.fromkeys(name for named in RECIPES.values() for name in named)]},
    )
    epochs: PositiveFloat | None = Field(None, description="Passes over the train split, if not the recipe's.")
    options: dict[str, Any] = Field(
        {}, description='Other options of the recipe by dotted name, as {"method.eds_distance": 0, "train.seed": 1}.'
    )
    workers: PositiveInt = Field(1, description="Training workers; they share the recipe's total batch.")
    gpus: bool = Field(False, description="One GPU per training worker and evaluation task.")
    ray: str = Field("local", description="'local' starts Ray here; 'auto' or host:port joins a cluster.")
    bad_share: float = Field(0.01, ge=0, le=1, description="Share of unusable samples that fails the run.")
    synthetic: SyntheticConfig = Field(SyntheticConfig(), description="Size of the set if data is 'synthetic'.")

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainCoco":
        self.resolved()
        return self

    def check(self) -> None:
        """Raise TesseraError for a batch that its workers cannot share, and a store that cannot be written."""
        self.resolved().train.split_batch(self.workers)
        open_store(self.storage).check()

    def resolved(self) -> Recipe:
        """The method's recipe with all that this job changes; TesseraError if there is no such recipe or option."""
        chosen = recipe(self.method, self.recipe).changed(self.options)
        return chosen if self.epochs is None else chosen.lasting(self.epochs)
