"""Batches with random predictions for the generalist's losses, and the configs to try them with."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from preprocessing.synthetic import CATEGORIES
from tests.support.examples import STUFF, batch_of, in_double, of_all_kinds, scenes, whole
from tests.training import slow_losses
from training.batch import Example
from training.methods.generalist import loss
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.targets import instance_targets, semantic_targets


def config_of(**options: Any) -> GeneralistConfig:
    base = {"frequencies": 2, "eds_distance": 4.0, "cells": 5, "total_variation": 0.3, "dice": 0.7}
    return GeneralistConfig(**base | options)


CONFIG = config_of()
CONFIGS = {
    "embedding": CONFIG,
    "embedding, squared": config_of(squared=True),
    "embedding, without void": config_of(void_kept=False, frequencies=3, half_period=True),
    "direct": config_of(encoding="direct", eds_min=0.2),
    "direct, squared, without void": config_of(encoding="direct", squared=True, void_kept=False),
    "classes": config_of(encoding="classes"),
    "classes, without void": config_of(encoding="classes", void_kept=False, boundaries="panoptic"),
    "without EDS": config_of(eds_distance=0.0),
}
MIXED = [*scenes(3, (16, 16)), of_all_kinds((16, 16)), whole(STUFF, (16, 16)), whole(None, (16, 16))]


class Case:
    """A batch with targets and random predictions."""

    def __init__(self, *examples: Example, config: GeneralistConfig = CONFIG, double: bool = False) -> None:
        self.config = config
        self.batch = in_double(batch_of(*examples)) if double else batch_of(*examples)
        self.semantic = semantic_targets(self.batch, config)
        self.instance = instance_targets(self.batch, config)
        if double:
            self.semantic = replace(self.semantic, weight_BHW=self.semantic.weight_BHW.double())
            self.instance = replace(self.instance, weight_BHW=self.instance.weight_BHW.double())
        images, _, height, width = self.batch.images_B3HW.shape
        generator, dtype = torch.Generator().manual_seed(1), torch.float64 if double else torch.float32
        shapes = ((images, count, height, width) for count in (len(CATEGORIES), config.instance_channels))
        self.logits, noise = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
        self.predicted = noise if config.encoding == "classes" else self.instance.dense_BXHW + 0.5 * noise

    @property
    def ideal(self) -> Tensor:
        """What a perfect instance head says."""
        dense = self.instance.dense_BXHW
        if self.config.encoding != "classes":
            return dense
        halves = [torch.nn.functional.one_hot(cells, self.config.cells + 1) for cells in dense.unbind(1)]
        return 100 * torch.cat(halves, -1).movedim(-1, 1).to(self.predicted.dtype)

    def losses(self, logits: Tensor | None = None, predicted: Tensor | None = None) -> dict[str, Tensor]:
        """Of both tasks, from the product."""
        logits, predicted = (
            self.logits if logits is None else logits,
            self.predicted if predicted is None else predicted,
        )
        semantic = loss.semantic_losses(logits, self.semantic, self.config)
        return semantic | loss.instance_losses(predicted, self.instance, self.batch, self.config)

    def slow(self) -> dict[str, float]:
        """Of both tasks, from loops."""
        config, y, targets = self.config, self.predicted, self.instance
        if config.encoding == "classes":
            instance, variation = slow_losses.cells(y, targets), slow_losses.cell_variation(y)
        else:
            parts = 2 if config.encoding == "embedding" else 1
            instance = slow_losses.codes(y, targets, parts, config.squared)
            variation = slow_losses.code_variation(y)
        claims = slow_losses.claims(y, targets.codes_BNX, config.encoding == "classes")
        return {
            "semantic": slow_losses.classes(self.logits, self.semantic),
            "semantic_tv": 0.3 * slow_losses.class_variation(self.logits),
            "instance": instance,
            "instance_tv": 0.3 * variation,
            "dice": 0.7 * slow_losses.dice(claims, self.batch, config.void_kept),
        }

    def image(self, b: int) -> "Case":
        """One image of the batch."""
        part = object.__new__(Case)
        part.config = self.config
        for name in ("semantic", "instance", "batch"):
            whole = getattr(self, name)
            cut = {k: v[b : b + 1] for k, v in vars(whole).items()}
            setattr(part, name, type(whole)(**cut))
        part.logits, part.predicted = self.logits[b : b + 1], self.predicted[b : b + 1]
        return part
