"""Decoding one 420 x 420 output, L = 4, 80 x 80 candidates: `python -m benchmarks.decode`.

decode_votes_vs_cdist: the nearest of 6400 codes for every pixel, ours against torch.cdist and argmin in chunks of 8192
pixels, on one CPU thread. CPU time, both sides alternating with the order flipped every round; the median of the
ratios. Only ours also refines between cells and compares with zero. decode_excess: by how much the squared distance of
what we choose (a code, or zero) exceeds the least one, in float64, on noise, codes and codes with noise.

Operations of ours, per pixel and axis: 40 pairs of mirrored cells, each 8 multiply-adds, an absolute value, an
addition, a comparison and two selections. 2 x 40 x 13 = 1040 for a pixel, in AVX-512 lanes of 16 float32 11.5 million
instructions an image: 3.1 ms at one a cycle of 3.7 GHz. Without the mirroring it would be 2 x 80 x 11. Reading the
11 MB of an embedding takes 1.5 ms of the rest, the refinement 1.1 ms.

The other lines bar nothing: the whole decode with 133 classes and the resize to 480 x 640, by its two paths.
"""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks.bars import bar, finish
from benchmarks.model_size import COCO
from preprocessing.panoptic_map import PanopticMap
from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.methods.generalist.decode import cast_votes_on_host, decode, decode_on_device
from training.methods.generalist.targets import embed, embed_xy, omegas
from training.parts.assemble import Assembly
from training.parts.nearest_codes import FIXED

SIZE, RESIZED, ROUNDS, CHUNK, BATCH, INSTANCES = (420, 420), (480, 640), 6, 8192, 16, 20
CONFIG = GeneralistConfig(decode=DecodeConfig(reach=12))


def codes() -> Tensor:
    """float32 (80, 2 L): code of each cell's centre, of one axis."""
    grid = CONFIG.decode.grid
    return embed((2 * torch.arange(grid, dtype=torch.float64) + 1) / grid - 1, omegas(CONFIG)).float()


def outputs(images: int, noise: float) -> tuple[Tensor, Tensor]:
    """Logits (B, 133, H, W) and embeddings (B, 16, H, W): regions around seeds, the first of them stuff."""
    generator = torch.Generator().manual_seed(0)
    y_HW, x_HW = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in SIZE), indexing="ij")
    every = []
    for _ in range(images):
        seeds_N2 = torch.rand(INSTANCES, 2, generator=generator) * torch.tensor(SIZE)
        nearest_HW = torch.stack([(y_HW - y) ** 2 + (x_HW - x) ** 2 for y, x in seeds_N2.tolist()]).argmin(0)
        class_N = torch.cat([torch.arange(100, 105), torch.arange(INSTANCES - 5)])
        codes_NE = embed_xy(2 * seeds_N2.flip(1) / torch.tensor(SIZE) - 1, omegas(CONFIG))
        codes_NE[class_N >= 80] = 0
        logits_CHW = torch.randn(len(COCO), *SIZE, generator=generator)
        logits_CHW.scatter_add_(0, class_N[nearest_HW][None], torch.full((1, *SIZE), 10.0))
        embedding_EHW = codes_NE[nearest_HW].permute(2, 0, 1).contiguous()
        every.append((logits_CHW, embedding_EHW + noise * torch.randn(embedding_EHW.shape, generator=generator)))
    logits, embeddings = zip(*every, strict=True)
    return torch.stack(logits), torch.stack(embeddings)


def by_cdist(embedding_EHW: Tensor) -> Tensor:
    """The nearest of all codes, v * grid + u, as one would write it."""
    grid = CONFIG.decode.grid
    codes_GE = torch.cat([codes().repeat(grid, 1), codes().repeat_interleave(grid, 0)], 1)
    pixels_PE = embedding_EHW.flatten(1).T.contiguous()
    return torch.cat([torch.cdist(part_KE, codes_GE).argmin(1) for part_KE in pixels_PE.split(CHUNK)])


def ratio(embedding_EHW: Tensor) -> float:
    """Median over rounds of cdist's CPU time divided by ours."""

    def ours() -> object:
        return cast_votes_on_host(embedding_EHW, CONFIG)

    def theirs() -> object:
        return by_cdist(embedding_EHW)

    ours()  # compiles
    ratios = []
    for number in range(ROUNDS):
        seconds = {side: cpu_seconds(side) for side in ((ours, theirs) if number % 2 else (theirs, ours))}
        ratios.append(seconds[theirs] / seconds[ours])
        print(f"round {number}: cdist {1000 * seconds[theirs]:.0f} ms, ours {1000 * seconds[ours]:.2f} ms", flush=True)
    return median(ratios)


def cpu_seconds(side: Callable[[], object]) -> float:
    start = time.process_time()
    side()
    return time.process_time() - start


def excess(embedding_EHW: Tensor) -> float:
    """Largest squared distance, beyond the least, of what was chosen for a pixel; float64, by all codes of an axis."""
    votes_2HW, inside_HW = cast_votes_on_host(embedding_EHW, CONFIG)
    cells_2P = torch.from_numpy((votes_2HW + FIXED // 2) // FIXED).flatten(1).long()
    best_P, chosen_P = torch.zeros(2, cells_2P.shape[1], dtype=torch.float64)
    for values_DP, cell_P in zip(embedding_EHW.double().flatten(1).chunk(2), cells_2P, strict=True):
        d2_GP = torch.stack([(values_DP - code_D[:, None]).square().sum(0) for code_D in codes().double()])
        best_P += d2_GP.amin(0)
        chosen_P += d2_GP.gather(0, cell_P[None])[0]
    zero_P = embedding_EHW.double().square().sum(0).flatten()
    chosen_P = torch.where(torch.from_numpy(inside_HW).flatten(), chosen_P, zero_P)
    return float((chosen_P - torch.minimum(best_P, zero_P)).max())


def whole_decode(name: str, path: Callable[..., list[PanopticMap]], images: int, device: str) -> None:
    """Print wall milliseconds an image and images a second, the best of three batches."""
    logits_BCHW, embedding_BEHW = (tensor.to(device) for tensor in outputs(images, noise=0.3))
    seconds = []
    for _ in range(4):  # the first compiles
        start = time.perf_counter()
        path(logits_BCHW, embedding_BEHW, [RESIZED] * images, Assembly(COCO), CONFIG)
        seconds.append(time.perf_counter() - start)
    best = min(seconds[1:]) / images
    print(f"decode {name}, batches of {images}: {1000 * best:.2f} ms/image, {1 / best:.0f} images/s", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    noise = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(1))
    inputs = {"noise": noise[0], "codes": outputs(1, 0.0)[1][0], "noisy_codes": outputs(1, 0.3)[1][0]}
    for name, embedding_EHW in inputs.items():
        bar(f"decode_excess_{name}", excess(embedding_EHW), "at-most", 1e-5)
    bar("decode_votes_vs_cdist", ratio(inputs["noisy_codes"]), "at-least", 200)
    whole_decode("on the CPU, one thread", decode, 4, "cpu")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        whole_decode(f"by torch on {name}", decode_on_device, BATCH, "cuda")
        print(f"peak memory with its inputs: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    else:
        whole_decode("by torch on the CPU, one thread (no CUDA device here)", decode_on_device, 4, "cpu")
    print(f"numpy {np.__version__}, torch {torch.__version__}")
    finish()


if __name__ == "__main__":
    main()
