"""What every benchmark shares: the command line, the context, interleaved rounds, and the JSON file of figures.

A figure is one number at the top level of the JSON; the cases behind it lie under "cases", machine, versions and seed
under "context". Contenders are measured in turn within each round, so that a drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ecotone.schema import write_aside

PACKAGES = (
    "ecotone", "torch", "numpy", "openvino", "onnxruntime", "transformers", "eclipse-zenoh", "zstandard", "grpcio", "uvloop",
)  # fmt: skip


def arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options that all benchmarks take: --json, --quick, --seed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", metavar="FILE", help="write figures, cases and context to FILE")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases; not the judged figures")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def context(seed: int, **more: Any) -> dict[str, Any]:
    """Machine, versions and seed, as the JSON's "context"."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"machine": machine(), "versions": versions, "seed": seed, **more}


def machine() -> str:
    """Processor model, cores in use and the vector features that decide speed."""
    model, flags = platform.processor() or platform.machine(), ""
    try:
        with open("/proc/cpuinfo") as file:
            text = file.read()
        model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), model)
        names = ("avx2", "avx512f", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "i8mm", "sve")
        flags = " ".join(name for name in names if f" {name}" in text)
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores, {flags}".strip(", ")


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Wall seconds of each contender, one call per round in turn, `rounds` times after `warm_up` unmeasured rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        for index in range(warm_up + rounds):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                if index >= warm_up:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        if gc_was_on:
            gc.enable()
    return seconds


def median(values: Sequence[float]) -> float:
    """Median, as a plain float."""
    return float(statistics.median(values))


def finish(path: str | None, figures: Mapping[str, float | None], cases: Any, about: Mapping[str, Any]) -> None:
    """Print the figures (None: not measured), and write them with cases and context to `path` where one is given."""
    for name, value in figures.items():
        print(f"{name:40s} {'not measured' if value is None else f'{value:.6g}'}")
    if path:
        write_aside(path, json.dumps({**figures, "cases": cases, "context": about}, indent=1, allow_nan=False) + "\n")
