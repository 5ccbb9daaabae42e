"""Painter's instance decoding against ours, on the same network outputs.

    python -m benchmarks.candidates                      # ideal outputs of coco_mini, about two minutes
    python -m benchmarks.candidates STORE RUN SPLIT-SET  # outputs of a trained run

G says that it decodes as Painter does; the rules are those of Painter's public code. Its open numbers, here:
the threshold on the Euclidean distance between an output and a code is the distance between the codes of cells 4
apart (Painter: 16 to 19 grey levels where its neighbours differ by 4.3), or 2 apart, which suits ideal outputs; the
mean distance in a mask is normalised by the largest one kept, but at least by 1/16 of the threshold, which is
Painter's 1 grey level. Where it pastes and where it resizes follows our order: on the network's grid, then nearest.
Stuff areas are limited alike on both sides, by Painter's 8192 pixels of 640 x 480, so that the two differ in their
instances alone. CPU time on one thread, without the network.

By default: the first images of val2017, the paper's code (L = 4, 80 x 80 cells) at 128 x 128, ideal and with Gaussian
noise added to the embeddings; then our PQ of ideal outputs at 420 x 420 by the number of candidates. PQ is measured at
the images' own sizes.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.pq import PQStats, compare, summarise
from infra.store import open_store
from preprocessing.coco import read_index
from preprocessing.geometry import Frame, Size, resize_labels
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment, measured
from preprocessing.sample import decode_image, from_fields, make_sample
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import read_set
from preprocessing.source import Record
from training.backbones.vit import VitConfig
from training.batch import Example, collate
from training.methods.base import Method
from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.methods.generalist.decode import decode
from training.methods.generalist.model import Generalist
from training.methods.generalist.targets import embed, embed_xy, omegas
from training.parts.assemble import Assembly
from training.run import open_run

COCO_MINI = Path(__file__).resolve().parents[2] / "shared/data/coco_mini"
COMPARED, NOISES, GRIDS = 5, (0.0, 0.1, 0.3), (20, 40, 80, 160)
WAYS = ((4, 0.55), (2, 0.55), (8, 0.0), (16, 0.0))
"""Cells of the threshold, least score: Painter's, one for ideal outputs, two that keep outputs far from codes."""
STUFF_AREA = 8192 / (640 * 480)
REACH = 12 / 80
"""Of our grouping, as a share of the image: what the recipe for coco_mini has."""
CHUNK, CANDIDATES, SIGMA, INSTANCES, MOST_TAKEN = 400, 2000, 2.0, 100, 0.5
Decoder = Callable[[Tensor, Tensor, Size, LabelTable, GeneralistConfig], PanopticMap]


@dataclass(frozen=True)
class Output:
    """What the network said of one image, and the ground truth at the image's own size."""

    logits_CHW: Tensor
    embedding_EHW: Tensor
    truth: PanopticMap


def ours(
    logits_CHW: Tensor, embedding_EHW: Tensor, size: Size, labels: LabelTable, config: GeneralistConfig
) -> PanopticMap:
    """Our decoding of one image."""
    assembly = Assembly(labels, min_stuff_area=config.decode.min_stuff_area)
    return decode(logits_CHW[None], embedding_EHW[None], [size], assembly, config)[0]


def painters(
    logits_CHW: Tensor,
    embedding_EHW: Tensor,
    size: Size,
    labels: LabelTable,
    config: GeneralistConfig,
    *,
    steps: int,
    least: float,
) -> PanopticMap:
    """Painter's decoding of one image; steps: cells between two codes as far apart as the threshold; least score."""
    masks_NP, score_N = suppress(*candidates(embedding_EHW.flatten(1).float(), config, steps))
    share_CP = logits_CHW.flatten(1).float().softmax(0)
    thing_C = torch.from_numpy(labels.is_thing)
    category_N = (masks_NP @ share_CP[thing_C].T).argmax(1) if len(masks_NP) else torch.empty(0, dtype=torch.long)
    segments, dense_P = paste(masks_NP.bool(), score_N, thing_C.nonzero()[:, 0][category_N], least)
    class_P = share_CP.argmax(0)
    for category in np.flatnonzero(~labels.is_thing).tolist():
        free_P = (class_P == category) & (dense_P == 0)
        if free_P.sum() >= STUFF_AREA * len(free_P):
            segments.append(Segment(0, category, False))
            dense_P[free_P] = len(segments)
    dense_HW = dense_P.view(embedding_EHW.shape[1:]).numpy().astype(np.uint16)
    return on_image(resize_labels(dense_HW, size), segments)


