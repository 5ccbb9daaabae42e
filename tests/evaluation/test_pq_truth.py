"""PQ against others' truth: the COCO panoptic API on random maps, DeepLab2's published test results."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from panopticapi.evaluation import pq_compute_single_core
from PIL import Image

from evaluation.pq import PQStats, compare, summarise
from preprocessing import rgb_ids
from preprocessing.labels import Category, LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment

LABELS = LabelTable(
    tuple(Category(id_, f"c{id_}", thing, (0, 0, 0)) for id_, thing in [(3, True), (90, True), (7, False)])
)


def random_ids(rng, count):
    """Distinct ids: dense, or any 24-bit ones."""
    dense = np.arange(1, count + 1)
    return rng.permutation(dense) if rng.random() < 0.5 else 1 + rng.choice(2**24 - 1, count, replace=False)


def random_truth(rng):
    """Up to 7 segments and void in blocks, several crowds, ids without a row, rows without a pixel."""
    size, count = rng.integers(1, 14, 2), int(rng.integers(1, 8))
    block = int(rng.integers(1, 4))
    labels = rng.integers(0, count + 1, -(-size // block)).repeat(block, 0).repeat(block, 1)
    ids = random_ids(rng, count + 2)
    listed = [*ids[:count][rng.random(count) < 0.9], *ids[count:][rng.random(2) < 0.3]]
    rows = [Segment(int(i), int(rng.integers(3)), False, bool(rng.random() < 0.35)) for i in listed]
    table = tuple(rows[i] for i in rng.permutation(len(rows)))
    return PanopticMap(np.r_[0, ids].astype(np.int32)[labels[: size[0], : size[1]]], table)


def random_prediction(rng, truth):
    """The truth shifted, merged, split, with holes and wrong classes; now and then plain noise."""
    _, labels = np.unique(truth.ids, return_inverse=True)
    labels = labels.reshape(truth.size).astype(np.int64)
    if rng.random() < 0.15:
        labels = rng.integers(0, 4, truth.size)
    labels = np.roll(labels, rng.choice([0, 0, 0, 1], 2), (0, 1))
    labels[labels == rng.integers(0, 15)] = rng.integers(0, 9)
    labels[: rng.integers(0, truth.size[0] + 1)] += 10 * (rng.random() < 0.3)
    labels[rng.random(truth.size) < rng.choice([0, 0.05, 0.3])] = rng.choice([0, 1, 25])
    ids = np.r_[0, random_ids(rng, labels.max() + 1)].astype(np.int32)[labels]
    values = [int(i) for i in np.unique(ids) if i]
    return PanopticMap(ids, tuple(Segment(i, _likely_category(rng, truth, ids == i), False) for i in values))


def _likely_category(rng, truth, mask):
    """Mostly that of the ground truth under one of its pixels."""
    below = {s.id: s.category for s in truth.segments}.get(int(rng.choice(truth.ids[mask])))
    return below if below is not None and rng.random() < 0.9 else int(rng.integers(3))


def panopticapi_stats(pairs, folder):
    """panopticapi's own statistics object, fed with the counted areas of the ground truth."""
    annotations = []
    for number, pair in enumerate(pairs):
        for side, panoptic in zip(("truth", "prediction"), pair, strict=True):
            (folder / side).mkdir(exist_ok=True)
            (folder / side / f"{number}.png").write_bytes(rgb_ids.write_png(panoptic.ids))
        annotations.append([_coco(panoptic, number) for panoptic in pair])
    (folder / "annotations.json").write_text(json.dumps(annotations))
    pairs_read = json.loads((folder / "annotations.json").read_text())
    categories = {c["id"]: c for c in LABELS.to_coco()}
    return pq_compute_single_core(0, pairs_read, folder / "truth", folder / "prediction", categories), categories


def _coco(panoptic, number):
    rows = [
        {
            "id": s.id,
            "category_id": LABELS.categories[s.category].dataset_id,
            "iscrowd": int(s.is_crowd),
            "area": int((panoptic.ids == s.id).sum()),
        }
        for s in panoptic.segments
    ]
    return {"image_id": number, "file_name": f"{number}.png", "segments_info": rows}


def assert_agrees(pairs, folder):
    ours = sum((compare(*pair, len(LABELS)) for pair in pairs), PQStats.zero(len(LABELS)))
    theirs, categories = panopticapi_stats(pairs, folder)
    for c, category in enumerate(LABELS.categories):
        stat = theirs[category.dataset_id]
        assert (ours.tp[c], ours.fp[c], ours.fn[c]) == (stat.tp, stat.fp, stat.fn)
        assert ours.iou[c] == pytest.approx(stat.iou, abs=1e-9)
    summary = summarise(ours, LABELS)
    for group, is_thing in (("all", None), ("things", True), ("stuff", False)):
        if summary["counts"][group]["categories"] == 0:
            assert [summary[metric][group] for metric in ("pq", "sq", "rq")] == [None] * 3
            continue
        average, each = theirs.pq_average(categories, is_thing)
        for metric in ("pq", "sq", "rq"):
            assert summary[metric][group] / 100 == pytest.approx(average[metric], abs=1e-9)
            for category in (c for c in LABELS.categories if c.dataset_id in each):
                value = summary[metric]["per_category"][category.name]
                assert (value or 0) / 100 == pytest.approx(each[category.dataset_id][metric], abs=1e-9)
    return ours


