"""Examples and batches of synthetic scenes, without files."""

import numpy as np

from preprocessing.kernels import squared_distance
from preprocessing.panoptic_map import Segment, measured
from preprocessing.sample import instance_groups, semantic_groups
from preprocessing.synthetic import CATEGORIES, draw_scene
from training.batch import Batch, Example, collate

RADIUS = 20


def example(labels_HW, segments, key="0", seed=0):
    """An example of a dense label map; segments without measures."""
    labels_HW = np.asarray(labels_HW, np.uint16)
    rows = tuple(measured(labels_HW, segments))
    image_HW3 = np.random.default_rng(seed).integers(0, 256, (*labels_HW.shape, 3), dtype=np.uint8)
    maps = [squared_distance(labels_HW, groups(rows), RADIUS) for groups in (semantic_groups, instance_groups)]
    return Example(key, image_HW3, labels_HW, *maps, rows)


def scene_example(seed, size=(32, 32)):
    """A synthetic scene; its own pixels, not noise."""
    scene = draw_scene(np.random.default_rng(seed), size)
    position = {c.name: i for i, c in enumerate(CATEGORIES.categories)}
    present = np.unique(scene.label[scene.label > 0])
    dense_HW = np.searchsorted(present, scene.label) + 1
    dense_HW[scene.label == 0] = 0
    segments = [
        Segment(0, position[name], name not in ("sky", "field", "water"), int(label) in scene.crowds)
        for label, name in ((label, scene.names[label]) for label in present)
    ]
    made = example(dense_HW, segments, key=str(seed))
    rgb = scene.rgb.clip(0, 255).astype(np.uint8)
    return Example(made.key, rgb, made.labels_HW, made.semantic_d2_HW, made.instance_d2_HW, made.segments)


def scene_batch(seeds, size=(32, 32)) -> Batch:
    return collate([scene_example(seed, size) for seed in seeds])
