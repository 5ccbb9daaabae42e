"""PISR, "Panoptic, Instance and Semantic Relations" (Borse et al., CVPR 2022): a module on any base.

The base gives features and its first, intermediate predictions; `Relations` makes features of them that know of every
class and instance of the image, and the base predicts again from those, with loss `intermediate` x first + second.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.errors import TesseraError

_MOST = 1024
"""Instance maps: their relations are squared."""
_GROUP = 16
"""Channels of a group of the norm, as in the other decoders."""
_LEAST_MASS = 1e-5
"""Mean over its pixels under which a map's encoding fades to nothing, so that its gradient does not explode: a mean
over a segment changes the faster with each of its weights the less they sum to. A 2048 x 1024 image has 21 such pixels.
"""


@dataclass(frozen=True, kw_only=True)
class PisrConfig:
    """Options of the module. The paper names all of them; what we know of its numbers is said at each."""

    instances: int = 100
    """K, instance maps; ours, the paper's value is not known to us."""
    channels: int = 256
    """Of the new features; a multiple of 16."""
    reweighting: bool = True
    """Whether each encoding gets a weight (paper: 62.2 PQ with, 61.8 without)."""
    intermediate: float = 0.4
    """gamma, the weight of the intermediate predictions' loss; ours. For the base, the module has no loss."""

    def __post_init__(self) -> None:
        if not 1 <= self.instances <= _MOST:
            raise TesseraError(f"pisr: instances {self.instances} is not in 1..{_MOST}")
        if self.channels < _GROUP or self.channels % _GROUP:
            raise TesseraError(f"pisr: channels {self.channels} must be a multiple of {_GROUP}")
        if not 0 <= self.intermediate < float("inf"):
            raise TesseraError(f"pisr: intermediate {self.intermediate} is no weight")


class Relations(nn.Module):
    """Features, semantic and instance maps -> features of the same size that know of the others (paper's equations).

    E = [S F^T; I F^T]: an encoding of each of the M = categories + K maps. E <- w(E) E. Relations of the encodings to
    the pixels, F_sp = g_s(E)^T h(F), and back, F_pan = g_q(E)^T g_p(F_sp).

    Ours, where the paper is silent:
    - An encoding is the mean of features weighted by its map, so it depends neither on the number of pixels nor on a
      segment's size, down to a 100,000th of the image.
    - w sees one encoding at a time: it judges what was found, not its rank, with the same parameters for any K.
    - g_s and g_q have no bias, so a map without mass has no effect at all and K may exceed what an image holds.
    - g_p starts as the identity: each pixel gets what it resembles, and learns which maps to mix.
    - F_sp is divided by sqrt(channels); the output is ReLU(h(F) + GroupNorm(F_pan)). F_pan has rank M at most,
      fine detail comes by h(F).
    - Gradients reach the intermediate predictions through the maps; a base that does not want this detaches them.

    F_pan is linear in h(F), so it is computed as (g_q(E)^T g_p g_s(E)) h(F), the same by associativity: a 1x1
    convolution of its own for each image instead of three products, and the 2 M maps between them are never made.
    """

    def __init__(self, config: PisrConfig, features: int, categories: int) -> None:
        super().__init__()
        channels, maps = config.channels, categories + config.instances
        self.counts = (categories, config.instances)
        self.local = nn.Conv2d(features, channels, 3, padding=1)  # h
        self.weigh: nn.Sequential | None = None
        if config.reweighting:
            hidden = channels // 4  # ours
            self.weigh = nn.Sequential(
                nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 1), nn.Sigmoid()
            )
        # 1x1 convolutions over encodings, of which each is a row
        self.keys = nn.Linear(features, channels, bias=False)  # g_s
        self.values = nn.Linear(features, channels, bias=False)  # g_q
        self.mix_MM = nn.Parameter(torch.eye(maps))  # g_p
        self.mix_bias_M = nn.Parameter(torch.zeros(maps))
        self.norm = nn.GroupNorm(channels // _GROUP, channels)

    def forward(self, features_BFHW: Tensor, semantic_BSHW: Tensor, instances_BKHW: Tensor) -> Tensor:
        """The new features, (B, channels, H, W) in the type in which h computes.

        features_BFHW: the base's. semantic_BSHW: probabilities. instances_BKHW: heat maps of the K best instances, best
        first, zeros where there are fewer; what is below 0 counts as 0 (ours), scale does not matter (see encode).
        Raises TesseraError for another number of maps than the module was made for.
        """
        if (semantic_BSHW.shape[1], instances_BKHW.shape[1]) != self.counts:
            raise TesseraError(
                f"pisr: {semantic_BSHW.shape[1]} semantic and {instances_BKHW.shape[1]} instance maps, not "
                f"{self.counts[0]} and {self.counts[1]}"
            )
        maps = (semantic_BSHW, instances_BKHW.relu())
        encodings_BMF = torch.cat([encode(each_BMHW, features_BFHW) for each_BMHW in maps], 1)
        if self.weigh is not None:
            encodings_BMF = encodings_BMF * self.weigh(encodings_BMF)
        local_BCHW = self.local(features_BFHW)
        relation_BCC, offset_BC1 = self._relate(encodings_BMF)
        panoptic_BCP = torch.baddbmm(offset_BC1, relation_BCC, local_BCHW.flatten(2))
        # the norm computes in float32: without the cast so would all that follows
        return (local_BCHW + self.norm(panoptic_BCP.view_as(local_BCHW)).type_as(local_BCHW)).relu()

    def _relate(self, encodings_BMF: Tensor) -> tuple[Tensor, Tensor]:
        """F_pan as an affine function of h(F): (B, C, C) and (B, C, 1)."""
        keys_BMC, values_BMC = self.keys(encodings_BMF), self.values(encodings_BMF)
        scaled_BMC = self.mix_MM @ keys_BMC * keys_BMC.shape[-1] ** -0.5
        return values_BMC.mT @ scaled_BMC, values_BMC.mT @ self.mix_bias_M[:, None]


def encode(maps_BMHW: Tensor, features_BFHW: Tensor) -> Tensor:
    """The mean of features weighted by each map, (B, M, F), at least float32; 0 for a map without mass (paper's E_sem
    and E_ins; that they are means is ours). Maps are not negative. One of less than _LEAST_MASS counts as filled up to
    it by features of 0.

    Under autocast the product is one in bfloat16, as every other, and saves a float32 copy of the features; mass and
    division are float32.
    """
    maps_BMP, features_BFP = maps_BMHW.flatten(2), features_BFHW.flatten(2)
    mass_BM1 = maps_BMP.sum(-1, keepdim=True, dtype=torch.promote_types(maps_BMP.dtype, torch.float32))
    return maps_BMP @ features_BFP.mT / mass_BM1.clamp(min=_LEAST_MASS * maps_BMP.shape[-1])
