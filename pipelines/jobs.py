"""What the jobs of all flows have in common: where Ray and the results are, from the environment unless a job says.

TESSERA_STORAGE and TESSERA_RAY are read where the flow runs, so a worker's environment says once what holds for all of
its deployments. Keys are never parameters: AWS_*, see infra.s3_store.
"""

import os
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from infra import ray_address
from infra.errors import TesseraError
from infra.store import open_store
from pipelines.fields import Count, Text
from training.shares import Crew


class Job(BaseModel):
    """Where the work is done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_environment(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What the environment said is not written down: a deployment would carry its deployer's to the worker."""
        silent = {"ray", "storage"} - self.model_fields_set
        return {name: value for name, value in plain(self).items() if name not in silent}

    gpus: bool = Field(False, description="One GPU for each training worker and each task that runs a network.")
    ray: Text = Field(
        default_factory=ray_address.from_environment,
        description="'local' starts Ray here, 'auto' joins the cluster that this machine is a node of; another one is "
        "named by TESSERA_RAY, never by a job. Default: TESSERA_RAY, else local.",
    )

    @field_validator("ray")
    @classmethod
    def _ray_is_the_workers_own(cls, address: str) -> str:
        return ray_address.chosen(address)


class StoredJob(Job):
    """And where the results are kept."""

    storage: Text = Field(
        default_factory=lambda: os.environ.get("TESSERA_STORAGE", ".tessera/store"),
        description="Root of all results: a folder, or s3://bucket/prefix (server and keys: AWS_*). Default: "
        "TESSERA_STORAGE, else .tessera/store.",
    )

    def absolute(self) -> Self:
        """The same with its storage as a URL that holds wherever a worker stands."""
        return self.model_copy(update={"storage": open_store(self.storage).url})


class TrainingJob(StoredJob):
    """And who trains."""

    workers: Count = Field(1, description="Training workers; they share the recipe's total batch exactly.")
    least_workers: Count | None = Field(
        None, description="Go on with as few workers while nodes are missing, and grow again; none: wait for all."
    )
    sharded: bool = Field(
        False, description="Each training worker holds a part of the weights and of the optimizer's state (FSDP2)."
    )

    @model_validator(mode="after")
    def _least_is_least(self) -> Self:
        if self.least_workers is not None and self.least_workers > self.workers:
            raise TesseraError(f"least_workers {self.least_workers} is more than workers {self.workers}")
        return self

    @property
    def crew(self) -> Crew:
        """The training workers."""
        return Crew(self.workers, self.least_workers, self.gpus, self.sharded)

    @property
    def needs(self) -> dict[str, int]:
        """What ray_cluster.session is to make sure of."""
        return {"gpus" if self.gpus else "cpus": self.least_workers or self.workers}
