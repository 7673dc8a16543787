"""Hidden states and token choices on their way between stages: tensors to the bytes of a codec and back.

    fp32   exact; also "none", between stages of one device
    bf16   half the bytes, rounded
    int8   a quarter and 4 bytes per token: symmetric, with the largest magnitude of each token as scale

Only fp32 changes nothing. The codec of a crossing is the plan's choice and is reported (ecotone.llmplan.CODECS).
"""

from __future__ import annotations

import torch

from ecotone.decoding.frame import Payload
from ecotone.units import EcotoneError

__all__ = ["pack_hidden", "unpack_hidden"]

_SCALE_BYTES = 4


def pack_hidden(x_TW: torch.Tensor, codec: str) -> memoryview:
    """The bytes of `x_TW` (tokens, width), float32; token after token, each of equal length."""
    if codec in ("none", "fp32"):
        made = x_TW.contiguous()
    elif codec == "bf16":
        made = x_TW.to(torch.bfloat16).contiguous()
    elif codec == "int8":
        scale_T1 = x_TW.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        codes = (x_TW / scale_T1).round().to(torch.int8)
        made = torch.cat([scale_T1.float().view(torch.uint8), codes.view(torch.uint8)], dim=1)
    else:
        raise EcotoneError(f"hidden states have no codec {codec!r}")
    return memoryview(made.view(torch.uint8).flatten().numpy())  # type: ignore[arg-type]


def unpack_hidden(payload: Payload, codec: str, num_tokens: int, width: int) -> torch.Tensor:
    """(tokens, width) float32 of what `pack_hidden` made; raises EcotoneError where the size is another."""
    each = {"none": 4 * width, "fp32": 4 * width, "bf16": 2 * width, "int8": _SCALE_BYTES + width}.get(codec)
    if each is None or len(payload) != num_tokens * each:
        raise EcotoneError(f"{len(payload)} bytes of hidden states in {codec} came, {num_tokens} tokens of {width} expected")
    view = memoryview(payload)
    raw = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
    if codec in ("none", "fp32"):
        return _floats(raw, torch.float32).view(num_tokens, width)
    if codec == "bf16":
        return _floats(raw, torch.bfloat16).view(num_tokens, width).float()
    rows = raw.view(num_tokens, each)
    scale_T1 = _floats(rows[:, :_SCALE_BYTES].contiguous(), torch.float32).view(-1, 1)
    return scale_T1 * rows[:, _SCALE_BYTES:].view(torch.int8)


def _floats(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`raw` as `dtype`, copied where it does not lie on a multiple of the type's size."""
    raw = raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()
    return raw.flatten().view(dtype)
