"""Shards by our own fused CPU kernels (native.cpp): weights of 4, 8, 16 or 32 bits, one call for all layers of a step.

Made for decoding and for windows of drafts: a step of four tokens costs little more than one. Every family is computed.
Needs a C++ compiler on the machine, once. Hidden states and logits are float32; with 4- and 8-bit weights activations
are rounded to 8 bits per 32 inputs. The head keeps 8 bits under int4, and a tied table is held once. A token is computed
with the same bits alone, in a batch and in a window of fewer than 16 tokens: speculation cannot change greedy text.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ecotone.decoding.step import Row, Step
from ecotone.llm.config import ACTIVATIONS, DecoderConfig
from ecotone.llm.executors import native_library as abi
from ecotone.llm.executors.executor import ShardError
from ecotone.llm.executors.native_packing import pack_matrix
from ecotone.llm.executors.packed_store import packed
from ecotone.llm.executors.torch_shard import check_input
from ecotone.llm.kv import KvCache
from ecotone.llm.recipes import Recipe, span_recipes
from ecotone.llm.rope import frequencies
from ecotone.llm.weights import WeightSource
from ecotone.llmplan import Span

__all__ = ["NativeShard", "NativeShards"]

BITS = {"int4": 4, "int8": 8, "bf16": 16, "fp32": 32}


@dataclass(frozen=True, slots=True)
class NativeShards:
    """`id` is "native:int4", "native:int8", "native:bf16" or "native:fp32"; `processor` is the compiler's name of one."""

    id: str
    processor: str = "native"

    def available(self, accelerator: str) -> str:
        if accelerator != "cpu":
            return f"these kernels run on the CPU, not on {accelerator}; use torch:bf16"
        return abi.library_for(self.processor)[1]

    def supports(self, config: DecoderConfig) -> str:
        return ""

    def load(
        self, source: WeightSource, span: Span, cache: KvCache, accelerator: str = "cpu", threads: int = 1, context: int = 0
    ) -> NativeShard:
        """Read and pack the weights of `span`; raises ShardError where there is no compiler or no such precision."""
        precision = self.id.partition(":")[2]
        reason = self.available(accelerator) if precision in BITS else f"unknown precision; known: {', '.join(BITS)}"
        library, _ = abi.library_for(self.processor)
        if reason or library is None:
            raise ShardError(f"{self.id}: {reason}")
        return NativeShard(self.id, library, source, span, cache, threads, context)


