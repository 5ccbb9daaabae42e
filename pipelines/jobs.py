"""What the jobs of all flows have in common: where Ray and the results are, from the environment unless a job says.

TESSERA_STORAGE and TESSERA_RAY are read where the flow runs, so a worker's environment says once what holds for all of
its deployments. Keys are never parameters: AWS_*, see infra.s3_store.
"""

import os

from pydantic import BaseModel, ConfigDict, Field


class Job(BaseModel):
    """Where the work is done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: bool = Field(False, description="One GPU for each training worker and each task that runs a network.")
    ray: str = Field(
        default_factory=lambda: os.environ.get("TESSERA_RAY", "local"),
        description="'local' starts Ray here; 'auto' or host:port joins a cluster. Default: TESSERA_RAY, else local.",
    )


class StoredJob(Job):
    """And where the results are kept."""

    storage: str = Field(
        default_factory=lambda: os.environ.get("TESSERA_STORAGE", ".tessera/store"),
        description="Root of all results: a folder, or s3://bucket/prefix (server and keys: AWS_*). Default: "
        "TESSERA_STORAGE, else .tessera/store.",
    )