def candidates(embedding_EP: Tensor, config: GeneralistConfig, steps: int) -> tuple[Tensor, Tensor]:
    """Masks (N, P), 0 or 1, of the codes nearest to the pixels around them, and their scores (N,), falling."""
    grid = config.decode.grid
    centres_G = (2 * torch.arange(grid) + 1) / grid - 1
    codes_KE = embed_xy(torch.cartesian_prod(centres_G, centres_G), omegas(config))
    apart_2 = embed(torch.tensor([0.0, 2 * steps / grid]), omegas(config))
    threshold = float((apart_2[1] - apart_2[0]).norm())
    mean_K = []
    for part_KE in codes_KE.split(CHUNK):
        distance_KP = torch.cdist(part_KE, embedding_EP.T)
        near_KP = distance_KP < threshold
        mean_K.append((distance_KP * near_KP).sum(1) / near_KP.sum(1))  # NaN without a pixel: sorted last
    mean_N, order_N = torch.cat(mean_K).sort()
    found = min(CANDIDATES, int(mean_N.isfinite().sum()))
    order_N, mean_N = order_N[:found], mean_N[:found]
    masks = [torch.cdist(part_KE, embedding_EP.T) < threshold for part_KE in codes_KE[order_N].split(CHUNK)]
    highest = max(float(mean_N[-1]), threshold / 16) if found else 1.0
    return torch.cat(masks).float(), 1 - mean_N / highest


