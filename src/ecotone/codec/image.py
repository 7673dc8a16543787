"""8-bit pixels, JPEG, PNG, WebP and AVIF of a picture tensor: what a camera would send instead of activations, at cut 0.

A network's input is a normalised float image x = (pixel/255 - mean) / std, channels first: (N, 3|1, H, W) or (3|1, H, W).
ImageSpec gives mean and std per channel; it travels in the payload. Lossless rule: pixels (one byte each), PNG and lossless
WebP give the 8-bit pixels back exactly, so a tensor made from 8-bit pixels with the right ImageSpec comes back within float
rounding, and any other is rounded to half a pixel step, 1/(510 std) at most (outside [0, 255]: clipped). JPEG, AVIF
and lossy WebP promise no more than the range. Each image of a batch is coded by itself. Sizes are checked before decoding.
AVIF is there where Pillow was built with it; a machine without it says so, and its profile has no time for it.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from ecotone.codec.catalogue import CodecError, Recipe

__all__ = ["ImageSpec", "decode_images", "encode_images", "image_error_bound", "is_picture"]

_FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF"}
_EFFORT: dict[str, dict[str, int | bool]] = {"webp": {"method": 2}, "avif": {"speed": 9, "max_threads": 1}}
_COUNT, _SIZE = struct.Struct("<BI"), struct.Struct("<I")
_MAX_SIDE = 16383  # WebP's own limit; JPEG and PNG go further, pictures of networks do not


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """How pixels became the input: x = (pixel/255 - mean) / std per channel, RGB or grey."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise CodecError("image: mean and std need 1 or 3 values each, as many as one another")
        if not all(math.isfinite(m) and math.isfinite(s) and s > 0 for m, s in zip(self.mean, self.std, strict=True)):
            raise CodecError(f"image: mean {self.mean} must be finite and std {self.std} above zero")

    def constants(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift, [C, 1, 1] float32, with pixel = x * scale + shift."""
        if len(self.mean) not in (1, channels):
            raise CodecError(f"image: {len(self.mean)} means for {channels} channels; give one, or one per channel")
        scale = 255.0 * np.broadcast_to(np.asarray(self.std, np.float64), channels)
        shift = 255.0 * np.broadcast_to(np.asarray(self.mean, np.float64), channels)
        return scale.astype(np.float32).reshape(-1, 1, 1), shift.astype(np.float32).reshape(-1, 1, 1)


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether a float tensor of `shape` can be coded as pictures."""
    return len(shape) in (3, 4) and shape[-3] in (1, 3) and all(0 < side <= _MAX_SIDE for side in shape[-2:])


def encode_images(x: np.ndarray, parts: Recipe, image: ImageSpec | None) -> bytes:
    """Float32 `x` of a picture shape as a file or plain bytes per item, behind the spec; raises CodecError for NaN."""
    _require(parts)
    batch = x.reshape(-1, *x.shape[-3:])
    channels = batch.shape[1]
    spec = image or _own_range(x)
    scale, shift = spec.constants(channels)
    out = [_COUNT.pack(channels, len(batch)), scale.tobytes(), shift.tobytes()]
    for item in batch:
        if not np.isfinite(item).all():
            raise CodecError(f"codec {parts.name}: the picture holds values that are not finite; use fp32 or an int codec")
        pixels = _pixels(item, scale, shift)
        if parts.image == "pixels":
            out += [_SIZE.pack(pixels.size), pixels.tobytes()]
            continue
        planes = [Image.fromarray(plane) for plane in pixels]
        picture = planes[0] if channels == 1 else Image.merge("RGB", planes)  # five times as fast as turning the array
        file = io.BytesIO()
        picture.save(file, _FORMATS[parts.image], **_options(parts))
        out += [_SIZE.pack(file.tell()), file.getvalue()]
    return b"".join(out)


def decode_images(payload: memoryview, parts: Recipe, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of `shape` again; raises CodecError for any payload that encode_images does not write."""
    _require(parts)
    items, channels = math.prod(shape[:-3]), shape[-3]
    start = _COUNT.size + 8 * channels
    if len(payload) < start or _COUNT.unpack_from(payload) != (channels, items):
        raise CodecError(f"codec {parts.name}: the payload does not hold {items} pictures of {channels} channels")
    constants = np.frombuffer(payload, "<f4", 2 * channels, _COUNT.size).reshape(2, channels, 1, 1)
    if not np.isfinite(constants).all() or not (constants[0] > 0).all():
        raise CodecError(f"codec {parts.name}: the payload's scale is not above zero")
    if len(payload) - start < items * _SIZE.size:
        raise CodecError(f"codec {parts.name}: the payload is cut")
    x = np.empty((items, *shape[-3:]), np.float32)
    for index in range(items):
        if start + _SIZE.size > len(payload):
            raise CodecError(f"codec {parts.name}: picture {index} is missing")
        (size,) = _SIZE.unpack_from(payload, start)
        start += _SIZE.size
        if size > len(payload) - start:
            raise CodecError(f"codec {parts.name}: picture {index} is cut")
        pixels = _open(payload[start : start + size], parts, channels, shape[-2:])
        np.subtract(pixels, constants[1], out=x[index])
        x[index] /= constants[0]
        start += size
    if start != len(payload):
        raise CodecError(f"codec {parts.name}: {len(payload) - start} bytes too many behind the last picture")
    return x.reshape(shape)


def image_error_bound(x: np.ndarray, parts: Recipe, image: ImageSpec | None) -> float:
    """Greatest |decoded - x|: half a pixel step and what clipping takes, or for lossy codecs the whole range."""
    scale, shift = (image or _own_range(x)).constants(x.shape[-3])
    pixels = x.reshape(-1, *x.shape[-3:]).astype(np.float64) * scale + shift
    outside = np.maximum(np.maximum(pixels - 255, -pixels), 0)
    step = 0.5 if parts.quality == 101 else 255.0
    return float(((outside + step) / scale).max()) + float(np.abs(x).max()) * 2.0**-20


def _pixels(item: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """uint8 of the shape of `item`; in place, since fresh memory costs more than the arithmetic."""
    values: np.ndarray = item * scale
    values += shift
    np.rint(values, out=values)
    np.clip(values, 0, 255, out=values)
    return values.astype(np.uint8)


def _require(parts: Recipe) -> None:
    if parts.image == "avif" and not features.check("avif"):
        raise CodecError(f"codec {parts.name}: Pillow has no AVIF on this machine; use webp:80, or install pillow 11.3")


def _own_range(x: np.ndarray) -> ImageSpec:
    """[0, 1] where the values fit, else the range of the values."""
    lo, hi = float(x.min()), float(x.max())
    if (lo >= 0 and hi <= 1) or not math.isfinite(hi - lo):
        return ImageSpec()
    span = max(hi - lo, abs(lo) * 2.0**-20, 1e-30)
    return ImageSpec(mean=(-lo / span,), std=(1 / span,))


def _options(parts: Recipe) -> dict[str, int | bool]:
    if parts.image == "png":
        return {"compress_level": 6}
    if parts.quality == 101:
        return {"lossless": True, "method": 2}
    return {"quality": parts.quality} | _EFFORT.get(parts.image, {})


def _open(file: memoryview, parts: Recipe, channels: int, sides: tuple[int, ...]) -> np.ndarray:
    if parts.image == "pixels":
        if len(file) != channels * sides[0] * sides[1]:
            raise CodecError(f"codec {parts.name}: {len(file)} bytes are no {channels} x {sides[0]} x {sides[1]} pixels")
        return np.frombuffer(file, np.uint8).reshape(channels, *sides)
    mode = "L" if channels == 1 else "RGB"
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(file), formats=[_FORMATS[parts.image]]) as picture:
            warnings.simplefilter("ignore")
            if picture.size != (sides[1], sides[0]) or getattr(picture, "n_frames", 1) != 1:
                raise CodecError(f"codec {parts.name}: picture is {picture.size}, the tensor is {sides[1]} x {sides[0]}")
            pixels = np.asarray(picture if picture.mode == mode else picture.convert(mode), np.float32)
    except CodecError:
        raise
    except Exception as error:  # decoders of four formats raise what they like on hostile bytes
        raise CodecError(
            f"codec {parts.name}: not a picture that can be read ({type(error).__name__}); send it again"
        ) from None
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
