"""What a training worker keeps of freed memory: the variables do what they are set for."""

import os
import subprocess
import sys

import pytest

from mm_model.adapters import environment

# Pages that the kernel gives while 64 MB and 1 MB are taken and freed ten times, once they have
# found their place.
_FAULTS = """
import resource, torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for turn in range(15):
    if turn == 5:
        before = faults()
    large, small = torch.zeros(16 * 2**20), torch.zeros(2**18)
    del large, small
print(faults() - before)
"""


def faults(variables: dict[str, str]) -> int:
    answer = subprocess.run(
        [sys.executable, "-c", _FAULTS], env=os.environ | variables, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return int(answer.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what glibc gives back")
def test_a_worker_is_given_no_page_twice():
    assert faults(environment.training_environment()) < 0.1 * faults({})


def test_what_is_set_outside_wins(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    assert environment.training_environment()["MALLOC_TRIM_THRESHOLD_"] == "7"
