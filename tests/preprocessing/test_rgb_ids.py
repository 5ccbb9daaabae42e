import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from panopticapi.utils import id2rgb, rgb2id

from infra.errors import TesseraError
from preprocessing.rgb_ids import MAX_ID, decode, encode, read_png, write_png

ID_MAPS = arrays(np.int32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, MAX_ID))


@settings(deadline=None)
@given(ID_MAPS)
def test_ids_survive_the_png(ids: np.ndarray):
    assert decode(encode(ids)).dtype == np.int32
    assert np.array_equal(decode(encode(ids)), ids)
    assert np.array_equal(read_png(write_png(ids)), ids)


@given(ID_MAPS)
def test_the_encoding_is_panopticapis(ids: np.ndarray):
    rgb = encode(ids)
    assert np.array_equal(rgb, id2rgb(ids))
    assert np.array_equal(decode(rgb), rgb2id(rgb))


def test_all_of_the_24_bit_range_fits():
    ids = np.arange(2**24, dtype=np.int32).reshape(4096, 4096)
    assert np.array_equal(decode(encode(ids)), ids)


@pytest.mark.parametrize("value", [-1, MAX_ID + 1])
def test_ids_that_rgb_cannot_hold_are_refused(value: int):
    with pytest.raises(TesseraError, match=str(value)):
        encode(np.array([[0, value]], np.int32))


def test_an_empty_map_stays_empty():
    assert encode(np.empty((0, 4), np.int32)).shape == (0, 4, 3)
