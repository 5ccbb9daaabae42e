"""An upload from the inbox to shards, or to quarantine."""

import logging

from infra.errors import StoreError, TesseraError
from infra.store import Store
from preprocessing.inbox import Decision, Upload, decide, page, sift
from preprocessing.layouts import read_index
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardSet
from preprocessing.source import Index, TooManyBad

log = logging.getLogger("tessera.inbox")


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
    url = f"{store.url}/{upload.folder}"
    index: Index | None = None
    train_ids = frozenset(i for shard in train_set.shards for i in shard.image_ids)
    try:
        sifted = sift(read_index(url, split, layout), train_set.labels, train_ids, val_ids)
        index = sifted.index
        if not index.records and not index.rejected:
            return decide(
                store, line, upload, state="known", shards=None, samples=0, known=sifted.known, rejected=(), reason=None
            )
        fresh = len(index.records) + len(index.rejected)
        share = min(1.0, bad_share * (fresh + sifted.known) / fresh)  # what is known counts as good
        made = precompute(upload.name, index, train_set.config, store.url, share)
    except StoreError:
        raise
    except TesseraError as error:
        rejected = error.rejected if isinstance(error, TooManyBad) else index.rejected if index else ()
        text = page(f"{url}: in quarantine", index, rejected, str(error))
        facts = {"shards": None, "samples": 0, "known": 0, "rejected": rejected, "reason": str(error)}
        return decide(store, line, upload, text, state="quarantined", **facts)
    aside = f"{url}: {len(made.rejected)} of {len(made.rejected) + made.samples} samples set aside"
    return decide(
        store,
        line,
        upload,
        page(aside, index, made.rejected, None) if made.rejected else None,
        state="accepted",
        shards=made.path,
        samples=made.samples,
        known=sifted.known,
        rejected=made.rejected,
        reason=None,
    )
