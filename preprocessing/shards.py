"""Shards: tars of samples on the object store, named by the hash of what they were made from.

A shard's name depends only on its own samples and the settings below, so data sets that share samples
share shards, a rerun computes nothing and images added to a data set cost only their own shards.
"""

import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import PurePath
from typing import Annotated, Any

import webdataset as wds
from pydantic import Field
from typing_extensions import TypedDict

from infra import artifacts, records
from infra.errors import TesseraError
from infra.records import Count, Flag, Key
from infra.store import Store, open_store
from preprocessing.geometry import Size
from preprocessing.json_file import without_collector
from preprocessing.kernels import MAX_RADIUS
from preprocessing.labels import LabelTable
from preprocessing.opening import NoMemory, within_memory
from preprocessing.sample import SCHEMA_VERSION, make_sample, to_fields
from preprocessing.source import BadSample, Index, Origin, Record, Rejected, TooManyBad

FOLDER = "precompute"
_EARLIER = 8
_AT_ONCE = 64
"""Records whose fingerprints a thread takes before the next ones."""
log = logging.getLogger("tessera.precompute")


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """All that the contents of shards depend on, beside the data."""

    grid: Size | None = None
    """Height, width of the pixel grid; None keeps each image's own (what evaluation wants)."""
    radius: int = 50
    """Distances are exact up to here, in pixels of the grid; EDS needs 2.5 D. 0: none, as evaluation wants."""
    samples: int = 128
    """Samples in one shard: the unit of work of every step."""

    def __post_init__(self) -> None:
        if not 0 <= self.radius <= MAX_RADIUS:
            raise TesseraError(f"shards: radius {self.radius} is not in 0..{MAX_RADIUS}")
        if not 1 <= self.samples < 1 << 31 or not all(1 <= side <= 1 << 16 for side in self.grid or ()):
            raise TesseraError(f"shards: samples {self.samples} and grid {self.grid} must be positive, sides to 65536")


@dataclass(frozen=True)
class Shard:
    """One finished shard, as its record beside the tar and the manifest state it."""

    key: Key
    """Key of the tar under the store's root; no object if every sample was rejected."""
    records: tuple[Count, ...]
    """Image ids that it was made from."""
    image_ids: tuple[Count, ...]
    """Those that it holds, in the order of the tar."""
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True)
class ShardSet:
    """A finished data set of shards: what training and evaluation read instead of the source."""

    path: str
    labels: LabelTable
    config: ShardConfig
    shards: tuple[Shard, ...]
    rejected: tuple[Rejected, ...]
    origins: tuple[Origin, ...] = field(default=(), compare=False)
    """Where its samples were read from, by whoever made it first; none where that was not written down."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(len(shard.image_ids) for shard in self.shards)


@dataclass(frozen=True)
class _Schema:
    schema: int


class _Category(TypedDict):
    id: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
    name: str
    isthing: Flag
    color: list[int]


@dataclass(frozen=True)
class _Content:
    """Of a set's manifest."""

    samples: Count
    labels: list[_Category]
    config: ShardConfig
    shards: tuple[Shard, ...]
    rejected: tuple[Rejected, ...]
    origins: tuple[Origin, ...] = ()


@dataclass(frozen=True)
class ShardJob:
    """What one task computes. Small: it holds rows of the JSON, no pixels."""

    key: str
    records: tuple[Record, ...]
    labels: LabelTable
    config: ShardConfig


@dataclass(frozen=True)
class Plan:
    """How a data set becomes shards."""

    path: str
    """Folder of its manifest."""
    jobs: tuple[ShardJob, ...]
    extends: tuple[str, ...]
    """Folders of the earlier sets whose shards it takes over."""
    taken: int
    """How many shards those are: the first of the jobs."""


def plan(store: Store, index: Index, config: ShardConfig) -> Plan:
    """Cut an index into shards: those of earlier sets on the store as they are, then what is new, in its own order.

    So a data set that has grown costs what it has grown by. Earlier sets are those with the same labels and
    config; the newest are asked first. A shard is taken over if all of its samples are in the index unchanged.
    """
    family = _family(index.labels, config)
    with without_collector(), ThreadPoolExecutor(16) as pool:  # the time goes into waiting for the disk
        chunks = [index.records[i : i + _AT_ONCE] for i in range(0, len(index.records), _AT_ONCE)]
        prints = list(chain.from_iterable(pool.map(_fingerprints, chunks)))
        left = {record.image_id: (record, known) for record, known in zip(index.records, prints, strict=True)}
    facts = asdict(index.labels)  # once: of 133 categories it takes as long as a shard's fingerprints
    jobs, extends = list[ShardJob](), list[str]()
    for earlier in _newest_sets(store, family) if left else ():
        count = len(jobs)
        for shard in earlier.shards:
            if all(i in left for i in shard.records):
                job = _job([left[i] for i in shard.records], index.labels, facts, config)
                if job.key == shard.key:
                    jobs.append(job)
                    for i in shard.records:
                        del left[i]
        extends += [earlier.path] if len(jobs) > count else []
    rest, taken = list(left.values()), len(jobs)
    jobs += [
        _job(rest[start : start + config.samples], index.labels, facts, config)
        for start in range(0, len(rest), config.samples)
    ]
    path = _set_path(index.labels, config, [job.key for job in jobs], index.rejected)
    return Plan(path, tuple(jobs), tuple(extends), taken)


