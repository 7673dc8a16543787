"""Segments by torch.compile (inductor), float32 or bfloat16, with frozen weights; CPU and CUDA.

Needs a C++ compiler (CPU) or Triton (CUDA). Preparing takes seconds to tens of seconds per segment. Kernels are kept by
inductor itself in a folder beside our own cache; a damaged entry there is compiled anew by inductor.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ecotone.executors.cache import cache_root
from ecotone.executors.executor import Compiled
from ecotone.executors.preparation import engine_threads, per_shape, route_of, stop_unsupported
from ecotone.executors.torch_eager import accelerator_reason, in_precision, on_device
from ecotone.model.segment import Segment

__all__ = ["TorchCompile"]


@dataclass(frozen=True, slots=True)
class TorchCompile:
    """`id` is "torch-compile:fp32" or "torch-compile:bf16"."""

    id: str

    @property
    def precision(self) -> str:
        return self.id.partition(":")[2]

    def available(self, accelerator: str) -> str:
        reason = accelerator_reason(accelerator)
        if reason:
            return reason
        if accelerator.startswith("cuda"):
            return "" if importlib.util.find_spec("triton") else "torch.compile needs Triton on CUDA; pip install triton"
        if accelerator == "mps":
            return "torch.compile is not used on Apple GPUs; use torch:fp32"
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            return "torch.compile needs a C++ compiler; install g++ or clang++"
        return ""

    def compile(self, segment: Segment, examples: Sequence[torch.Tensor], accelerator: str, threads: int) -> Compiled:
        """Prepare `segment` (seconds to tens of seconds); raises ExecutorError where inductor cannot."""
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
        route = route_of(segment)

        def prepare(tensors: Sequence[torch.Tensor]) -> Compiled:
            if not route.made:
                return route.through(lambda _: [])
            fed = [tensors[i] for i in route.fed]
            with stop_unsupported(self.id, segment), engine_threads(threads), torch.no_grad():
                module = in_precision(segment, route, tensors, self.precision, accelerator)
                on_it = tuple(t.to(accelerator) for t in fed)
                # Exported first: a graph module has code of its own, while dynamo would count every segment's
                # interpreter as one function and give up after a few of them.
                graph = torch.export.export(module, on_it, strict=False).module(check_guards=False)
                options: dict[str, Any] = {"freezing": True}
                if accelerator == "cpu":
                    options["cpp.threads"] = threads
                fast: Any = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
                engine = on_device(fast, accelerator, threads)
                engine(fed)
            return route.through(engine)

        return per_shape(self.id, segment, examples, prepare)
