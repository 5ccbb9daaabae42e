"""Decoding what a perfect network would say."""

from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.pq import PQStats, compare, summarise
from preprocessing.coco import read_index
from preprocessing.geometry import Frame
from preprocessing.sample import make_sample
from preprocessing.synthetic import SyntheticConfig, write_set
from training.augment import framed
from training.backbones.stem_vit import StemVitConfig
from training.backbones.vit import VitConfig
from training.batch import Example, collate
from training.methods import METHODS
from training.methods.generalist.config import GeneralistConfig
from training.recipes import panoptic_deeplab
from training.recipes.generalist import demo

COCO_MINI = Path(__file__).resolve().parents[3] / "shared/data/coco_mini"
TINY = VitConfig(patch=4, width=8, depth=4, heads=1, layers=(1, 2, 3, 4))
"""No network runs here."""
RADIUS = 1
"""Nor is any loss computed."""


def ideal_pq(root, split, config, frame=None):
    """PQ at the images' own sizes of targets made on `frame` (None: their own grids) and decoded."""
    index = read_index(root, split)
    method = METHODS[type(config)](config, index.labels, frame or Frame(size=(8, 8)))
    stats = PQStats.zero(len(index.labels))
    for record in index.records:
        sample = make_sample(record, index.labels, None, RADIUS)
        example = Example.of("", sample) if frame is None else framed(Example.of("", sample), frame, RADIUS)
        (predicted,) = method.decode(method.ideal(collate([example])), [sample.panoptic.size])
        stats += compare(sample.panoptic, predicted, len(index.labels))
    return summarise(stats, index.labels)["pq"]


def small(config, **options):
    """The same targets and decoding with a network that is never run."""
    if isinstance(config, GeneralistConfig):
        return replace(config, backbone=TINY, decoder_widths=(1,) * 5, **options)
    return replace(config, backbone=StemVitConfig(widths=(8, 8, 8), depth=1, heads=1), skip_strides=(4, 2), **options)


CONFIGS = {
    "demo": demo().method,
    "paper": GeneralistConfig(),
    "direct": GeneralistConfig(encoding="direct"),
    "classes": GeneralistConfig(encoding="classes"),
    "void left out": GeneralistConfig(void_kept=False),
    "deeplab": panoptic_deeplab.demo().method,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_ideal_predictions_of_synthetic_scenes_keep_pq_99(tmp_path, config, record_property):
    root = write_set(tmp_path, SyntheticConfig(train=1, val=150))
    pq = ideal_pq(root, "val2017", small(config))
    record_property("pq", pq["all"])
    assert pq["all"] >= 99
    assert pq["things"] >= 99


LONG_REACH = GeneralistConfig(decode=replace(GeneralistConfig().decode, reach=12.0))
ALL_STUFF = panoptic_deeplab.coco().method
ALL_STUFF = replace(ALL_STUFF, decode=replace(ALL_STUFF.decode, min_stuff_area=0.0))


@pytest.mark.parametrize(
    ("config", "frame", "least"),
    [
        (LONG_REACH, Frame(size=(420, 420)), 97.0),
        pytest.param(LONG_REACH, None, 99.5, marks=pytest.mark.slow),
        (ALL_STUFF, panoptic_deeplab.coco().evaluated, 99.9),
        pytest.param(ALL_STUFF, None, 99.9, marks=pytest.mark.slow),
    ],
    ids=["generalist 420x420", "generalist own size", "deeplab 640x640", "deeplab own size"],
)
def test_ideal_predictions_of_coco_keep_their_pq(config, frame, least, record_property):
    if not COCO_MINI.exists():
        pytest.skip(f"needs {COCO_MINI}")
    pq = ideal_pq(COCO_MINI, "val2017", small(config), frame)
    record_property("pq", pq["all"])
    assert pq["all"] >= least
