"""What predict is asked to do. Imports no Prefect, so that a job can be refused before anything starts."""

from pydantic import Field

from evaluation.champion import resolve
from evaluation.predict_plan import Plan, plan_prediction
from pipelines.fields import Options, Text
from pipelines.jobs import Job


class Predict(Job):
    """Parameters of predict."""

    run: Text = Field(
        description="Folder of a finished run, <storage>/train/<hash>, or <storage>/champion: the one in use."
    )
    input: Text = Field(description="An image, a folder with all its folders, or s3://bucket/prefix.")
    output: Text = Field(
        description="Where predictions, overlays and problems.json go: a folder or s3://bucket/prefix."
    )
    images: Text | None = Field(
        None,
        description="COCO's image info JSON, as image_info_test-dev2017.json: predict just its images, by its ids, "
        "and write the zip that COCO's server takes.",
    )
    algorithm: str = Field(
        "tessera",
        pattern="^[A-Za-z0-9-]{1,100}$",
        description="Names the submission: panoptic_<split>_<algorithm>_results.",
    )
    overlays: bool = Field(True, description="Write a JPEG of the segments over each image, too.")
    options: Options = Field(
        {}, description='Options of decoding, as pipelines.tune prints them: {"method.decode.min_stuff_area": 0.01}.'
    )

    def resolved(self) -> "Predict":
        """The same for the run that is champion now, if that is asked for: it may be another one a minute later."""
        return self.model_copy(update={"run": resolve(self.run)})

    def plan(self) -> Plan:
        """See plan_prediction."""
        return plan_prediction(
            self.run, self.input, self.output, self.images, self.algorithm, self.overlays, self.options
        )
