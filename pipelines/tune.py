"""`python -m pipelines.tune JOB`: decoding thresholds for a run that train-coco has finished.

JOB is the JSON that train-coco ran with. Prints the options to give it next time; no server, no Ray.
"""

import json
import sys

from pydantic import ValidationError

from evaluation.tune import tune
from infra import artifacts, logs
from infra.errors import TesseraError
from infra.store import open_store
from pipelines.fields import told
from pipelines.job import TrainCoco
from pipelines.train_coco import data_root
from preprocessing.layouts import read_index
from preprocessing.shards import ShardConfig, ShardSet, plan, read_set
from preprocessing.source import Index
from training.run import read_run


def main(job: TrainCoco) -> None:
    """Find the run and its val shards on the store, tune, print."""
    chosen, root, storage = job.resolved(), data_root(job), open_store(job.storage).url
    train_set = _finished(storage, read_index(root, job.train_split, job.layout), chosen.shards)
    val_set = _finished(storage, read_index(root, job.val_split, job.layout), chosen.val_shards)
    run = read_run(storage, chosen.run_path(train_set.path))
    if run is None:
        raise TesseraError(f"{storage}: no finished run of this job; run train-coco first")
    artifacts.refuse_lost(open_store(storage), run.path)
    found = tune(chosen, run.path, val_set, storage)
    before, best = found.trials[0].pq, found.best.pq
    print(f"PQ {before:.2f} -> {best:.2f} after {len(found.trials)} trials, {storage}/{found.path}/manifest.json")
    print(f"options: {json.dumps(job.options | found.options())}")


def _finished(storage: str, index: Index, config: ShardConfig) -> ShardSet:
    store = open_store(storage)
    found = read_set(store, plan(store, index, config).path)
    if found is None:
        raise TesseraError(f"{storage}: no shards of this job's data; run train-coco first")
    return found


if __name__ == "__main__":
    logs.to_stream(sys.stderr)
    try:
        main(TrainCoco.model_validate_json(sys.argv[1] if len(sys.argv) > 1 else "{}"))
    except ValidationError as error:
        sys.exit(f"error: {told(error)}")
    except TesseraError as error:
        sys.exit(f"error: {error}")
