"""Precompute as Ray tasks, one a shard."""

import logging
from pathlib import Path

from infra import ray_cluster
from infra.store import open_store
from preprocessing.coco import read_index
from preprocessing.shards import Shard, ShardConfig, ShardSet, check, commit, compute_shard, plan, read_set, set_path

log = logging.getLogger("tessera.precompute")


def precompute(root: str | Path, split: str, config: ShardConfig, store_url: str, bad_share: float = 0.01) -> ShardSet:
    """Make all shards of one split and its manifest; what is there already is left as it is.

    Needs a Ray connection. Raises TesseraError as `read_index` and `commit` do.
    """
    store = open_store(store_url)
    index = read_index(root, split)
    jobs = plan(index, config)
    path = set_path(index, config, jobs)
    finished = read_set(store, path)
    if finished is not None:
        check(finished, bad_share)
        log.info("%s: %d shards are there already (%s)", split, len(finished.shards), path)
        return finished
    log.info("%s: %d samples in %d shards", split, len(index.records), len(jobs))
    order = {job.key: position for position, job in enumerate(jobs)}
    done: list[Shard] = []

    def report(shard: Shard) -> None:
        done.append(shard)
        samples, megabytes = len(shard.image_ids), shard.bytes / 1e6
        log.info("%s: shard %d of %d, %d samples, %.1f MB", split, len(done), len(jobs), samples, megabytes)
        for rejected in shard.rejected:
            log.warning("%s: sample %s set aside: %s", split, rejected.sample, rejected.reason)

    shards = ray_cluster.map_tasks(compute_shard, ((store.url, job) for job in jobs), report)
    shards.sort(key=lambda shard: order[shard.key])
    return commit(store, path, index, config, shards, bad_share)
