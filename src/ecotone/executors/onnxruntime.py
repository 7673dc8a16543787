"""Segments by ONNX Runtime on the CPU: float32, and int8 (static QDQ, unsigned activations, signed weights per channel).

Export is torch's own, for concrete shapes; the ONNX file is cached on disk under the segment's content hash. Tensors are
bound in place on the way in.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ecotone.executors.cache import executor_store, key_of
from ecotone.executors.executor import Compiled, ExecutorError
from ecotone.executors.preparation import Core, Route, cpu_flags, per_shape, route_of, shapes_of, stop_unsupported
from ecotone.executors.quantisation import calibration_sets, quiet
from ecotone.model.segment import Segment

__all__ = ["OnnxRuntime"]

PACKAGES = ("onnxruntime", "onnx", "onnxscript")
OPSET = 18
NUMPY_TYPES = {
    torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.int64: "int64",
    torch.int32: "int32", torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8", torch.bool: "bool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """`id` is "onnxruntime:fp32" or "onnxruntime:int8"; `calibration` holds more input sets for int8."""

    id: str
    calibration: tuple[tuple[torch.Tensor, ...], ...] = ()

    @property
    def precision(self) -> str:
        return self.id.partition(":")[2]

    def available(self, accelerator: str) -> str:
        if accelerator != "cpu":
            return f'ONNX Runtime runs on the CPU here, not on {accelerator}; set accelerator = "cpu" or use torch:fp32'
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        return f'{", ".join(missing)} not installed; pip install "ecotone[fast]"' if missing else ""

    def compile(self, segment: Segment, examples: Sequence[torch.Tensor], accelerator: str, threads: int) -> Compiled:
        """Prepare `segment`; raises ExecutorError naming the operator that cannot be exported."""
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
        """An ONNX Runtime session, from the cache where it is whole, and into it."""
        versions = tuple(f"{name} {version(name)}" for name in ("torch", *PACKAGES))
        key = key_of(self.id, segment.content_hash(), versions, shapes_of(tensors), threads, cpu_flags())
        store = executor_store()
        cached = store.get(key)
        if cached is not None:
            try:
                return _session(cached, threads)
            except Exception:  # the engine's own exceptions have no common root; prepared again below
                store.drop(key)
        model = _exported(Core(segment, route, tensors), [tensors[i] for i in route.fed])
        if self.precision == "int8":
            sets = calibration_sets(self.id, tensors, self.calibration)
            model = _quantised(model, [[t[i] for i in route.fed] for t in sets])
        store.put(key, model)
        return _session(model, threads)


def _session(model: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other work shares the cores
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _exported(module: Core, fed: list[torch.Tensor]) -> bytes:
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, tuple(fed), dynamo=True, verbose=False, opset_version=OPSET, external_data=False)
    proto = program.model_proto  # type: ignore[union-attr]
    if len(proto.graph.input) != len(fed):
        raise ExecutorError(f"onnxruntime: {len(fed)} tensors are read, {len(proto.graph.input)} inputs were kept")
    if proto.ByteSize() > 2**31 - 1:
        raise ExecutorError("onnxruntime: the segment is over 2 GB, more than one ONNX file can hold; cut it smaller")
    return bytes(proto.SerializeToString())


def _quantised(model: bytes, sets: list[list[torch.Tensor]]) -> bytes:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():
        plain, ready, small = (str(Path(folder) / name) for name in ("plain.onnx", "ready.onnx", "small.onnx"))
        Path(plain).write_bytes(model)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready, small, _Reader(ready, sets), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        return Path(small).read_bytes()


class _Reader:
    """Hands the quantiser one input set after the other."""

    def __init__(self, path: str, sets: list[list[torch.Tensor]]) -> None:
        import onnx

        names = [entry.name for entry in onnx.load(path, load_external_data=False).graph.input]
        self.sets = [dict(zip(names, (t.numpy() for t in tensors), strict=True)) for tensors in sets]
        self.left: Iterator[dict[str, Any]] = iter(self.sets)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.left, None)

    def rewind(self) -> None:
        self.left = iter(self.sets)


def _engine(session: Any) -> Any:
    names = [entry.name for entry in session.get_inputs()]
    outputs = [entry.name for entry in session.get_outputs()]

    def engine(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        binding = session.io_binding()
        held = [t.contiguous() for t in tensors]
        for name, tensor in zip(names, held, strict=True):
            kind = NUMPY_TYPES[tensor.dtype]
            binding.bind_input(name, "cpu", 0, kind, list(tensor.shape), tensor.data_ptr())
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return [torch.from_numpy(value) for value in binding.copy_outputs_to_cpu()]

    return engine
