"""What retrain is asked to do, and what it starts from."""

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field

from evaluation.champion import Champion, current
from evaluation.report import Finished
from infra import artifacts, records
from infra.errors import TesseraError
from infra.store import Store
from pipelines.fields import Epochs, Options, Percent, Share, Text
from pipelines.jobs import TrainingJob
from preprocessing import layouts
from preprocessing.shards import ShardSet, read_set
from training.recipe import Recipe
from training.run import RunFacts

T = TypeVar("T")


class Retrain(TrainingJob):
    """Parameters of retrain. The recipe is the one that the champion's line began with."""

    layout: Annotated[Text, AfterValidator(layouts.known)] = Field(
        "coco",
        description="How uploads are laid out; see docs/data.md.",
        json_schema_extra={"enum": [*layouts.LAYOUTS]},
    )
    split: Text = Field("train2017", description="The split of an upload that is trained on.")
    epochs: Epochs | None = Field(
        None, description="Passes of fine-tuning over all data; default: a tenth of the recipe's."
    )
    lr_share: Share = Field(0.1, gt=0, description="Peak learning rate of fine-tuning, as a share of the recipe's.")
    options: Options = Field({}, description="Other options of the recipe by dotted name, as in train-coco.")
    margin: Percent = Field(
        0.0, description="Promote if the 95 % interval of the gain in PQ lies above so many percent as a whole."
    )
    bad_share: Share = Field(0.05, description="Share of unusable samples that puts an upload in quarantine.")

    @property
    def settings(self) -> dict[str, Any]:
        """All that another challenger or another verdict follows from."""
        return self.model_dump(include={"epochs", "lr_share", "options", "margin"})


@dataclass(frozen=True)
class Line:
    """Where a line of fine-tuned runs began."""

    champion: Champion
    """Of today."""
    recipe: Recipe
    """Of the first run, with the decoding of its evaluation."""
    base: ShardSet
    """What the first run was trained on."""
    val_set: ShardSet
    """What all are evaluated on."""

    def tuned(self, job: Retrain) -> Recipe:
        """The recipe of a challenger. TesseraError for options that there are not."""
        recipe = self.recipe.lasting(job.epochs or self.recipe.train.epochs / 10)
        return recipe.changed({"train.lr": self.recipe.train.lr * job.lr_share} | job.options)


def read_line(store: Store) -> Line:
    """The line of today's champion. TesseraError if there is none, or something that it names is gone."""
    champion = current(store)
    root = _manifest(store, champion.root, Finished)
    run = _manifest(store, root.run, RunFacts)
    url = store.url_for(root.run)
    return Line(champion, _recipe(run, root, url), _set(store, run.train_set), _set(store, root.val_set))


def decoded(store: Store, champion: Champion) -> Recipe:
    """Recipe of a champion's run with the decoding of its evaluation."""
    run, evaluation = _manifest(store, champion.run, RunFacts), _manifest(store, champion.evaluation, Finished)
    return _recipe(run, evaluation, store.url_for(champion.run))


def _recipe(run: RunFacts, evaluation: Finished, url: str) -> Recipe:
    """A run's, with an evaluation's decoding as it was written: 6 for 6.0 would be another evaluation."""
    method = records.restore(dict[str, Any], run.recipe.get("method"), f"{url}: the recipe's method")
    return Recipe.from_json(run.recipe | {"method": method | {"decode": evaluation.decode}}, url)


def _manifest(store: Store, path: str, kind: type[T]) -> T:
    content = artifacts.read_manifest(store, path, kind)
    if content is None:
        raise TesseraError(f"{store.url_for(path)}: the champion refers to it, and it is not there")
    return content


def _set(store: Store, path: str) -> ShardSet:
    found = read_set(store, path)
    if found is None:
        raise TesseraError(f"{store.url_for(path)}: the champion refers to this data set, and it is not there")
    return found