def _family(labels: LabelTable, config: ShardConfig) -> str:
    """Folder of all sets whose shards can be taken over by each other."""
    return f"{FOLDER}/{artifacts.digest(SCHEMA_VERSION, labels, config)}"


def _set_path(labels: LabelTable, config: ShardConfig, keys: Sequence[str], rejected: Sequence[Rejected]) -> str:
    inputs = [*sorted(keys), artifacts.digest([(r.image_id, PurePath(r.file).name, r.reason) for r in rejected])]
    return artifacts.step_path(_family(labels, config), SCHEMA_VERSION, config, inputs)


def _fingerprints(records: Sequence[Record]) -> list[str]:
    return [record.fingerprint() for record in records]


def _job(
    samples: Sequence[tuple[Record, str]], labels: LabelTable, facts: dict[str, Any], config: ShardConfig
) -> ShardJob:
    """facts: asdict of the labels."""
    name = artifacts.digest(SCHEMA_VERSION, config.grid, config.radius, facts, [known for _, known in samples])
    return ShardJob(f"{FOLDER}/shards/{name}.tar", tuple(record for record, _ in samples), labels, config)


def _newest_sets(store: Store, family: str) -> Iterator[ShardSet]:
    """The last sets of a family, newest first; more would cost more to read than they save."""
    manifests = [entry for entry in store.list(f"{family}/") if entry.key.endswith(f"/{artifacts.MANIFEST}")]
    for entry in sorted(manifests, key=lambda entry: entry.modified, reverse=True)[:_EARLIER]:
        found = read_set(store, entry.key.removesuffix(f"/{artifacts.MANIFEST}"))
        if found is not None:
            yield found


def lost_shards(store: Store, done: ShardSet) -> set[str]:
    """Keys of the tars that a finished set lists and the store has lost or cut."""
    sizes = {entry.key: entry.size for entry in store.list(f"{FOLDER}/shards/")}
    return {shard.key for shard in done.shards if sizes.get(shard.key) != shard.bytes}


def forget_lost(store: Store, jobs: Sequence[ShardJob], done: ShardSet) -> list[ShardJob]:
    """The jobs whose tar a finished set lists and the store has lost or cut.

    Their records are deleted, so that `compute_shard` makes them again.
    """
    lost = lost_shards(store, done)
    for key in lost:
        store.delete(_record_key(key))
    return [job for job in jobs if job.key in lost]


def compute_shard(store_url: str, job: ShardJob) -> Shard:
    """Make one shard: the tar, then its record. A shard that is there already is not computed again.

    One with rejected samples is: a sample may have been mended without a change of its file's size.
    """
    store = open_store(store_url)
    done = read_shard(store, job.key)
    if done is not None and not done.rejected and store.exists(job.key):
        return done
    buffer, image_ids, rejected = io.BytesIO(), [], []
    with wds.TarWriter(buffer, mtime=0) as tar:  # a fixed time makes the bytes depend on the samples only
        for record in job.records:
            try:
                with within_memory():
                    fields = to_fields(make_sample(record, job.labels, job.config.grid, job.config.radius))
            except (BadSample, NoMemory) as problem:
                rejected.append(Rejected(record.image_id, str(record.image), str(problem)))
                continue
            tar.write({"__key__": f"{record.image_id:012d}", **fields})
            image_ids.append(record.image_id)
    data = buffer.getvalue() if image_ids else b""
    made_from = tuple(record.image_id for record in job.records)
    sha256 = hashlib.sha256(data).hexdigest()
    shard = Shard(job.key, made_from, tuple(image_ids), len(data), sha256, tuple(rejected))
    if data:
        store.write(job.key, data)
    store.write(_record_key(job.key), records.to_json(shard, indent=None))
    return shard


def read_shard(store: Store, key: str) -> Shard | None:
    """The record of a finished shard, or None."""
    record = _record_key(key)
    if not store.exists(record):
        return None
    found = records.read(store, record, Shard)
    if found.key != key:
        raise TesseraError(f"{store.url_for(record)}: it is the record of another shard, {found.key}")
    return found


