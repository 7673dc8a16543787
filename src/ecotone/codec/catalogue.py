"""Which codecs there are and what their ids mean: "int4c+zstd" is 4 bits, one range per channel, then zstd.

An id is `base[+entropy]` or an image codec with its quality. Ids are plain strings, because plans, profiles and bodies
carry them; only this file takes them apart. What each one does to a tensor stands in tensors.py and image.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

from ecotone.plan import LOCAL
from ecotone.units import EcotoneError

__all__ = ["CANDIDATES", "IMAGE_CANDIDATES", "CodecError", "CodecInfo", "Recipe", "catalogue", "info", "recipe"]

Entropy = Literal["", "zstd", "deflate"]
FLOAT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}
INTEGER_BITS = (8, 6, 4, 3, 2)
CLIPPED_BITS = (4, 3, 2)  # above 4 bits the tails cost less than clipping them
ENTROPIES: tuple[Entropy, ...] = ("", "zstd", "deflate")
IMAGE_QUALITIES = {"jpeg": (95, 90, 75, 50), "webp": (90, 80, 50)}
# Worth measuring by default: one of each kind that can be the best plan somewhere.
CANDIDATES = (
    "fp32", "fp16", "fp16+zstd", "int8", "int8+zstd", "int6+zstd", "int4", "int4+zstd", "int4c+zstd",
    "int3clip+zstd", "int3c+zstd", "int2clip+zstd",
)  # fmt: skip
IMAGE_CANDIDATES = ("pixels", "png", "webp:80", "jpeg:95", "jpeg:90", "jpeg:75")

_BASE = re.compile(r"(?:(fp32|fp16|bf16)|int([86432])(c|clip)?)(?:\+(zstd|deflate))?")
_IMAGE = re.compile(r"(png|pixels)|(jpeg):([1-9][0-9]?|100)|(webp):([1-9][0-9]?|100|lossless)")


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
    """A codec id taken apart. `bits` 0: keep a float format (`float_format`), or a picture (`image`)."""

    name: str
    bits: int = 0
    float_format: str = ""
    per_channel: bool = False
    clip: bool = False
    entropy: Entropy = ""
    image: str = ""
    quality: int = 0  # 101: lossless


@lru_cache(maxsize=512)
def recipe(codec_id: str) -> Recipe:
    """Take `codec_id` apart; raises CodecError for an unknown one, naming what there is."""
    if found := _BASE.fullmatch(codec_id):
        floating, bits, suffix, entropy = found.groups()
        if suffix != "clip" or int(bits) in CLIPPED_BITS:
            return Recipe(
                name=codec_id, bits=int(bits or 0), float_format=floating or "", per_channel=suffix == "c",
                clip=suffix == "clip", entropy=cast(Entropy, entropy or ""),
            )  # fmt: skip
    if found := _IMAGE.fullmatch(codec_id):
        lossless, jpeg, jpeg_quality, _, webp_quality = found.groups()
        quality = jpeg_quality or webp_quality or "lossless"
        return Recipe(
            name=codec_id, image=lossless or jpeg or "webp", quality=101 if quality == "lossless" else int(quality)
        )
    if codec_id == LOCAL:
        raise CodecError(
            f'codec "{LOCAL}" moves nothing: source and target are one device; hand the tensors over as they are'
        )
    raise CodecError(
        f'codec "{codec_id:.40}" is not known; write fp32, fp16, bf16, int8, int6, int4, int3 or int2 (int4c: per channel, '
        f"int4clip: clipped), +zstd or +deflate behind it, or pixels, png, jpeg:90, webp:80, webp:lossless for pictures"
    )


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
    """Every codec, with the usual qualities of the image codecs (any quality from 1 to 100 works)."""
    bases = [*FLOAT_BITS]
    for bits in INTEGER_BITS:
        bases += [f"int{bits}", f"int{bits}c"] + ([f"int{bits}clip"] if bits in CLIPPED_BITS else [])
    names = [base + (f"+{entropy}" if entropy else "") for base in bases for entropy in ENTROPIES]
    names += [
        "pixels",
        "png",
        "webp:lossless",
        *(f"{kind}:{q}" for kind, qualities in IMAGE_QUALITIES.items() for q in qualities),
    ]
    return tuple(info(name) for name in names)


def _summary(parts: Recipe) -> str:
    if parts.image == "pixels":
        return "8-bit pixels of the input picture, as they are"
    if parts.image:
        quality = "lossless" if parts.quality == 101 else f"quality {parts.quality}"
        return f"{parts.image.upper()} of the input picture, {quality}"
    if parts.float_format:
        text = {"fp32": "as it is", "fp16": "half precision", "bf16": "bfloat16"}[parts.float_format]
    else:
        ranges = "each channel" if parts.per_channel else "each item, tails clipped" if parts.clip else "each item"
        text = f"{parts.bits} bits over the range of {ranges}"
    return text + (f", then {parts.entropy}" if parts.entropy else "")
