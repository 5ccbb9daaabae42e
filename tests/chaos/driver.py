"""`python -m tests.chaos.driver JSON`: one training run in a process that can be killed, and started again.

Its output has a line of JSON for each row that it hears of, for each line of the log, and for the end.
"""

import json
import logging
import sys
import time
from pathlib import Path

import torch

from infra import ray_cluster
from preprocessing.layouts import read_index
from preprocessing.ray_precompute import precompute
from tests.chaos.plan import Job, trained
from tests.chaos.whereabouts import Whereabouts
from training.metrics import Row
from training.ray_train import run_training
from training.shares import Crew


class _JsonLines(logging.Handler):
    """The log, a line of JSON each."""

    def emit(self, record: logging.LogRecord) -> None:
        _say({"log": record.getMessage(), "time": record.created})


def main(job: Job) -> None:
    """Precompute what is not there yet, train, and say so."""
    logging.getLogger("tessera").addHandler(_JsonLines())
    logging.getLogger("tessera").setLevel(logging.INFO)
    torch.set_num_threads(1)
    chosen = trained()
    with ray_cluster.session(job.ray):
        index = read_index(Path(job.data), "train2017")
        shards = precompute("train", index, chosen.shards, job.storage)
        crew, check = Crew(job.workers, job.least), Whereabouts(job.whereabouts)
        run = run_training(chosen, shards, job.storage, crew, check=check, watch=_heard)
    _say({"run": run.path, "time": time.time()})


def _heard(row: Row, steps: int) -> None:
    _say({"step": row.step, "time": row.time, "loss": sum(row.losses.values()), "workers": row.workers})


def _say(content: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Job.from_json(sys.argv[1]))
