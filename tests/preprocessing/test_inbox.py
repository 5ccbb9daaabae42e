"""Uploads: whole or left alone, decided on once, bad samples set aside with a report, an outage never their fault."""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from html import unescape
from pathlib import Path
from threading import Barrier

import pytest

from infra.errors import StoreError, TesseraError
from infra.store import FolderStore, Store, open_store
from preprocessing import inbox, ray_inbox
from preprocessing.inbox import Decision, Upload, decide, decisions, sift, uploads, withdraw
from preprocessing.ray_inbox import take_in
from preprocessing.shards import ShardSet, join, read_set
from preprocessing.synthetic import CATEGORIES
from tests.support import retraining
from tests.support.coco_folder import CocoFolder, cut
from tests.support.retraining import ids_of, make_base, put, write_upload

FACTS = {"shards": None, "samples": 0, "known": 3, "rejected": (), "reason": None}
LINE = "of-the-champion"


@dataclass(frozen=True)
class Taker:
    """A store with a train set of images 1-8 and a val set; takes uploads in as the flow does, without Ray."""

    store: Store
    train_set: ShardSet
    val_set: ShardSet

    def __call__(self, name: str, bad_share: float = 0.5, train_set: ShardSet | None = None) -> Decision:
        (upload,) = (found for found in uploads(self.store) if found.name == name)
        val_ids = frozenset(ids_of([self.val_set]))
        return take_in(self.store, LINE, upload, "coco", "train2017", train_set or self.train_set, val_ids, bad_share)

    def put(self, folder: Path, name: str) -> None:
        put(folder, self.store, name)

    def objects(self, name: str) -> dict[str, tuple]:
        return {e.key: (e, self.store.read(e.key)) for e in self.store.list(f"inbox/{name}/")}

    def report(self, decision: Decision) -> str:
        assert decision.report == f"quarantine/{LINE}/{decision.upload}-{decision.version}/report.html"
        return self.store.read(decision.report).decode()