def commit(
    store: Store, made: Plan, index: Index, config: ShardConfig, shards: Sequence[Shard], bad_share: float
) -> ShardSet:
    """Write the manifest, unless more than `bad_share` of all samples had to be set aside (TesseraError).

    The shards stay in either case: once the samples are mended, only their shards are computed again.
    """
    rejected = index.rejected + tuple(r for shard in shards for r in shard.rejected)
    order = {job.key: position for position, job in enumerate(made.jobs)}
    kept = tuple(shard for shard in sorted(shards, key=lambda shard: order[shard.key]) if shard.image_ids)
    result = ShardSet(made.path, index.labels, config, kept, rejected, origins_of(index))
    check(result, bad_share)
    write_set(store, result, made.extends)
    return result


def origins_of(index: Index) -> tuple[Origin, ...]:
    """Of a set that is made of it."""
    return () if index.origin is None else (index.origin,)


def write_set(store: Store, finished: ShardSet, extends: Sequence[str]) -> None:
    """Declare a set finished. extends: folders of the sets whose shards it takes over."""
    content = {
        "schema": SCHEMA_VERSION,
        "samples": finished.samples,
        "labels": finished.labels.to_coco(),
        "config": finished.config,
        "origins": finished.origins,
        "extends": extends,
        "shards": [asdict(shard) for shard in finished.shards],
        "rejected": [asdict(r) for r in finished.rejected],
    }
    artifacts.write_manifest(store, finished.path, content)


def join(first: ShardSet, others: Sequence[ShardSet]) -> ShardSet:
    """The set of the shards of all: nothing is computed, and nothing written (write_set does).

    A shard with an image that an earlier one holds is left out: no image is there twice. The same sets in any order
    after the first make the same one. Raises TesseraError for sets of other labels or settings than the first's.
    """
    shards, held = [*first.shards], {i for shard in first.shards for i in shard.image_ids}
    others = sorted(others, key=lambda other: other.path)
    for other in others:
        if (other.labels, other.config) != (first.labels, first.config):
            differ = other.labels.difference(first.labels)
            told = f" ({differ})" if differ else ""
            raise TesseraError(
                f"{other.path}: its categories or settings are other ones than those of {first.path}{told}"
            )
        fresh = [shard for shard in other.shards if held.isdisjoint(shard.image_ids)]
        if len(fresh) < len(other.shards):
            lost = sum(len(shard.image_ids) for shard in other.shards) - sum(len(shard.image_ids) for shard in fresh)
            log.warning("%s: %d samples are left out, in shards with images that are there already", other.path, lost)
        shards += fresh
        held |= {i for shard in fresh for i in shard.image_ids}
    if len(shards) == len(first.shards):
        return first
    rejected = (*first.rejected, *(r for other in others for r in other.rejected))
    path = _set_path(first.labels, first.config, [shard.key for shard in shards], rejected)
    origins = dict.fromkeys(origin for one in (first, *others) for origin in one.origins)
    return ShardSet(path, first.labels, first.config, tuple(shards), rejected, tuple(origins))


def check(result: ShardSet, bad_share: float) -> None:
    """TooManyBad if too many samples were set aside."""
    rejected = result.rejected
    share = len(rejected) / max(1, result.samples + len(rejected))
    if share > bad_share or not result.shards:
        shown = "; ".join(map(str, rejected[:5]))
        raise TooManyBad(
            f"{len(rejected)} of {result.samples + len(rejected)} samples are unusable, above the limit of "
            f"{bad_share:.1%}: {shown}{'; ...' if len(rejected) > 5 else ''}",
            rejected,
        )


def read_set(store: Store, path: str) -> ShardSet | None:
    """The finished set at `path`, or None. TesseraError if another version has written it."""
    url = store.url_for(f"{path}/{artifacts.MANIFEST}")
    content = artifacts.read_manifest(store, path)
    if content is None:
        return None
    if (schema := records.restore(_Schema, content, url).schema) != SCHEMA_VERSION:
        schemas = f"schema {schema}, this code reads {SCHEMA_VERSION}"
        raise TesseraError(f"{url}: written by another version ({schemas}); run precompute again")
    found = records.restore(_Content, content, url)
    labels = LabelTable.from_coco(found.labels, url)
    result = ShardSet(path, labels, found.config, found.shards, found.rejected, found.origins)
    if result.samples != found.samples:
        raise TesseraError(f"{url}: its shards hold {result.samples} samples, it says {found.samples}")
    return result


def _record_key(key: str) -> str:
    return key.removesuffix(".tar") + ".json"
