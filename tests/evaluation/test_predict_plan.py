"""What there is to predict, where an entry of the input cannot be listed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.predict_plan import plan_prediction, png_name
from infra.errors import TesseraError


def test_an_entry_that_cannot_be_listed_is_a_failure_and_the_others_are_predicted(tmp_path: Path):
    run, source, output = f"{tmp_path}/store/train/a", tmp_path / "photos", str(tmp_path / "out")
    source.mkdir()
    (source / "me").symlink_to("me")
    with pytest.raises(TesseraError, match=r"photos: no images found; me: .*symbolic links"):
        plan_prediction(run, str(source), output)
    (source / "1.jpg").write_bytes(b"1")
    found = plan_prediction(run, str(source), output)
    assert [item.name for item in found.items] == ["1.jpg"]
    assert [failure.file_name for failure in found.missing] == ["me"]


names = st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=3).map(".".join)
endings = st.sampled_from([".jpg", ".png", ".PNG", ".tif", ".jpeg"])


@given(st.sets(st.builds(str.__add__, names, endings), min_size=1, max_size=8))
def test_no_two_images_share_a_png(images):
    pngs = {image: png_name(image, images.__contains__) for image in images}
    assert len({*pngs.values()}) == len(images)
    assert all(png == image for image, png in pngs.items() if image.endswith(".png"))
