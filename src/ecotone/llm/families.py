"""From a Hugging Face config.json to a DecoderConfig: one small function per family, with that family's own defaults.

Reads both spellings: `rope_theta` with `rope_scaling` (before transformers 5) and `rope_parameters` (since). Every
option that would change the result and is not computed here is refused by name. No torch, no transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecotone.llm.config import DecoderConfig, ExpertsConfig, LayerConfig, ModelError, RopeConfig

__all__ = ["SUPPORTED", "load_config", "read_config"]

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
MAX_CONFIG_BYTES = 1 << 20
SLIDING = "sliding_attention"


class _Reader:
    """A config.json seen with a family's defaults; a null counts as absent unless asked with `optional`."""

    def __init__(self, document: Mapping[str, Any], where: str):
        self.document, self.where = document, where

    def optional(self, name: str, default: Any = None) -> Any:
        return self.document.get(name, default)

    def _get(self, name: str, default: Any) -> Any:
        value = self.document.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or abs(value) > 2**40:
            raise ModelError(f"{self.where}: {name} is {value!r}, not a whole number")
        return int(value)

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{self.where}: {name} is {value!r}, not a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {name} is {value!r}, not true or false")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise ModelError(f"{self.where}: {name} is {value!r}, not an object")
        return value

    def refuse(self, name: str, when: object, default: object = False) -> None:
        if self._get(name, default) == when:
            raise ModelError(f"{self.where}: {name} = {when!r} is not supported")

    def activation(self, default: str, *names: str) -> str:
        stated = next((self.document[n] for n in names if self.document.get(n) is not None), default)
        if not isinstance(stated, str) or stated not in ACTIVATION_NAMES:
            raise ModelError(f"{self.where}: activation {stated!r} is not supported; known: {', '.join(ACTIVATION_NAMES)}")
        return ACTIVATION_NAMES[stated]


def load_config(folder: Path) -> DecoderConfig:
    """The model in `folder` (its config.json, and the stop tokens of generation_config.json).

    Raises ModelError where the file is missing, is not a JSON object, or describes a model that is not supported.
    """
    document = _json_object(folder / "config.json")
    config = read_config(document, str(folder))
    if (folder / "generation_config.json").is_file():
        more = _stop_tokens(_json_object(folder / "generation_config.json"), str(folder), config.vocabulary)
        config = replace(config, stop_tokens=tuple(dict.fromkeys((*config.stop_tokens, *more))))
    return config


def read_config(document: Mapping[str, Any], where: str) -> DecoderConfig:
    """The model that a config.json describes; `where` names it in errors. Raises ModelError naming what is not supported."""
    family = document.get("model_type")
    if family == "gemma3" and isinstance(document.get("text_config"), dict):  # text part of a model that also sees
        document = document["text_config"] | {"model_type": "gemma3_text"}
        family = "gemma3_text"
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ModelError(f"{where}: architecture {family!r} is not supported; supported: {', '.join(SUPPORTED)}")
    if document.get("quantization_config"):
        raise ModelError(f"{where}: weights are already quantised; give a float checkpoint, shards are quantised here")
    reader = _Reader(document, where)
    config = _FAMILIES[family](reader)
    return replace(config, stop_tokens=_stop_tokens(document, where, config.vocabulary))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes; it is no configuration")
        document = json.loads(path.read_bytes())
    except OSError:
        raise ModelError(f"{path} cannot be read; give a Hugging Face model directory") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON; download it again") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a JSON object; download it again")
    return document


def _stop_tokens(document: Mapping[str, Any], where: str, vocabulary: int) -> tuple[int, ...]:
    stated = document.get("eos_token_id")
    tokens = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
        raise ModelError(f"{where}: eos_token_id is {stated!r}, not token ids")
    return tuple(t for t in tokens if 0 <= t < vocabulary)


