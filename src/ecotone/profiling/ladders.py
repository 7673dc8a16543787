"""Ladders: codecs that differ only in bits (or in quality), and losses made monotone along them.

More bits never lose more, so a measured loss that says otherwise is noise: of all monotone sequences the fit takes the
nearest in weighted least squares (pool adjacent violators, Ayer et al. 1955; O(n)), never below 0. With the number of
decisions as weights that is also the likeliest monotone sequence of shares (Robertson, Wright, Dykstra 1988, ch. 1). The
entropy stage is no rung: it changes bytes, not values. This is step 3 of DynO's offline half (arXiv 2104.09949).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from ecotone.codec.catalogue import info, recipe

__all__ = ["fitted_losses", "is_exact", "pooled", "rung", "value_codec"]

Place = TypeVar("Place", bound=Hashable)


def value_codec(codec: str) -> str:
    """The id whose values `codec` gives: itself without the lossless coder behind it. Equal ids, equal tensors."""
    return codec.partition("+")[0]


def is_exact(codec: str) -> bool:
    """It gives back any tensor bit for bit. (A lossless picture codec does so only where pixels are inside.)"""
    known = info(codec)
    return known.is_lossless and not known.is_image


def rung(codec: str) -> tuple[str, int]:
    """Ladder and height of a codec: "int4c+zstd" is at ("int#c", 4), "jpeg:90" at ("jpeg:#", 90), "fp16" alone on its own.

    Raises CodecError for an unknown id.
    """
    parts, values = recipe(codec), value_codec(codec)
    height = parts.bits or (parts.quality if parts.image and parts.quality <= 100 else 0)
    return values.replace(str(height), "#", 1) if height else values, height


def pooled(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-increasing sequence nearest to `values` in least squares with positive `weights`."""
    groups: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        mean, total, count = value, weight, 1
        while groups and groups[-1][0] < mean:
            before, size, length = groups.pop()
            mean, total, count = (before * size + mean * total) / (size + total), size + total, length + count
        groups.append((mean, total, count))
    return [mean for mean, _, count in groups for _ in range(count)]


def fitted_losses(losses: Mapping[tuple[Place, str], tuple[float, float]]) -> dict[tuple[Place, str], float]:
    """The fitted loss of every (place, codec), from its (loss, weight): ladders are fitted place by place, clipped at 0."""
    ladders: dict[tuple[Place, str], list[tuple[int, str]]] = {}
    for place, codec in losses:
        ladder, height = rung(codec)
        ladders.setdefault((place, ladder), []).append((height, codec))
    found: dict[tuple[Place, str], float] = {}
    for (place, _), rungs in ladders.items():
        heights = sorted({height for height, _ in rungs})
        at = {height: [losses[place, codec] for own, codec in rungs if own == height] for height in heights}
        weights = [sum(weight for _, weight in at[height]) for height in heights]
        means = [sum(loss * w for loss, w in at[h]) / weight for h, weight in zip(heights, weights, strict=True)]
        fit = dict(zip(heights, pooled(means, weights), strict=True))
        found |= {(place, codec): max(0.0, fit[height]) for height, codec in rungs}
    return found
