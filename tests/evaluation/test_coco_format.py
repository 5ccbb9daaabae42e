"""Predictions in COCO's format, checked by writing, reading back and by panopticapi."""

import io
import json

import numpy as np
import pytest
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import rgb2id
from PIL import Image

from evaluation.coco_format import annotation, png
from infra.errors import TesseraError
from preprocessing.labels import Category, LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment

LABELS = LabelTable((Category(90, "cat", True, (1, 2, 3)), Category(7, "sky", False, (4, 5, 6))))
IDS = np.array([[0, 300, 300], [2**24 - 1, 300, 300]], np.int32)
MAP = PanopticMap(
    IDS,
    (
        Segment(300, 1, False, area=4, box=(1, 0, 2, 2)),
        Segment(2**24 - 1, 0, True, is_crowd=True, area=1, box=(0, 1, 1, 1)),
    ),
)


def test_annotation_has_the_data_sets_own_ids_and_plain_values():
    entry = annotation(MAP, LABELS, 42, "42.png")
    assert json.loads(json.dumps(entry)) == entry
    assert entry == {
        "image_id": 42,
        "file_name": "42.png",
        "segments_info": [
            {"id": 300, "category_id": 7, "area": 4, "bbox": [1, 0, 2, 2], "iscrowd": 0, "isthing": 0},
            {"id": 2**24 - 1, "category_id": 90, "area": 1, "bbox": [0, 1, 1, 1], "iscrowd": 1, "isthing": 1},
        ],
    }


def test_numpy_integers_become_plain():
    numbers = Segment(np.int32(5), np.int64(0), np.bool_(True), np.bool_(False), np.int64(1), (np.int64(0),) * 4)
    entry = annotation(PanopticMap(np.full((1, 1), 5, np.int32), (numbers,)), LABELS, np.int64(3), "3.png")
    assert json.loads(json.dumps(entry)) == entry


@pytest.mark.parametrize("category", [-1, 2])
def test_unknown_category_is_refused(category):
    panoptic = PanopticMap(IDS, (Segment(300, category, True),))
    with pytest.raises(TesseraError, match=rf"^42.png: segment 300 has category {category} of 2$"):
        annotation(panoptic, LABELS, 42, "42.png")


def test_png_is_rgb_ids():
    with Image.open(io.BytesIO(png(MAP))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(rgb2id(np.asarray(image)), IDS)


@pytest.mark.parametrize("id_", [-1, 2**24])
def test_ids_that_rgb_cannot_hold_are_refused(id_):
    with pytest.raises(TesseraError, match=str(id_)):
        png(PanopticMap(np.full((1, 1), id_, np.int32), ()))


def test_panopticapi_reads_what_we_write(tmp_path):
    (tmp_path / "42.png").write_bytes(png(MAP))
    entry = json.loads(json.dumps(annotation(MAP, LABELS, 42, "42.png")))
    categories = {c["id"]: c for c in LABELS.to_coco()}
    stats = pq_compute_single_core(0, [(entry, entry)], tmp_path, tmp_path, categories)
    assert (stats[7].tp, stats[7].iou, stats[90].tp) == (1, 1, 0)