def _rope(r: _Reader, parameters: Mapping[str, Any], theta: float, head_size: int, positions: int) -> RopeConfig:
    """One rotary embedding from `rope_parameters` or `rope_scaling` (`parameters`) with `theta` as the default base."""
    inner = _Reader(parameters, f"{r.where}: rope")
    kind = parameters.get("rope_type", parameters.get("type", "default")) or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    original = inner.integer("original_max_position_embeddings", r.integer("original_max_position_embeddings", positions))
    partial = inner.number("partial_rotary_factor", r.number("partial_rotary_factor", 1.0))
    default_factor = positions / original if kind in ("yarn", "longrope") else 1.0
    if kind == "dynamic":
        original = positions  # what transformers scales from
    factors = [parameters.get(name) or () for name in ("short_factor", "long_factor")]
    if not all(isinstance(f, list | tuple) and all(isinstance(x, int | float) for x in f) for f in factors):
        raise ModelError(f"{r.where}: rope factors are not lists of numbers")
    stated = [parameters.get(n) for n in ("attention_factor", "mscale", "mscale_all_dim")]
    return RopeConfig(
        kind=str(kind),
        theta=inner.number("rope_theta", theta),
        rotary_size=int(head_size * partial),
        factor=inner.number("factor", default_factor),
        original_positions=original,
        low_frequency_factor=inner.number("low_freq_factor", 1.0),
        high_frequency_factor=inner.number("high_freq_factor", 4.0),
        beta_fast=inner.number("beta_fast", 32.0) or 32.0,
        beta_slow=inner.number("beta_slow", 1.0) or 1.0,
        truncate=inner.flag("truncate", True),
        attention_factor=stated[0],
        mscale=stated[1] or None,
        mscale_all=stated[2] or None,
        short_factors=tuple(map(float, factors[0])),
        long_factors=tuple(map(float, factors[1])),
    )


def _one_rope(r: _Reader, head_size: int, positions: int, theta: float = 10_000.0) -> tuple[RopeConfig, ...]:
    parameters = r.mapping("rope_parameters") or r.mapping("rope_scaling")
    return (_rope(r, parameters, r.number("rope_theta", theta), head_size, positions),)


def _layer_types(r: _Reader, count: int, sliding: Callable[[int], bool]) -> list[bool]:
    """For each layer whether its window slides: as stated in `layer_types`, else by the family's own rule."""
    stated = r.optional("layer_types")
    if stated is None:
        return [sliding(i) for i in range(count)]
    if not isinstance(stated, list) or len(stated) != count or not set(stated) <= {SLIDING, "full_attention"}:
        raise ModelError(f"{r.where}: layer_types must name {count} of {SLIDING} and full_attention")
    return [kind == SLIDING for kind in stated]


def _common(r: _Reader, **defaults: int) -> dict[str, Any]:
    """The sizes that all but GPT-2 spell alike, with a family's `defaults`."""
    width, heads = r.integer("hidden_size", defaults["width"]), r.integer("num_attention_heads", defaults["heads"])
    if heads < 1:
        raise ModelError(f"{r.where}: num_attention_heads is {heads}")
    kv = r.integer("num_key_value_heads", defaults.get("kv", 0) if "num_key_value_heads" not in r.document else 0) or heads
    count = r.integer("num_hidden_layers", defaults["layers"])
    if not 1 <= count <= 10_000:
        raise ModelError(f"{r.where}: num_hidden_layers is {count}")
    return {
        "family": r.document["model_type"],
        "vocabulary": r.integer("vocab_size", defaults["vocabulary"]),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": kv,
        "head_size": r.integer("head_dim", defaults.get("head", 0)) or width // heads,
        "ffn_width": r.integer("intermediate_size", defaults["ffn"]),
        "max_positions": r.integer("max_position_embeddings", defaults["positions"]),
        "layers": (LayerConfig(),) * count,
        "tied": r.flag("tie_word_embeddings", False),
    }