def suppress(masks_NP: Tensor, score_N: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix NMS, class-agnostic, with a Gaussian kernel: scores fall by the overlap with better candidates, less where
    those overlap with better ones themselves. The best ones, by falling score."""
    if not len(masks_NP):
        return masks_NP, score_N
    common_NN, area_N = masks_NP @ masks_NP.T, masks_NP.sum(1)
    iou_NN = (common_NN / (area_N[:, None] + area_N - common_NN)).triu(1)
    decay_NN = torch.exp(-SIGMA * (iou_NN.square() - iou_NN.amax(0)[:, None].square()))
    score_N, order_N = (score_N * decay_NN.amin(0)).sort(descending=True)
    return masks_NP[order_N[:INSTANCES]], score_N[:INSTANCES]


def paste(masks_NP: Tensor, score_N: Tensor, category_N: Tensor, least: float) -> tuple[list[Segment], Tensor]:
    """Masks by falling score onto free pixels: things, and the label of each pixel, int64 (P,), 0 where none is."""
    segments: list[Segment] = []
    dense_P = torch.zeros(masks_NP.shape[1], dtype=torch.long)
    for mask_P, score, category in zip(masks_NP, score_N.tolist(), category_N.tolist(), strict=True):
        if score < least:
            break
        free_P = mask_P & (dense_P == 0)
        if free_P.sum() >= (1 - MOST_TAKEN) * mask_P.sum():
            segments.append(Segment(0, category, True))
            dense_P[free_P] = len(segments)
    return segments, dense_P


def on_image(dense_HW: np.ndarray, segments: Sequence[Segment]) -> PanopticMap:
    """The map of those segments that have pixels."""
    kept = tuple(segment for segment in measured(dense_HW, segments) if segment.area)
    return PanopticMap(dense_HW.astype(np.int32), kept)


def ideal_outputs(
    records: Sequence[Record], labels: LabelTable, config: GeneralistConfig, grid: Size
) -> Iterator[Output]:
    """What a perfect network says of the images on the grid."""
    tiny = VitConfig(patch=1, width=8, depth=4, heads=1, layers=(1, 2, 3, 4))  # never run
    method = Generalist(replace(config, backbone=tiny, decoder_widths=(1,) * 5), labels, Frame(size=(1, 1)))
    for record in records:
        sample = make_sample(record, labels, grid, 1)
        logits_BCHW, codes_BXHW = method.ideal(collate([Example.of("", sample)]))
        truth = make_sample(record, labels, None, 1).panoptic
        yield Output(logits_BCHW[0].contiguous(), codes_BXHW[0].contiguous(), truth)


def run_outputs(method: Method, store_url: str, split_set: str) -> Iterator[Output]:
    """What a trained run says of the images of a finished set of shards (docs/architecture.md names the paths)."""
    shards = read_set(open_store(store_url), split_set)
    if shards is None:
        sys.exit(f"{split_set}: no finished set on {store_url}")
    for shard in shards.shards:
        for sample in map(from_fields, read_shard_samples(store_url, shard)):
            logits_BCHW, codes_BXHW = method.predict(method.inputs([decode_image(sample.image)]))
            yield Output(logits_BCHW[0].float(), codes_BXHW[0].float(), sample.panoptic)


def measure(outputs: Sequence[Output], decoder: Decoder, labels: LabelTable, config: GeneralistConfig) -> str:
    """PQ of all, things and stuff, and CPU milliseconds an image, as cells of a table."""
    stats, seconds = PQStats.zero(len(labels)), 0.0
    for output in outputs:
        start = time.process_time()
        found = decoder(output.logits_CHW, output.embedding_EHW, output.truth.size, labels, config)
        seconds += time.process_time() - start
        stats += compare(output.truth, found, len(labels))
    pq = summarise(stats, labels)["pq"]
    points = " | ".join("-" if pq[g] is None else f"{pq[g]:.1f}" for g in ("all", "things", "stuff"))
    return f"{points} | {1000 * seconds / len(outputs):.1f}"


def compare_decoders(name: str, outputs: Sequence[Output], labels: LabelTable, config: GeneralistConfig) -> None:
    """A row of the table for each way."""
    config = replace(config, decode=replace(config.decode, min_stuff_area=STUFF_AREA))
    ours(outputs[0].logits_CHW, outputs[0].embedding_EHW, (8, 8), labels, config)  # compiles
    ways: dict[str, Decoder] = {
        f"Painter's, {steps} cells, score {least}": partial(painters, steps=steps, least=least) for steps, least in WAYS
    }
    for way, decoder in {**ways, "ours": ours}.items():
        print(f"| {name} | {way} | {measure(outputs, decoder, labels, config)} |", flush=True)


def noisy(outputs: Sequence[Output], noise: float) -> list[Output]:
    """The same outputs with Gaussian noise of that deviation added to every channel of the embeddings."""
    generator = torch.Generator().manual_seed(0)
    return [
        replace(o, embedding_EHW=o.embedding_EHW + noise * torch.randn(o.embedding_EHW.shape, generator=generator))
        for o in outputs
    ]


def by_grid(records: Sequence[Record], labels: LabelTable) -> None:
    """PQ of ideal outputs at 420 x 420 by candidates per axis, stuff of any area."""
    print(f"\nideal outputs at 420 x 420, {len(records)} images\n| cells | all | things | stuff | ms |")
    outputs = list(ideal_outputs(records, labels, GeneralistConfig(), (420, 420)))
    for grid in GRIDS:
        config = GeneralistConfig(decode=DecodeConfig(grid=grid, reach=REACH * grid))
        print(f"| {grid} x {grid} | {measure(outputs, ours, labels, config)} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        store_url, run, split_set = sys.argv[1:]
        recipe, method = open_run(store_url, run)
        if not isinstance(recipe.method, GeneralistConfig) or recipe.method.encoding != "embedding":
            sys.exit(f"{recipe.name}: only embeddings of the generalist can be compared")
        print("| outputs | decoding | all | things | stuff | ms |")
        compare_decoders(run, list(run_outputs(method, store_url, split_set)), method.labels, recipe.method)
        return
    if not COCO_MINI.exists():
        print(f"candidates: skipped, needs {COCO_MINI}")
        return
    index = read_index(COCO_MINI, "val2017")
    config = GeneralistConfig(decode=DecodeConfig(reach=REACH * 80))
    ideal = list(ideal_outputs(index.records[:COMPARED], index.labels, config, (128, 128)))
    print(f"128 x 128, {len(ideal)} images\n| outputs | decoding | all | things | stuff | ms |")
    for noise in NOISES:
        compare_decoders(f"ideal + {noise} noise", noisy(ideal, noise), index.labels, config)
    by_grid(index.records[:COMPARED], index.labels)


if __name__ == "__main__":
    main()
