from __future__ import annotations

import torch

from mm_model.nn.flops import count_flops


def test_counts_two_operations_a_multiply_add_and_the_backward_pass() -> None:
    layer = torch.nn.Linear(5, 7, bias=False)
    x = torch.randn(3, 5)
    assert count_flops(lambda: layer(x)) == 2 * 3 * 5 * 7
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * 2 * 3 * 5 * 7