class NativeShard:
    """One span by native.cpp; see ShardExecutor. `_held` keeps every tensor whose address the kernels know."""

    def __init__(
        self, id: str, library: ctypes.CDLL, source: WeightSource, span: Span, cache: KvCache, threads: int, context: int
    ):
        self.id, self.config, self.span, self.cache = id, source.config, span, cache
        self.bits, self._library, self._source = BITS[id.partition(":")[2]], library, source
        self.weight_bytes = self._matrix_bytes = self._matrix_weights = 0
        self._held: list[object] = []
        if span.stop > self.config.num_layers:
            raise ShardError(f"{id}: {span.describe()} of a model with {self.config.num_layers} layers")
        if cache.dtype not in (torch.float32, torch.bfloat16) or (cache.keys and cache.keys[0].device.type != "cpu"):
            raise ShardError(f"{id}: the key-value cache must be float32 or bfloat16 on the CPU, not {cache.dtype}")
        self._model = self._record(threads, context or self.config.max_positions)
        before, layers, after = span_recipes(self.config, span)
        self._layers = (abi.Layer * max(len(layers), 1))()
        for index, recipes in enumerate(layers):
            self._fill(self._layers[index], index, recipes)
        self._ends(before, after)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self._matrix_bytes / max(self._matrix_weights, 1)

    def forward(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        check_input(self.id, self.config, self.span, step, x)
        if self.span.num_layers:
            self.cache.extend(step)
        x_TW = self._embed(step, x) if self.span.embedding else x.to(torch.float32, copy=True).contiguous()
        if self.span.num_layers:
            self._run_layers(step, x_TW)
        return self._logits(step, x_TW) if self.span.head else x_TW

    def continue_greedily(self, slot: int, start: int, token: int, count: int, vocabulary: int) -> list[int]:
        """See Continues: one call for all tokens."""
        self.cache.extend([Row(slot=slot, start=start, count=count)])
        blocks = self.cache.tables.table(slot)
        table, made = (ctypes.c_int32 * len(blocks))(*blocks), (ctypes.c_int32 * count)()
        places = None if self._positions is None else self._positions.data_ptr()
        self._library.ecotone_greedy(
            ctypes.byref(self._model), self._layers, self.span.num_layers, ctypes.byref(self._table),
            self.config.embedding_scale, places, ctypes.byref(self._final_norm), ctypes.byref(self._head), table, start,
            token, vocabulary, count, made,
        )  # fmt: skip
        return list(made)

    def _run_layers(self, step: Step, x_TW: torch.Tensor) -> None:
        tables: list[int] = []
        begins: list[int] = []
        for row in step.rows:
            begins += [len(tables)] * row.count
            tables += self.cache.tables.table(row.slot)
        numbers = torch.tensor(step.positions() + begins + tables, dtype=torch.int32)
        at, count = numbers.data_ptr(), step.num_tokens
        record = abi.StepRecord(count, at, at + 4 * count, at + 8 * count)
        self._library.ecotone_layers(
            ctypes.byref(self._model), self._layers, self.span.num_layers, ctypes.byref(record), x_TW.data_ptr()
        )

    def _embed(self, step: Step, ids_T: torch.Tensor) -> torch.Tensor:
        ids_T = ids_T.long().contiguous()
        x_TW = torch.empty(len(ids_T), self.config.width)
        self._library.ecotone_embed(
            ctypes.byref(self._table), ids_T.data_ptr(), len(ids_T), self.config.embedding_scale, x_TW.data_ptr()
        )
        return x_TW + self._positions[torch.tensor(step.positions())] if self._positions is not None else x_TW

    def _logits(self, step: Step, x_TW: torch.Tensor) -> torch.Tensor:
        wanted = step.logit_indices()
        picked_TW = x_TW if len(wanted) == len(x_TW) else x_TW[wanted].contiguous()
        made_TV = torch.empty(len(wanted), self.config.vocabulary)
        if wanted:
            norm, head = ctypes.byref(self._final_norm), ctypes.byref(self._head)
            self._library.ecotone_head(
                ctypes.byref(self._model),
                norm,
                head,
                len(wanted),
                picked_TW.data_ptr(),
                self.config.logit_softcap,
                made_TV.data_ptr(),
            )
        return made_TV

    def _record(self, threads: int, context: int) -> abi.Model:
        c, experts = self.config, self.config.experts
        ropes = (abi.Rope * max(len(c.ropes), 1))()
        for index, rope in enumerate(c.ropes):
            angles, scale = frequencies(rope, context)
            ropes[index] = abi.Rope(self._keep(angles), scale, rope.rotary_size // 2)
        self._held.append(ropes)
        return abi.Model(
            ropes=ctypes.addressof(ropes), width=c.width, heads=c.num_heads, kv_heads=c.num_kv_heads, head_size=c.head_size,
            activation=ACTIVATIONS.index(c.activation), gated=c.gated, post_norms=c.post_norms, parallel=c.parallel,
            bf16_cache=self.cache.dtype == torch.bfloat16, experts=experts.num_experts if experts else 0,
            experts_per_token=experts.experts_per_token if experts else 0, normalise=bool(experts and experts.normalise),
            threads=threads, epsilon=c.norm_epsilon, scale=c.scale, softcap=c.attention_softcap,
        )  # fmt: skip

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, recipe: Recipe, bias: Recipe | None, bits: int) -> abi.Matrix:
        kept = packed(self._source, recipe, f"native {bits}", lambda weight: pack_matrix(weight, bits))
        self._matrix_bytes += kept.nbytes
        self._matrix_weights += recipe.num_elements
        self.weight_bytes += kept.nbytes
        outputs, inputs = recipe.shape
        return abi.Matrix(self._keep(kept), self._floats(bias) if bias else None, outputs, inputs, bits)

    def _floats(self, recipe: Recipe, offset: float = 0.0) -> int:
        wide = self._source.read(recipe).float() + offset
        self.weight_bytes += wide.nbytes
        return self._keep(wide)

    def _norm(self, recipes: dict[str, Recipe], name: str) -> abi.Norm:
        bias = recipes.get(f"{name}.bias")
        weight = self._floats(recipes[f"{name}.weight"], self.config.norm_offset)
        return abi.Norm(weight, self._floats(bias) if bias else None)

    def _fill(self, layer: abi.Layer, index: int, recipes: Iterable[Recipe]) -> None:
        by_name, kind = {r.name: r for r in recipes}, self.config.layers[self.span.start + index]
        layer.window, layer.rope, layer.sparse = kind.window, kind.rope, kind.sparse
        layer.keys, layer.values = self.cache.keys[index].data_ptr(), self.cache.values[index].data_ptr()
        for name in ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"):
            if f"{name}.weight" in by_name:
                setattr(layer, name, self._norm(by_name, name))
        for name in ("qkv", "output", "gate_up", "down", "shared.gate_up", "shared.down"):
            if recipe := by_name.get(f"{name}.weight"):
                setattr(layer, name.replace(".", "_"), self._matrix(recipe, by_name.get(f"{name}.bias"), self.bits))
        for name in ("q_norm", "k_norm", "router", "shared_router"):
            if recipe := by_name.get(name):
                setattr(layer, name, self._floats(recipe, self.config.norm_offset if name.endswith("norm") else 0.0))
        if kind.sparse and self.config.experts is not None:
            for part in ("gate_up", "down"):
                names = [f"experts.{e}.{part}.weight" for e in range(self.config.experts.num_experts)]
                array = (abi.Matrix * len(names))(*(self._matrix(by_name[n], None, self.bits) for n in names))
                self._held.append(array)
                setattr(layer, f"expert_{part}", ctypes.addressof(array))

    def _ends(self, before: list[Recipe], after: list[Recipe]) -> None:
        by_name = {r.name: r for r in (*before, *after)}
        head_bits = max(self.bits, 8)
        if self.span.head:
            self._head = self._matrix(by_name["head.weight"], by_name.get("head.bias"), head_bits)
            self._final_norm = self._norm(by_name, "final_norm")
        self._positions: torch.Tensor | None = None
        if self.span.embedding:
            shared = self.span.head and self.config.tied
            bits = head_bits if self.config.tied else self.bits  # the same numbers whether or not the head is here
            self._table = self._head if shared else self._matrix(by_name["embedding.weight"], None, bits)
            if self.config.learned_positions:
                self._positions = self._source.read(by_name["positions.weight"]).float()
                self.weight_bytes += self._positions.nbytes
