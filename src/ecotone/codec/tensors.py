"""One tensor <-> the payload of its codec: encode, decode and the stated bound on the error. No name, no shape inside.

Payload: one mode byte, then content: codes.py's, sparse.py's, image.py's or learned.py's; float formats: little-endian
words. Tensors that are not floating point, and float tensors that a codec cannot hold (NaN, infinities, beyond 2**100) or
would make larger, travel as they are, word by word. "fp32" keeps every dtype as it is; "fp16" and "bf16" round to nearest
and saturate at their largest finite value.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ecotone.codec import entropy, quantise
from ecotone.codec.bits import packed_bytes
from ecotone.codec.catalogue import CodecError, Entropy, Recipe, recipe
from ecotone.codec.codes import RAW, STORED, decode_codes, encode_codes, table_bytes
from ecotone.codec.image import ImageSpec, decode_images, encode_images, image_error_bound, is_picture
from ecotone.codec.learned import known
from ecotone.codec.sparse import decode_sparse, encode_sparse, sparse_bound

__all__ = ["DTYPES", "decode", "encode", "error_bound", "parts_of"]

Buffer = bytes | bytearray | memoryview
Parts = list[bytes | memoryview]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64,
    "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Half a unit in the last place, relative; and half the distance of subnormals, absolute.
_HALF_ERROR = {"fp16": (2.0**-11, 2.0**-25, 65504.0), "bf16": (2.0**-8, 2.0**-134, torch.finfo(torch.bfloat16).max)}


def encode(tensor: Tensor, codec_id: str, *, image: ImageSpec | None = None) -> bytearray:
    """The payload of `tensor` (any shape, strides and device) under `codec_id`; raises CodecError."""
    return bytearray().join(parts_of(tensor, recipe(codec_id), image))


def decode(buffer: Buffer, codec_id: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The tensor of `shape` and `dtype` ("float32") whose payload `buffer` is; a new CPU tensor that owns its memory.

    Raises CodecError for any bytes that encode does not write; allocates no more than the tensor and its codes.
    """
    parts, kind = recipe(codec_id), _dtype(dtype)
    view = memoryview(buffer).cast("B")
    if len(view) == 0:
        raise CodecError(f"codec {codec_id}: the payload is empty; it was cut, send it again")
    mode, content = view[0], view[1:]
    if mode & ~(RAW | STORED):
        raise CodecError(f"codec {codec_id}: the payload starts with {mode}, which no encoder writes; it is damaged")
    count = _count(shape)
    if mode & RAW or not kind.is_floating_point or parts.float_format == "fp32" or count == 0:
        return _words(content, parts, mode, kind, count).reshape(shape)
    if parts.float_format:
        return _words(content, parts, mode, _HALF[parts.float_format], count).reshape(shape).to(kind)
    if parts.image:
        if not is_picture(shape):
            raise CodecError(f"codec {codec_id}: a tensor of shape {shape} is no picture")
        return torch.from_numpy(decode_images(content, parts, shape)).to(kind)
    if parts.learned:
        return known(parts).decode(content, mode, shape).to(kind)
    if parts.keep:
        values = decode_sparse(content, quantise.layout(shape, False), parts, shape[-1] if shape else 1)
    else:
        values = decode_codes(content, parts, mode, shape)
    return torch.from_numpy(values).reshape(shape).to(kind)


