"""Matrices packed for PyTorch's own kernels: float32, bfloat16, and weights of 8 and 4 bits with bfloat16 activations.

int8: one scale per output, `aten::_weight_int8pack_mm`. int4: groups of 64 inputs (32 where 64 does not divide), scale and
zero point in bfloat16, `aten::_weight_int4pack_mm_for_cpu`, on CUDA `aten::_weight_int4pack_mm`: the kernels behind
torchao's weight-only configurations, called without it. These kernels are made for few rows; from `UNPACK_ROWS` on a
matrix is unpacked to bfloat16 for the one product, which is faster by then.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ecotone.llm.decoder import Linear

__all__ = ["PRECISIONS", "Packed", "pack"]

PRECISIONS = ("fp32", "bf16", "int8", "int4")
UNPACK_ROWS = 16
INT8_INPUTS = 16  # PyTorch's int8 kernel takes inputs so many at a time, and with a rest left reads on and crashes


class Packed:
    """A linear map with the bytes that its weights take; `bits` per weight with scales."""

    def __init__(self, apply: Linear, num_bytes: int, num_weights: int):
        self.apply, self.num_bytes, self.num_weights = apply, num_bytes, num_weights

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.apply(x_TK)


def pack(weight_NK: torch.Tensor, bias_N: torch.Tensor | None, precision: str, device: str) -> Packed:
    """`weight` (outputs, inputs) for `precision` on `device`; what the int4 kernels do not take is int8."""
    outputs, inputs = weight_NK.shape
    if precision == "int4" and (inputs % 32 or outputs % 16 or (device.startswith("cuda") and inputs % 128)):
        precision = "int8"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    bias_N = None if bias_N is None else bias_N.to(device, dtype)
    extra = 0 if bias_N is None else bias_N.nbytes
    if precision in ("fp32", "bf16"):
        kept_NK = weight_NK.to(device, dtype).contiguous()
        return Packed(lambda x: F.linear(x, kept_NK, bias_N), kept_NK.nbytes + extra, weight_NK.numel())
    made = _int8(weight_NK, bias_N, device) if precision == "int8" else _int4(weight_NK, bias_N, device)
    made.num_bytes += extra
    return made


def _int8(weight_NK: torch.Tensor, bias_N: torch.Tensor | None, device: str) -> Packed:
    wide = weight_NK.float()
    scale_N = (wide.abs().amax(1).clamp(min=1e-12) / 127).to(torch.bfloat16)
    quantised_NK = (wide / scale_N.float()[:, None]).round().clamp(-127, 127).to(torch.int8).to(device).contiguous()
    scale_N = scale_N.to(device)

    def apply(x_TK: torch.Tensor) -> torch.Tensor:
        if x_TK.shape[0] < UNPACK_ROWS and device == "cpu" and x_TK.shape[1] % INT8_INPUTS == 0:
            made_TN = torch._weight_int8pack_mm(x_TK, quantised_NK, scale_N)
        else:
            made_TN = F.linear(x_TK, quantised_NK.to(torch.bfloat16)) * scale_N
        return made_TN if bias_N is None else made_TN + bias_N

    return Packed(apply, quantised_NK.nbytes + scale_N.nbytes, weight_NK.numel())


def _int4(weight_NK: torch.Tensor, bias_N: torch.Tensor | None, device: str) -> Packed:
    outputs, inputs = weight_NK.shape
    group = 64 if inputs % 64 == 0 else 32
    grouped = weight_NK.float().view(outputs, inputs // group, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-9).to(torch.bfloat16)
    zero = (low + 8 * scale.float()).to(torch.bfloat16)  # the kernels compute (q - 8) * scale + zero
    quantised = ((grouped - zero.float()) / scale.float() + 8).round().clamp(0, 15).to(torch.int32)
    pairs_GN2 = torch.stack([scale[..., 0].t(), zero[..., 0].t()], -1).contiguous().to(device)
    flat_NK = quantised.view(outputs, inputs).to(device)
    if device == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(flat_NK, 1)
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack((flat_NK[:, ::2] << 4 | flat_NK[:, 1::2]).to(torch.uint8), 8)
        kernel = torch.ops.aten._weight_int4pack_mm

    def apply(x_TK: torch.Tensor) -> torch.Tensor:
        made_TN: torch.Tensor = kernel(x_TK, packed, group, pairs_GN2)
        return made_TN if bias_N is None else made_TN + bias_N

    return Packed(apply, packed.nbytes + pairs_GN2.nbytes, weight_NK.numel())
