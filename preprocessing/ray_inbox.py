"""An upload from the inbox to shards, or to quarantine."""

from functools import partial

from infra.errors import StoreError, TesseraError
from infra.store import Store
from preprocessing.inbox import Decision, Sifted, Upload, decide, page, refuse_faults, sift
from preprocessing.layouts import read_index
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardConfig, ShardSet
from preprocessing.source import Rejected, TooManyBad


def take_in(
    store: Store,
    line: str,
    upload: Upload,
    layout: str,
    split: str,
    train_set: ShardSet,
    val_ids: frozenset[int],
    bad_share: float,
) -> Decision:
    """Make shards of what is new and good in an upload, like those of the train set, and write what became of it.

    Bad samples are set aside with a report; more than `bad_share` of them, other categories, or nothing that can be
    read put the whole upload in quarantine. Needs a Ray connection. StoreError if the store fails: that is no fault
    of the upload, which is looked at again. line: of the champion, for which it is decided.
    """
    url, index, decided = f"{store.url}/{upload.folder}", None, partial(decide, store, line, upload)
    train_ids = frozenset(i for shard in train_set.shards for i in shard.image_ids)
    try:
        refuse_faults(store, upload)
        sifted = sift(read_index(url, split, layout), train_set.labels, train_ids, val_ids)
        index = sifted.index
        made, rejected = _shards_of(store, upload.name, sifted, train_set.config, bad_share)
    except StoreError:
        raise
    except TesseraError as error:
        rejected = error.rejected if isinstance(error, TooManyBad) else index.rejected if index else ()
        told = page(f"{url}: in quarantine", index, rejected, str(error))
        return decided(told, state="quarantined", rejected=rejected, reason=str(error))
    text = page(f"{url}: {len(rejected)} samples set aside", index, rejected, None) if rejected else None
    if made is None:
        return decided(text, state="known", known=sifted.known, rejected=rejected)
    facts = {"shards": made.path, "samples": made.samples}
    return decided(text, state="accepted", known=sifted.known, rejected=rejected, **facts)


def _shards_of(
    store: Store, name: str, sifted: Sifted, config: ShardConfig, bad_share: float
) -> tuple[ShardSet | None, tuple[Rejected, ...]]:
    """The set of what is new, None if nothing new is good, and what was set aside. What is known counts as good."""
    fresh = len(sifted.index.records) + len(sifted.index.rejected)
    if not fresh:
        return None, ()
    allowed = bad_share * (fresh + sifted.known)
    try:
        made = precompute(name, sifted.index, config, store.url, min(1.0, allowed / fresh))
    except TooManyBad as error:
        if len(error.rejected) == fresh <= allowed:
            return None, error.rejected
        raise
    return made, made.rejected
