"""Where each tensor of a shard lies in a checkpoint, by family; and how many bytes a shard takes. No torch.

The decoder knows one set of canonical names per layer, with projections of one input joined along rows: "qkv", "gate_up".
A recipe says which tensors of the checkpoint are put one below the other to make one canonical tensor, and its shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ecotone.llm.config import DecoderConfig
from ecotone.llmplan import Span

__all__ = ["Recipe", "layer_recipes", "span_recipes", "weight_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """`name` of the canonical tensor, its `shape`, and the checkpoint's tensors that make it, one below the other.

    `transposed`: the checkpoint stores (inputs, outputs). `stacked`: (tensor, index) of a checkpoint that keeps all
    experts in one tensor instead.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transposed: bool = False
    stacked: tuple[str, int] | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with activations, and so may be quantised (the router of experts is not)."""
        return len(self.shape) == 2 and self.name not in ("embedding.weight", "positions.weight", "router", "shared_router")

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """A family's spelling: layer tensors without the layer's own prefix."""

    layer: str = "layers.{}."
    embedding: str = "embed_tokens.weight"
    final_norm: str = "norm"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    attention_post_norm: str = ""
    ffn_norm: str = "post_attention_layernorm"
    ffn_post_norm: str = ""
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    transposed: bool = False
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    expert_gate_up: tuple[str, str] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"


_GEMMA = _Names(
    attention_post_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)
_NAMES: dict[str, _Names] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    "phi": _Names(output="self_attn.dense", gate_up=("mlp.fc1",), down="mlp.fc2", final_norm="final_layernorm", ffn_norm=""),
    "gpt2": _Names(
        layer="h.{}.",
        embedding="wte.weight",
        final_norm="ln_f",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        output="attn.c_proj",
        ffn_norm="ln_2",
        gate_up=("mlp.c_fc",),
        down="mlp.c_proj",
        transposed=True,
    ),
    "mixtral": _Names(
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}.",
        expert_gate_up=("w1", "w3"),
        expert_down="w2",
    ),
}


def _names(config: DecoderConfig) -> _Names:
    return _NAMES.get(config.family, _Names())


def _linear(name: str, shape: tuple[int, int], sources: tuple[str, ...], bias: bool, transposed: bool) -> Iterator[Recipe]:
    weights = tuple(f"{s}.weight" for s in sources)
    yield Recipe(name=f"{name}.weight", shape=shape, sources=weights, transposed=transposed)
    if bias:
        yield Recipe(name=f"{name}.bias", shape=shape[:1], sources=tuple(f"{s}.bias" for s in sources))


def _norm(config: DecoderConfig, name: str, source: str) -> Iterator[Recipe]:
    if source:
        for part in ("weight", "bias") if config.layer_norm else ("weight",):
            yield Recipe(name=f"{name}.{part}", shape=(config.width,), sources=(f"{source}.{part}",))


def _expert_recipes(config: DecoderConfig, names: _Names) -> Iterator[Recipe]:
    experts = config.experts
    assert experts is not None
    yield Recipe(name="router", shape=(experts.num_experts, config.width), sources=(f"{names.router}.weight",))
    for index in range(experts.num_experts):
        own = names.expert.format(index)
        yield Recipe(
            name=f"experts.{index}.gate_up.weight",
            shape=(2 * experts.width, config.width),
            sources=tuple(f"{own}{part}.weight" for part in names.expert_gate_up),
            stacked=("mlp.experts.gate_up_proj", index),
        )
        yield Recipe(
            name=f"experts.{index}.down.weight",
            shape=(config.width, experts.width),
            sources=(f"{own}{names.expert_down}.weight",),
            stacked=("mlp.experts.down_proj", index),
        )
    if experts.shared_width:
        shape, own = (2 * experts.shared_width, config.width), "mlp.shared_expert."
        gate_up = tuple(f"{own}{part}.weight" for part in names.expert_gate_up)
        yield Recipe(name="shared.gate_up.weight", shape=shape, sources=gate_up)
        down = (f"{own}{names.expert_down}.weight",)
        yield Recipe(name="shared.down.weight", shape=(config.width, experts.shared_width), sources=down)
        yield Recipe(name="shared_router", shape=(1, config.width), sources=("mlp.shared_expert_gate.weight",))


def layer_recipes(config: DecoderConfig, layer: int) -> list[Recipe]:
    """The canonical tensors of one layer; their sources carry the layer's prefix but not the model's."""
    names, width = _names(config), config.width
    recipes = list(_norm(config, "attention_norm", names.attention_norm))
    qkv = (config.query_size + 2 * config.kv_size, width)
    recipes += _linear("qkv", qkv, names.qkv, config.qkv_bias, names.transposed)
    output = (width, config.query_size)
    recipes += _linear("output", output, (names.output,), config.output_bias, names.transposed)
    if config.qk_norm:
        for part in ("q_norm", "k_norm"):
            recipes.append(Recipe(name=part, shape=(config.head_size,), sources=(f"self_attn.{part}.weight",)))
    if config.post_norms:
        recipes += _norm(config, "attention_post_norm", names.attention_post_norm)
        recipes += _norm(config, "ffn_post_norm", names.ffn_post_norm)
    recipes += _norm(config, "ffn_norm", "" if config.parallel else names.ffn_norm)
    if config.layers[layer].sparse:
        recipes += _expert_recipes(config, names)
    else:
        first = ((2 if config.gated else 1) * config.ffn_width, width)
        recipes += _linear("gate_up", first, names.gate_up, config.ffn_bias, names.transposed)
        recipes += _linear("down", (width, config.ffn_width), (names.down,), config.ffn_bias, names.transposed)
    prefix = names.layer.format(layer)
    return [
        Recipe(
            name=r.name,
            shape=r.shape,
            sources=tuple(prefix + s for s in r.sources),
            transposed=r.transposed,
            stacked=r.stacked and (prefix + r.stacked[0], r.stacked[1]),
        )
        for r in recipes
    ]


def span_recipes(config: DecoderConfig, span: Span) -> tuple[list[Recipe], list[list[Recipe]], list[Recipe]]:
    """(embedding, one list per layer, final norm and head) of a span; parts that it does not hold are empty."""
    names, table = _names(config), (config.vocabulary, config.width)
    before: list[Recipe] = []
    after: list[Recipe] = []
    if span.embedding:
        before.append(Recipe(name="embedding.weight", shape=table, sources=(names.embedding,)))
        if config.learned_positions:
            shape = (config.max_positions, config.width)
            before.append(Recipe(name="positions.weight", shape=shape, sources=("wpe.weight",)))
    if span.head:
        after += _norm(config, "final_norm", names.final_norm)
        source = names.embedding if config.tied else "lm_head.weight"
        after.append(Recipe(name="head.weight", shape=table, sources=(source,)))
        if config.head_bias:
            after.append(Recipe(name="head.bias", shape=table[:1], sources=("lm_head.bias",)))
    return before, [layer_recipes(config, i) for i in range(span.start, span.stop)], after


def weight_bytes(config: DecoderConfig, span: Span, bits_per_weight: float, element_bytes: int = 4) -> int:
    """Bytes that the weights of `span` take: matrices at `bits_per_weight` (scales included), the rest at `element_bytes`.

    A tied head on the machine of the embedding still counts: the embedding is looked up, the head is packed.
    """
    before, layers, after = span_recipes(config, span)
    total = 0.0
    for recipe in [*before, *(r for layer in layers for r in layer), *after]:
        total += recipe.num_elements * (bits_per_weight / 8 if recipe.is_matrix else element_bytes)
    return math.ceil(total)