def error_bound(tensor: Tensor, codec_id: str, *, image: ImageSpec | None = None) -> float:
    """The stated bound on |decode(encode(tensor)) - tensor|, over all elements; 0.0 where the codec loses nothing.

    Holds for finite values; NaN and infinities come back as they were. Half-precision tensors add their own rounding.
    """
    parts = recipe(codec_id)
    if tensor.numel() == 0 or not tensor.is_floating_point() or parts.float_format == "fp32":
        return 0.0
    x = _float32(tensor)
    if parts.float_format:
        return _half_bound(tensor, parts.float_format)
    if parts.image:
        bound = image_error_bound(x.reshape(tensor.shape), parts, image) if is_picture(tuple(tensor.shape)) else 0.0
    elif parts.learned:
        made = decode(encode(tensor, codec_id), codec_id, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return 1.001 * float((made.double() - tensor.double()).abs().max())  # what this very tensor suffers, and rounding
    elif parts.keep:
        bound = sparse_bound(x, quantise.layout(tuple(tensor.shape), False), parts) or 0.0
    else:
        fitted = quantise.fit(x, quantise.layout(tuple(tensor.shape), parts.per_channel), parts.bits, parts.clip)
        bound = fitted[1] if fitted else 0.0
    return bound + _own_rounding(tensor, x, bound) if bound else 0.0


def parts_of(tensor: Tensor, parts: Recipe, image: ImageSpec | None) -> Parts:
    """The payload as pieces to be joined, so that a large tensor is copied once."""
    kind = _dtype(str(tensor.dtype).removeprefix("torch."))
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise CodecError(f"a tensor of layout {tensor.layout} on {tensor.device} cannot be sent; make it dense")
    tensor = tensor.detach()
    if not kind.is_floating_point or parts.float_format == "fp32" or tensor.numel() == 0:
        return _write_words(tensor, parts, 0)
    if parts.float_format:
        return _write_words(_round(tensor, parts.float_format), parts, 0)
    shape = tuple(tensor.shape)
    if parts.image:
        if not is_picture(shape):
            return _write_words(tensor, parts, RAW)
        return [b"\0", encode_images(_float32(tensor).reshape(shape), parts, image)]
    x = _float32(tensor)
    written: Parts | None = None
    raw_bytes = x.size * kind.itemsize
    if parts.learned:
        written = known(parts).encode(torch.from_numpy(x).reshape(shape))
    elif parts.keep:
        sparse = encode_sparse(x, quantise.layout(shape, False), parts, shape[-1] if shape else 1)
        written = [b"\0", sparse] if sparse is not None and len(sparse) < raw_bytes else None
    elif table_bytes(shape, parts) + packed_bytes(x.size, parts.bits) < raw_bytes:
        written = encode_codes(x, shape, parts)
    return written or _write_words(tensor, parts, RAW)


def _write_words(tensor: Tensor, parts: Recipe, mode: int) -> Parts:
    if tensor.numel() == 0:
        return [bytes((mode,))]
    words = tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    method = _for_words(parts)
    if method:
        squeezed = entropy.compress(words, method, tensor.element_size())
        if len(squeezed) < words.size:
            return [bytes((mode,)), squeezed]
        mode |= STORED
    return [bytes((mode,)), words.data]


def _words(content: memoryview, parts: Recipe, mode: int, kind: torch.dtype, count: int) -> Tensor:
    size = count * kind.itemsize
    method = _for_words(parts)
    if method and not mode & STORED and count:
        raw = entropy.decompress(content, method, size, kind.itemsize)
        raw = raw if raw.flags.writeable else raw.copy()
    else:
        if len(content) != size:
            raise CodecError(
                f"codec {parts.name}: {len(content)} bytes for a tensor of {size}; the payload was cut or padded"
            )
        raw = np.frombuffer(content, np.uint8).copy()
    if count == 0:
        return torch.empty(0, dtype=kind)
    if kind is torch.bool and (raw > 1).any():
        raise CodecError(f"codec {parts.name}: a truth value is neither 0 nor 1; the payload is damaged")
    return torch.from_numpy(raw).view(kind)


def _for_words(parts: Recipe) -> Entropy:
    """rans is for codes; words beside them take zstd."""
    return "zstd" if parts.entropy == "rans" else parts.entropy


def _float32(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1).numpy()


def _round(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype == _HALF[name]:
        return tensor
    x, top = tensor.to("cpu"), _HALF_ERROR[name][2]
    lo, hi = torch.aminmax(x)
    if not (lo >= -top and hi <= top):  # also where NaN or an infinity is inside: these stay
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # in bfloat16 the largest half would round up to infinity
        x = torch.where(torch.isfinite(x), x.clamp(-top, top), x)
    return x.to(_HALF[name])


def _half_bound(tensor: Tensor, name: str) -> float:
    if tensor.dtype == _HALF[name]:
        return 0.0
    values = tensor.detach().to("cpu", torch.float64)
    finite = values[torch.isfinite(values)].abs()
    if finite.numel() == 0:
        return 0.0
    relative, absolute, top = _HALF_ERROR[name]
    largest = float(finite.max())
    bound = max(min(largest, top) * relative + absolute, largest - top)
    return bound + (_rounding(tensor.dtype) * largest)


def _own_rounding(tensor: Tensor, x: np.ndarray, bound: float) -> float:
    """What converting to float32 and back to the tensor's dtype adds."""
    if tensor.dtype == torch.float32:
        return 0.0
    relative = 2.0**-23 if tensor.dtype == torch.float64 else _rounding(tensor.dtype)
    return relative * (float(np.abs(x).max()) + bound) + 2.0**-24


def _rounding(kind: torch.dtype) -> float:
    return {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(kind, 0.0)


def _count(shape: tuple[int, ...]) -> int:
    if math.prod(max(size, 1) for size in shape) >= 1 << 48:  # also where another dimension is 0
        raise CodecError(f"shape {shape} is beyond any tensor; the payload is damaged")
    return math.prod(shape)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise CodecError(f"dtype {name} cannot be sent; convert to one of {', '.join(DTYPES)}")
    return DTYPES[name]
