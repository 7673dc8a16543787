"""Which codecs there are and what their ids mean: "int4c+zstd" is 4 bits, one range per channel, then zstd.

An id is `base[+entropy]`, an image codec with its quality, or a learned codec by the hash of its weights. Ids are plain
strings, because plans, profiles and bodies carry them; only this file takes them apart. What each one does to a tensor
stands in tensors.py, sparse.py, image.py and learned.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

from ecotone.plan import LOCAL
from ecotone.units import EcotoneError

__all__ = ["CANDIDATES", "IMAGE_CANDIDATES", "CodecError", "CodecInfo", "Recipe", "catalogue", "info", "recipe"]

Entropy = Literal["", "zstd", "deflate", "rans"]
FLOAT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}
INTEGER_BITS = (8, 6, 4, 3, 2)
CLIPPED_BITS = (4, 3, 2)  # above 4 bits the tails cost less than clipping them
BYTE_ENTROPIES: tuple[Entropy, ...] = ("", "zstd", "deflate")  # for words; codes may also take rans
ENTROPIES: tuple[Entropy, ...] = (*BYTE_ENTROPIES, "rans")
IMAGE_QUALITIES = {"jpeg": (95, 90, 75, 60, 50), "webp": (90, 80, 60, 50), "avif": (80, 70, 60)}
TOP_SHARES = ("50", "25", "10", "5", "1")
# Worth measuring by default: one of each kind that can be the best plan somewhere.
CANDIDATES = (
    "fp32", "fp16", "fp16+zstd", "int8", "int8+zstd", "int6+zstd", "int4", "int4+zstd", "int4+rans", "int4c+zstd",
    "int3clip+zstd", "int3clip+rans", "int3cclip+zstd", "int2clip+zstd", "topk:10+zstd",
)  # fmt: skip
IMAGE_CANDIDATES = (
    "pixels", "png", "webp:80", "webp:60", "jpeg:95", "jpeg:90", "jpeg:75", "jpeg:60", "avif:70", "avif:60",
)  # fmt: skip

_FLOAT = re.compile(r"(fp32|fp16|bf16)(?:\+(zstd|deflate))?")
_CODES = re.compile(r"int([86432])(c?)(clip)?(?:\+(zstd|deflate|rans))?")
_SPARSE = re.compile(r"topk:([1-9][0-9]?|0\.[1-9])(?:\+(zstd|deflate|rans))?")
_IMAGE = re.compile(r"(png|pixels)|(jpeg|avif):([1-9][0-9]?|100)|(webp):([1-9][0-9]?|100|lossless)")
_LEARNED = re.compile(r"learned:([a-z0-9][a-z0-9_.-]{0,31})@([0-9a-f]{16})")


class CodecError(EcotoneError):
    """A tensor cannot be coded as asked, or bytes are not what a codec writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecInfo:
    """What a codec promises. `bits` per element before the entropy stage; 0: depends on the content."""

    name: str
    bits: int
    is_lossless: bool  # for float32 and for 8-bit pictures respectively
    per_channel: bool
    is_image: bool
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A codec id taken apart: just one of `bits`, `float_format`, `keep`, `image` and `learned` says what kind it is."""

    name: str
    bits: int = 0
    float_format: str = ""
    per_channel: bool = False
    clip: bool = False
    entropy: Entropy = ""
    keep: float = 0.0  # share of the values that a sparse codec keeps
    image: str = ""
    quality: int = 0  # 101: lossless
    learned: str = ""  # the first 16 hexadecimal digits of the sha256 of a learned codec's file


@lru_cache(maxsize=512)
def recipe(codec_id: str) -> Recipe:
    """Take `codec_id` apart; raises CodecError for an unknown one, naming what there is."""
    if found := _FLOAT.fullmatch(codec_id):
        return Recipe(name=codec_id, float_format=found[1], entropy=_entropy(found[2]))
    if (found := _CODES.fullmatch(codec_id)) and (not found[3] or int(found[1]) in CLIPPED_BITS):
        return Recipe(
            name=codec_id, bits=int(found[1]), per_channel=bool(found[2]), clip=bool(found[3]), entropy=_entropy(found[4])
        )
    if found := _SPARSE.fullmatch(codec_id):
        return Recipe(name=codec_id, keep=float(found[1]) / 100, entropy=_entropy(found[2]))
    if found := _IMAGE.fullmatch(codec_id):
        quality = found[3] or found[5] or "lossless"
        return Recipe(
            name=codec_id, image=found[1] or found[2] or found[4], quality=101 if quality == "lossless" else int(quality)
        )
    if found := _LEARNED.fullmatch(codec_id):
        return Recipe(name=codec_id, learned=found[2])
    if codec_id == LOCAL:
        raise CodecError(
            f'codec "{LOCAL}" moves nothing: source and target are one device; hand the tensors over as they are'
        )
    raise CodecError(
        f'codec "{codec_id:.40}" is not known; write fp32, fp16, bf16, int8, int6, int4, int3 or int2 (int4c: per channel, '
        f"int4clip, int4cclip: clipped) or topk:10 (percent kept), +zstd, +deflate or +rans behind it; pixels, png, "
        f"jpeg:90, webp:80, webp:lossless or avif:60 for pictures; learned:NAME@HASH for a trained bottleneck"
    )


def _entropy(text: str | None) -> Entropy:
    return cast(Entropy, text or "")


def info(codec_id: str) -> CodecInfo:
    """What `codec_id` promises; raises CodecError for an unknown id."""
    parts = recipe(codec_id)
    return CodecInfo(
        name=codec_id,
        bits=parts.bits or FLOAT_BITS.get(parts.float_format, 0),
        is_lossless=parts.float_format == "fp32" or parts.quality == 101,
        per_channel=parts.per_channel,
        is_image=bool(parts.image),
        summary=_summary(parts),
    )


@lru_cache(maxsize=1)
def catalogue() -> tuple[CodecInfo, ...]:
    """Every codec but the learned ones, with the usual qualities and shares (any from 1 to 100 and 0.1 to 99 works)."""
    names = [_with(base, entropy) for base in FLOAT_BITS for entropy in BYTE_ENTROPIES]
    for bits in INTEGER_BITS:
        clipped = [f"int{bits}clip", f"int{bits}cclip"] if bits in CLIPPED_BITS else []
        names += [_with(base, entropy) for base in (f"int{bits}", f"int{bits}c", *clipped) for entropy in ENTROPIES]
    names += [_with(f"topk:{share}", entropy) for share in TOP_SHARES for entropy in ENTROPIES]
    names += ["pixels", "png", "webp:lossless"]
    names += [f"{kind}:{quality}" for kind, qualities in IMAGE_QUALITIES.items() for quality in qualities]
    return tuple(info(name) for name in names)


def _with(base: str, entropy: Entropy) -> str:
    return f"{base}+{entropy}" if entropy else base


def _summary(parts: Recipe) -> str:
    if parts.learned:
        return "a trained bottleneck for one cut of one model"
    if parts.image == "pixels":
        return "8-bit pixels of the input picture, as they are"
    if parts.image:
        quality = "lossless" if parts.quality == 101 else f"quality {parts.quality}"
        return f"{parts.image.upper()} of the input picture, {quality}"
    if parts.float_format:
        text = {"fp32": "as it is", "fp16": "half precision", "bf16": "bfloat16"}[parts.float_format]
    elif parts.keep:
        text = f"the largest {100 * parts.keep:g} % of each item, the rest zero"
    else:
        ranges = ("each channel" if parts.per_channel else "each item") + (", tails clipped" if parts.clip else "")
        text = f"{parts.bits} bits over the range of {ranges}"
    return text + (f", then {parts.entropy}" if parts.entropy else "")
