"""Freed memory stays in the process: page faults are counted by the system, in two processes, with and without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ecotone.executors.memory import keep_freed_memory

pytestmark = pytest.mark.torch

PROGRAM = """
import resource, sys, threading
import torch
from ecotone.executors.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = []
def work():
    for _ in range(30):
        tensors = [torch.ones(300_000) for _ in range(8)]  # 1.2 MB each, all freed before the next round
        del tensors
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults[-1] - faults[9])
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_requests_of_one_shape_take_no_new_pages() -> None:
    """20 rounds of 9.6 MB are 48,000 pages of 4 kB when each is taken anew; some systems give larger pages, hence 2,000."""
    if not keep_freed_memory():
        pytest.skip("this C library does not take mallopt")
    assert faults("keep") < 200
    assert faults("plain") > 2000
