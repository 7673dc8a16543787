"""A whole frontier <-> one self-describing body: per tensor its name, shape, dtype, codec, size and checksum. No pickle.

Layout, little-endian: "ECB1", tensor count u16, reserved u16 (0), header bytes u32; per tensor: name length u16,
dtype u8, codec length u8, dimensions u8, reserved u8 (0), payload bytes u64, crc32 u32, dims u64 each, name, codec; then
crc32 u32 of the header; then the payloads in order. Whatever arrives ends as the tensors that were sent or as
one CodecError: all sizes are read, capped and added up before the first payload is touched, and what is expected is
compared before decoding.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ecotone.codec.catalogue import CodecError, recipe
from ecotone.codec.checksum import crc32
from ecotone.codec.image import ImageSpec, is_picture
from ecotone.codec.tensors import DTYPES, Buffer, Parts, decode, parts_of

__all__ = ["HasSpec", "pack", "unpack"]

MAGIC = b"ECB1"
MAX_TENSORS, MAX_NAME_BYTES, MAX_DIMS = 4096, 1024, 8
LIMIT_BYTES = 1 << 30
_HEAD, _ENTRY, _SUM = struct.Struct("<4sHHI"), struct.Struct("<HBBBBQI"), struct.Struct("<I")
_CODES = tuple(DTYPES)  # the code of a dtype is its position: append only


class HasSpec(Protocol):
    """What is known of a tensor before it arrives; graph.Tensor fits. `dynamic_dims`, where there, may differ."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    start: int
    size: int
    checksum: int


def pack(tensors: Sequence[tuple[str, Tensor]], codec_id: str, *, image: ImageSpec | None = None) -> bytearray:
    """The body of a frontier: named tensors under one codec, those that are not floating point losslessly.

    An image codec takes the picture tensors ((N, 1|3, H, W) or (1|3, H, W)); other tensors beside them travel as they are.
    `image` says how pixels became the input. Raises CodecError.
    """
    parts = recipe(codec_id)
    if len(tensors) > MAX_TENSORS:
        raise CodecError(f"a frontier of {len(tensors)} tensors; at most {MAX_TENSORS} travel in one body")
    if parts.image and not any(t.is_floating_point() and is_picture(tuple(t.shape)) for _, t in tensors):
        raise CodecError(f"codec {codec_id}: no tensor here is a picture (N, 1 or 3, height, width); use it at cut 0 of one")
    header, payloads = bytearray(_HEAD.size), []
    for name, tensor in tensors:
        written: Parts = parts_of(tensor, parts, image)
        checksum, size = 0, 0
        for piece in written:
            checksum, size = crc32(piece, checksum), size + len(piece)
        label, codec = name.encode(), codec_id.encode()
        if len(label) > MAX_NAME_BYTES or tensor.dim() > MAX_DIMS:
            raise CodecError(f"tensor {name:.40}: name over {MAX_NAME_BYTES} bytes or more than {MAX_DIMS} dimensions")
        kind = _CODES.index(str(tensor.dtype).removeprefix("torch."))
        header += _ENTRY.pack(len(label), kind, len(codec), tensor.dim(), 0, size, checksum)
        header += struct.pack(f"<{tensor.dim()}Q", *tensor.shape) + label + codec
        payloads += written
    _HEAD.pack_into(header, 0, MAGIC, len(tensors), 0, len(header) + _SUM.size)
    header += _SUM.pack(crc32(header))
    return bytearray().join([header, *payloads])


