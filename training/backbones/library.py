"""Published weights into a network of ours: names, shapes, positions, and what must not be left over."""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import TesseraError
from training.backbones.weights import LoadReport, State, few

_UNNEEDED = re.compile(r"mask_token|num_batches_tracked|relative_position_index|(^|\.)layernorm\.")
"""Entries of published files inside a backbone's own parts that a backbone does without."""


def load_by_library(net: Any, state: State, fresh: str = "$^") -> LoadReport:
    """Let `transformers` map published names to its own, then take the weights over into `net`, one of its backbones.

    The library renames between its versions, so its loader must do it. fresh: pattern of entries that published files
    never have. Raises TesseraError as `report_of` does.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # what it would print, the report says
    logging.disable_progress_bar()
    loaded, info = type(net).from_pretrained(
        None, config=net.config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if info["mismatched_keys"]:
        raise TesseraError(_mismatch(sorted(info["mismatched_keys"])))
    report = report_of(net, info["missing_keys"], info["unexpected_keys"], fresh)
    filled = loaded.state_dict()
    net.load_state_dict({name: filled[name] for name in net.state_dict()})
    return report


def load_by_name(net: nn.Module, state: State) -> tuple[list[str], list[str]]:
    """load_state_dict that returns (missing, unexpected). TesseraError naming the first shape that differs."""
    ours = net.state_dict()
    different = [(k, v.shape, ours[k].shape) for k, v in state.items() if k in ours and v.shape != ours[k].shape]
    if different:
        raise TesseraError(_mismatch(different))
    found = net.load_state_dict(state, strict=False)
    return list(found.missing_keys), list(found.unexpected_keys)


def _mismatch(different: list[Any]) -> str:
    name, theirs, ours = different[0]
    return (
        f"{name} is {tuple(theirs)} in the file and {tuple(ours)} in this backbone ({len(different)} differ): "
        "another width, patch or window?"
    )


def report_of(net: nn.Module, missing: Iterable[str], unexpected: Iterable[str], fresh: str = "$^") -> LoadReport:
    """What was loaded. Raises TesseraError unless everything but `fresh` arrived, and all that was left over lies
    outside of the backbone's own parts: a deeper network's layers, or register tokens, would change what it computes.
    """
    values = {name: value for name, value in net.state_dict().items() if value.is_floating_point()}
    absent = tuple(sorted(name for name in missing if name in values))
    total = sum(value.numel() for value in values.values())
    loaded = total - sum(values[name].numel() for name in absent)
    report = LoadReport(loaded, total, absent, tuple(sorted(unexpected)))
    lacking = tuple(name for name in absent if not re.search(fresh, name))
    if lacking:
        raise TesseraError(f"{few(lacking)} of this backbone's entries are not in the file: {report}")
    modules = {name for name, _ in net.named_modules()} - {""}
    stray = tuple(n for n in report.unexpected if _inside(n, modules) and not _UNNEEDED.search(n))
    if stray:
        raise TesseraError(f"the file has {few(stray)} that this backbone has no place for: another depth or variant?")
    return report


def _inside(name: str, modules: set[str]) -> bool:
    """Whether an entry belongs to one of the modules, with the name of a whole model before it or without."""
    parts = name.split(".")
    return any(".".join(parts[start:end]) in modules for start in (0, 1) for end in range(start + 1, len(parts)))


_META = [
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
]
"""Names in Meta's own DINOv2 files -> those of the library's published ones."""


def from_meta(state: State) -> State:
    """The same weights under the library's published names; others pass as they are."""
    result: State = {}
    for name, value in state.items():
        for pattern, replacement in _META:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            if value.ndim == 0 or len(value) % 3:
                raise TesseraError(f"{name} is {tuple(value.shape)}: not query, key and value")
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        else:
            result[name] = value
    return result


def resize_positions(positions_1NC: Tensor, side: int) -> Tensor:
    """Position embeddings of a class token and a square of patches -> for side x side patches, bicubic.

    As DINOv2 and the library do at every step; once is enough. TesseraError if they are no square.
    """
    shape = tuple(positions_1NC.shape)
    old = round(max(0, shape[1] - 1) ** 0.5) if len(shape) == 3 else 0
    if old == 0 or shape != (1, 1 + old * old, shape[2]):
        raise TesseraError(f"position embeddings are {shape}: not those of a class token and a square of patches")
    square_1CHW = positions_1NC[:, 1:].reshape(1, old, old, shape[2]).permute(0, 3, 1, 2).float()
    resized_1CHW = F.interpolate(square_1CHW, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions_1NC[:, :1].float(), resized_1CHW.flatten(2).transpose(1, 2)], 1)
