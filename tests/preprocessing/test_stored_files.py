"""A data set on an object store gives what the same data set gives on disk."""

import pickle
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from infra import opening
from infra.errors import StoreError, TesseraError
from infra.s3_store import S3Store
from infra.seaweed import S3Server, seaweed
from infra.store import Store, open_store
from preprocessing.files import File
from preprocessing.layouts import read_index
from preprocessing.shards import Shard, ShardConfig, compute_shard, plan
from preprocessing.source import BadSample, Index, read_sample
from preprocessing.tree import Tree
from tests.preprocessing import test_ade20k, test_cityscapes, test_instances
from tests.support.coco_folder import CocoFolder, cut

CONFIG = ShardConfig(grid=(20, 30), radius=9, samples=5)
SPLITS = {
    "coco": "train2017",
    "cityscapes": "train",
    "ade20k": "training",
    "ade20k-full": "training",
    "instances": "train",
}


@dataclass(frozen=True)
class Twins:
    """One data set in a folder and, once uploaded, on the store."""

    folder: Path
    store: Store
    layout: str = "coco"

    def upload(self) -> None:
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                self.store.write(path.relative_to(self.folder).as_posix(), path.read_bytes())

    def local(self) -> Index:
        return read_index(self.folder, SPLITS[self.layout], self.layout)

    def remote(self) -> Index:
        return read_index(self.store.url, SPLITS[self.layout], self.layout)

    def as_local(self, text: object) -> str:
        return str(text).replace(self.store.url, str(self.folder))


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server of its own: it is taken away."""
    with seaweed(tmp_path_factory.mktemp("seaweed"), "data-sets") as server:
        yield server


@pytest.fixture
def s3_store(s3_env: S3Server) -> S3Store:
    store = open_store(f"s3://{s3_env.bucket}/{uuid.uuid4().hex}/set")
    assert isinstance(store, S3Store)
    return store


@pytest.fixture
def twins(coco: CocoFolder, s3_store: S3Store) -> Twins:
    made = Twins(coco.root, s3_store)
    made.upload()
    return made


@contextmanager
def requests(store: S3Store) -> Iterator[list[str]]:
    """What is sent meanwhile to the server: names of operations."""
    sent: list[str] = []

    def note(event_name: str, **_: object) -> None:
        sent.append(event_name.rpartition(".")[2])

    events = store._client.meta.events
    events.register("before-send.s3", note)
    try:
        yield sent
    finally:
        events.unregister("before-send.s3", note)


def write_coco(root: Path, pristine: Path) -> None:
    made = CocoFolder(Path(shutil.copytree(pristine, root)))
    made.image(2).unlink()
    cut(made.mask(3))
    made.mask(4).unlink()
    made.mask(4).with_name("stray.png").write_bytes(b"no entry")
    with made.editing() as content:
        content["images"].append({**content["images"][0], "id": 999, "file_name": "no annotation.jpg"})
        name = content["annotations"][5]["file_name"]
        content["annotations"][5]["file_name"] = f".//{name}"


def write_cityscapes(root: Path, _: Path) -> None:
    made = test_cityscapes.City(root)
    for stem in (test_cityscapes.STEM, "bonn/bonn_000001_000019", "bonn/bonn_000002_000019"):
        made.write(test_cityscapes.IDS, stem)
    made.image("bonn/bonn_000001_000019").unlink()


def write_ade20k(root: Path, _: Path) -> None:
    made = test_ade20k.Challenge(root / "ADEChallengeData2016")
    for stem in (test_ade20k.STEM, "ADE_train_00000002"):
        made.write(test_ade20k.SEMANTIC, test_ade20k.INSTANCE, stem)
    made.path("annotations_instance", "ADE_train_00000002").unlink()


def write_full_ade20k(root: Path, _: Path) -> None:
    made = test_ade20k.Full(root, 2021)
    made.write(test_ade20k.INDEX, test_ade20k.NUMBER)
    made.write(test_ade20k.INDEX, test_ade20k.NUMBER, "ADE_train_00000002")
    made.write_names(test_ade20k.NAMES)
    made.path(".jpg", "ADE_train_00000002").unlink()


def write_instances(root: Path, _: Path) -> None:
    made = test_instances.Detections(root)
    for name in ("a.jpg", "b.jpg"):
        made.add(test_instances.SEMANTIC, test_instances.ANNOTATIONS, name)
    (made.images / "b.jpg").unlink()


WRITERS = {
    "coco": write_coco,
    "cityscapes": write_cityscapes,
    "ade20k": write_ade20k,
    "ade20k-full": write_full_ade20k,
    "instances": write_instances,
}


def shards(index: Index, store_url: str) -> list[Shard]:
    return [compute_shard(store_url, job) for job in plan(open_store(store_url), index, CONFIG).jobs]


@pytest.mark.parametrize("layout", SPLITS)
def test_index_and_shards_are_those_of_the_folder(layout: str, pristine: Path, tmp_path: Path, s3_store: S3Store):
    both = Twins(tmp_path / "set", s3_store, layout)
    WRITERS[layout](both.folder, pristine)
    both.upload()
    local, remote = both.local(), both.remote()
    assert remote.labels == local.labels
    assert [r.image_id for r in remote.records] == [r.image_id for r in local.records]
    assert [r.fingerprint() for r in remote.records] == [r.fingerprint() for r in local.records]
    assert both.as_local(remote.rejected) == str(local.rejected)
    assert both.as_local(remote.unused) == str(local.unused)
    stores = [open_store(str(tmp_path / name)) for name in ("of folder", "of store")]
    one, two = (shards(index, store.url) for index, store in zip((local, remote), stores, strict=True))
    assert [replace(shard, rejected=()) for shard in one] == [replace(shard, rejected=()) for shard in two]
    assert [[(r.image_id, r.file) for r in shard.rejected] for shard in one] == [
        [(r.image_id, both.as_local(r.file)) for r in shard.rejected] for shard in two
    ]
    assert any(shard.image_ids for shard in one)
    for shard in one:
        if shard.image_ids:
            assert stores[0].read(shard.key) == stores[1].read(shard.key)


def test_requests_are_one_listing_and_one_for_each_file_that_is_read(twins: Twins, s3_store: S3Store, tmp_path: Path):
    with requests(s3_store) as sent:
        index = twins.remote()
    assert sent == ["ListObjectsV2", "GetObject"]  # the JSON
    with requests(s3_store) as sent:
        plan(open_store(str(tmp_path)), index, CONFIG)
    assert sent == ["GetObject"] * 12  # the masks
    with requests(s3_store) as sent:
        assert [r.image.size() for r in index.records] == [r.image.size() for r in twins.local().records]
    assert sent == []
    with requests(s3_store) as sent:
        read_sample(index.records[0], index.labels)
    assert sent == ["GetObject"] * 2


def test_a_file_is_small_and_can_be_read_wherever_it_is_sent(twins: Twins):
    record = twins.remote().records[0]
    sent = pickle.dumps(record.image)
    assert len(sent) < 200 + len(str(record.image))
    assert pickle.loads(sent) == record.image
    assert pickle.loads(sent).read() == twins.local().records[0].image.read()


@pytest.mark.parametrize("part", ["image", "mask"])
def test_what_the_listing_lacks_costs_its_sample_alone_and_no_request(twins: Twins, s3_store: S3Store, part: str):
    file = getattr(twins.remote().records[3], part)
    s3_store.delete(file.path.removeprefix(f"{s3_store.url}/"))
    index = twins.remote()
    file = getattr(index.records[3], part)
    with requests(s3_store) as sent, pytest.raises(FileNotFoundError):
        file.read()
    assert sent == []
    with pytest.raises(BadSample, match=rf"^{file.path}: cannot be read \(the store has no such object\)$"):
        read_sample(index.records[3], index.labels)


@pytest.mark.parametrize("part", ["image", "mask"])
def test_what_vanished_since_the_listing_is_set_aside_by_name(twins: Twins, tmp_path: Path, part: str):
    index, store = twins.remote(), open_store(str(tmp_path / "store"))
    jobs = plan(store, index, CONFIG).jobs
    file = getattr(index.records[3], part)
    twins.store.delete(file.path.removeprefix(f"{twins.store.url}/"))
    twins.store.write(f"{file.path.removeprefix(f'{twins.store.url}/')}.old", b"of a similar name")
    shard = compute_shard(store.url, jobs[0])
    assert [r.image_id for r in shard.rejected] == [index.records[3].image_id]
    assert shard.rejected[0].reason == f"{file}: cannot be read (the object is gone since the data set was listed)"
    assert len(shard.image_ids) == 4


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")


def lose_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocessing.files.open_store", lambda url: open_store(f"{url}-that-is-not-there"))


@pytest.mark.parametrize("fault", [refuse, lose_the_bucket])
def test_a_store_that_refuses_makes_no_bad_sample(
    twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
):
    index, store = twins.remote(), open_store(str(tmp_path))
    jobs = plan(store, index, CONFIG).jobs
    fault(monkeypatch)
    with pytest.raises(StoreError, match=r"correct the URL|AWS_SECRET_ACCESS_KEY"):
        compute_shard(store.url, jobs[0])
    with pytest.raises(StoreError):
        plan(store, index, CONFIG)


def test_a_store_that_is_away_makes_no_bad_sample(
    twins: Twins, s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    index, store = twins.remote(), open_store(str(tmp_path))
    jobs = plan(store, index, CONFIG).jobs
    with monkeypatch.context() as hurried, s3_env.killed():
        hurried.setenv("TESSERA_STORE_PATIENCE", "0.2")
        for work in (lambda: compute_shard(store.url, jobs[0]), lambda: plan(store, index, CONFIG), twins.remote):
            with pytest.raises(StoreError, match=r"^cannot (read|list) s3://"):
                work()
    assert compute_shard(store.url, jobs[0]).rejected == ()


def test_only_what_lies_below_the_prefix_belongs_to_the_set(twins: Twins):
    around = open_store(twins.store.url.removesuffix("/set"))
    around.write("set2/train2017/other.jpg", b"of another set")
    tree = Tree(f"{twins.store.url}/")
    assert tree.file("train2017/other.jpg") is None
    images = tree.folder("train2017")
    assert images is not None
    assert sorted(images.files) == sorted(path.name for path in (twins.folder / "train2017").iterdir())
    assert tree.folder("train201") is None
    assert read_index(around.url + "/set", "train2017") == twins.remote()


def test_urls_without_a_data_set_are_refused_in_one_sentence(twins: Twins, s3_env: S3Server):
    parent = twins.store.url.removesuffix("/set")
    cases = {
        "s3://": r"^'s3://' is no store: use a folder, file:///folder or s3://bucket/prefix$",
        "gs://bucket/set": "^'gs://bucket/set' is no store",
        f"s3://{s3_env.bucket}//set": "is no key",
        f"{parent}/se": rf"^{parent}/se: not found \(expected the folder of a data set\)$",
        "s3://there-is-none/set": "^cannot list s3://there-is-none/set: .*create the bucket or correct the URL$",
    }
    for url, told in cases.items():
        with pytest.raises(TesseraError, match=told):
            read_index(url, "train2017")


@pytest.mark.parametrize("layout", SPLITS)
def test_a_missing_split_is_told_as_of_a_folder(twins: Twins, layout: str):
    told = []
    for root in (twins.folder, twins.store.url):
        with pytest.raises(TesseraError, match=r"test(\.json)?: not found.* \(expected ") as caught:
            read_index(root, "test", layout)
        told.append(twins.as_local(caught.value))
    assert told[0] == told[1]


def test_zips_on_a_store_must_be_unpacked(coco: CocoFolder, s3_store: S3Store):
    both = Twins(coco.root, s3_store)
    shutil.make_archive(str(coco.images), "zip", coco.root, coco.split)
    shutil.rmtree(coco.images)
    assert both.local().rejected == ()
    both.upload()
    with pytest.raises(TesseraError, match=r"train2017\.zip must be unpacked, zips are read from disks only$"):
        both.remote()


def test_an_object_of_more_than_memory_is_refused_before_it_is_read(
    twins: Twins, s3_store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    image = twins.remote().records[0].image
    monkeypatch.setattr(opening, "MOST", image.size() - 1)
    with requests(s3_store) as sent, pytest.raises(OSError, match="bytes are too many"):
        image.read()
    assert sent == []


def test_a_name_that_stores_refuse_costs_its_sample_alone(twins: Twins, s3_store: S3Store):
    name = "no\N{NO-BREAK SPACE}break.jpg"
    bucket, _, prefix = s3_store.url.removeprefix("s3://").partition("/")
    s3_store._client.put_object(Bucket=bucket, Key=f"{prefix}/train2017/{name}", Body=b"data")
    images = Tree(s3_store.url).folder("train2017")
    assert images is not None
    with pytest.raises(OSError, match="is no key"):
        images.file(name).read()


def test_names_are_found_however_they_are_written(twins: Twins):
    images = Tree(twins.store.url).folder("train2017")
    assert images is not None
    name = min(images.files)
    assert images.file(f".//{name}") == images.file(f"./{name}") == images.files[name]


def test_accents_and_a_folder_around_the_set_are_no_obstacle(coco: CocoFolder, s3_store: S3Store):
    before = [(r.image_id, r.image.size(), r.masks[0].crc()) for r in coco.index().records]
    with coco.editing() as content:
        for image in content["images"]:
            image["file_name"] = f"\u00f6 {image['file_name']}"
    for image in coco.images.iterdir():
        image.rename(image.with_name(f"o\u0308 {image.name}"))
    around = open_store(f"{s3_store.url}/COCO2017")
    Twins(coco.root, around).upload()
    index = read_index(s3_store.url, "train2017")
    assert [(r.image_id, r.image.size(), r.masks[0].crc()) for r in index.records] == before
    with pytest.raises(TesseraError, match=r"there is COCO2017/annotations/panoptic_train2017\.json"):
        read_index(s3_store.url, "train")


def test_a_file_url_is_the_folder(coco: CocoFolder):
    assert read_index(coco.root.as_uri(), coco.split) == coco.index()
    assert Tree(coco.root.as_uri()).file("nothing") is None
    assert Tree(coco.root.as_uri()).file(f"annotations/{coco.json.name}") == File(str(coco.json))


def test_the_command_validates_a_store(twins: Twins, tmp_path: Path):
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "preprocessing.validate", "--workers", "2", "--page", str(page)]
    sound = subprocess.run([*command, twins.store.url], capture_output=True, text=True)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert "train2017: 12 of 12 samples can be used" in sound.stdout
    assert f"{twins.store.url} can be trained on" in sound.stdout
    assert twins.store.url in page.read_text()
    wrong = subprocess.run([*command, "gs://bucket/set"], capture_output=True, text=True)
    assert "'gs://bucket/set' is no store" in wrong.stderr
