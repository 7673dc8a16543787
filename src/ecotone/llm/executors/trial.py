"""An executor that may kill its process is tried once in another: a small random model, compared with float32.

    python -m ecotone.llm.executors.trial openvino:int8 bf16 1

The verdict is kept under $ECOTONE_CACHE/trials by executor, cache precision, threads and versions.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import torch

from ecotone.executors.cache import cache_root, key_of
from ecotone.llm.config import DecoderConfig, LayerConfig, RopeConfig
from ecotone.schema import write_aside

__all__ = ["TRIAL_CONFIG", "trial_reason"]

TRIAL_S = 180
TRIAL_CONFIG = DecoderConfig(
    family="llama", vocabulary=96, width=128, num_heads=4, num_kv_heads=2, head_size=32, ffn_width=192, max_positions=256,
    layers=(LayerConfig(), LayerConfig(window=8)), ropes=(RopeConfig(rotary_size=32, original_positions=256),),
)  # fmt: skip


def trial_reason(id: str, cache: str, threads: int, versions: str) -> str:
    """ "" where executor `id` survived its trial here, else why it is not to be trusted. Seconds the first time."""
    path = cache_root() / "trials" / f"{key_of(id, cache, threads, versions)[:32]}.txt"
    if path.is_file():
        return path.read_text()
    command = [sys.executable, "-m", "ecotone.llm.executors.trial_run", id, cache, str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_S, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return "its trial did not end in time; try again on a quieter machine"
    reason = _verdict(done)
    write_aside(path, reason.encode())
    return reason


def _verdict(done: subprocess.CompletedProcess[str]) -> str:
    # What counts is that the answer was right: one that dies while it takes itself down has done its work.
    if "trial passed" in done.stdout:
        return ""
    if done.returncode < 0:
        return f"it died in its trial ({signal.Signals(-done.returncode).name}); use another executor or more threads"
    return f"its trial failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:160]}"


def random_ids(count: int) -> torch.Tensor:
    """Token ids for trials and tests, always the same."""
    return torch.randint(0, TRIAL_CONFIG.vocabulary, (count,), generator=torch.Generator().manual_seed(1))
