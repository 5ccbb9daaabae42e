"""All of precompute but Ray."""

from infra.store import Store
from preprocessing.shards import ShardConfig, ShardSet, commit, compute_shard, plan
from preprocessing.source import Index


def make_set(store: Store, index: Index, config: ShardConfig, bad_share: float = 0.0) -> ShardSet:
    """The finished set of an index."""
    planned = plan(store, index, config)
    shards = [compute_shard(store.url, job) for job in planned.jobs]
    return commit(store, planned, index, config, shards, bad_share)
