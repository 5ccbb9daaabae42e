"""A synthetic data set in COCO's panoptic layout: true files, any size, the same for the same seed.

Scenes have wavy stuff regions told apart by hue and texture, and things told apart by shape alone, of
random colour, occluding each other. They hold what makes real annotations hard: void seams, objects that
nobody labelled, crowds, random 24-bit ids, category ids with gaps.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra import artifacts
from infra.copying import WHOLE, copy_files, counted
from infra.errors import TesseraError
from infra.store import Store
from preprocessing import rgb_ids
from preprocessing.labels import LabelTable

CATEGORIES = LabelTable.from_coco(
    [
        {"id": 1, "name": "disk", "isthing": 1, "color": [220, 20, 60]},
        {"id": 3, "name": "box", "isthing": 1, "color": [0, 0, 142]},
        {"id": 4, "name": "triangle", "isthing": 1, "color": [250, 170, 30]},
        {"id": 18, "name": "ring", "isthing": 1, "color": [106, 0, 228]},
        {"id": 92, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
        {"id": 117, "name": "field", "isthing": 0, "color": [107, 142, 35]},
        {"id": 200, "name": "water", "isthing": 0, "color": [0, 220, 220]},
    ]
)
STORED = "data"
"""Folder under a store's root with the sets that Tessera has made."""
SHAPES = ("disk", "box", "triangle", "ring")
STUFF = ("sky", "field", "water")
_STUFF_COLOR = {"sky": (165, 195, 230), "field": (95, 140, 60), "water": (40, 95, 135)}
_VAL_IDS = 1_000_000  # ids of val images come after it
Kind = Literal["plain", "hard"]


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Size and seed of a synthetic data set."""

    train: int = 3000
    """Images in the train split."""
    val: int = 200
    """Images in the val split, from other scenes."""
    size: tuple[int, int] = (64, 64)
    """Height, width in pixels."""
    scenes: Kind = "plain"
    """hard: what G says panoptic maps are difficult for: void borders, small neighbours of one category with
    close centroids, areas of things over two decades."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train, self.val) < 1 or min(self.size) < 16:
            raise TesseraError(f"synthetic: at least 1 image a split and 16x16 pixels, got {self}")
        if self.train > _VAL_IDS:  # a scene follows from seed and id: val images would be train images
            raise TesseraError(f"synthetic: at most {_VAL_IDS} train images, got {self.train}")
        if not 0 <= self.seed < 1 << 63:
            raise TesseraError(f"synthetic: seed {self.seed}, expected one from 0 to 2^63 - 1")


@dataclass
class Scene:
    """What has been drawn so far."""

    rgb: NDArray[np.float64]
    """(H, W, 3), 0-255."""
    label: NDArray[np.int32]
    """(H, W), position in `names`, 0 = void."""
    names: list[str]
    """Category name of each label; entry 0 is void."""
    crowds: set[int]


def stored_set(store: Store, config: SyntheticConfig) -> str:
    """Folder or URL of the set below the storage's data/, where every node can read it; written where it is not yet.

    Raises StoreError.
    """
    if not store.url.startswith("s3://"):
        return str(write_set(Path(store.url_for(STORED)), config))
    place = f"{STORED}/{_name(config)}"
    entries = [*store.list(f"{place}/")]
    whole = any(entry.key == f"{place}/{WHOLE}" for entry in entries)
    if not whole or counted(store, place, entries) is False:
        with tempfile.TemporaryDirectory() as folder:
            root = write_set(Path(folder), config)
            files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
            copy_files(files, store, place)
    return store.url_for(place)


def write_set(folder: Path, config: SyntheticConfig) -> Path:
    """Write `<folder>/<hash of config>` in COCO's layout and return it; a finished one is left as it is.

    The splits are written to a folder of another name that gets its own at the end: no half set is seen,
    and of two processes at once one wins.
    """
    target = folder / _name(config)
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{target.name}.part-") as making:
        root = Path(making) / "set"
        for split, count, first in (("train2017", config.train, 0), ("val2017", config.val, _VAL_IDS)):
            write_split(root, split, count, first, config)
        try:
            root.rename(target)
        except OSError:  # another process was first, with the same content
            if not target.exists():
                raise
    return target


def _name(config: SyntheticConfig) -> str:
    return f"synthetic-{artifacts.digest(1, config)}"


