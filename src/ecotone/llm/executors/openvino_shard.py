"""Shards by OpenVINO on the CPU, paged attention over our own cache: strong at prompts, above all on processors with AMX.

fp32 and bf16 by precision hint, int8 (per output) and int4 (groups of 64) by NNCF weight compression. The hint follows
the cache: bfloat16 cache, bfloat16 computation. The compressed model is kept on disk. OpenVINO may die (a division by
zero was seen with one thread): a combination of precision and threads first runs once in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecotone.decoding.step import Step
from ecotone.executors.cache import executor_store, joined, key_of, parted
from ecotone.executors.preparation import cpu_flags
from ecotone.executors.quantisation import quiet
from ecotone.llm.config import DecoderConfig
from ecotone.llm.decoder import embed
from ecotone.llm.executors import openvino_graph as graph
from ecotone.llm.executors.executor import ShardError
from ecotone.llm.executors.torch_shard import check_input
from ecotone.llm.executors.trial import trial_reason
from ecotone.llm.kv import KvCache
from ecotone.llm.recipes import Recipe, span_recipes
from ecotone.llm.rope import Rotation
from ecotone.llm.weights import WeightSource, content_key
from ecotone.llmplan import Span

__all__ = ["OpenVinoShard", "OpenVinoShards"]

PRECISIONS = ("fp32", "bf16", "int8", "int4")
INT4_GROUP = 64


@dataclass(frozen=True, slots=True)
class OpenVinoShards:
    """`id` is "openvino:fp32", "openvino:bf16", "openvino:int8" or "openvino:int4"; `tried` skips the trial."""

    id: str
    tried: bool = False

    @property
    def precision(self) -> str:
        return self.id.partition(":")[2]

    def available(self, accelerator: str) -> str:
        if accelerator != "cpu":
            return f"OpenVINO runs on the CPU here, not on {accelerator}; use torch:bf16"
        for package in ("openvino", *(("nncf",) if self.precision in ("int8", "int4") else ())):
            if importlib.util.find_spec(package) is None:
                return f'{package} is not installed; pip install "ecotone[fast]"'
        return ""

    def supports(self, config: DecoderConfig) -> str:
        return graph.unsupported(config)

    def load(
        self, source: WeightSource, span: Span, cache: KvCache, accelerator: str = "cpu", threads: int = 1, context: int = 0
    ) -> OpenVinoShard:
        """Convert (or fetch from disk) and compile `span`; raises ShardError where OpenVINO cannot or died in its trial."""
        reason = self.available(accelerator) or self.supports(source.config)
        if self.precision not in PRECISIONS:
            reason = f"unknown precision; known: {', '.join(PRECISIONS)}"
        if not reason and not self.tried:
            name = "bf16" if cache.dtype == torch.bfloat16 else "fp32"
            reason = trial_reason(self.id, name, threads, f"openvino {version('openvino')} {cpu_flags()}")
        if reason:
            raise ShardError(f"{self.id}: {reason}")
        return OpenVinoShard(self.id, source, span, cache, threads, context)


class OpenVinoShard:
    """One span by OpenVINO; see ShardExecutor."""

    def __init__(self, id: str, source: WeightSource, span: Span, cache: KvCache, threads: int, context: int):
        self.id, self.config, self.span, self.cache = id, source.config, span, cache
        self.precision = id.partition(":")[2]
        if span.stop > self.config.num_layers:
            raise ShardError(f"{id}: {span.describe()} of a model with {self.config.num_layers} layers")
        before, layers, after = span_recipes(self.config, span)
        table = torch.bfloat16 if cache.dtype == torch.bfloat16 else torch.float32
        self._before = {r.name: source.read(r).to(table) for r in before}
        matrices = [r for part in (*layers, after) for r in part if r.is_matrix]
        self._weights = sum(r.num_elements for r in matrices)
        self._matrix_bytes = sum(_bytes(r, self.precision) for r in matrices)
        self.weight_bytes = self._matrix_bytes + sum(t.nbytes for t in self._before.values())
        context = context or self.config.max_positions
        self._rotations = [Rotation(rope, context) for rope in self.config.ropes]
        self._used = sorted({k.rope for k in self.config.layers[span.start : span.stop] if k.rope >= 0})
        self._request: Any = None
        if span.num_layers or span.head:
            with _named(id, span):
                self._request = self._compile(source, layers, after, threads)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self._matrix_bytes / max(self._weights, 1)

    def forward(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        check_input(self.id, self.config, self.span, step, x)
        if self.span.num_layers:
            self.cache.extend(step)
        with torch.inference_mode():
            positions_T = torch.tensor(step.positions())
            x_TW = (embed(self.config, self._before, x, positions_T) if self.span.embedding else x).float().contiguous()
            if self._request is None:
                return x_TW
            return self._infer(step, x_TW, positions_T)

    def _infer(self, step: Step, x_TW: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        feed: dict[str, torch.Tensor] = {"inputs_embeds": x_TW if self.span.num_layers else x_TW[:, None]}
        wanted = step.logit_indices()
        if self.span.head:
            feed["wanted"] = torch.tensor(wanted or [0], dtype=torch.int32)
        if self.span.num_layers:
            for index in self._used:
                for name, angles_TR in zip(("cos", "sin"), self._rotations[index].of(positions_T), strict=True):
                    feed[f"{name}.{index}"] = torch.cat([angles_TR, angles_TR], -1)[:, None]
            tables = [self.cache.tables.table(row.slot) for row in step.rows]
            feed["past_lens"] = torch.tensor([row.start for row in step.rows], dtype=torch.int32)
            feed["subsequence_begins"] = torch.tensor(step.offsets, dtype=torch.int32)
            feed["block_indices"] = torch.tensor([b for table in tables for b in table], dtype=torch.int32)
            begins = np.cumsum([0, *(len(table) for table in tables)]).astype(np.int32)
            feed["block_indices_begins"] = torch.from_numpy(begins)
            feed["max_context_len"] = torch.tensor(max(row.stop for row in step.rows), dtype=torch.int32)
            feed["position_ids"] = positions_T
        ov, held = _openvino(), []
        for name, tensor in feed.items():
            if name in self._inputs:
                held.append(ov.Tensor(tensor.numpy(), shared_memory=True))
                self._request.set_tensor(name, held[-1])
        self._request.infer()
        made = torch.from_numpy(self._request.get_output_tensor(0).data.copy()).float()
        made = made.reshape(-1, made.shape[-1])
        return made[: len(wanted)] if self.span.head else made

    def _compile(self, source: WeightSource, layers: list[list[Recipe]], after: list[Recipe], threads: int) -> Any:
        ov = _openvino()
        core = ov.Core()
        model = self._model(ov, core, source, layers, after)
        graph.paged(ov, model, self.config.layers[self.span.start : self.span.stop])
        half = self.cache.dtype == torch.bfloat16
        if half and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ShardError(f"{self.id}: this processor has no bfloat16 units; give the shard a float32 cache")
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
            "KV_CACHE_PRECISION": "bf16" if half else "f32",
        }
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        self._inputs = {name for port in request.model_inputs for name in port.get_names()}
        for index, (keys, values) in enumerate(zip(self.cache.keys, self.cache.values, strict=True)):
            request.set_tensor(f"key_cache.{index}", _shared(ov, keys))
            request.set_tensor(f"value_cache.{index}", _shared(ov, values))
        return request

    def _model(self, ov: Any, core: Any, source: WeightSource, layers: list[list[Recipe]], after: list[Recipe]) -> Any:
        """The model before paging, from disk where it was made before."""
        tensors = [{r.name: source.read(r) for r in part} for part in (*layers, after)]
        contents = content_key(t for part in tensors for t in part.values())
        versions = f"openvino {version('openvino')}" + (
            f" nncf {version('nncf')}" if self.precision.startswith("int") else ""
        )
        store, key = executor_store(), key_of("llm openvino 1", self.precision, contents, self.config, self.span, versions)
        if kept := store.get(key):
            try:
                xml, weights = parted(kept)
                return core.read_model(model=xml, weights=weights)
            except (RuntimeError, ValueError):
                store.drop(key)
        reads = [graph.arrays(_arrays(part, self.config, self.precision)) for part in tensors]
        model = graph.build(ov, self.config, self.span, reads[:-1], reads[-1])
        if self.precision in ("int8", "int4"):
            model = _compressed(model, self.precision)
        store.put(key, joined(_serialised(ov, model)))
        return model


def _bytes(recipe: Recipe, precision: str) -> int:
    outputs, inputs = recipe.shape
    if precision == "int4" and inputs % INT4_GROUP == 0:
        return outputs * inputs // 2 + 2 * outputs * inputs // INT4_GROUP
    if precision in ("int4", "int8"):
        return outputs * inputs + 2 * outputs
    return outputs * inputs * (4 if precision == "fp32" else 2)


def _arrays(tensors: dict[str, torch.Tensor], config: DecoderConfig, precision: str) -> dict[str, np.ndarray[Any, Any]]:
    made = {}
    for name, tensor in tensors.items():
        is_norm = name in ("q_norm", "k_norm") or name.endswith("norm.weight")
        wide = tensor.float() + (config.norm_offset if is_norm else 0.0)
        is_half = tensor.dim() == 2 and precision != "fp32"
        made[name] = (wide.half() if is_half else wide).numpy()
    return made


def _compressed(model: Any, precision: str) -> Any:
    """Weights as integers with scales. Matrices whose inputs do not divide into groups of int4 keep 8 bits."""
    with quiet():
        import nncf

        nncf.set_log_level(40)
        if precision == "int8":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        ragged = [
            op.get_friendly_name()
            for op in model.get_ordered_ops()
            if op.get_type_name() == "MatMul" and op.input_value(1).get_shape()[-1] % INT4_GROUP
        ]
        ignored = nncf.IgnoredScope(names=ragged) if ragged else None
        mode = nncf.CompressWeightsMode.INT4_SYM
        model = nncf.compress_weights(
            model, mode=mode, ratio=1.0, group_size=INT4_GROUP, all_layers=True, ignored_scope=ignored
        )
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM) if ragged else model


def _serialised(ov: Any, model: Any) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        xml, weights = Path(folder) / "shard.xml", Path(folder) / "shard.bin"
        ov.serialize(model, str(xml), str(weights))
        return xml.read_bytes(), weights.read_bytes()


def _shared(ov: Any, pool: torch.Tensor) -> Any:
    """A tensor of OpenVINO over the memory of `pool`."""
    if pool.dtype == torch.bfloat16:
        return ov.Tensor(pool.view(torch.int16).numpy(), ov.Shape(list(pool.shape)), ov.Type.bf16)
    return ov.Tensor(pool.numpy(), shared_memory=True)


def _openvino() -> Any:
    if "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # nothing is reported to anyone
    import openvino
    import openvino.opset13

    return openvino


@contextlib.contextmanager
def _named(id: str, span: Span):  # type: ignore[no-untyped-def]
    try:
        yield
    except ShardError:
        raise
    except Exception as error:
        lines: Sequence[str] = [line for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
        raise ShardError(
            f"{id}: cannot prepare {span.describe()}: {(lines or ['?'])[0].strip()[:200]}; use torch"
        ) from error
