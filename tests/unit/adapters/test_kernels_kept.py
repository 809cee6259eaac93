"""What a replica keeps of compiled kernels: the variables do what they are set for."""

import os
import subprocess
import sys

import pytest

from mm_model.adapters import environment

# Bytes allocated after as many sizes as a replica keeps kernels, after twice and thrice as many.
_SIZES = """
import ctypes, gc, torch
from torch.nn.functional import linear

fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in fields]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
torch.set_num_threads(1)
weight = torch.ones(192, 192, dtype=torch.bfloat16)
for size in range(1, 769):
    linear(torch.ones(size, 192, dtype=torch.bfloat16), weight)
    if size % 256 == 0:
        gc.collect()
        print(info().uordblks + info().hblkhd)
"""


def allocated(variables):
    answer = subprocess.run(
        [sys.executable, "-c", _SIZES], env=os.environ | variables, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return [int(line) for line in answer.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc what is allocated")
def test_more_sizes_hold_no_more_memory_of_a_replica():
    full, _, later = allocated(environment.replica_environment())
    full_without, _, later_without = allocated({})
    assert later - full < 0.2 * (later_without - full_without)


def test_what_is_set_outside_wins(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    assert environment.replica_environment()["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
