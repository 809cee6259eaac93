"""Which numbers matrices are multiplied in."""

from __future__ import annotations

import torch


def native_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies it itself, else fp32, which emulation would not beat."""
    if device.type == "cpu":
        # Private names, of torch 2.4 and later: there is no public question.
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, bool)() for name in asked)
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bf16" if native else "fp32"


def used_precision(precision: str | None, device: torch.device) -> str:
    """What was asked for, or (None) the device's own."""
    return precision or native_precision(device)


def autocast(device: torch.device, precision: str | None) -> torch.autocast:
    """In which products are taken in "bf16", in "fp32", or (None) in the device's own precision."""
    bf16 = used_precision(precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