def _llama(r: _Reader) -> DecoderConfig:
    c = _common(r, vocabulary=32_000, width=4096, layers=32, heads=32, ffn=11_008, positions=2048)
    bias = r.flag("attention_bias", False)
    return DecoderConfig(
        **c,
        ropes=_one_rope(r, c["head_size"], c["max_positions"]),
        activation=r.activation("silu", "hidden_act"),
        norm_epsilon=r.number("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=r.flag("mlp_bias", False),
    )


def _mistral(r: _Reader) -> DecoderConfig:
    c = _common(r, vocabulary=32_000, width=4096, layers=32, heads=32, kv=8, ffn=14_336, positions=131_072)
    window = r.optional("sliding_window", 4096) or 0
    c["layers"] = (LayerConfig(window=window),) * len(c["layers"])
    return DecoderConfig(
        **c,
        ropes=_one_rope(r, c["head_size"], c["max_positions"]),
        activation=r.activation("silu", "hidden_act"),
        norm_epsilon=r.number("rms_norm_eps", 1e-6),
    )


def _qwen_layers(r: _Reader, count: int, sparse: Callable[[int], bool] = lambda _: False) -> tuple[LayerConfig, ...]:
    window = r.integer("sliding_window", 4096) if r.flag("use_sliding_window", False) else 0
    first = r.integer("max_window_layers", 28)
    slides = _layer_types(r, count, lambda i: window > 0 and i >= first)
    return tuple(LayerConfig(window=window if s else 0, sparse=sparse(i)) for i, s in enumerate(slides))


def _qwen(r: _Reader, c: dict[str, Any], third: bool, **more: Any) -> DecoderConfig:
    bias = r.flag("attention_bias", False) if third else r.flag("qkv_bias", True)
    return DecoderConfig(
        **c,
        ropes=_one_rope(r, c["head_size"], c["max_positions"]),
        activation=r.activation("silu", "hidden_act"),
        norm_epsilon=r.number("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        output_bias=bias and third,
        qk_norm=third,
        **more,
    )


def _qwen2(r: _Reader) -> DecoderConfig:
    c = _common(r, vocabulary=151_936, width=4096, layers=32, heads=32, kv=32, ffn=22_016, positions=32_768)
    return _qwen(r, c | {"layers": _qwen_layers(r, len(c["layers"]))}, third=False)


def _qwen3(r: _Reader) -> DecoderConfig:
    c = _common(r, vocabulary=151_936, width=4096, layers=32, heads=32, kv=32, head=128, ffn=22_016, positions=32_768)
    return _qwen(r, c | {"layers": _qwen_layers(r, len(c["layers"]))}, third=True)


def _qwen_moe(r: _Reader, third: bool) -> DecoderConfig:
    heads_ffn = {"heads": 32, "kv": 4, "ffn": 6144} if third else {"heads": 16, "kv": 16, "ffn": 5632}
    c = _common(r, vocabulary=151_936, width=2048, layers=24, positions=32_768, **heads_ffn)
    every, dense = r.integer("decoder_sparse_step", 1), set(r.optional("mlp_only_layers") or ())
    count = r.integer("num_experts", r.integer("num_local_experts", 128 if third else 60))
    c["layers"] = _qwen_layers(r, len(c["layers"]), lambda i: count > 0 and i not in dense and (i + 1) % every == 0)
    experts = ExpertsConfig(
        num_experts=count,
        experts_per_token=r.integer("num_experts_per_tok", 8 if third else 4),
        width=r.integer("moe_intermediate_size", 768 if third else 1408),
        normalise=r.flag("norm_topk_prob", False),
        shared_width=0 if third else r.integer("shared_expert_intermediate_size", 5632),
    )
    return _qwen(r, c, third, experts=experts)


def _mixtral(r: _Reader) -> DecoderConfig:
    c = _common(r, vocabulary=32_000, width=4096, layers=32, heads=32, kv=8, ffn=14_336, positions=131_072)
    window = r.optional("sliding_window", None) or 0
    c["layers"] = (LayerConfig(window=window, sparse=True),) * len(c["layers"])
    experts = ExpertsConfig(
        num_experts=r.integer("num_local_experts", 8),
        experts_per_token=r.integer("num_experts_per_tok", 2),
        width=c["ffn_width"],
        normalise=True,
    )
    return DecoderConfig(
        **c,
        ropes=_one_rope(r, c["head_size"], c["max_positions"], 1e6),
        activation=r.activation("silu", "hidden_act"),
        norm_epsilon=r.number("rms_norm_eps", 1e-5),
        experts=experts,
    )


def _gemma_flags(r: _Reader, c: dict[str, Any]) -> dict[str, Any]:
    r.refuse("use_bidirectional_attention", True)
    bias = r.flag("attention_bias", False)
    return c | {
        "tied": r.flag("tie_word_embeddings", True),
        "activation": r.activation("gelu_pytorch_tanh", "hidden_activation", "hidden_act"),
        "norm_epsilon": r.number("rms_norm_eps", 1e-6),
        "norm_offset": 1.0,
        "qkv_bias": bias,
        "output_bias": bias,
        "embedding_scale": math.sqrt(c["width"]),
    }


def _gemma(r: _Reader) -> DecoderConfig:
    c = _common(r, vocabulary=256_000, width=3072, layers=28, heads=16, kv=16, head=256, ffn=24_576, positions=8192)
    c = _gemma_flags(r, c)
    if r.optional("hidden_activation") is None:  # the first checkpoints say "gelu" and mean its approximation
        c["activation"] = "gelu_tanh"
    return DecoderConfig(**c, ropes=_one_rope(r, c["head_size"], c["max_positions"]))


def _gemma2(r: _Reader) -> DecoderConfig:
    c = _common(r, vocabulary=256_000, width=2304, layers=26, heads=8, kv=4, head=256, ffn=9216, positions=8192)
    window = r.integer("sliding_window", 4096)
    slides = _layer_types(r, len(c["layers"]), lambda i: i % 2 == 0)
    c["layers"] = tuple(LayerConfig(window=window if s else 0) for s in slides)
    return DecoderConfig(
        **_gemma_flags(r, c),
        ropes=_one_rope(r, c["head_size"], c["max_positions"]),
        post_norms=True,
        query_scale=r.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=r.optional("attn_logit_softcapping", 50.0) or 0.0,
        logit_softcap=r.optional("final_logit_softcapping", 30.0) or 0.0,
    )


def _gemma3(r: _Reader) -> DecoderConfig:
    c = _common(r, vocabulary=262_208, width=2304, layers=26, heads=8, kv=4, head=256, ffn=9216, positions=131_072)
    window, every = r.integer("sliding_window", 4096), r.integer("sliding_window_pattern", 6)
    slides = _layer_types(r, len(c["layers"]), lambda i: (i + 1) % every != 0)
    c["layers"] = tuple(LayerConfig(window=window if s else 0, rope=int(s)) for s in slides)
    both = _Reader(r.mapping("rope_parameters"), f"{r.where}: rope_parameters")
    whole, near = both.mapping("full_attention") or r.mapping("rope_scaling"), both.mapping(SLIDING)
    ropes = (
        _rope(r, whole, r.number("rope_theta", 1e6), c["head_size"], c["max_positions"]),
        _rope(r, near, r.number("rope_local_base_freq", 1e4), c["head_size"], c["max_positions"]),
    )
    return DecoderConfig(
        **_gemma_flags(r, c),
        ropes=ropes,
        post_norms=True,
        qk_norm=True,
        query_scale=r.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=r.optional("final_logit_softcapping", None) or 0.0,
    )  # attn_logit_softcapping is stated by some files and read by nobody: transformers passes it nowhere


def _phi3(r: _Reader) -> DecoderConfig:
    c = _common(r, vocabulary=32_064, width=3072, layers=32, heads=32, ffn=8192, positions=4096)
    c["layers"] = (LayerConfig(window=r.optional("sliding_window") or 0),) * len(c["layers"])
    original = r.integer("original_max_position_embeddings", 4096)
    reader = _Reader({**r.document, "original_max_position_embeddings": original}, r.where)
    return DecoderConfig(
        **c,
        ropes=_one_rope(reader, c["head_size"], c["max_positions"]),
        activation=r.activation("silu", "hidden_act"),
        norm_epsilon=r.number("rms_norm_eps", 1e-5),
    )


def _phi(r: _Reader) -> DecoderConfig:
    r.refuse("qk_layernorm", True)
    c = _common(r, vocabulary=51_200, width=2048, layers=24, heads=32, ffn=8192, positions=2048)
    half = _Reader({"partial_rotary_factor": 0.5, **r.document}, r.where)
    return DecoderConfig(
        **c,
        ropes=_one_rope(half, c["head_size"], c["max_positions"]),
        activation=r.activation("gelu_new", "hidden_act"),
        gated=False,
        layer_norm=True,
        norm_epsilon=r.number("layer_norm_eps", 1e-5),
        parallel=True,
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
        head_bias=True,
    )


def _gpt2(r: _Reader) -> DecoderConfig:
    for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        r.refuse(option, True)
    r.refuse("scale_attn_weights", False, True)
    width, heads, count = r.integer("n_embd", 768), r.integer("n_head", 12), r.integer("n_layer", 12)
    if heads < 1 or not 1 <= count <= 10_000:
        raise ModelError(f"{r.where}: n_head is {heads}, n_layer is {count}")
    return DecoderConfig(
        family="gpt2",
        vocabulary=r.integer("vocab_size", 50_257),
        width=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=width // heads,
        ffn_width=r.integer("n_inner", 4 * width),
        max_positions=r.integer("n_positions", 1024),
        layers=(LayerConfig(rope=-1),) * count,
        learned_positions=True,
        activation=r.activation("gelu_new", "activation_function"),
        gated=False,
        layer_norm=True,
        norm_epsilon=r.number("layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
        tied=r.flag("tie_word_embeddings", True),
    )


_FAMILIES: dict[str, Callable[[_Reader], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "qwen2_moe": lambda r: _qwen_moe(r, third=False),
    "qwen3_moe": lambda r: _qwen_moe(r, third=True),
}
SUPPORTED = tuple(_FAMILIES)
