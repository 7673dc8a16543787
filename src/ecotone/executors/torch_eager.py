"""Segments by PyTorch's eager kernels: float32 or bfloat16, on the CPU or a GPU.

float32 keeps the layout in which the model was captured, so its answers are the captured graph's to the bit on the same
machine and thread count; bfloat16 convolves in channels_last. A rule, not a race: which one wins a timing would change the
last bits from one start to the next. On a GPU inputs go through pinned memory without blocking, and results come back
into pinned memory. Works wherever torch does: this is the executor that every other one is measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ecotone.executors.executor import Compiled
from ecotone.executors.preparation import Core, Engine, Route, engine_threads, per_shape, route_of, stop_unsupported
from ecotone.model.segment import Segment

__all__ = ["TorchEager", "accelerator_reason", "in_precision", "on_device"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def accelerator_reason(accelerator: str) -> str:
    """ "" where torch can compute on `accelerator`, else why not and what to do."""
    kind, _, index = accelerator.partition(":")
    if kind == "cpu":
        return ""
    if kind == "cuda":
        if not torch.cuda.is_available():
            return 'torch sees no CUDA device; install a CUDA build of torch and the driver, or set accelerator = "cpu"'
        if index and int(index) >= torch.cuda.device_count():
            return f"there are {torch.cuda.device_count()} CUDA devices, counted from 0; name one of them"
        return ""
    if kind == "mps":
        return "" if torch.backends.mps.is_available() else 'torch sees no Apple GPU; set accelerator = "cpu"'
    return f'accelerator {accelerator!r} is not known; write "cpu", "cuda", "cuda:1" or "mps"'


class _Cast(torch.nn.Module):
    """The core with its weights in `dtype`: floating inputs are cast on the way in, results back to float32."""

    def __init__(self, inner: torch.nn.Module, dtype: torch.dtype, result_dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.inner, self.dtype, self.result_dtypes = inner.to(dtype), dtype, tuple(result_dtypes)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cast = [t.to(self.dtype) if t.is_floating_point() else t for t in tensors]
        return tuple(t.to(dtype) for t, dtype in zip(self.inner(*cast), self.result_dtypes, strict=True))


class _Autocast(torch.nn.Module):
    """The core under autocast, for segments whose operators mix types once their weights are cast."""

    def __init__(
        self, inner: torch.nn.Module, dtype: torch.dtype, result_dtypes: Sequence[torch.dtype], device: str
    ) -> None:
        super().__init__()
        self.inner, self.dtype, self.result_dtypes, self.device = inner, dtype, tuple(result_dtypes), device

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast(self.device, self.dtype):
            results = self.inner(*tensors)
        return tuple(t.to(dtype) for t, dtype in zip(results, self.result_dtypes, strict=True))


def in_precision(
    segment: Segment, route: Route, tensors: Sequence[torch.Tensor], precision: str, accelerator: str
) -> torch.nn.Module:
    """The core of `segment` computing in `precision` on `accelerator`; the same tensors in and out in any precision."""
    device = torch.device(accelerator)
    plain = Core(segment, route, tensors).to(device)
    if precision == "fp32":
        return plain
    fed = [tensors[i].to(device) for i in route.fed]
    with torch.no_grad():
        result_dtypes = [t.dtype for t in plain(*fed)]
        cast = _Cast(Core(segment, route, tensors).to(device), DTYPES[precision], result_dtypes)
        try:
            cast(*fed)
        except RuntimeError:
            return _Autocast(plain, DTYPES[precision], result_dtypes, device.type)
    return cast


def on_device(module: torch.nn.Module, accelerator: str, threads: int) -> Engine:
    """`module` as an engine: CPU tensors in and out, whatever `accelerator` it computes on."""
    device = torch.device(accelerator)
    if device.type == "cpu":
        return lambda tensors: _on_cpu(module, tensors, threads)
    if device.type == "cuda":
        return _on_cuda(module, device)
    return lambda tensors: _on_other(module, tensors, device)


def _on_cpu(module: torch.nn.Module, tensors: list[torch.Tensor], threads: int) -> list[torch.Tensor]:
    with torch.no_grad(), engine_threads(threads):
        return [t.contiguous() for t in module(*tensors)]


def _on_cuda(module: torch.nn.Module, device: torch.device) -> Engine:
    staging: dict[int, torch.Tensor] = {}

    def stage(index: int, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda or tensor.is_pinned():
            return tensor.to(device, non_blocking=True)
        held = staging.get(index)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = staging[index] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return held.copy_(tensor).to(device, non_blocking=True)

    def engine(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad(), torch.cuda.device(device):
            results = [t.contiguous() for t in module(*[stage(i, t) for i, t in enumerate(tensors)])]
            back = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in results]
            torch.cuda.current_stream(device).synchronize()  # also frees the staging buffers for the next call
        return back

    return engine


def _on_other(module: torch.nn.Module, tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t.contiguous().cpu() for t in module(*[t.to(device) for t in tensors])]


@dataclass(frozen=True, slots=True)
class TorchEager:
    """`id` is "torch:fp32" or "torch:bf16"."""

    id: str

    @property
    def precision(self) -> str:
        return self.id.partition(":")[2]

    def available(self, accelerator: str) -> str:
        return accelerator_reason(accelerator)

    def compile(self, segment: Segment, examples: Sequence[torch.Tensor], accelerator: str, threads: int) -> Compiled:
        """Prepare `segment`; raises ExecutorError where it cannot run on `accelerator` in this precision."""
        route = route_of(segment)

        def prepare(tensors: Sequence[torch.Tensor]) -> Compiled:
            if not route.made:
                return route.through(lambda _: [])
            fed = [tensors[i] for i in route.fed]
            with stop_unsupported(self.id, segment), engine_threads(threads):
                module = in_precision(segment, route, tensors, self.precision, accelerator)
                if self.precision != "fp32" and any(weight.dim() == 4 for weight in module.state_dict().values()):
                    # Weights in channels_last are enough: a convolution follows the layout of its weights.
                    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                engine = on_device(module, accelerator, threads)
                engine(fed)  # sees that it runs, and warms it
                return route.through(engine)

        return per_shape(self.id, segment, examples, prepare)
