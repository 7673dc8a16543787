"""Learned bottlenecks as codecs: a small trained encoder and decoder for the one tensor that crosses one cut of one model.

Encoder: one strided convolution (1x1 in MAHPPO, 2205.11854), C channels to fewer latents. Decoder: one layer, or two with a
ReLU between them, and a pixel shuffle where the encoder had a stride. On the wire are integers only, made at the sender; the
decoder's floats may differ between machines within their rounding. Two ways to make integers:
- an int id ("int8+zstd"): the mid-tread quantiser of quantise.py over the range of one item, unbiased (MAHPPO's own rounds x
- 1/2
  and decodes without the half, which is a bias of half a step, over a range of the whole batch);
- "prior": round(latent), clipped to what training saw, written by rANS with one table per latent that travels with the
weights.

A codec is one safetensors file: float16 weights, int16 tables, and its Spec as JSON in the metadata. Its id names the first
16 hexadecimal digits of the file's sha256. Nothing is promised about one tensor's error: what the codec does to the answer
is measured, and its profile says so. Whatever bytes come, decoding ends as a tensor or as CodecError. No training here: see
profiling/bottleneck.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from ecotone import schema
from ecotone.codec import rans
from ecotone.codec.catalogue import CodecError, Recipe, info, recipe
from ecotone.codec.codes import decode_codes, encode_codes

__all__ = [
    "PRIOR", "LearnedCodec", "Spec", "down", "hold", "holding", "known", "position_of", "read_learned", "release", "up",
    "write_learned",
]  # fmt: skip

SCHEMA, VERSION = "ecotone.bottleneck", 1
PRIOR = "prior"
MAX_FILE_BYTES = 16 << 20
MAX_HEADER_BYTES = 1 << 16
MAX_KERNEL, MAX_CHANNELS = 16, 1 << 14
Weights = Mapping[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a learned codec is for, and its layers. `head`: hash of the weights before the cut, see profiling/bottleneck.py.

    `kernel` - `stride` must be even: the encoder pads half of that on each side. The weights are for a tensor over `scale`.
    `is_sequence`: (.., T, C), a linear layer on C. The figures are those of the validation samples at training time, for
    people.
    """

    name: str
    position: int
    head: str
    channels: int
    latents: int
    stride: int = 1
    kernel: int = 1
    hidden: int = 0
    is_sequence: bool = False
    is_nonnegative: bool = False
    scale: float = 1.0
    coding: str = PRIOR
    bits_per_element: float = 0.0
    relative_error: float = 0.0
    disagreement: float = 0.0

    def __post_init__(self) -> None:
        schema.check(f"bottleneck {self.name:.40}", self._violations())

    def _violations(self) -> Iterator[str]:
        try:
            recipe(f"learned:{self.name}@{'0' * 16}")
        except CodecError:
            yield "its name must be at most 32 of a-z, 0-9, '_', '.' and '-', the first a letter or digit"
        if self.position < 0 or not (0 < self.channels <= MAX_CHANNELS and 0 <= self.hidden <= MAX_CHANNELS):
            yield f"position and hidden must not be negative, channels be above zero, both widths at most {MAX_CHANNELS}"
        if not 0 < self.latents <= self.channels * self.stride**2:
            yield f"latents must be in [1, {self.channels * self.stride**2}]: more than goes in is no bottleneck"
        if not 1 <= self.stride <= self.kernel <= MAX_KERNEL or (self.kernel - self.stride) % 2:
            yield f"kernel must be the stride or larger by an even number, both in [1, {MAX_KERNEL}]"
        if not (math.isfinite(self.scale) and self.scale > 0):
            yield "scale must be finite and above zero"
        if self.is_sequence and (self.stride, self.kernel) != (1, 1):
            yield "a codec of sequences has stride and kernel 1"
        if self.coding != PRIOR and not _is_integer(self.coding):
            yield f'coding {self.coding!r} must be "{PRIOR}" or an int codec such as int8+zstd'

    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of the weights."""
        inner, out = self.hidden or self.channels * self.stride**2, self.channels * self.stride**2
        side = 3 if self.hidden and not self.is_sequence else 1
        found: dict[str, Shape] = {
            "down.weight": (self.latents, self.channels, self.kernel, self.kernel), "down.bias": (self.latents,),
            "up.weight": (inner, self.latents, side, side), "up.bias": (inner,),
        }  # fmt: skip
        if self.hidden:
            found |= {"out.weight": (out, self.hidden, 1, 1), "out.bias": (out,), "skip.weight": (out, self.latents, 1, 1)}
        return found


class LearnedCodec:
    """A codec with weights; `data` is the whole file. Made by read_learned."""

    def __init__(self, spec: Spec, weights: Weights, tables: rans.Tables | None, lowest: np.ndarray | None, data: bytes):
        self.spec, self.data, self._weights = spec, data, dict(weights)
        self._tables, self._lowest = tables, lowest
        self.sha256 = hashlib.sha256(data).hexdigest()

    @property
    def id(self) -> str:
        return f"learned:{self.spec.name}@{self.sha256[:16]}"

    def violation(self, shape: Shape, dtype: str) -> str:
        """Why a tensor cannot be coded, "" where it can."""
        dims = (2, 3) if self.spec.is_sequence else (3, 4)
        found = shape[-1] if self.spec.is_sequence and shape else shape[-3] if len(shape) >= 3 else 0
        if len(shape) in dims and found == self.spec.channels and "float" in dtype:
            return ""
        layout = "(.., steps, channels)" if self.spec.is_sequence else "(.., channels, height, width)"
        return f"{self.id} takes {layout} floats of {self.spec.channels} channels, not {dtype} {shape}"

    def latents(self, x: Tensor) -> Tensor:
        """What the encoder makes of float32 `x` before rounding: (N, latents, height, width)."""
        return down(_as_map(x, self.spec), self._weights, self.spec)

    def encode(self, x: Tensor) -> list[bytes | memoryview] | None:
        """The payload of float32 `x` on the CPU, mode byte first; None where a value is not finite. Raises CodecError."""
        shape = tuple(x.shape)
        problem = self.violation(shape, "float32")
        if problem:
            raise CodecError(f"codec {problem}; train one for this cut")
        with torch.no_grad():
            y = self.latents(x).contiguous()
        if self._tables is None or self._lowest is None:
            return encode_codes(y.reshape(-1).numpy(), tuple(y.shape), recipe(self.spec.coding))
        if not torch.isfinite(y).all():
            return None
        symbols = y.round_().numpy() - self._lowest[:, None, None]
        symbols = np.clip(symbols, 0, self._greatest[:, None, None]).astype(np.uint8)
        return [b"\0", rans.encode(symbols.reshape(-1), self._tables, _rows(y.shape))]

    def decode(self, content: memoryview, mode: int, shape: Shape) -> Tensor:
        """The float32 tensor of `shape` from the payload behind its mode byte; raises CodecError."""
        problem = self.violation(shape, "float32")
        if problem:
            raise CodecError(f"codec {problem}; the payload is damaged, or was made for another cut")
        batch, height, width = _sides(shape, self.spec)
        small = (batch, self.spec.latents, -(-height // self.spec.stride), -(-width // self.spec.stride))
        if self._tables is None or self._lowest is None:
            y = decode_codes(content, recipe(self.spec.coding), mode, small)
        else:
            symbols = rans.decode(content, math.prod(small), self._tables, _rows(small)).reshape(small)
            y = symbols.astype(np.float32) + self._lowest[:, None, None].astype(np.float32)
        with torch.no_grad():
            x = up(torch.from_numpy(y).reshape(small), self._weights, self.spec)
        x = x[:, :, :height, :width]
        return (x[:, :, 0].transpose(1, 2) if self.spec.is_sequence else x).contiguous().reshape(shape)

    @cached_property
    def _greatest(self) -> np.ndarray:
        """The greatest symbol of each latent."""
        assert self._tables is not None
        return np.asarray(np.count_nonzero(self._tables.frequency, axis=1) - 1)


def down(x: Tensor, weights: Weights, spec: Spec) -> Tensor:
    """The encoder: (N, C, H, W), filled up with zeros to whole strides, to latents (N, M, H / stride, W / stride)."""
    high, wide = (-side % spec.stride for side in x.shape[-2:])
    if high or wide:
        x = functional.pad(x, (0, wide, 0, high))
    return functional.conv2d(x, weights["down.weight"], weights["down.bias"], spec.stride, (spec.kernel - spec.stride) // 2)


def up(y: Tensor, weights: Weights, spec: Spec) -> Tensor:
    """The decoder: latents to (N, C, H, W), sides whole strides."""
    x = functional.conv2d(y, weights["up.weight"], weights["up.bias"], padding=weights["up.weight"].shape[-1] // 2)
    if spec.hidden:
        x = functional.conv2d(functional.relu(x), weights["out.weight"], weights["out.bias"])
        x = x + functional.conv2d(y, weights["skip.weight"])
    if spec.stride > 1:
        x = functional.pixel_shuffle(x, spec.stride)
    return functional.relu(x) if spec.is_nonnegative else x


def write_learned(spec: Spec, weights: Weights, frequencies: np.ndarray | None, lowest: np.ndarray | None) -> bytes:
    """The file of a codec; `frequencies` [latents, symbols] and `lowest` [latents] where its coding is "prior"."""
    tensors = {name: weights[name].detach().cpu().to(torch.float16).contiguous() for name in spec.shapes()}
    if frequencies is not None and lowest is not None:
        tensors["frequencies"] = torch.from_numpy(np.asarray(frequencies, np.int16))
        tensors["lowest"] = torch.from_numpy(np.asarray(lowest, np.int16))
    return safetensors.torch.save(tensors, {"ecotone": schema.dump_json(spec, SCHEMA, VERSION)})


def read_learned(data: bytes, where: str = "bottleneck") -> LearnedCodec:
    """The codec of a file's bytes; raises CodecError, on one line, for anything that write_learned does not write."""
    if len(data) > MAX_FILE_BYTES:
        raise CodecError(f"{where}: {len(data)} bytes, a learned codec has at most {MAX_FILE_BYTES}")
    try:
        size = int.from_bytes(data[:8], "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        text = json.loads(data[8 : 8 + size])["__metadata__"]["ecotone"]
        spec = schema.load_json(Spec, text, SCHEMA, VERSION, where)
        tensors = safetensors.torch.load(data)
    except schema.SchemaError as error:
        raise CodecError(str(error)) from None
    except Exception as error:  # safetensors has its own exception type
        problem = " ".join(str(error).split())[:120]
        raise CodecError(f"{where}: is no learned codec ({problem}); make one with ecotone bottleneck") from None
    _check_weights(spec, tensors, where)
    weights = {name: tensors[name].to(torch.float32) for name in spec.shapes()}
    weights["down.weight"] /= spec.scale
    for name in ("out.weight", "out.bias", "skip.weight") if spec.hidden else ("up.weight", "up.bias"):
        weights[name] *= spec.scale
    if spec.coding != PRIOR:
        return LearnedCodec(spec, weights, None, None, data)
    try:
        tables = rans.Tables(tensors["frequencies"].numpy())
    except CodecError as error:
        raise CodecError(f"{where}: {error}") from None
    count = np.count_nonzero(tables.frequency, axis=1)
    if (np.arange(tables.frequency.shape[1]) < count[:, None]).astype(bool).tolist() != (tables.frequency > 0).tolist():
        raise CodecError(f"{where}: a table has a gap; make the codec again")
    return LearnedCodec(spec, weights, tables, tensors["lowest"].numpy().astype(np.int64), data)


def _check_weights(spec: Spec, tensors: Weights, where: str) -> None:
    wanted: dict[str, tuple[Shape | None, torch.dtype]] = {n: (shape, torch.float16) for n, shape in spec.shapes().items()}
    if spec.coding == PRIOR:
        wanted |= {"frequencies": (None, torch.int16), "lowest": ((spec.latents,), torch.int16)}
    if set(wanted) != set(tensors):
        raise CodecError(f"{where}: holds {', '.join(sorted(tensors))}; needed are {', '.join(sorted(wanted))}")
    for name, (shape, kind) in wanted.items():
        tensor = tensors[name]
        if tensor.dtype != kind or (shape is not None and tuple(tensor.shape) != shape):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CodecError(f"{where}: {name} is {found}, must be {kind} {shape or 'with two dimensions'}")
        if kind == torch.float16 and not torch.isfinite(tensor).all():
            raise CodecError(f"{where}: {name} holds values that are not finite; train it again")
    if spec.coding == PRIOR and (tensors["frequencies"].dim() != 2 or len(tensors["frequencies"]) != spec.latents):
        raise CodecError(f"{where}: there must be a table of frequencies for each of {spec.latents} latents")


# ---- the codecs that this process has ------------------------------------------------------------------------------------

_lock = threading.Lock()
_held: dict[str, tuple[LearnedCodec, int]] = {}  # by the 16 digits of the id, with how many hold it


def hold(codec: LearnedCodec) -> None:
    """From now on `codec.id` can be packed and unpacked in this process, until as many calls of release."""
    with _lock:
        present, count = _held.get(codec.sha256[:16], (codec, 0))
        if present.sha256 != codec.sha256:
            raise CodecError(f"codec {codec.id}: another one begins with the same hash; train it again")
        _held[codec.sha256[:16]] = (present, count + 1)


def release(codec: LearnedCodec) -> None:
    """Undo one hold."""
    with _lock:
        present, count = _held.get(codec.sha256[:16], (codec, 0))
        if count > 1:
            _held[codec.sha256[:16]] = (present, count - 1)
        else:
            _held.pop(codec.sha256[:16], None)


@contextlib.contextmanager
def holding(codecs: Sequence[LearnedCodec]) -> Iterator[None]:
    """`codecs` can be used inside."""
    with contextlib.ExitStack() as stack:
        for codec in codecs:
            hold(codec)
            stack.callback(release, codec)
        yield


def known(parts: Recipe) -> LearnedCodec:
    """The codec that a learned id names; raises CodecError where it is not here."""
    found = _held.get(parts.learned)
    if found is None or found[0].id != parts.name:
        raise CodecError(f"codec {parts.name}: its weights are not here; give its file (--bottleneck), or deploy again")
    return found[0]


def position_of(codec_id: str) -> int | None:
    """The one cut that a codec is for: 0 for pictures, that of a learned codec which is here; None for any other."""
    parts = recipe(codec_id)
    if parts.learned:
        return known(parts).spec.position
    return 0 if info(codec_id).is_image else None


# ---- shapes --------------------------------------------------------------------------------------------------------------


def _as_map(x: Tensor, spec: Spec) -> Tensor:
    """`x` as (N, C, H, W); of a sequence (N, C, 1, T)."""
    if spec.is_sequence:
        return x.reshape(-1, *x.shape[-2:]).transpose(1, 2).unsqueeze(2)
    return x.reshape(-1, *x.shape[-3:])


def _sides(shape: Shape, spec: Spec) -> tuple[int, int, int]:
    """Batch, height and width of _as_map."""
    if spec.is_sequence:
        return math.prod(shape[:-2]), 1, shape[-2]
    return math.prod(shape[:-3]), shape[-2], shape[-1]


def _rows(shape: Shape) -> np.ndarray:
    """The table of every latent of (N, M, h, w), flat."""
    batch, latents, height, width = shape
    return np.tile(np.repeat(np.arange(latents, dtype=np.uint16), height * width), batch)


def _is_integer(codec_id: str) -> bool:
    try:
        return recipe(codec_id).bits > 0
    except CodecError:
        return False
