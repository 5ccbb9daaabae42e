"""A training step on whatever device there is: `python -m benchmarks.train_step [METHOD/RECIPE ...]`.

Prints, for each recipe, images/s of whole steps (forward, loss, backward, clipping, AdamW; batches are on the
device already), peak memory, the FLOPs of an image, their share of what the device can do, and where the time
goes: the encoder, the decoder with the heads, and the losses are timed forward and backward each time with one
part more, so a share is a difference. What the losses keep in memory is a difference too. Variants: as it is, in
channels-last memory, and compiled.

Median of the steps after two for warming up. On a CPU the peak is measured by a large matrix product. There is
no bar but on a GPU: base_420 at 150 images/s (the paper's rate is about 17 per A100).
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bars import bar, finish
from benchmarks.model_size import COCO
from preprocessing.panoptic_map import Segment, measured
from preprocessing.sample import distances
from training.batch import Batch, Example, collate
from training.methods.base import Method
from training.metrics import memory_gib
from training.precision import autocast, multiplies_bf16
from training.recipe import Recipe
from training.recipes import recipe
from training.recipes.generalist import base_420, coco_mini, demo, large_420, large_518

SEGMENTS = 24
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""bf16 FLOP/s without sparsity, by the makers' data sheets."""


@dataclass(frozen=True)
class Bench:
    """One method on one batch."""

    method: Method
    batch: Batch
    recipe: Recipe
    device: torch.device

    @property
    def turns(self) -> tuple[int, ...]:
        """Steps that serve each task once."""
        return (0, 2) if self.method.alternates else (0,)

    def outputs(self, part: str) -> list[Tensor]:
        """What the encoder, the network, or the losses of both tasks give."""
        with autocast(self.recipe.train.bf16, self.device):
            if part == "encoder":
                return list(self.method.backbone(self.batch.images_B3HW))
            if part == "network":
                return [x for x in self.method.network(self.batch.images_B3HW) if x.numel()]
            return [loss for turn in self.turns for loss in self.method.losses(self.batch, turn).values()]

    def forward_backward(self, part: str) -> None:
        sum(x.float().sum() for x in self.outputs(part)).backward()  # type: ignore[union-attr]