def random_pair(rng):
    truth = random_truth(rng)
    return truth, random_prediction(rng, truth)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_one_image_agrees_with_panopticapi(tmp_path_factory, seed):
    assert_agrees([random_pair(np.random.default_rng(seed))], tmp_path_factory.mktemp("pq"))


@pytest.mark.parametrize("seed", range(4))
def test_many_images_agree_with_panopticapi(tmp_path, seed):
    rng = np.random.default_rng(seed)
    stats = assert_agrees([random_pair(rng) for _ in range(600)], tmp_path)
    assert min(*stats.tp, *stats.fp, *stats.fn) > 100  # the fuzz reaches every outcome


DEEPLAB2 = Path(__file__).resolve().parents[3] / "shared/data/pq_truth/deeplab2"

NAMES = ["person", "bear", "tree", "bird", "sky", "cat"]
COLORS = [(0, 0, 255), (255, 0, 0), (0, 255, 0), (255, 0, 255), (0, 255, 255), (255, 255, 0)]
DEEPLAB2_LABELS = LabelTable(
    tuple(Category(i, name, True, rgb) for i, (name, rgb) in enumerate(zip(NAMES, COLORS, strict=True)))
)
# Category by grey value of the ground truth; other values are void.
TEAM = {198: 1} | dict.fromkeys([47, 97, 133, 150, 174, 215, 244, 255], 0)
TRUTHS = {"team_gt_instance": TEAM, "bird_gt": {92: 4, 176: 2, 255: 3}, "cat_gt": {255: 5}}


def deeplab2_stats(name):
    """Statistics of one of the three images: `<name>`'s ground truth against <its first word>_pred_*."""
    grey_HW = read_picture(f"{name}.png", "L").astype(np.int32)
    category_by_id = TRUTHS[name]
    truth_HW = np.where(np.isin(grey_HW, list(category_by_id)), grey_HW, 0)
    image = name.split("_")[0]
    instance_HW = read_picture(f"{image}_pred_instance.png", "L").astype(np.int32)
    rgb_HW3 = read_picture(f"{image}_pred_class.png", "RGB")
    prediction_HW = np.zeros_like(grey_HW)
    for c, color in enumerate(COLORS):
        of_class_HW = (rgb_HW3 == color).all(axis=2)
        prediction_HW[of_class_HW] = 256 * (c + 1) + instance_HW[of_class_HW]
    predicted = {int(i): int(i) // 256 - 1 for i in np.unique(prediction_HW) if i}
    maps = (with_table(truth_HW, category_by_id), with_table(prediction_HW, predicted))
    return compare(*maps, len(COLORS), where=name)


def read_picture(file_name, mode):
    if not (DEEPLAB2 / file_name).exists():
        pytest.skip(f"{DEEPLAB2 / file_name} is not here")
    return np.asarray(Image.open(DEEPLAB2 / file_name).convert(mode))


def with_table(ids_HW, category_by_id):
    return PanopticMap(ids_HW.astype(np.int32), tuple(Segment(i, c, True) for i, c in category_by_id.items()))


def test_deeplab2_one_image():
    """panoptic_quality_test: test_matches_expected (DeepLab), test_streaming_metric_on_single_image."""
    stats = deeplab2_stats("team_gt_instance")
    assert [stats.tp.tolist()[:2], stats.fn.tolist()[:2], stats.fp.tolist()[:2]] == [[7, 1], [1, 0], [0, 0]]
    assert stats.iou[:2] == pytest.approx([5.26827, 0.54069], abs=5e-6)
    summary = summarise(stats, DEEPLAB2_LABELS)
    averages = [summary[metric]["all"] / 100 for metric in ("pq", "sq", "rq")]
    assert averages == pytest.approx([0.62156284, 0.64664984, 0.9666667], abs=1e-7)


def test_deeplab2_three_images():
    """panoptic_quality_test and streaming_metrics_test: test_streaming_metric_on_multiple_images."""
    stats = sum(map(deeplab2_stats, TRUTHS), PQStats.zero(len(COLORS)))
    assert [stats.tp.tolist(), stats.fn.tolist(), stats.fp.tolist()] == [
        [7] + [1] * 5,
        [1] + [0] * 5,
        [0] * 6,
    ]
    # Published as coverings: for a category of one segment that is the segment's IoU.
    single = [0.5406896552, 0.7453531599, 0.8576779026, 0.9910687881, 0.7741046032]
    assert stats.iou[1:] == pytest.approx(single, abs=1e-9)
    summary = summarise(stats, DEEPLAB2_LABELS)
    averages = [summary[metric]["all"] / 100 for metric in ("pq", "sq", "rq")]
    assert averages == pytest.approx([0.76855499, 0.7769174, 0.98888892], abs=1e-7)
    each = [value / 100 for value in summary["pq"]["per_category"].values()]
    assert each == pytest.approx([0.7024, 0.54069, 0.745353, 0.85768, 0.99107, 0.77410], abs=5e-5)
