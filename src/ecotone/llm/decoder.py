"""The decoder itself, once for every family: functions of tensors, steered by DecoderConfig.

No state: `attend` writes and reads the cache, linear maps are callables, so a precision is a matter of the executor. Shape
suffixes: T tokens of a step, N heads, H key-value heads, D head size, W width, V vocabulary. Norms, the router and the
soft caps are computed in float32 whatever the precision of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from ecotone.llm.config import DecoderConfig, LayerConfig
from ecotone.llm.rope import rotate

__all__ = ["Attend", "LayerWeights", "Linear", "activate", "decode_layer", "embed", "logits", "normalise"]

Linear = Callable[[torch.Tensor], torch.Tensor]
"""(tokens, inputs) -> (tokens, outputs), bias included."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Queries (T, N, D), new keys and values (T, H, D) of one layer -> attended (T, N * D); keeps the new keys and values."""

Angles = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Cosines and sines (T, rotary / 2) of the tokens of a step, by index into `DecoderConfig.ropes`."""


@dataclass(slots=True, kw_only=True)
class LayerWeights:
    """One layer ready to run: `linears` by canonical name without ".weight", the other tensors by canonical name."""

    kind: LayerConfig
    linears: dict[str, Linear] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def normalise(
    config: DecoderConfig, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """LayerNorm or RMS norm over the last dimension by `weight` (float32, any offset already added)."""
    wide = x.float()
    if bias is not None:
        return F.layer_norm(wide, (wide.shape[-1],), weight, bias, config.norm_epsilon).to(x.dtype)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.norm_epsilon)
    return (wide * scale * weight).to(x.dtype)


def activate(config: DecoderConfig, x: torch.Tensor) -> torch.Tensor:
    """The activation of the feed-forward network, elementwise."""
    if config.activation == "silu":
        return F.silu(x)
    if config.activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if config.activation == "gelu_tanh" else "none")


def embed(
    config: DecoderConfig, tensors: Mapping[str, torch.Tensor], ids_T: torch.Tensor, positions_T: torch.Tensor
) -> torch.Tensor:
    """Token ids to hidden states (T, W)."""
    x_TW = F.embedding(ids_T, tensors["embedding.weight"])
    if config.embedding_scale != 1.0:
        x_TW = x_TW * torch.tensor(config.embedding_scale, dtype=x_TW.dtype)
    return x_TW + F.embedding(positions_T, tensors["positions.weight"]) if config.learned_positions else x_TW


def decode_layer(
    config: DecoderConfig, layer: LayerWeights, x_TW: torch.Tensor, angles: Angles, attend: Attend
) -> torch.Tensor:
    """Hidden states through one layer."""
    normed_TW = _norm(config, layer, "attention_norm", x_TW)
    attended_TW = layer.linears["output"](attend(*_queries_keys_values(config, layer, normed_TW, angles)))
    if config.parallel:
        return x_TW + attended_TW + _feed_forward(config, layer, normed_TW)
    if config.post_norms:
        attended_TW = _norm(config, layer, "attention_post_norm", attended_TW)
    x_TW = x_TW + attended_TW
    made_TW = _feed_forward(config, layer, _norm(config, layer, "ffn_norm", x_TW))
    if config.post_norms:
        made_TW = _norm(config, layer, "ffn_post_norm", made_TW)
    return x_TW + made_TW


def logits(config: DecoderConfig, head: LayerWeights, x_TW: torch.Tensor) -> torch.Tensor:
    """Final norm and head: hidden states to float32 logits (T, V)."""
    made_TV = head.linears["head"](_norm(config, head, "final_norm", x_TW)).float()
    if config.logit_softcap:
        made_TV = torch.tanh(made_TV / config.logit_softcap) * config.logit_softcap
    return made_TV


def _norm(config: DecoderConfig, layer: LayerWeights, name: str, x: torch.Tensor) -> torch.Tensor:
    return normalise(config, x, layer.tensors[f"{name}.weight"], layer.tensors.get(f"{name}.bias"))


def _queries_keys_values(
    config: DecoderConfig, layer: LayerWeights, x_TW: torch.Tensor, angles: Angles
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count, size = x_TW.shape[0], config.head_size
    sizes = [config.query_size, config.kv_size, config.kv_size]
    parts = torch.split(layer.linears["qkv"](x_TW), sizes, -1)
    q_TND, k_THD, v_THD = (part.reshape(count, -1, size) for part in parts)
    if config.qk_norm:
        q_TND = normalise(config, q_TND, layer.tensors["q_norm"])
        k_THD = normalise(config, k_THD, layer.tensors["k_norm"])
    if layer.kind.rope >= 0:
        cos_TR, sin_TR = angles[layer.kind.rope]
        q_TND, k_THD = rotate(q_TND, cos_TR, sin_TR), rotate(k_THD, cos_TR, sin_TR)
    return q_TND, k_THD, v_THD


def _feed_forward(config: DecoderConfig, layer: LayerWeights, x_TW: torch.Tensor) -> torch.Tensor:
    if layer.kind.sparse:
        return _experts(config, layer, x_TW)
    return _dense(config, layer.linears["gate_up"], layer.linears["down"], x_TW)


def _dense(config: DecoderConfig, gate_up: Linear, down: Linear, x_TW: torch.Tensor) -> torch.Tensor:
    inner = gate_up(x_TW)
    if config.gated:
        gate, up = inner.chunk(2, -1)
        return down(activate(config, gate) * up)
    return down(activate(config, inner))


def _experts(config: DecoderConfig, layer: LayerWeights, x_TW: torch.Tensor) -> torch.Tensor:
    """Each token through its best experts; an expert sees its tokens together. O(experts hit) calls."""
    experts = config.experts
    assert experts is not None
    chances_TE = F.linear(x_TW.float(), layer.tensors["router"]).softmax(-1)
    weights_TK, chosen_TK = chances_TE.topk(experts.experts_per_token, -1)
    if experts.normalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    made_TW = torch.zeros_like(x_TW)
    for expert in sorted(set(chosen_TK.flatten().tolist())):
        tokens, places = (chosen_TK == expert).nonzero(as_tuple=True)
        own = f"experts.{expert}."
        part = _dense(config, layer.linears[own + "gate_up"], layer.linears[own + "down"], x_TW[tokens])
        made_TW.index_add_(0, tokens, part * weights_TK[tokens, places, None].to(part.dtype))
    if experts.shared_width:
        open_T1 = torch.sigmoid(F.linear(x_TW.float(), layer.tensors["shared_router"])).to(x_TW.dtype)
        made_TW = made_TW + open_T1 * _dense(config, layer.linears["shared.gate_up"], layer.linears["shared.down"], x_TW)
    return made_TW
