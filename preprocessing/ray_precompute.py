"""Precompute as Ray tasks, one a shard."""

import logging
import platform
import resource
import time
from dataclasses import dataclass, replace

from infra import ray_cluster
from infra.in_use import in_use
from infra.store import Store, open_store
from preprocessing.shards import (
    FOLDER,
    Shard,
    ShardConfig,
    ShardJob,
    ShardSet,
    check,
    commit,
    compute_shard,
    forget_lost,
    origins_of,
    plan,
    read_set,
)
from preprocessing.source import Index

log = logging.getLogger("tessera.precompute")


@dataclass(frozen=True)
class Computed:
    """A shard, and what it took."""

    shard: Shard
    seconds: float
    """CPU time of the task."""
    peak_bytes: int
    """Most memory that the worker process has held so far."""
    machine: str
    """Its name."""


def precompute(name: str, index: Index, config: ShardConfig, store_url: str, bad_share: float = 0.01) -> ShardSet:
    """Make all shards of one split, called `name` in the log, and its manifest; what is there is left as it is.

    Shards that the store has lost since the set was finished are made again. Needs a Ray connection. Raises
    TesseraError as `commit` does.
    """
    store = open_store(store_url)
    with in_use(store, f"{FOLDER}/"):  # shards that are there are taken over, whoever refers to them
        return _precompute(store, name, index, config, bad_share)


def _precompute(store: Store, name: str, index: Index, config: ShardConfig, bad_share: float) -> ShardSet:
    planned = plan(store, index, config)
    finished = read_set(store, planned.path)
    jobs = planned.jobs if finished is None else forget_lost(store, planned.jobs, finished)
    if finished is not None:
        check(finished, bad_share)
        log.info("%s: %d shards are there already (%s)", name, len(finished.shards) - len(jobs), planned.path)
    else:
        taken = f", {planned.taken} of them from {', '.join(planned.extends)}" if planned.extends else ""
        log.info("%s: %d samples in %d shards%s", name, len(index.records), len(jobs), taken)
    if index.unused:
        log.warning("%s: %d files belong to no sample, the first is %s", name, len(index.unused), index.unused[0].file)
    done: list[Computed] = []

    def report(computed: Computed) -> None:
        done.append(computed)
        shard, megabytes = computed.shard, computed.shard.bytes / 1e6
        cost = f"{computed.seconds:.1f} s CPU on {computed.machine}, worker's peak {computed.peak_bytes / 1e6:.0f} MB"
        place = f"{len(done)} of {len(jobs)}"
        log.info("%s: shard %s, %d samples, %.1f MB, %s", name, place, len(shard.image_ids), megabytes, cost)
        for rejected in shard.rejected:
            log.warning("%s: set aside: %s", name, rejected)

    ray_cluster.map_tasks(compute, ((store.url, job) for job in jobs), report)
    if finished is not None:
        return replace(finished, origins=origins_of(index))  # the same samples may lie in many places
    return commit(store, planned, index, config, [computed.shard for computed in done], bad_share)


def compute(store_url: str, job: ShardJob) -> Computed:
    """`compute_shard` as a Ray task."""
    started = time.process_time()
    shard = compute_shard(store_url, job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return Computed(shard, time.process_time() - started, peak, platform.node())
