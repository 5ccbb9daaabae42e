"""Options of Panoptic-DeepLab that are refused."""

import math

import pytest

from infra.errors import TesseraError
from training.backbones import PyramidConfig
from training.methods.panoptic_deeplab.config import DecodeConfig, PanopticDeeplabConfig


@pytest.mark.parametrize(
    "change",
    [
        {"skip_strides": (8,)},
        {"skip_strides": (), "skip_channels": ()},
        {"skip_strides": (4, 8)},
        {"skip_strides": (4, 4)},
        {"skip_strides": (4, 0)},
        {"skip_channels": (16, 0)},
        {"context_rates": (6, 0)},
        *({name: 0} for name in ("context_channels", "semantic_channels", "instance_channels", "head_channels")),
        *({n: v} for n in ("small_weight", "centre_weight", "offset_weight") for v in (-1.0, math.inf, math.nan)),
        *({"hardest": v} for v in (0.0, -0.1, 1.1, math.nan)),
        *({"dropout": v} for v in (-0.1, 1.0)),
        *({name: v} for name in ("sigma", "heat_reach") for v in (0.0, -1.0, math.inf, math.nan)),
        {"small_area": -1},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(change: dict):
    with pytest.raises(TesseraError, match="panoptic_deeplab: "):
        PanopticDeeplabConfig(**change)


@pytest.mark.parametrize(
    "change",
    [
        *({"window": v} for v in (-1, 1, 2, 40)),
        {"most": 0},
        *({"min_stuff_area": v} for v in (-0.1, 1.0, math.nan)),
        *({"threshold": v} for v in (-0.1, math.inf, math.nan)),
    ],
    ids=str,
)
def test_options_of_decoding_out_of_range_are_refused(change: dict):
    with pytest.raises(TesseraError, match="decode: "):
        DecodeConfig(**change)


@pytest.mark.parametrize(
    "options",
    [{"dilations": (2, 4)}, {"dilations": (2, 4, 0)}, {"name": "pvt-v2-b0", "dilations": (2, 4, 8)}],
    ids=str,
)
def test_dilations_that_no_resnet_has_are_refused(options: dict):
    with pytest.raises(TesseraError, match="dilations"):
        PyramidConfig(**options)
