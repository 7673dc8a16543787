"""Shards by PyTorch's operators: CPU, CUDA and Apple GPUs, every family; the reference that other executors are held to.

float32 computes in float32; bf16, int8 and int4 in bfloat16 with float32 norms, packed as `linears.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ecotone.decoding.step import Step
from ecotone.executors.preparation import engine_threads
from ecotone.executors.torch_eager import accelerator_reason
from ecotone.llm.config import DecoderConfig
from ecotone.llm.decoder import LayerWeights, decode_layer, embed, logits
from ecotone.llm.executors.attention import StepAttention
from ecotone.llm.executors.executor import ShardError
from ecotone.llm.executors.linears import PRECISIONS, Packed, pack
from ecotone.llm.kv import KvCache
from ecotone.llm.recipes import Recipe, span_recipes
from ecotone.llm.rope import Rotation
from ecotone.llm.weights import WeightSource
from ecotone.llmplan import Span

__all__ = ["TorchShard", "TorchShards", "check_input"]


@dataclass(frozen=True, slots=True)
class TorchShards:
    """`id` is "torch:fp32", "torch:bf16", "torch:int8" or "torch:int4"."""

    id: str

    def available(self, accelerator: str) -> str:
        if self.id.partition(":")[2] == "int4" and accelerator == "mps":
            return "4-bit weights are not tried on Apple GPUs; use torch:bf16"
        return accelerator_reason(accelerator)

    def supports(self, config: DecoderConfig) -> str:
        return ""

    def load(
        self, source: WeightSource, span: Span, cache: KvCache, accelerator: str = "cpu", threads: int = 1, context: int = 0
    ) -> TorchShard:
        """Read and pack the weights of `span`; raises ShardError where this device has no such kernels."""
        precision = self.id.partition(":")[2]
        reason = (
            self.available(accelerator) if precision in PRECISIONS else f"unknown precision; known: {', '.join(PRECISIONS)}"
        )
        if reason:
            raise ShardError(f"{self.id}: {reason}")
        with engine_threads(threads), torch.no_grad():
            return TorchShard(self.id, source, span, cache, accelerator, threads, context)


class TorchShard:
    """One span by PyTorch; see ShardExecutor."""

    def __init__(self, id: str, source: WeightSource, span: Span, cache: KvCache, device: str, threads: int, context: int):
        self.id, self.config, self.span, self.cache = id, source.config, span, cache
        self.device, self.threads = device, threads
        self.precision = id.partition(":")[2]
        self.dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        self.weight_bytes = self._packed_bytes = self._packed_weights = 0
        if span.stop > self.config.num_layers:
            raise ShardError(f"{id}: {span.describe()} of a model with {self.config.num_layers} layers")
        before, layers, after = span_recipes(self.config, span)
        self.before = self._part(source, before, span.start)
        self.layers = [self._part(source, recipes, span.start + i) for i, recipes in enumerate(layers)]
        self.after = self._part(source, after, span.start)
        context = context or self.config.max_positions
        self.rotations = [Rotation(rope, context, device) for rope in self.config.ropes]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self._packed_bytes / max(self._packed_weights, 1)

    def _part(self, source: WeightSource, recipes: Sequence[Recipe], layer: int) -> LayerWeights:
        part = LayerWeights(kind=self.config.layers[min(layer, self.config.num_layers - 1)])
        biases = {r.name: r for r in recipes if r.name.endswith(".bias")}
        for recipe in recipes:
            name = recipe.name.removesuffix(".weight")
            if recipe.is_matrix:
                bias = biases.get(f"{name}.bias")
                packed = pack(source.read(recipe), source.read(bias) if bias else None, self.precision, self.device)
                part.linears[name] = packed
                self._count(packed)
            elif not (recipe.name.endswith(".bias") and f"{recipe.name.removesuffix('.bias')}" in part.linears):
                part.tensors[recipe.name] = self._tensor(source.read(recipe), recipe)
                self.weight_bytes += part.tensors[recipe.name].nbytes
        return part

    def _count(self, packed: Packed) -> None:
        self.weight_bytes += packed.num_bytes
        self._packed_bytes += packed.num_bytes
        self._packed_weights += packed.num_weights

    def _tensor(self, tensor: torch.Tensor, recipe: Recipe) -> torch.Tensor:
        if recipe.name in ("embedding.weight", "positions.weight"):
            return tensor.to(self.device, self.dtype)
        wide = tensor.float()
        is_norm = recipe.name in ("q_norm", "k_norm") or recipe.name.endswith("norm.weight")
        return (wide + self.config.norm_offset if is_norm else wide).to(self.device)

    def forward(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        check_input(self.id, self.config, self.span, step, x)
        with engine_threads(self.threads), torch.inference_mode():
            if self.span.num_layers:
                self.cache.extend(step)
            return self._run(step, x)

    def _run(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.device)
        positions_T = torch.tensor(step.positions(), device=self.device)
        x_TW = embed(self.config, self.before.tensors, x, positions_T) if self.span.embedding else x.to(self.dtype)
        used = {layer.kind.rope for layer in self.layers if layer.kind.rope >= 0}
        angles = {index: self.rotations[index].of(positions_T) for index in used}
        attention = StepAttention(self.config, self.cache, step)
        for index, layer in enumerate(self.layers):

            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: int = index) -> torch.Tensor:
                return attention.attend(index, self.layers[index].kind.window, q, k, v)

            x_TW = decode_layer(self.config, layer, x_TW, angles, attend)
        if not self.span.head:
            return x_TW.float().cpu()
        wanted = torch.tensor(step.logit_indices(), dtype=torch.long, device=self.device)
        return logits(self.config, self.after, x_TW[wanted]).cpu()


def check_input(id: str, config: DecoderConfig, span: Span, step: Step, x: torch.Tensor) -> None:
    """Raise ShardError where `x` does not fit `step`: shape, type, token ids or positions outside the model."""
    if span.embedding:
        if x.shape != (step.num_tokens,) or x.dtype not in (torch.int64, torch.int32):
            raise ShardError(f"{id}: {step.num_tokens} token ids are expected, got {tuple(x.shape)} of {x.dtype}")
        if int(x.min()) < 0 or int(x.max()) >= config.vocabulary:
            raise ShardError(f"{id}: token ids must lie in [0, {config.vocabulary})")
    elif x.shape != (step.num_tokens, config.width) or not x.is_floating_point():
        expected = (step.num_tokens, config.width)
        raise ShardError(f"{id}: hidden states of shape {expected} are expected, got {tuple(x.shape)} of {x.dtype}")
    last = max(row.stop for row in step.rows)
    if config.learned_positions and last > config.max_positions:
        raise ShardError(f"{id}: position {last - 1} is beyond the {config.max_positions} that the model has learned")
