"""Mapillary Vistas, Cityscapes' panoptic export and BDD100K in their own folders, tiny ones."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.errors import TesseraError
from preprocessing import bdd100k, rgb_ids
from preprocessing.cityscapes import LABELS
from preprocessing.layouts import read_index
from preprocessing.source import BadSample, Index, read_sample, stable_id
from tests.preprocessing.test_cityscapes import IDS, STEM, City
from tests.support.coco_folder import CocoFolder


def samples(index: Index) -> list[tuple]:
    """All that is trained on: ids, images, maps, and of each segment what a network is asked for."""
    found = []
    for record in sorted(index.records, key=lambda record: record.image_id):
        data, truth = read_sample(record, index.labels)
        names = [index.labels.names[segment.category] for segment in truth.segments]
        rows = [(s.is_thing, s.is_crowd, s.area, s.box, s.centroid) for s in truth.segments]
        found.append((record.image_id, data, [*zip(names, rows, strict=True)]))
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("layout", "folder", "name"),
    [
        ("mapillary-v2.0", "v2.0/panoptic", "panoptic_2020.json"),
        ("mapillary-v1.2", "v1.2/panoptic", "panoptic_2018.json"),
        ("mapillary-v1.2", "panoptic", "panoptic_2018.json"),
    ],
)
def test_mapillary_is_what_it_would_be_in_cocos_layout(
    coco: CocoFolder, tmp_path: Path, layout: str, folder: str, name: str, packed: bool
):
    with coco.editing() as content:  # its images have names for ids
        names = {image["id"]: f"key_{image['id']}" for image in content["images"]}
        for image in content["images"]:
            image["id"] = names[image["id"]]
        for entry in content["annotations"]:
            entry["image_id"] = names[entry["image_id"]]
    expected = samples(coco.index())
    root = tmp_path / "vistas"
    shutil.copytree(coco.images, root / "training/images")
    shutil.copytree(coco.masks, root / "training" / folder)
    shutil.copy(coco.json, root / "training" / folder / name)
    if packed:
        shutil.make_archive(str(tmp_path / "zips/mapillary-vistas-dataset_public"), "zip", root)
        root = tmp_path / "zips"
    index = read_index(root, "training", layout)
    assert samples(index) == expected
    assert (index.rejected, index.unused) == ((), ())
    assert index.records[0].image_id == stable_id("key_1")
    with pytest.raises(TesseraError, match=rf"validation/.*{name}: not found.* \(expected Mapillary"):
        read_index(root, "validation", layout)


def export_cityscapes(root: Path, ids: np.ndarray, stem: str, kind: str) -> None:
    """As createPanopticImgs.py does, --use-train-id for kind "_trainId"."""
    evaluated = [label for label in LABELS if label.is_evaluated]
    number = {label.id: i if kind else label.id for i, label in enumerate(evaluated)}
    rows, png, name = [], np.zeros(ids.shape, np.int32), Path(stem).name
    for value in np.unique(ids).tolist():
        label = next((row for row in evaluated if row.id == (value // 1000 if value >= 1000 else value)), None)
        if label is None:
            continue
        png[ids == value] = value
        crowd = int(label.has_instances and value < 1000)
        rows.append({"id": value, "category_id": number[label.id], "iscrowd": crowd, "area": int((ids == value).sum())})
    folder = root / f"gtFine/cityscapes_panoptic_train{kind}"
    folder.mkdir(parents=True)
    (folder / f"{name}_gtFine_panoptic.png").write_bytes(rgb_ids.write_png(png))
    height, width = ids.shape
    image = {"id": name, "file_name": f"{name}_gtFine_leftImg8bit.png", "height": height, "width": width}
    entry = {"image_id": name, "file_name": f"{name}_gtFine_panoptic.png", "segments_info": rows}
    things = [
        {"id": number[label.id], "name": label.name, "isthing": int(label.has_instances), "color": label.color}
        for label in evaluated
    ]
    content = {"images": [image], "annotations": [entry], "categories": things}
    folder.with_name(f"{folder.name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["", "_trainId"])
def test_the_panoptic_export_of_cityscapes_is_what_its_own_files_are(tmp_path: Path, kind: str):
    city = City(tmp_path / "cityscapes")
    ids = np.where(IDS == 29001, 0, IDS)  # an instance of a class that is not evaluated
    city.write(ids)
    export_cityscapes(city.root, ids, STEM, kind)
    own, exported = (read_index(city.root, "train", layout) for layout in ("cityscapes", "cityscapes-panoptic"))
    assert samples(exported) == samples(own)
    assert (exported.rejected, exported.unused) == ((), ())
    assert [r.image_id for r in exported.records] == [stable_id("aachen_000000_000019")]
    city.image().unlink()
    (city.image().parent / "other_leftImg8bit.png").touch()
    index = read_index(city.root, "train", "cityscapes-panoptic")
    with pytest.raises(BadSample, match=r"leftImg8bit/train/aachen_000000_000019_gtFine_leftImg8bit\.png: cannot be"):
        read_sample(index.records[0], index.labels)


ROAD, PERSON, CAR = 7, 31, 35
CROWD, IGNORED, OCCLUDED = 2, 1, 4
BITMASK = np.array(
    [
        [(0, 0, 0, 0), (ROAD, 0, 0, ROAD), (ROAD, 0, 0, ROAD), (ROAD, OCCLUDED, 0, ROAD)],
        [(CAR, OCCLUDED, 0, 31), (CAR, OCCLUDED, 0, 31), (CAR, 0, 1, 31), (ROAD, CROWD, 0, ROAD)],
        [(PERSON, CROWD, 0, 33), (PERSON, CROWD, 0, 33), (PERSON, 0, 0, 34), (PERSON, IGNORED, 0, 35)],
    ],
    np.uint8,
)


def write_bdd(root: Path, bitmask: np.ndarray = BITMASK, stem: str = "7d2f7975-e0c1c5a7") -> None:
    for folder in ("labels/pan_seg/bitmasks/train", "images/10k/train"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(bitmask, "RGBA").save(root / f"labels/pan_seg/bitmasks/train/{stem}.png")
    Image.new("RGB", bitmask.shape[1::-1], (9, 99, 199)).save(root / f"images/10k/train/{stem}.jpg")


def test_the_table_of_bdd100k_has_thirty_stuff_and_ten_things():
    assert len(bdd100k.CATEGORIES) == 40
    assert np.flatnonzero(bdd100k.CATEGORIES.is_thing).tolist() == list(range(30, 40))
    assert [bdd100k.CATEGORIES.names[i - 1] for i in (ROAD, 30, PERSON, CAR, 40)] == [
        "road",
        "sky",
        "person",
        "car",
        "truck",
    ]


def test_bitmasks_of_bdd100k_are_things_stuff_crowds_and_void(tmp_path: Path):
    write_bdd(tmp_path)
    index = read_index(tmp_path, "train", "bdd100k")
    (record,) = index.records
    truth = read_sample(record, index.labels)[1]
    assert record.image_id == stable_id("7d2f7975-e0c1c5a7")
    assert [(index.labels.names[s.category], s.is_crowd, s.area) for s in truth.segments] == [
        ("road", False, 4),
        ("car", False, 2),
        ("person", True, 2),
        ("person", False, 1),
        ("person", True, 1),
        ("car", False, 1),
    ]
    assert (truth.ids == 0).tolist() == (BITMASK[..., 0] == 0).tolist()


def test_bdd100k_in_its_zips_and_its_own_conversion_are_the_same(tmp_path: Path):
    write_bdd(tmp_path / "plain")
    expected = samples(read_index(tmp_path / "plain", "train", "bdd100k"))
    (tmp_path / "zips").mkdir()
    for part in ("labels", "images"):
        with zipfile.ZipFile(tmp_path / f"zips/bdd100k_{part}.zip", "w") as archive:
            for path in sorted((tmp_path / "plain" / part).rglob("*.*g")):
                archive.write(path, f"bdd100k/{path.relative_to(tmp_path / 'plain').as_posix()}")
    assert samples(read_index(tmp_path / "zips", "train", "bdd100k")) == expected

    stem, ids = "7d2f7975-e0c1c5a7", BITMASK[..., 3] + 256 * BITMASK[..., 2].astype(np.int32)
    rows = {}
    for category, bits, high, low in BITMASK.reshape(-1, 4).tolist():
        if category:
            crowd = bool(bits & (CROWD | IGNORED)) and category > 30
            rows[low + 256 * high] = {"id": low + 256 * high, "category_id": category, "iscrowd": crowd}
    masks = tmp_path / "plain/jsons/pan_seg/masks/train"
    masks.mkdir(parents=True)
    (masks / f"{stem}.png").write_bytes(rgb_ids.write_png(ids))
    image = {"id": stem, "file_name": f"{stem}.jpg", "height": 3, "width": 4}
    entry = {"image_id": stem, "file_name": f"{stem}.jpg", "segments_info": [*rows.values()]}
    content = {"images": [image], "annotations": [entry], "categories": bdd100k.CATEGORIES.to_coco()}
    (tmp_path / "plain/jsons/pan_seg_train_cocofmt.json").write_text(json.dumps(content))
    converted = samples(read_index(tmp_path / "plain", "train", "bdd100k-coco"))
    assert [(number, data, sorted(rows, key=str)) for number, data, rows in converted] == [
        (number, data, sorted(rows, key=str)) for number, data, rows in expected
    ]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "category": (
        lambda root: write_bdd(root, np.where(BITMASK == ROAD, 41, BITMASK).astype(np.uint8)),
        r"category 41, expected 0 to 40 \(4 px, the first at x=1, y=0\)",
    ),
    "no alpha": (
        lambda root: Image.new("RGB", (4, 3)).save(root / "labels/pan_seg/bitmasks/train/7d2f7975-e0c1c5a7.png"),
        "8-bit RGB, expected 8-bit RGB with transparency",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_bitmask_is_told(tmp_path: Path, name: str):
    spoil, told = BROKEN[name]
    write_bdd(tmp_path)
    spoil(tmp_path)
    index = read_index(tmp_path, "train", "bdd100k")
    with pytest.raises(BadSample, match=told):
        read_sample(index.records[0], index.labels)


def test_files_without_mates_are_told_with_what_is_there_instead(tmp_path: Path):
    write_bdd(tmp_path)
    write_bdd(tmp_path, stem="b")
    write_bdd(tmp_path, stem="c")
    images = tmp_path / "images/10k/train"
    (images / "b.jpg").rename(images / "b.JPG")
    (images / "c.jpg").unlink()
    (images / "me").symlink_to("me")
    index = read_index(tmp_path, "train", "bdd100k")
    assert len(index.records) == 1
    told = [rejected.reason for rejected in index.rejected]
    assert told[0].startswith(f"{images}/me cannot be listed (")
    assert told[1] == f"no b.jpg in {images} (there is none, but there is b.JPG)"
    assert told[2].startswith(f"no c.jpg in {images} (there is none; ")
