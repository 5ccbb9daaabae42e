"""Training on one worker and on two, and what more of them would need: `python -m benchmarks.scaling [--plan]`.

Measured: samples/s of a small model on one and on two Ray Train workers of this machine, one thread each, the same
batches, in turn, medians over rows of the runs' own metrics. By default also the plan, alone with --plan: bytes and
seconds of a step of base_420 on 8, 64 and 256 GPUs, from what was measured (marked m), counted (c), or taken from
data sheets and the paper (s).
"""

import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.bars import bar, finish
from benchmarks.train_step import COCO, flops_per_image
from infra import ray_cluster
from infra.store import open_store
from preprocessing.layouts import read_index
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardSet
from preprocessing.synthetic import SyntheticConfig, write_set
from training.metrics import read_metrics
from training.ray_train import run_training
from training.recipe import Recipe
from training.recipes.generalist import base_420, demo
from training.shares import Crew

ROUNDS, STEPS = 2, 160
GPUS = (8, 64, 256)
PER_NODE = 8


@dataclass(frozen=True)
class Inputs:
    """What the plan starts from: figures and where they are from."""

    flops: float = 989e12
    """s: dense bf16 of an H100, data sheet."""
    used: float = 0.35
    """s: share of it that ViTs of this size commonly reach; ours is not measured yet."""
    inside: float = 370e9
    """s: bytes/s a GPU all-reduces at within a node of 8 (NVLink 4: 450e9 each way on the data sheet)."""
    between: float = 50e9
    """s: bytes/s of one GPU's network card (400 Gbit/s), one each."""
    sample: float = 190e3
    """m: bytes of a sample on the store, of the 100 train images of coco_mini in shards of base_420."""
    decoded: float = 421.0 / 2
    """m: samples/s that one reader process prepares, on this machine's cores: docs/results.md."""


def pace(recipe: Recipe, train_set: ShardSet, store_url: str, workers: int) -> float:
    """Samples/s: the median row of a run's later half, when everything is warm."""
    run = run_training(recipe, train_set, store_url, Crew(workers))
    rows = read_metrics(open_store(store_url), run.path)
    return median(row.images_per_s for row in rows[len(rows) // 2 :])


def measure() -> None:
    """One worker against two."""
    recipe = demo()
    recipe = replace(recipe, train=replace(recipe.train, batch=32, epochs=STEPS * 32 / 600, warmup_epochs=0))
    recipe = replace(recipe, upkeep=replace(recipe.upkeep, check_epochs=None, checkpoints=1))
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder, ray_cluster.session():
        root = write_set(Path(folder), SyntheticConfig(train=600, val=1))
        store_url = str(Path(folder) / "store")
        shards = precompute("train2017", read_index(root, "train2017"), recipe.shards, store_url, 0.0)
        for number in range(ROUNDS):
            seeded = recipe.changed({"train.seed": number})
            for workers in (1, 2) if number % 2 == 0 else (2, 1):
                home = f"{store_url}/{workers}"  # the same run with other workers would be trained already
                again = precompute("train2017", read_index(root, "train2017"), recipe.shards, home, 0.0)
                assert again.path == shards.path
                found[workers].append(pace(seeded, again, home, workers))
                print(f"{workers} workers: {found[workers][-1]:.1f} samples/s", flush=True)
    one, two = (median(found[workers]) for workers in (1, 2))
    print(f"{os.cpu_count()} cores, batch {recipe.train.batch}, {recipe.name}: {one:.1f} and {two:.1f} samples/s")
    bar("scaling.two_workers_over_one", two / one, "at-least", 1.5)


def plan(inputs: Inputs) -> None:
    """A Markdown table."""
    recipe = base_420()
    with torch.device("meta"):
        weights = sum(p.numel() for p in recipe.build(COCO).parameters())
    flops, gradient = flops_per_image(recipe), 4 * weights
    print(f"base_420: {weights / 1e6:.1f}M weights (c), {flops / 1e12:.2f} TFLOP an image and step (c)")
    print(
        "| GPUs | images a GPU | compute | all-reduce, bytes a GPU | its time | share | store, MB/s a node, in all | "
        "reader processes a GPU |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for gpus in GPUS:
        images = recipe.train.batch / gpus
        compute = images * flops / (inputs.flops * inputs.used)
        moved = 2 * (gpus - 1) / gpus * gradient
        exchange = moved / (inputs.inside if gpus <= PER_NODE else inputs.between)
        rate = images / max(compute, exchange)
        node = rate * PER_NODE * inputs.sample
        print(
            f"| {gpus} | {images:g} | {compute * 1e3:.1f} ms | {moved / 1e6:.0f} MB | {exchange * 1e3:.1f} ms | "
            f"{exchange / compute:.0%} | {node / 1e6:.0f}, {node * gpus / PER_NODE / 1e6:.0f} | "
            f"{rate / inputs.decoded:.1f} |"
        )


def main(arguments: list[str]) -> None:
    plan(Inputs())
    if arguments != ["--plan"]:
        os.environ |= {"OMP_NUM_THREADS": "1"}
        measure()
        finish()


if __name__ == "__main__":
    main(sys.argv[1:])