def write_split(root: Path, split: str, count: int, first_id: int, config: SyntheticConfig) -> None:
    """Write a split of `count` images with the ids from first_id + 1 on; of a config size, scenes, seed are used."""
    images, masks = root / split, root / "annotations" / f"panoptic_{split}"
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    listed, annotations = [], []
    height, width = config.size
    for image_id in range(first_id + 1, first_id + count + 1):
        rng = np.random.default_rng([config.seed, image_id])
        scene = draw_scene(rng, config.size, config.scenes)
        ids_N = np.append(0, rng.choice(rgb_ids.MAX_ID, len(scene.names), replace=False) + 1).astype(np.int32)
        name = f"{image_id:012d}"
        Image.fromarray(scene.rgb.clip(0, 255).astype(np.uint8)).save(images / f"{name}.jpg", quality=92)
        (masks / f"{name}.png").write_bytes(rgb_ids.write_png(ids_N[scene.label]))
        listed.append({"id": image_id, "file_name": f"{name}.jpg", "height": height, "width": width})
        rows = _segments_info(scene, ids_N)
        annotations.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": rows})
    content = {
        "info": {"description": "Tessera synthetic", **asdict(config)},
        "images": listed,
        "annotations": annotations,
        "categories": CATEGORIES.to_coco(),
    }
    masks.with_suffix(".json").write_text(json.dumps(content))


def _segments_info(scene: Scene, ids_N: NDArray[np.int32]) -> list[dict[str, object]]:
    dataset_id = {c.name: c.dataset_id for c in CATEGORIES.categories}
    rows: list[dict[str, object]] = []
    for label in np.unique(scene.label[scene.label > 0]):
        ys, xs = np.nonzero(scene.label == label)
        x, y = int(xs.min()), int(ys.min())
        rows.append(
            {
                "id": int(ids_N[label]),
                "category_id": dataset_id[scene.names[label]],
                "area": len(xs),
                "bbox": [x, y, int(xs.max()) - x + 1, int(ys.max()) - y + 1],
                "iscrowd": int(label in scene.crowds),
            }
        )
    return rows


def draw_scene(rng: np.random.Generator, size: tuple[int, int], kind: Kind = "plain") -> Scene:
    """One scene of (height, width) pixels, from back to front."""
    scene = Scene(np.zeros((*size, 3)), np.zeros(size, np.int32), ["void"], set())
    _draw_stuff(scene, rng)
    if rng.random() < 0.15:
        _draw_crowd(scene, rng)
    if kind == "hard":
        _draw_hard_things(scene, rng)
    else:
        for _ in range(rng.integers(1, 6)):
            _draw_object(scene, rng, rng.choice(SHAPES), labelled=rng.random() > 0.08)
    _draw_void_seam(scene, rng)
    _drop_slivers(scene, 0.0015 if kind == "hard" else 0.003)
    scene.rgb *= rng.uniform(0.85, 1.1)
    scene.rgb += rng.normal(0, 5, scene.rgb.shape)
    return scene


def _draw_stuff(scene: Scene, rng: np.random.Generator) -> None:
    """Two or three wavy bands, top to bottom, each with the hue and texture of its category."""
    height, width = scene.label.shape
    ys, xs = np.mgrid[:height, :width] / max(height, width)
    names = rng.permutation(STUFF)[: rng.integers(2, 4)]
    level = np.zeros((height, width), np.int32)
    for position in range(1, len(names)):
        slope, phase, waves = rng.uniform(-0.3, 0.3), rng.uniform(0, 2 * np.pi), rng.uniform(1, 3)
        wave = 0.06 * np.sin(2 * np.pi * waves * xs + phase) + slope * (xs - 0.5)
        level += ys - wave > position / len(names) + rng.uniform(-0.08, 0.08)
    texture = {
        "sky": 10 * ys,
        "field": 14 * rng.normal(size=(height, width)),
        "water": 14 * np.sin(2 * np.pi * (ys * 12 + 0.3 * np.sin(9 * xs) + rng.random())),
    }
    for position, name in enumerate(names):
        where = level == position
        color = np.array(_STUFF_COLOR[name]) + rng.normal(0, 12, 3)
        scene.names.append(str(name))
        scene.label[where] = len(scene.names) - 1
        scene.rgb[where] = (color + texture[name][..., None])[where]


def _draw_object(
    scene: Scene, rng: np.random.Generator, shape: str, labelled: bool = True, scale: float = 1.0
) -> NDArray[np.bool_]:
    """Draw one thing in front of the scene; unlabelled ones become void. Returns its mask, bool (H, W)."""
    height, width = scene.label.shape
    radius = scale * rng.uniform(0.08, 0.2) * min(height, width)
    centre = rng.uniform((0.1 * height, 0.1 * width), (0.9 * height, 0.9 * width))
    mask_HW = _shape_mask(shape, (height, width), centre, radius, rng)
    _paint(scene, mask_HW, rng.uniform(20, 235, 3), shape if labelled else None)
    return mask_HW


def _paint(scene: Scene, mask_HW: NDArray[np.bool_], color: NDArray[np.float64], name: str | None) -> None:
    """One thing in front of all others, slightly shaded; one without a name becomes void."""
    behind = scene.rgb[mask_HW].mean(axis=0) if mask_HW.any() else np.zeros(3)
    if np.abs(color - behind).max() < 60:  # keep it visible
        color = 255 - behind
    shade = np.linspace(-12, 12, mask_HW.shape[1])[None, :, None]
    scene.rgb[mask_HW] = (color + np.broadcast_to(shade, scene.rgb.shape))[mask_HW]
    if name is not None:
        scene.names.append(name)
    scene.label[mask_HW] = len(scene.names) - 1 if name is not None else 0


