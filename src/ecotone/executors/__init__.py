"""Executors run one segment fast on one device; one file each. `catalogue` says which work here, `by_id` finds one.

The list below is the registry: there are no plug-ins.
"""

from __future__ import annotations

from ecotone.executors.executor import Compiled, Executor, ExecutorError
from ecotone.executors.onnxruntime import OnnxRuntime
from ecotone.executors.openvino import OpenVino
from ecotone.executors.quantisation import with_calibration
from ecotone.executors.torch_compile import TorchCompile
from ecotone.executors.torch_eager import TorchEager

__all__ = [
    "IDS",
    "Compiled",
    "Executor",
    "ExecutorError",
    "by_id",
    "catalogue",
    "unavailable",
    "with_calibration",
]

_ALL: tuple[Executor, ...] = (
    TorchEager("torch:fp32"),
    TorchEager("torch:bf16"),
    TorchCompile("torch-compile:fp32"),
    TorchCompile("torch-compile:bf16"),
    OpenVino("openvino:fp32"),
    OpenVino("openvino:bf16"),
    OpenVino("openvino:int8"),
    OnnxRuntime("onnxruntime:fp32"),
    OnnxRuntime("onnxruntime:int8"),
)
IDS: tuple[str, ...] = tuple(executor.id for executor in _ALL)


def catalogue(accelerator: str = "cpu") -> tuple[Executor, ...]:
    """The executors that work here for `accelerator` ("cpu", "cuda", "cuda:1", "mps")."""
    return tuple(executor for executor in _ALL if not executor.available(accelerator))


def unavailable(accelerator: str = "cpu") -> dict[str, str]:
    """Reason and remedy, by id, of each executor that does not work here for `accelerator`."""
    return {executor.id: reason for executor in _ALL if (reason := executor.available(accelerator))}


def by_id(executor: str) -> Executor:
    """The executor called `executor` ("openvino:bf16"); raises ExecutorError naming the known ones."""
    for known in _ALL:
        if known.id == executor:
            return known
    raise ExecutorError(f"executor {executor!r} is not known; known are {', '.join(IDS)}")
