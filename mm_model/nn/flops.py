"""Floating-point operations of a call, for benchmarks: what a device's peak is compared with."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def count_flops(call: Callable[[], object]) -> int:
    """Operations of all matrix products and convolutions in a call, a multiply-add being two.

    Backward passes within the call count, too; elementwise work does not.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