_SHAPE_COLOR = {"disk": (205, 60, 50), "box": (215, 190, 60), "triangle": (170, 80, 190), "ring": (50, 40, 50)}
_AREA = {"disk": 2.75, "box": 2.7, "triangle": 1.87, "ring": 2.5}
"""Of a shape, in squares of its radius, at a mean stretch."""


def _draw_hard_things(scene: Scene, rng: np.random.Generator) -> None:
    """Large and middle things, then groups of small neighbours of one category.

    A category has a colour, so that classes are easy and only where things are tells them apart. Shares of the image
    from 0.3 to 30 %; most have a void border, as annotators leave it.
    """
    height, width = size = scene.label.shape
    lone, groups = rng.integers(1, 4), rng.integers(1, 3)
    shares = [[share] for share in sorted(np.exp(rng.uniform(np.log(0.015), np.log(0.3), lone)), reverse=True)]
    shares += [[*np.exp(rng.uniform(np.log(0.003), np.log(0.015), rng.integers(2, 5)))] for _ in range(groups)]
    for group in shares:
        shape = str(rng.choice(SHAPES))
        centre, last = rng.uniform((0.12 * height, 0.12 * width), (0.88 * height, 0.88 * width)), 0.0
        for share in group:
            radius, angle = np.sqrt(share * height * width / _AREA[shape]), rng.uniform(0, 2 * np.pi)
            if last:
                centre = centre + (last + radius) * rng.uniform(0.9, 1.2) * np.array((np.sin(angle), np.cos(angle)))
                centre = centre.clip(radius, np.array(size) - radius)
            mask_HW, last = _shape_mask(shape, size, centre, radius, rng), radius
            if rng.random() < 0.7:
                scene.label[_grown(mask_HW, _border(size))] = 0
            _paint(scene, mask_HW, np.array(_SHAPE_COLOR[shape]) + rng.normal(0, 15, 3), shape)


def _border(size: tuple[int, int]) -> int:
    """Pixels of a void border: 1 at 64."""
    return max(1, round(min(size) / 64))


def _grown(mask_HW: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """The mask and what is up to so many steps up, down, left or right of it."""
    for _ in range(pixels):
        grown_HW = mask_HW.copy()
        grown_HW[1:] |= mask_HW[:-1]
        grown_HW[:-1] |= mask_HW[1:]
        grown_HW[:, 1:] |= mask_HW[:, :-1]
        grown_HW[:, :-1] |= mask_HW[:, 1:]
        mask_HW = grown_HW
    return mask_HW


def _shape_mask(
    shape: str, size: tuple[int, int], centre: NDArray[np.float64], radius: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    ys, xs = np.mgrid[: size[0], : size[1]]
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.0)
    dy, dx = ys - centre[0], (xs - centre[1]) / stretch
    a, b = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    distance = np.hypot(dx, dy)
    if shape == "disk":
        return distance < radius
    if shape == "ring":
        return (distance < 1.1 * radius) & (distance > 0.55 * radius)
    if shape == "box":
        return (np.abs(a) < 0.9 * radius) & (np.abs(b) < 0.75 * radius)
    sides = [np.cos(t) * a + np.sin(t) * b < 0.6 * radius for t in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    return sides[0] & sides[1] & sides[2]


def _draw_crowd(scene: Scene, rng: np.random.Generator) -> None:
    """Many small things of one shape under one crowd segment."""
    shape = str(rng.choice(SHAPES))
    masks = [_draw_object(scene, rng, shape, labelled=False, scale=0.45) for _ in range(8)]
    scene.names.append(shape)
    scene.crowds.add(len(scene.names) - 1)
    scene.label[np.any(masks, axis=0)] = len(scene.names) - 1


def _draw_void_seam(scene: Scene, rng: np.random.Generator) -> None:
    """Annotators leave seams: a band along a random line stays unlabelled where only stuff is."""
    if rng.random() < 0.5:
        return
    height, width = scene.label.shape
    ys, xs = np.mgrid[:height, :width]
    angle = rng.uniform(0, np.pi)
    offset = np.cos(angle) * (xs - rng.uniform(0, width)) + np.sin(angle) * (ys - rng.uniform(0, height))
    is_stuff = np.array([name in STUFF for name in scene.names])[scene.label]
    scene.label[(np.abs(offset) < 0.02 * min(height, width)) & is_stuff] = 0


def _drop_slivers(scene: Scene, share: float) -> None:
    """What occlusion leaves of a segment is void when too small to be annotated: under this share of the image."""
    areas = np.bincount(scene.label.ravel(), minlength=len(scene.names))
    scene.label[areas[scene.label] < share * scene.label.size] = 0
