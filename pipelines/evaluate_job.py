"""What evaluate is asked to do. Imports no Prefect, so that a job can be refused before anything starts."""

from typing import Annotated

from pydantic import AfterValidator, Field

from evaluation.champion import resolve
from infra import artifacts
from infra.errors import TesseraError
from infra.store import open_store
from pipelines.fields import Options, Share, Text
from pipelines.jobs import Job
from preprocessing import layouts
from preprocessing.labels import LabelTable
from preprocessing.source import Index
from training.recipe import Recipe
from training.run import open_run


class Evaluate(Job):
    """Parameters of evaluate."""

    run: Text = Field(
        description="Folder of a finished run, <storage>/train/<hash>, or <storage>/champion: the one in use. "
        "The results go to the same storage."
    )
    data: Text = Field(description="Folder of the data set, which every Ray worker can read, or s3://bucket/prefix.")
    layout: Annotated[Text, AfterValidator(layouts.known)] = Field(
        "coco",
        description="How the data set is laid out; see docs/data.md.",
        json_schema_extra={"enum": [*layouts.LAYOUTS]},
    )
    split: Text = Field("val2017", description="The split that PQ is measured on.")
    options: Options = Field(
        {}, description='Options of decoding, as pipelines.tune prints them: {"method.decode.min_stuff_area": 0.01}.'
    )
    bad_share: Share = Field(0.01, description="Share of unusable samples that fails the evaluation.")

    def resolved(self) -> "Evaluate":
        """The same for the run that is champion now, if that is asked for."""
        return self.model_copy(update={"run": resolve(self.run)})

    @property
    def storage(self) -> str:
        """Root of the storage that holds the run. TesseraError if its URL is none of a run."""
        return artifacts.split_url(self.run, "train")[0]

    @property
    def run_path(self) -> str:
        """Folder of the run under the storage's root."""
        return artifacts.split_url(self.run, "train")[1]

    @property
    def source(self) -> str:
        """Folder or URL of the data, absolute."""
        return open_store(self.data).url

    def check(self) -> Recipe:
        """The run's recipe, decoding as this job says.

        Raises TesseraError for a store that cannot be written, a run that is not finished, an option of anything but
        decoding, data that are not there, and for other categories than those that the run was trained on.
        """
        open_store(self.storage).check()
        recipe, method = open_run(self.storage, self.run_path, self.options)
        self.index(method.labels)
        return recipe

    def index(self, labels: LabelTable) -> Index:
        """The data by the table of the run: weights know categories by their place in it. TesseraError as `check`."""
        found = layouts.read_index(self.source, self.split, self.layout)
        if differ := found.labels.difference(labels):
            raise TesseraError(f"{self.data}: {self.split} lists other categories than {self.run} knows: {differ}")
        return found.under(labels)
