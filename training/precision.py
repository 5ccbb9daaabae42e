"""In what precision a device computes."""

from functools import cache

import torch


@cache
def multiplies_bf16(kind: str) -> bool:
    """Whether devices of a kind ("cpu", "cuda") have instructions for bfloat16; emulated it is slower than float32."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(wanted: bool, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 if that is wanted and of use on the device; else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and multiplies_bf16(device.type))


def told(wanted: bool, device: torch.device) -> str:
    """What `autocast` makes of it, in words."""
    if wanted and not multiplies_bf16(device.type):
        return "float32, since this machine has no instructions for bfloat16"
    return "bfloat16" if wanted else "float32"
