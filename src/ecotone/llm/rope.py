"""Rotary position embeddings and their scalings: frequencies per head dimension, and cosines and sines of positions.

RoFormer (2104.09864); position interpolation "linear" (2306.15595); NTK-aware "dynamic"; YaRN (2309.00071), equations
17 to 23; LongRoPE (2402.13753) with Phi-3's two sets of factors; Llama 3.1's piecewise scaling. Frequencies are formed
in float32 in the order of operations that the published models were trained and tested with: at position 100,000 another
order of rounding is already seen in the logits.
"""

from __future__ import annotations

import math

import torch

from ecotone.llm.config import RopeConfig

__all__ = ["Rotation", "frequencies", "rotate"]


def frequencies(rope: RopeConfig, context: int) -> tuple[torch.Tensor, float]:
    """(angles per position of each pair, factor on cosine and sine) for sequences of up to `context` tokens."""
    size = rope.rotary_size
    powers = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    if rope.kind == "dynamic":
        length = max(context, rope.original_positions)
        stretch = rope.factor * length / rope.original_positions - (rope.factor - 1)
        return 1.0 / (rope.theta * stretch ** (size / (size - 2))) ** powers, 1.0
    if rope.kind == "longrope":
        factors = rope.long_factors if context > rope.original_positions else rope.short_factors
        return 1.0 / (torch.tensor(factors) * rope.theta**powers), _longrope_attention(rope)
    plain = 1.0 / rope.theta**powers
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope)
    return plain, 1.0


def _longrope_attention(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_positions))


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Long waves divided by the factor, short ones kept, those between interpolated."""
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    waves = 2 * math.pi / plain
    scaled = torch.where(waves > rope.original_positions / low, plain / rope.factor, plain)
    smooth = (rope.original_positions / waves - low) / (high - low)
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_between = ~(waves < rope.original_positions / high) & ~(waves > rope.original_positions / low)
    return torch.where(is_between, between, scaled)


def _yarn(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    size = rope.rotary_size

    def dimension(rotations: float) -> float:  # the pair that turns `rotations` times over the original context
        return size * math.log(rope.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2).float() - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    waves = rope.theta ** (torch.arange(0, size, 2).float() / size)
    kept = 1 - ramp
    mixed = 1.0 / (rope.factor * waves) * (1 - kept) + 1.0 / waves * kept
    return mixed, _yarn_attention(rope)


def _yarn_attention(rope: RopeConfig) -> float:
    def scale(multiple: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * multiple * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    return scale(rope.mscale) / scale(rope.mscale_all) if rope.mscale and rope.mscale_all else scale(1.0)


class Rotation:
    """Cosines and sines of one RopeConfig for sequences of up to `context` tokens."""

    def __init__(self, rope: RopeConfig, context: int, device: torch.device | str = "cpu"):
        angles, self.attention_scale = frequencies(rope, context)
        self.angles, self.size = angles.to(device), rope.rotary_size

    def of(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cosines, sines) of shape (tokens, rotary_size / 2), float32."""
        angles_TR = positions_T[:, None].float() * self.angles[None]
        return angles_TR.cos() * self.attention_scale, angles_TR.sin() * self.attention_scale


def rotate(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """`x` with the pairs (i, i + rotary_size/2) of every head turned; what lies beyond the rotary size stays."""
    half = cos_TR.shape[1]
    cos, sin = cos_TR[:, None].to(x_THD.dtype), sin_TR[:, None].to(x_THD.dtype)
    first, second, rest = x_THD[..., :half], x_THD[..., half : 2 * half], x_THD[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
