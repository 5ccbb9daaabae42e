"""Predictions in COCO's panoptic format: an entry of the JSON's `annotations` and an RGB-id PNG."""

from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from infra.errors import TesseraError
from infra.records import Count, Flag
from preprocessing import rgb_ids
from preprocessing.export import segments_info
from preprocessing.kernels import UNKNOWN
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment, tabulate


class SegmentInfo(TypedDict):
    """A segment of such an entry, as `annotation` writes it."""

    id: Annotated[int, Field(gt=0, lt=1 << 24)]
    category_id: Count
    area: Count
    bbox: Annotated[list[Count], Field(min_length=4, max_length=4)]
    iscrowd: Flag
    isthing: NotRequired[Flag]


class Annotation(TypedDict):
    """An entry of `annotations`, as `annotation` writes it."""

    image_id: Count
    file_name: str
    segments_info: list[SegmentInfo]


def annotation(panoptic: PanopticMap, labels: LabelTable, image_id: int, file_name: str) -> dict[str, Any]:
    """One entry of `annotations`, plain ints and strings, `category_id` being the data set's own id.

    `file_name` is the PNG's. Areas and boxes are those of the map's table. Raises TesseraError for a
    category that is not in `labels`. Source: COCO's format description; `isthing` is ours, for readers that
    do not have the categories at hand.
    """
    for segment in panoptic.segments:
        if not 0 <= segment.category < len(labels):
            raise TesseraError(f"{file_name}: segment {segment.id} has category {segment.category} of {len(labels)}")
    kinds = [int(labels.is_thing[segment.category]) for segment in panoptic.segments]
    rows = zip(segments_info(panoptic, labels), kinds, strict=True)
    return {
        "image_id": int(image_id),
        "file_name": file_name,
        "segments_info": [{**row, "isthing": kind} for row, kind in rows],
    }


def read_map(data: bytes, entry: Annotation, labels: LabelTable) -> PanopticMap:
    """Inverse of `png` and `annotation`: ids 1..N in the order of the entry's segments, areas counted.

    Raises TesseraError for an unknown category, and ids that are only in the PNG.
    """
    rows = entry["segments_info"]
    labels_HW, measures = rgb_ids.read_labels(data, np.array([row["id"] for row in rows], np.int32))
    if (labels_HW == UNKNOWN).any():
        raise TesseraError(f"{entry['file_name']}: it has ids that its entry does not list")
    segments = []
    for row in rows:
        category = labels.contiguous.get(row["category_id"])
        if category is None:
            raise TesseraError(
                f"{entry['file_name']}: segment {row['id']} has the unknown category {row['category_id']}"
            )
        segments.append(Segment(0, category, bool(labels.is_thing[category]), bool(row["iscrowd"])))
    return PanopticMap(labels_HW.astype(np.int32), tuple(tabulate(segments, *measures)))


def png(panoptic: PanopticMap) -> bytes:
    """The map's ids as an 8-bit RGB PNG. Raises TesseraError for ids that RGB cannot hold."""
    return rgb_ids.write_png(panoptic.ids)