def scene(size: tuple[int, int], seed: int) -> Example:
    """Noise under a map of SEGMENTS blocks: half things, half stuff."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(1, SEGMENTS + 1, (7, 7), np.uint16)
    labels_HW = np.ascontiguousarray(blocks[np.ix_(*(np.arange(n) * 7 // n for n in size))])
    kinds = [Segment(0, i if i % 2 else 80 + i, bool(i % 2)) for i in range(SEGMENTS)]
    rows = tuple(measured(labels_HW, kinds))
    d2_H2W = distances(labels_HW, rows, 50)
    return Example(str(seed), rng.integers(0, 256, (*size, 3), np.uint8), labels_HW, d2_H2W, rows)


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median time of a round; two rounds warm up."""
    times = []
    for _ in range(rounds + 2):
        _settle(device)
        started = time.perf_counter()
        work()
        _settle(device)
        times.append(time.perf_counter() - started)
    return median(times[2:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_flops(device: torch.device, bf16: bool) -> float:
    """What the device can do: of its data sheet, or of a matrix product of the recipe's type on this CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        return next((peak for key, peak in PEAKS.items() if key in name), float("nan"))
    side = 1024
    a, b = (torch.rand(side, side, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    return 2 * side**3 / seconds(lambda: torch.mm(a, b), device, 10)


def flops_per_image(chosen: Recipe) -> float:
    """Of the network with all heads, forward and backward: matrix products and convolutions. Nothing is computed."""
    with torch.device("meta"):
        method, images = chosen.build(COCO), torch.zeros(1, 3, *chosen.trained)
    with FlopCounterMode(display=False) as counter:
        torch.stack([x.sum() for x in method.network(images)]).sum().backward()
    return counter.get_total_flops()


def saved_mib(bench: Bench, part: str) -> float:
    """Memory that the forward pass keeps for the backward pass, an image; each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in bench.method.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = bench.outputs(part)
    del outputs
    return sum(size for place, size in kept.items() if place not in parameters) / 2**20 / len(bench.batch.keys)


def step_of(bench: Bench) -> Callable[[], None]:
    """A whole step: its task changes from one call to the next as in training."""
    train, count = bench.recipe.train, iter(range(1 << 30))
    groups = bench.method.parameter_groups(train.lr, train.weight_decay, train.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=train.betas, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(train.bf16, bench.device):
            losses = bench.method.losses(bench.batch, next(count))
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(bench.method.parameters(), train.clip)
        optimizer.step()

    return step


def make(chosen: Recipe, images: int, device: torch.device, channels_last: bool, compiled: bool) -> Bench:
    """A fresh method; the seed is fixed, so all variants compute the same."""
    torch.manual_seed(0)
    method = chosen.build(COCO).to(device)
    batch = collate([scene(chosen.trained, seed) for seed in range(images)]).to(device)
    if channels_last:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        method.network.compile()
    return Bench(method.train(), batch, chosen, device)


def report(chosen: Recipe, device: torch.device) -> float:
    """Print one recipe's table; images/s of the best variant."""
    name, images = chosen.name, min(chosen.train.batch, chosen.train.micro_batch)
    rounds = 12 if device.type == "cuda" else 6  # a multiple of three: tasks alternate
    if device.type == "cpu":
        images = min(images, 8)
    rates = {}
    for variant, last, compiled in (("plain", False, False), ("channels-last", True, False), ("compiled", True, True)):
        bench = make(chosen, images, device, last, compiled)
        step = step_of(bench)
        three = seconds(lambda step=step: [step() for _ in range(3)], device, rounds // 3)  # type: ignore[misc]
        rates[variant] = 3 * images / three
        print(f"{name} {variant}: {rates[variant]:.1f} images/s, batch {images}, peak {memory_gib(device):.1f} GiB")
    bench = make(chosen, images, device, True, False)
    half = bench.recipe.train.bf16 and multiplies_bf16(device.type)
    flops, peak, best = flops_per_image(bench.recipe), peak_flops(device, half), max(rates.values())
    print(f"{name}: {flops / 1e9:.1f} GFLOP an image, {flops * best / peak:.1%} of {peak / 1e12:.2f} TFLOP/s")
    parts = {
        p: seconds(lambda p=p: bench.forward_backward(p), device, rounds) for p in ("encoder", "network", "losses")
    }  # type: ignore[misc]
    print(
        f"{name}, both tasks, ms an image: encoder {parts['encoder'] / images * 1e3:.1f}, decoder and heads "
        f"{(parts['network'] - parts['encoder']) / images * 1e3:.1f}, losses of both tasks "
        f"{(parts['losses'] - len(bench.turns) * parts['network']) / images * 1e3:.1f}"
    )
    network, whole = saved_mib(bench, "network"), saved_mib(bench, "losses")
    print(
        f"{name}, kept for the backward pass, MiB an image: network {network:.1f}, losses of both tasks "
        f"{whole - len(bench.turns) * network:.1f}"
    )
    return best


def main(names: list[str]) -> None:
    given = [recipe(*name.partition("/")[::2]) for name in names]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"device: {kind}, of {os.cpu_count()} cores, torch {torch.__version__}")
    for chosen in (base_420(), large_420(), large_518()):
        flops = flops_per_image(chosen)
        print(f"{chosen.name}: {flops / 1e12:.3f} TFLOP an image, forward and backward, counted")
    for chosen in given or ([base_420()] if device.type == "cuda" else [demo(), coco_mini()]):
        rate = report(chosen, device)
        if device.type == "cuda" and chosen == base_420():
            bar("train_step.base_420_images_per_s", rate, "at-least", 150)
    finish()


if __name__ == "__main__":
    main(sys.argv[1:])