@pytest.fixture
def take(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Taker:
    monkeypatch.setattr(ray_inbox, "precompute", retraining.precompute)
    base = make_base(tmp_path / "base", store)
    return Taker(store, base.train_set, base.val_set)


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a minute."""
    monkeypatch.setattr(inbox, "SETTLED", timedelta())


@pytest.fixture
def six(tmp_path: Path) -> CocoFolder:
    """Images 101-106, in no set so far."""
    return CocoFolder(write_upload(tmp_path / "six", 101, 6))


def only(store: Store) -> Upload:
    (found,) = uploads(store)
    return found


def shown(page: str) -> str:
    """What a page shows, without its tags."""
    return unescape(re.sub(r"<[^>]*>", " ", page))


def test_an_upload_is_a_folder_and_whole_once_success_is_there(store: Store):
    assert uploads(store) == ()
    store.write("inbox/b/train2017/_SUCCESS", b"deeper, it says nothing")
    store.write("inbox/a/x.jpg", b"123")
    store.write("inbox/a/_SUCCESS", b"")
    found = uploads(store)
    assert [(u.name, u.objects, u.bytes, u.whole) for u in found] == [("a", 2, 3, True), ("b", 1, 23, False)]
    assert [u.folder for u in found] == ["inbox/a", "inbox/b"]
    assert uploads(store) == found


def test_any_change_makes_another_version_and_another_upload_does_not(store: Store):
    store.write("inbox/a/x", b"1")
    seen = {only(store).version}
    changes: tuple[Callable[[], object], ...] = (
        lambda: store.write("inbox/a/x", b"12"),
        lambda: store.write("inbox/a/y", b""),
        lambda: store.write("inbox/a/_SUCCESS", b""),
        lambda: store.delete("inbox/a/x"),
    )
    for number, change in enumerate(changes, start=2):
        change()
        seen.add(only(store).version)
        assert len(seen) == number
    store.write("inbox/ab/x", b"1")
    assert uploads(store)[0].version in seen


def test_an_object_in_no_folder_is_told_and_in_nobodys_way(store: Store, caplog: pytest.LogCaptureFixture):
    store.write("inbox/a/_SUCCESS", b"")
    alone = uploads(store)
    store.write("inbox/lost.jpg", b"")
    assert uploads(store) == alone
    (told,) = caplog.messages
    assert f"{store.url}/inbox/lost.jpg: expected inbox/<upload>/..." in told


def test_of_racing_decisions_the_first_one_stays_and_all_are_told_it(store: Store):
    upload, start = Upload("a", "v1", 1, 1, True), Barrier(8)

    def write(number: int) -> Decision:
        start.wait()
        return decide(store, LINE, upload, state="known", **FACTS | {"known": number})

    with ThreadPoolExecutor(8) as pool:
        told = {*pool.map(write, range(8))}
    assert {*decisions(store, LINE).values()} == told
    assert len(told) == 1
    assert decide(store, LINE, upload, "page", state="quarantined", **FACTS) in told


def test_a_line_decides_for_itself(store: Store):
    upload, of_a = Upload("up", "v1", 1, 1, True), FACTS | {"shards": "precompute/f/a"}
    accepted = decide(store, "a", upload, state="accepted", **of_a)
    assert decisions(store, "ab") == {}
    with pytest.raises(TesseraError, match="/inbox/up: no accepted upload"):
        withdraw(store, "ab", "up")
    other = decide(store, "ab", upload, "page", state="quarantined", **FACTS)
    withdraw(store, "a", "up")
    assert decisions(store, "ab") == {"up-v1": other}
    assert decisions(store, "a") == {"up-v1": replace(accepted, state="withdrawn")}


def test_what_is_known_is_left_out_and_what_is_in_the_val_set_is_set_aside(six: CocoFolder):
    index = six.index()
    sifted = sift(index, CATEGORIES, frozenset({101, 102, 9}), frozenset({106, 10}))
    assert [r.image_id for r in sifted.index.records] == [103, 104, 105]
    assert sifted.known == 2
    (leaked,) = sifted.index.rejected
    assert (leaked.image_id, leaked.file) == (106, str(six.image(5)))
    assert "the image is in the val set" in leaked.reason
    assert sift(index, CATEGORIES, frozenset(), frozenset()).index == index


def test_a_good_upload_becomes_a_set_of_its_own(take: Taker, six: CocoFolder):
    take.put(six.root, "a")
    before = take.objects("a")
    decision = take("a", bad_share=0.0)
    assert (decision.state, decision.samples, decision.known, decision.rejected) == ("accepted", 6, 0, ())
    assert decision.report is decision.reason is None
    made = read_set(take.store, decision.shards)
    assert ids_of([made]) == [*range(101, 107)]
    assert (made.labels, made.config) == (take.train_set.labels, take.train_set.config)
    assert decisions(take.store, LINE) == {f"a-{decision.version}": decision}
    assert take.objects("a") == before


def test_bad_samples_are_set_aside_and_the_page_names_each_with_its_reason(take: Taker, six: CocoFolder):
    cut(six.image(1))
    six.mask(2).unlink()
    with six.editing() as content:
        content["annotations"][4]["segments_info"][0]["category_id"] = 77
    take.put(six.root, "a")
    before = take.objects("a")
    decision = take("a")
    assert (decision.state, decision.samples, len(decision.rejected)) == ("accepted", 3, 3)
    assert ids_of([read_set(take.store, decision.shards)]) == [101, 104, 106]
    text = shown(take.report(decision))
    for name, why in (
        ("train2017/000000000102.jpg", "not a readable image"),
        ("panoptic_train2017/000000000103.png", "cannot be read"),
        ("panoptic_train2017/000000000105.png", "unknown category 77"),
    ):
        assert re.search(rf"/inbox/a/\S*{name}\s[^/]*{why}", text), (name, why)
    assert take.objects("a") == before


def test_too_many_bad_samples_put_all_of_it_in_quarantine_and_no_set_is_made(take: Taker, six: CocoFolder):
    for position in range(4):
        cut(six.image(position))
    sets = {e.key for e in take.store.list("precompute/") if e.key.endswith("manifest.json")}
    take.put(six.root, "a")
    decision = take("a")
    assert (decision.state, decision.shards, decision.samples) == ("quarantined", None, 0)
    assert decision.reason.startswith("4 of 6 samples are unusable, above the limit of 50.0%")
    assert sorted(r.image_id for r in decision.rejected) == [101, 102, 103, 104]
    text = shown(take.report(decision))
    assert decision.reason in text
    assert all(re.search(rf"/{i:012d}\.jpg\s[^/]*not a readable image", text) for i in range(101, 105))
    assert {e.key for e in take.store.list("precompute/") if e.key.endswith("manifest.json")} == sets


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda six: six.json.write_text("{"), "not valid JSON"),
        (lambda six: six.json.unlink(), r"panoptic_train2017\.json: not found"),
        (lambda six: shutil.rmtree(six.images), r"train2017: not found"),
        (lambda six: six.json.write_text('{"images": [], "annotations": [], "categories": [3]}'), "no list of objects"),
    ],
    ids=["no JSON", "nothing to read", "no images", "no categories"],
)
def test_what_cannot_be_read_is_in_quarantine_with_the_reason(take: Taker, six: CocoFolder, spoil: Callable, why: str):
    spoil(six)
    take.put(six.root, "a")
    decision = take("a", bad_share=1.0)
    assert decision.state == "quarantined"
    assert re.search(why, decision.reason)
    assert decision.reason in shown(take.report(decision))


def test_colours_and_the_order_of_categories_are_those_of_the_train_set(six: CocoFolder):
    with six.editing() as content:
        content["categories"] = [{**c, "color": None} for c in content["categories"][::-1]]
    taken = sift(six.index(), CATEGORIES, frozenset(), frozenset()).index.labels
    assert taken.to_coco() == CATEGORIES.to_coco()


def test_other_categories_are_in_quarantine(take: Taker, six: CocoFolder):
    with six.editing() as content:
        content["categories"][0]["name"] = "dish"
    take.put(six.root, "a")
    decision = take("a", bad_share=1.0)
    assert decision.state == "quarantined"
    assert decision.reason.startswith("its categories are not those of the train set: 1 'dish' (thing) against 1 'di")


def test_images_of_the_val_set_are_never_trained_on(take: Taker, tmp_path: Path):
    take.put(write_upload(tmp_path / "leak", 999_999, 4), "a")  # 1,000,001 and 1,000,002 are val images
    decision = take("a")
    assert (decision.state, decision.samples) == ("accepted", 2)
    assert ids_of([read_set(take.store, decision.shards)]) == [999_999, 1_000_000]
    assert len(re.findall(r"the image is in the val set", take.report(decision))) >= 2


def test_the_same_images_under_another_name_are_known(take: Taker, six: CocoFolder):
    take.put(six.root, "a")
    first = take("a")
    everything = join(take.train_set, [read_set(take.store, first.shards)])
    take.put(six.root, "b")
    again = take("b", train_set=everything)
    assert (again.state, again.samples, again.known, again.report) == ("known", 0, 6, None)


def test_what_was_set_aside_comes_in_once_it_is_mended(take: Taker, six: CocoFolder):
    good = six.image(1).read_bytes()
    cut(six.image(1))
    take.put(six.root, "a")
    first = take("a")
    everything = join(take.train_set, [read_set(take.store, first.shards)])
    take.store.write("inbox/a/train2017/000000000102.jpg", good)
    take.store.write("inbox/a/_SUCCESS", b"")
    second = take("a", train_set=everything)
    assert first.version != second.version
    assert (second.state, second.samples, second.known) == ("accepted", 1, 5)
    whole = join(everything, [read_set(take.store, second.shards)])
    assert ids_of([whole]) == [*range(1, 9), *range(101, 107)]


def test_what_was_in_quarantine_comes_in_once_it_is_mended(take: Taker, six: CocoFolder):
    goods = [six.image(position).read_bytes() for position in range(4)]
    for position in range(4):
        image = six.image(position)
        image.write_bytes(b"\0" * image.stat().st_size)  # the size stays, and with it the name of the shard
    take.put(six.root, "a")
    assert take("a").state == "quarantined"
    for number, good in enumerate(goods, start=101):
        take.store.write(f"inbox/a/train2017/{number:012d}.jpg", good)
    take.store.write("inbox/a/_SUCCESS", b"mended")
    decision = take("a", bad_share=0.0)
    assert (decision.state, decision.samples) == ("accepted", 6)


def test_a_withdrawn_upload_is_no_accepted_one_and_only_an_accepted_one_can_be(take: Taker, six: CocoFolder):
    take.put(six.root, "a")
    accepted = take("a")
    (withdrawn,) = withdraw(take.store, LINE, "a")
    assert decisions(take.store, LINE) == {f"a-{accepted.version}": withdrawn}
    assert (withdrawn.state, withdrawn.samples, withdrawn.shards) == ("withdrawn", 6, accepted.shards)
    for name in ("a", "b"):
        with pytest.raises(TesseraError, match=f"/inbox/{name}: no accepted upload"):
            withdraw(take.store, LINE, name)


@pytest.mark.parametrize(("store", "spoiled"), [("folder", 0), ("folder", 5), ("s3", 2)], indirect=["store"])
def test_an_outage_is_no_fault_of_an_upload_whenever_it_comes(
    take: Taker, six: CocoFolder, spoiled: int, monkeypatch: pytest.MonkeyPatch
):
    for position in range(spoiled):
        cut(six.image(position))
    take.put(six.root, "a")
    kind, left = type(take.store), [0]

    def failing(real: Callable) -> Callable:
        def operation(self, *arguments):
            left[0] -= 1
            if left[0] < 0:
                raise StoreError("the store is away")
            return real(self, *arguments)

        return operation

    with monkeypatch.context() as away:
        for name in ("read", "write", "create", "exists", "list"):
            away.setattr(kind, name, failing(getattr(kind, name)))
        left[0] = 10**6
        (upload,) = uploads(take.store)
        outages, decision = 0, None
        while decision is None:
            left[0] = outages
            try:
                val_ids = frozenset(ids_of([take.val_set]))
                decision = take_in(take.store, LINE, upload, "coco", "train2017", take.train_set, val_ids, 0.5)
            except StoreError:
                outages += 1 if isinstance(take.store, FolderStore) else 4
                left[0] = 10**6
                assert decisions(take.store, LINE) == {}
    assert outages > 5
    assert decision.state == ("quarantined" if spoiled == 5 else "accepted")
    assert len(decision.rejected) == spoiled


def test_names_in_the_annotations_lead_nowhere_and_into_no_page(take: Taker, six: CocoFolder, tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(six.mask(0).read_bytes())
    script = "<script>alert(1)</script>.png"
    with six.editing() as content:
        for position, name in enumerate(["../../../secret.png", str(tmp_path / "secret.png"), script, "\ud800.png"]):
            content["annotations"][position]["file_name"] = name
        content["images"][4]["file_name"] = "../../a/train2017/000000000101.jpg"
    take.put(six.root, "a")
    decision = take("a", bad_share=0.9)
    assert (decision.state, decision.samples) == ("accepted", 1)
    page = take.report(decision)
    assert script not in page
    assert script in shown(page)
    assert json.loads(take.store.read(f"uploads/{LINE}/a-{decision.version}.json"))["rejected"]


def test_what_is_known_counts_as_good(take: Taker, tmp_path: Path):
    """Of images 3-10 six are known; 9 is good and 10 is not: one bad sample of eight."""
    made = CocoFolder(write_upload(tmp_path / "eight", 3, 8))
    cut(made.image(7))
    for name, bad_share, state in (("a", 0.124, "quarantined"), ("b", 0.125, "accepted")):
        take.put(made.root, name)
        decision = take(name, bad_share)
        assert (decision.state, [r.image_id for r in decision.rejected]) == (state, [10])
    assert (decision.samples, decision.known) == (1, 6)
    assert ids_of([read_set(take.store, decision.shards)]) == [9]


def test_one_bad_sample_beside_known_ones_is_no_reason_for_quarantine(take: Taker, tmp_path: Path):
    made = CocoFolder(write_upload(tmp_path / "eight", 2, 8))  # 9 alone is new
    cut(made.image(7))
    take.put(made.root, "a")
    decision = take("a", bad_share=0.125)
    assert decision.state != "quarantined"


@pytest.mark.parametrize("name", ["line\nbreak", "\udcff", "x" * 250, ".partial-x"], ids=ascii)
def test_whatever_the_folder_of_an_upload_is_called_something_becomes_of_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray_inbox, "precompute", retraining.precompute)
    store = open_store(str(tmp_path / "store"))
    base = make_base(tmp_path / "base", store)
    folder = Path(store.url, "inbox", name)
    write_upload(folder, 101, 2)
    (folder / "_SUCCESS").touch()
    decision = Taker(store, base.train_set, base.val_set)(only(store).name)
    assert decisions(store, LINE) == {only(store).title: decision}
    assert decision.upload.encode() == name.encode(errors="backslashreplace")


def test_where_no_sample_can_be_paired_the_page_names_each_all_the_same(take: Taker, six: CocoFolder):
    with six.editing() as content:
        content["images"] = []
    take.put(six.root, "a")
    decision = take("a")
    assert decision.state == "quarantined"
    assert all(f"{i:012d}.png" in take.report(decision) for i in range(101, 107))