def unpack(body: Buffer, expected: Sequence[HasSpec] | None = None, *, limit_bytes: int = LIMIT_BYTES) -> list[Tensor]:
    """The tensors of a body, in order, on the CPU; with `expected`, only a body of exactly these names, dtypes and shapes.

    Raises CodecError for anything else, before more than `limit_bytes` of tensors would be allocated.
    """
    view = memoryview(body).cast("B")
    entries = _read_header(view)
    total = sum(math.prod(e.shape) * DTYPES[e.dtype].itemsize for e in entries)
    if total > limit_bytes:
        raise CodecError(f"body announces {total} bytes of tensors, at most {limit_bytes} are taken; send less at once")
    if expected is not None:
        _compare(entries, expected)
    tensors = []
    for entry in entries:
        payload = view[entry.start : entry.start + entry.size]
        if crc32(payload) != entry.checksum:
            raise CodecError(f"tensor {entry.name}: payload is damaged (checksum differs); send it again")
        tensors.append(decode(payload, entry.codec, entry.shape, entry.dtype))
    return tensors


def _read_header(view: memoryview) -> list[_Entry]:
    if len(view) < _HEAD.size + _SUM.size:
        raise CodecError(f"body is {len(view)} bytes, shorter than any; it was cut")
    magic, count, reserved, header_bytes = _HEAD.unpack_from(view)
    if magic != MAGIC or reserved:
        raise CodecError("body does not start as one; the peer speaks another version of Ecotone")
    if count > MAX_TENSORS or not _HEAD.size + _SUM.size <= header_bytes <= len(view):
        raise CodecError(f"body announces {count} tensors in a header of {header_bytes} of {len(view)} bytes; it was cut")
    stop = header_bytes - _SUM.size
    if crc32(view[:stop]) != _SUM.unpack_from(view, stop)[0]:
        raise CodecError("body header is damaged (checksum differs); send it again")
    entries, at, start = [], _HEAD.size, header_bytes
    for _ in range(count):
        entry, at = _read_entry(view, at, stop, start)
        start += entry.size
        entries.append(entry)
    if at != stop or start != len(view):
        raise CodecError(f"body has {len(view)} bytes, its header describes {start}; it was cut or padded")
    return entries


def _read_entry(view: memoryview, at: int, stop: int, start: int) -> tuple[_Entry, int]:
    if at + _ENTRY.size > stop:
        raise CodecError("body header ends inside a tensor; it was cut")
    label, kind, codec, ndim, reserved, size, checksum = _ENTRY.unpack_from(view, at)
    dims_at = at + _ENTRY.size
    name_at = dims_at + 8 * ndim
    end = name_at + label + codec
    if kind >= len(_CODES) or ndim > MAX_DIMS or label > MAX_NAME_BYTES or reserved or end > stop:
        raise CodecError("body header describes a tensor that cannot be (dtype, dimensions or lengths); it is damaged")
    try:
        name, codec_id = str(view[name_at : name_at + label], "utf-8"), str(view[name_at + label : end], "ascii")
    except UnicodeDecodeError:
        raise CodecError("body header holds a name that is not text; it is damaged") from None
    if start + size > len(view):
        raise CodecError(f"tensor {name:.40}: announces {size} bytes, {max(len(view) - start, 0)} arrived; the body was cut")
    shape = struct.unpack_from(f"<{ndim}Q", view, dims_at)
    return _Entry(name, shape, _CODES[kind], codec_id, start, size, checksum), end


def _compare(entries: Sequence[_Entry], expected: Sequence[HasSpec]) -> None:
    if len(entries) != len(expected):
        raise CodecError(f"body holds {len(entries)} tensors, the plan expects {len(expected)}; plan and model must agree")
    for entry, spec in zip(entries, expected, strict=True):
        free = getattr(spec, "dynamic_dims", ())
        same = len(entry.shape) == len(spec.shape) and all(
            a == b or i in free for i, (a, b) in enumerate(zip(entry.shape, spec.shape, strict=True))
        )
        if entry.name != spec.name or entry.dtype != spec.dtype or not same:
            raise CodecError(
                f"tensor {entry.name:.40} {entry.dtype} {entry.shape} arrived, the plan expects "
                f"{spec.name} {spec.dtype} {tuple(spec.shape)}; plan and model must agree"
            )
