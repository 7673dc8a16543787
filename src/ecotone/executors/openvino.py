"""Segments by OpenVINO on the CPU: float32, bfloat16 (by precision hint), int8 (NNCF post-training quantisation).

Conversion goes through a trace of the segment for its concrete shapes. The IR is cached on disk under the segment's
content hash; float32 and bfloat16 share one. int8 is calibrated on the example inputs; what NNCF leaves alone runs in
bfloat16 where the processor has it. Tensors go in and come out without a copy. Nothing is reported to anyone: the
telemetry package that OpenVINO and NNCF would load is kept out.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ecotone.executors.cache import executor_store, joined, key_of, parted
from ecotone.executors.executor import Compiled, ExecutorError
from ecotone.executors.preparation import Core, Route, cpu_flags, per_shape, route_of, shapes_of, stop_unsupported
from ecotone.executors.quantisation import calibration_sets, quiet
from ecotone.model.segment import Segment

__all__ = ["OpenVino"]

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}


@dataclass(frozen=True, slots=True)
class OpenVino:
    """`id` is "openvino:fp32", "openvino:bf16" or "openvino:int8"; `calibration` holds more input sets for int8."""

    id: str
    calibration: tuple[tuple[torch.Tensor, ...], ...] = ()

    @property
    def precision(self) -> str:
        return self.id.partition(":")[2]

    def available(self, accelerator: str) -> str:
        if accelerator != "cpu":
            return f'OpenVINO runs on the CPU here, not on {accelerator}; set accelerator = "cpu" or use torch:fp32'
        for package in ("openvino", *(("nncf",) if self.precision == "int8" else ())):
            if importlib.util.find_spec(package) is None:
                return f'{package} is not installed; pip install "ecotone[fast]"'
        return ""

    def compile(self, segment: Segment, examples: Sequence[torch.Tensor], accelerator: str, threads: int) -> Compiled:
        """Prepare `segment`; raises ExecutorError naming the operator that OpenVINO does not know."""
        if reason := self.available(accelerator):
            raise ExecutorError(f"{self.id}: {reason}")
        route = route_of(segment)

        def prepare(tensors: Sequence[torch.Tensor]) -> Compiled:
            if not route.made:
                return route.through(lambda _: [])
            with stop_unsupported(self.id, segment):
                return route.through(_engine(self._load(segment, route, tensors, threads)))

        return per_shape(self.id, segment, examples, prepare)

    def _load(self, segment: Segment, route: Route, tensors: Sequence[torch.Tensor], threads: int) -> Any:
        """A compiled OpenVINO model, from the cache where it is whole, and into it."""
        ov = _openvino()
        form = "int8" if self.precision == "int8" else "float"
        versions = _versions(self.precision)
        key = key_of("openvino", form, segment.content_hash(), versions, shapes_of(tensors), threads, cpu_flags())
        store = executor_store()
        core = ov.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[self.precision] if _has_bf16(core) else "f32",
        }
        cached = store.get(key)
        if cached is not None:
            try:
                xml, weights = parted(cached)
                return core.compile_model(core.read_model(model=xml, weights=weights), "CPU", settings)
            except (RuntimeError, ValueError):
                store.drop(key)  # whole, but not of this OpenVINO: prepared again below
        model = _convert(ov, Core(segment, route, tensors), [tensors[i] for i in route.fed])
        if self.precision == "int8":
            sets = calibration_sets(self.id, tensors, self.calibration)
            model = _quantise(model, [[t[i] for i in route.fed] for t in sets])
        store.put(key, joined(_serialised(ov, model)))
        return core.compile_model(model, "CPU", settings)


def _openvino() -> Any:
    if "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # both fall back to a stub without it
    import openvino

    return openvino


def _versions(precision: str) -> str:
    return f"openvino {version('openvino')}" + (f" nncf {version('nncf')}" if precision == "int8" else "")


def _has_bf16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _convert(ov: Any, module: Core, fed: list[torch.Tensor]) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of every Python value that it makes constant: shapes are
        example = tuple(t.contiguous() for t in fed)
        traced = torch.jit.trace(module, example, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
        model = ov.convert_model(traced, example_input=example)
        if len(model.inputs) != len(fed):
            raise ExecutorError(f"openvino: {len(fed)} tensors are read, {len(model.inputs)} inputs were kept")
        model.reshape({i: list(t.shape) for i, t in enumerate(fed)})
    return model


def _quantise(model: Any, sets: list[list[torch.Tensor]]) -> Any:
    with quiet():
        import nncf

        nncf.set_log_level(40)
        data = nncf.Dataset([[t.numpy() for t in tensors] for tensors in sets])
        operators = {node.get_type_name() for node in model.get_ops()}
        kind = nncf.ModelType.TRANSFORMER if "Softmax" in operators or "ScaledDotProductAttention" in operators else None
        return nncf.quantize(model, data, subset_size=len(sets), model_type=kind, preset=nncf.QuantizationPreset.MIXED)


def _serialised(ov: Any, model: Any) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        xml, weights = Path(folder) / "segment.xml", Path(folder) / "segment.bin"
        ov.serialize(model, str(xml), str(weights))
        return xml.read_bytes(), weights.read_bytes()


def _engine(compiled: Any) -> Any:
    ov = _openvino()
    request = compiled.create_infer_request()
    results = [_result(output) for output in compiled.outputs]

    def engine(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        held = [t.contiguous() for t in tensors]
        for index, tensor in enumerate(held):
            request.set_input_tensor(index, ov.Tensor(tensor.numpy(), shared_memory=True))
        made: list[torch.Tensor | None] = []
        for index, result in enumerate(results):
            made.append(None if result is None else torch.empty(result[0], dtype=result[1]))
            if result is not None:
                request.set_output_tensor(index, ov.Tensor(made[-1].numpy(), shared_memory=True))  # type: ignore[union-attr]
        request.infer()
        return [
            torch.from_numpy(request.get_output_tensor(i).data.copy()) if tensor is None else tensor
            for i, tensor in enumerate(made)
        ]

    return engine


def _result(output: Any) -> tuple[list[int], torch.dtype] | None:
    """Shape and type of an output whose memory can be handed in, None where only the run shows its shape."""
    types = {"f32": torch.float32, "i64": torch.int64, "i32": torch.int32, "boolean": torch.bool, "u8": torch.uint8}
    kind = types.get(output.get_element_type().get_type_name())
    if output.get_partial_shape().is_dynamic or kind is None or 0 in output.get_shape() or not list(output.get_shape()):
        return None
    return list(output.get_shape()), kind
