"""What a decoder-only language model is, as plain numbers: one frozen record that covers every family by flags.

Not weights and not code: `families.py` fills it from a config.json, `decoder.py` computes by it, `recipes.py` finds its
tensors. A layer computes, with x of shape (tokens, width):
    pre:       x += post(attention(norm(x)));  x += post(ffn(norm(x)))     post is there where `post_norms`
    parallel:  x += attention(norm(x)) + ffn(norm(x))                      one norm for both
"""

from __future__ import annotations

from dataclasses import dataclass

from ecotone.schema import check
from ecotone.units import EcotoneError

__all__ = ["ACTIVATIONS", "ROPE_KINDS", "DecoderConfig", "ExpertsConfig", "LayerConfig", "ModelError", "RopeConfig"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


class ModelError(EcotoneError):
    """A model directory cannot be used: an unsupported architecture or option, or files that are missing or wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """One rotary position embedding over the first `rotary_size` numbers of a head.

    `kind` is how positions beyond `original_positions` are scaled. "dynamic" and "longrope" depend on the length of the
    sequence; here that is the context a shard was made for, so that keys once cached stay right (docs/llm.md).
    """

    kind: str = "default"
    theta: float = 10_000.0
    rotary_size: int
    factor: float = 1.0
    original_positions: int
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        wrong = []
        half = self.rotary_size // 2
        if self.kind not in ROPE_KINDS:
            wrong.append(f"rope type {self.kind!r} is not one of {', '.join(ROPE_KINDS)}")
        if self.rotary_size < 2 or self.rotary_size % 2:
            wrong.append(f"rotary size {self.rotary_size} is not even and positive")
        if self.theta <= 0 or self.factor <= 0 or self.original_positions < 1:
            wrong.append("rope theta, factor and original positions must be positive")
        if self.kind == "dynamic" and self.rotary_size < 4:
            wrong.append("dynamic rope needs a rotary size of 4 or more")
        if self.kind == "longrope" and not len(self.short_factors) == len(self.long_factors) == half:
            wrong.append(f"longrope needs {half} short and {half} long factors")
        check("rope", wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of a feed-forward network; `shared_width` 0 means no shared expert."""

    num_experts: int
    experts_per_token: int
    width: int
    normalise: bool
    shared_width: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if not 1 <= self.experts_per_token <= self.num_experts:
            wrong.append(f"{self.experts_per_token} experts per token of {self.num_experts}")
        if self.width < 1 or self.shared_width < 0:
            wrong.append("expert widths must be positive")
        check("experts", wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """How one layer differs: `window` tokens are seen (0: all before), `rope` indexes `ropes` (-1: none), experts or not."""

    window: int = 0
    rope: int = 0
    sparse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer. `family` is the Hugging Face model_type: it finds tensors, nothing else asks for it."""

    family: str
    vocabulary: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_width: int
    max_positions: int
    layers: tuple[LayerConfig, ...]
    ropes: tuple[RopeConfig, ...] = ()
    learned_positions: bool = False
    activation: str = "silu"
    gated: bool = True
    layer_norm: bool = False  # LayerNorm with bias; else RMS norm
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # 1: the weight is stored as its difference from one (Gemma)
    post_norms: bool = False
    parallel: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    head_bias: bool = False
    tied: bool = False
    query_scale: float = 0.0  # 0: 1/sqrt(head_size)
    attention_softcap: float = 0.0  # 0: none
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    experts: ExpertsConfig | None = None
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = {
            "vocabulary": self.vocabulary,
            "width": self.width,
            "heads": self.num_heads,
            "key-value heads": self.num_kv_heads,
            "head size": self.head_size,
            "feed-forward width": self.ffn_width,
            "maximum positions": self.max_positions,
            "layers": len(self.layers),
        }
        wrong = [f"{name} is {value}" for name, value in sizes.items() if value < 1]
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            wrong.append(f"{self.num_heads} heads do not divide into {self.num_kv_heads} key-value heads")
        if self.activation not in ACTIVATIONS:
            wrong.append(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        for index, layer in enumerate(self.layers):
            if layer.window < 0 or not -1 <= layer.rope < len(self.ropes):
                wrong.append(f"layer {index} has window {layer.window} and rope {layer.rope}")
            if layer.sparse and self.experts is None:
                wrong.append(f"layer {index} has experts but none are described")
        wrong += [f"rotary size {r.rotary_size} exceeds the head size" for r in self.ropes if r.rotary_size > self.head_size]
        check(f"model {self.family}", wrong)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def scale(self) -> float:
        """What the product of a query and a key is multiplied by."""
        return self.query_scale or self.head_size**-0.5

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size

    def kv_bytes_per_token(self, num_layers: int, element_bytes: int) -> int:
        """Bytes of keys and values that one token adds over `num_layers` layers."""
        return 2 * self.kv_size * element_bytes * num_layers
