"""Instances are merged over semantics as a slow painter does, and their masks are decoded as pycocotools does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from infra.errors import TesseraError
from preprocessing import rle
from preprocessing.instances import Instance, from_instances_and_semantics
from preprocessing.labels import LabelTable
from tests.support.instance_maps import CAT, DOG, LABELS, SEA, SIZE, SKY, box, counts_of, dense, rows_of

# ---- merging arrays


def test_instances_lie_over_semantics_and_bare_things_are_void():
    semantic = np.full(SIZE, SKY)
    semantic[3:] = CAT
    truth = from_instances_and_semantics(semantic, [(CAT, box(0, 2, 4, 2), False)], LABELS)
    assert rows_of(truth) == [(CAT, False, 8), (SKY, False, 20)]
    assert not truth.ids[4:].any()


def test_the_smaller_instance_lies_on_top_whatever_the_order():
    large, small, void = box(0, 0, 8, 6), box(1, 1, 2, 2), np.zeros(SIZE, np.uint8)
    for order in ([large, small], [small, large]):
        truth = from_instances_and_semantics(void, [Instance(CAT, mask) for mask in order], LABELS)
        assert {s.area for s in truth.segments} == {44, 4}


def test_of_equal_instances_the_later_lies_on_top():
    first, second = Instance(CAT, box(0, 0, 2, 1)), Instance(DOG, box(1, 0, 2, 1))
    void = np.zeros(SIZE, np.uint8)
    assert rows_of(from_instances_and_semantics(void, [first, second], LABELS)) == [(CAT, 0, 1), (DOG, 0, 2)]
    assert rows_of(from_instances_and_semantics(void, [second, first], LABELS)) == [(DOG, 0, 1), (CAT, 0, 2)]


def test_a_crowd_lies_below_even_what_is_larger():
    crowd, large = Instance(CAT, box(0, 0, 2, 2), True), Instance(CAT, box(1, 0, 7, 6))
    truth = from_instances_and_semantics(np.zeros(SIZE, int), [large, crowd], LABELS)
    assert rows_of(truth) == [(CAT, False, 42), (CAT, True, 2)]


def test_what_is_covered_has_no_segment_and_ids_stay_dense():
    instances = [Instance(CAT, box(0, 0, 2, 2)), Instance(DOG, box(0, 0, 2, 2)), Instance(CAT, np.zeros(SIZE, bool))]
    assert rows_of(from_instances_and_semantics(np.full(SIZE, SEA), instances, LABELS)) == [(DOG, 0, 4), (SEA, 0, 44)]
    truth = from_instances_and_semantics(np.full(SIZE, SEA), [Instance(DOG, box(0, 0, 8, 6))], LABELS)
    assert rows_of(truth) == [(DOG, 0, 48)]


def test_nothing_at_all_is_void_alone():
    truth = from_instances_and_semantics(np.full(SIZE, 255), [], LABELS)
    assert (truth.segments, truth.ids.any()) == ((), False)


def test_255_is_a_category_if_there_is_one():
    labels = LabelTable.from_coco([{"id": 255, "name": "sky", "isthing": 0}])
    (sky,) = from_instances_and_semantics(np.full(SIZE, 255), [], labels).segments
    assert sky.area == 48


def painter(semantic: np.ndarray, instances: list[Instance]) -> dict[tuple[int, int], tuple]:
    """Pixel -> segment, each pixel asking every instance: the topmost one, else the stuff, else nothing."""
    seen: dict[tuple[int, int], tuple] = {}
    for y, x in np.ndindex(semantic.shape):
        if semantic[y, x] in (SKY, SEA):
            seen[y, x] = ("stuff", int(semantic[y, x]))
        best = None
        for number, (category, mask, is_crowd) in enumerate(instances):
            rank = (0 if is_crowd else 1, -mask.sum(), number)
            if mask[y, x] and (best is None or rank > best[0]):
                best = (rank, ("thing", number, category, is_crowd))
        if best:
            seen[y, x] = best[1]
    return seen


masks = hnp.arrays(bool, SIZE)
some_instances = st.lists(st.builds(Instance, st.sampled_from([CAT, DOG]), masks, st.booleans()), max_size=6)


@given(hnp.arrays(np.uint8, SIZE, elements=st.sampled_from([0, CAT, DOG, SKY, SEA, 255])), some_instances)
def test_any_input_is_merged_as_a_slow_painter_does(semantic: np.ndarray, instances: list[Instance]):
    before = semantic.copy(), [i.mask_HW.copy() for i in instances]
    truth = from_instances_and_semantics(semantic, instances, LABELS)
    expected = painter(semantic, instances)
    pairs = {(int(truth.ids[y, x]), expected.get((y, x))) for y, x in np.ndindex(SIZE)}
    assert len({i for i, _ in pairs}) == len({e for _, e in pairs}) == len(pairs)
    for i, segment in pairs - {(0, None)}:
        row = truth.segments[i - 1]
        category = segment[1] if segment[0] == "stuff" else segment[2]
        assert (LABELS.categories[row.category].dataset_id, row.is_crowd) == (
            category,
            segment[0] == "thing" and segment[3],
        )
    assert np.array_equal(semantic, before[0])
    assert all(np.array_equal(i.mask_HW, mask) for i, mask in zip(instances, before[1], strict=True))


@pytest.mark.parametrize(
    ("semantic", "instances", "told"),
    [
        (np.zeros(SIZE), [], "semantics: expected integers"),
        (np.zeros((*SIZE, 3), int), [], "semantics: expected integers"),
        (np.full(SIZE, 9), [], r"semantics: categories \[9\] are not in the table"),
        (np.full(SIZE, -7), [], r"categories \[-7\]"),
        (np.zeros(SIZE, int), [(CAT, box(0, 0, 1, 1).astype(np.uint8), False)], "instance 0: expected bool"),
        (np.zeros(SIZE, int), [(CAT, np.zeros((6, 7), bool), False)], r"instance 0: .* got bool \(6, 7\)"),
        (
            np.zeros(SIZE, int),
            [(CAT, box(0, 0, 1, 1), False), (9, box(0, 0, 1, 1), False)],
            "instance 1: .* 9 is unknown",
        ),
        (np.zeros(SIZE, int), [(SKY, box(0, 0, 1, 1), False)], r"instance 0: the category 7 \(sky\) is stuff"),
    ],
)
def test_what_cannot_be_merged_is_refused(semantic: np.ndarray, instances: list, told: str):
    with pytest.raises(TesseraError, match=told):
        from_instances_and_semantics(semantic, instances, LABELS)


# ---- masks as the JSON writes them


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)))
def test_both_rles_are_decoded(mask: np.ndarray):
    size, packed = list(mask.shape), coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    for counts in (counts_of(mask), packed):
        runs = rle.runs_of({"size": size, "counts": counts}, mask.shape)
        assert np.array_equal(dense(runs, mask.shape), mask)
        assert rle.area(runs) == np.count_nonzero(mask)
        assert np.array_equal(runs, rle.encode(mask))


@given(hnp.arrays(bool, st.sampled_from([(700, 900), (1, 100000)]), elements=st.booleans(), fill=st.booleans()))
def test_long_runs_are_decoded(mask: np.ndarray):
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert np.array_equal(
        dense(rle.runs_of({"size": list(mask.shape), "counts": packed}, mask.shape), mask.shape), mask
    )


points = st.floats(-16, 16, allow_nan=False)
polygon = st.integers(3, 7).flatmap(lambda n: st.lists(points, min_size=2 * n, max_size=2 * n))


@given(st.lists(polygon.map(lambda p: [max(-6.0, min(12.0, v)) for v in p]), min_size=1, max_size=3))
def test_polygons_are_united_as_pycocotools_does(polygons: list[list[float]]):
    united = np.zeros(SIZE, bool)
    for one in polygons:
        united |= coco_mask.decode(coco_mask.frPyObjects([one], *SIZE))[..., 0].astype(bool)
    assert np.array_equal(dense(rle.runs_of(polygons, SIZE), SIZE), united)


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=130), max_size=30))
def test_any_text_is_decoded_or_refused(text: str):
    try:
        assert rle.runs_of({"size": list(SIZE), "counts": text}, SIZE).sum() == SIZE[0] * SIZE[1]
    except ValueError as problem:
        assert "RLE" in str(problem)  # noqa: PT017
