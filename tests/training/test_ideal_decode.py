"""Decoding what a perfect network would say."""

from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.pq import PQStats, compare, summarise
from preprocessing.coco import read_index
from preprocessing.geometry import Frame
from preprocessing.sample import make_sample
from preprocessing.synthetic import SyntheticConfig, write_set
from training.backbones.vit import VitConfig
from training.batch import Example, collate
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.model import Generalist
from training.recipes.generalist import demo

COCO_MINI = Path(__file__).resolve().parents[3] / "shared/data/coco_mini"
TINY = VitConfig(patch=8, width=8, depth=4, heads=1, layers=(1, 2, 3, 4))
"""No network runs here."""


def ideal_pq(root, split, config, grid):
    """PQ at the images' own sizes of targets made on `grid` (None: their own) and decoded."""
    index = read_index(root, split)
    method = Generalist(replace(config, backbone=TINY, decoder_widths=(1,) * 5), index.labels, Frame(size=(8, 8)))
    stats = PQStats.zero(len(index.labels))
    for record in index.records:
        truth = make_sample(record, index.labels, None, 1).panoptic
        sample = make_sample(record, index.labels, grid, 1)
        batch = collate([Example.of("", sample)])
        (predicted,) = method.decode(method.ideal(batch), [truth.size])
        stats += compare(truth, predicted, len(index.labels))
    return summarise(stats, index.labels)["pq"]


CONFIGS = {
    "demo": demo().method,
    "paper": GeneralistConfig(),
    "direct": GeneralistConfig(encoding="direct"),
    "classes": GeneralistConfig(encoding="classes"),
    "void left out": GeneralistConfig(void_kept=False),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_ideal_predictions_of_synthetic_scenes_keep_pq_99(tmp_path, config, record_property):
    root = write_set(tmp_path, SyntheticConfig(train=1, val=150))
    pq = ideal_pq(root, "val2017", config, None)
    record_property("pq", pq["all"])
    assert pq["all"] >= 99
    assert pq["things"] >= 99


@pytest.mark.parametrize(("grid", "least"), [((420, 420), 97.0), (None, 99.5)], ids=["420x420", "own size"])
def test_ideal_predictions_of_coco_keep_their_pq_though_the_reach_is_long(grid, least, record_property):
    if not COCO_MINI.exists():
        pytest.skip(f"needs {COCO_MINI}")
    config = GeneralistConfig(decode=replace(GeneralistConfig().decode, reach=12.0))
    pq = ideal_pq(COCO_MINI, "val2017", config, grid)
    record_property("pq", pq["all"])
    assert pq["all"] >= least
