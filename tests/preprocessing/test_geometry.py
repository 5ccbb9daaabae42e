import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from preprocessing.geometry import resize_labels
from tests.support.label_maps import resized

SIZES = st.tuples(st.integers(1, 25), st.integers(1, 25))
LABELS = arrays(np.uint16, array_shapes(min_dims=2, max_dims=2, max_side=15), elements=st.integers(0, 65535))


@settings(deadline=None)
@given(LABELS, SIZES)
def test_every_pixel_comes_from_the_nearest_centre(labels: np.ndarray, size: tuple[int, int]):
    result = resize_labels(labels, size)
    assert result.shape == size
    assert result.dtype == labels.dtype
    assert np.array_equal(result, resized(labels, size))
    assert set(result.flat) <= set(labels.flat)


@given(LABELS)
def test_the_own_size_changes_nothing(labels: np.ndarray):
    assert np.array_equal(resize_labels(labels, labels.shape), labels)


@given(LABELS, st.integers(1, 4))
def test_whole_factors_repeat_every_pixel(labels: np.ndarray, factor: int):
    size = labels.shape[0] * factor, labels.shape[1] * factor
    assert np.array_equal(resize_labels(labels, size), labels.repeat(factor, 0).repeat(factor, 1))


@pytest.mark.parametrize("size", [(420, 420), (1, 1), (1000, 3)])
def test_sizes_of_real_images(size: tuple[int, int]):
    labels = np.random.default_rng(0).integers(0, 300, (427, 640), np.int32)
    assert np.array_equal(resize_labels(labels, size), resized(labels, size))
