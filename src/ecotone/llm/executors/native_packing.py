"""Matrices in the tiles that native.cpp reads (its head says how), 4.5, 8.5, 16 or 32 bits per weight: tensor operations.

4 bits as llama.cpp's Q4_0 (symmetric, the value of largest magnitude maps to -8), 8 bits as its Q8_0, per 32 inputs.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

__all__ = ["BITS_PER_WEIGHT", "GROUP", "TILE", "pack_matrix", "unpack_matrix"]

TILE, GROUP = 16, 32
BITS_PER_WEIGHT = {4: 4.5, 8: 8.5, 16: 16.0, 32: 32.0}


def pack_matrix(weight_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """`weight` (outputs, inputs) as one flat uint8 tensor of tiles; outputs and inputs are padded with zeros."""
    outputs, inputs = weight_NK.shape
    padded = pad(weight_NK.float(), (0, -inputs % GROUP, 0, -outputs % TILE))
    tiles, groups = padded.shape[0] // TILE, padded.shape[1] // GROUP
    if bits == 32:
        return padded.view(tiles, TILE, groups * GROUP).permute(0, 2, 1).contiguous().view(torch.uint8).flatten()
    if bits == 16:
        pairs = padded.to(torch.bfloat16).view(tiles, TILE, groups * GROUP // 2, 2)
        return pairs.permute(0, 2, 1, 3).contiguous().view(torch.uint8).flatten()
    quantised, scale = _quantised(padded.view(tiles, TILE, groups, GROUP), bits)
    scales = scale.permute(0, 2, 1).contiguous().view(torch.uint8)  # (tiles, groups, 32)
    if bits == 4:
        parts = quantised.view(tiles, TILE, groups, 2, 4, 4).permute(3, 0, 2, 4, 1, 5)
        vectors = (parts[0] | parts[1] << 4).reshape(tiles, groups, 256)
    else:
        vectors = quantised.view(tiles, TILE, groups, 8, 4).permute(0, 2, 3, 1, 4).reshape(tiles, groups, 512)
    return torch.cat([vectors, scales], -1).flatten()


def _quantised(grouped: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tiles, 16, groups, 32) floats to unsigned bytes and half-precision scales (tiles, 16, groups)."""
    if bits == 4:
        largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))[..., 0]
        scale, zero, low, high = largest / -8, 8, 0, 15
    else:
        scale, zero, low, high = grouped.abs().amax(-1) / 127, 128, 1, 255
    scale = scale.half()
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    return ((grouped / divisor[..., None]).round() + zero).clamp(low, high).to(torch.uint8), scale


def unpack_matrix(packed: torch.Tensor, outputs: int, inputs: int, bits: int) -> torch.Tensor:
    """What `pack_matrix` kept of a matrix, float32 (outputs, inputs)."""
    tiles, groups = -(-outputs // TILE), -(-inputs // GROUP)
    if bits == 32:
        singles = packed.view(torch.float32).view(tiles, groups * GROUP, TILE)
        return singles.permute(0, 2, 1).reshape(tiles * TILE, -1)[:outputs, :inputs]
    if bits == 16:
        pairs = packed.view(torch.bfloat16).view(tiles, groups * GROUP // 2, TILE, 2)
        return pairs.permute(0, 2, 1, 3).reshape(tiles * TILE, -1)[:outputs, :inputs].float()
    per_group = 256 if bits == 4 else 512
    rows = packed.view(tiles, groups, per_group + 2 * TILE)
    scale = rows[..., per_group:].contiguous().view(torch.float16).float()  # (tiles, groups, 16)
    vectors = rows[..., :per_group]
    if bits == 4:
        halves = torch.stack([vectors & 15, vectors >> 4], 2).view(tiles, groups, 2, 4, TILE, 4)
        values = halves.permute(0, 4, 1, 2, 3, 5).reshape(tiles, TILE, groups, GROUP).float() - 8
    else:
        values = (
            vectors.reshape(tiles, groups, 8, TILE, 4).permute(0, 3, 1, 2, 4).reshape(tiles, TILE, groups, GROUP).float()
            - 128
        )
    return (values * scale.permute(0, 2, 1)[..., None]).reshape(tiles * TILE, -1)[:outputs, :inputs]
