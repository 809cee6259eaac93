"""Matrices are multiplied in what the hardware knows, unless somebody asks for something else."""

import pytest
import torch

from mm_model.generative import precision
from mm_model.generative.precision import autocast, native_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("avx512", "amx"), [(True, False), (False, True), (False, False)])
def test_bf16_is_native_where_the_processor_says_so(monkeypatch, avx512, amx) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert native_precision(CPU) == ("bf16" if avx512 or amx else "fp32")


@pytest.mark.parametrize("native", ["bf16", "fp32"])
@pytest.mark.parametrize("asked", ["bf16", "fp32", None])
def test_products_are_in_what_is_asked_for_or_native(monkeypatch, asked, native) -> None:
    monkeypatch.setattr(precision, "native_precision", lambda _: native)
    a = torch.ones(4, 6)
    with autocast(CPU, asked):
        made = a @ a.T
    assert made.dtype == (torch.bfloat16 if (asked or native) == "bf16" else torch.float32)
