"""What codecs cost on this machine, and what they do to a model's frontiers: bytes, error of the answer, flipped decisions.

Seconds are fitted as fixed + per uncompressed byte over several sizes of activation-like data. Bytes, error and
disagreement come from real inputs through the real codec and the rest of the model in eager float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ecotone import codec
from ecotone.cluster import DeviceId
from ecotone.codec import CodecError, ImageSpec
from ecotone.model import Captured
from ecotone.profile import CodecCost, Payload
from ecotone.profiling.crossings import Answer, Crossings, Sent
from ecotone.profiling.decisions import count_differing, decided
from ecotone.profiling.job import Frontiers, frontier_values
from ecotone.profiling.ladders import value_codec
from ecotone.profiling.link import fit_line
from ecotone.profiling.measurement import Progress
from ecotone.profiling.timing import Sweep, collector_off, median_and_spread, timed_s
from ecotone.profiling.work import error_of, error_terms

__all__ = ["PayloadSums", "codec_ids", "learned_positions", "payloads", "profile_codecs"]

SIZES_BYTES = (1 << 14, 1 << 18, 1 << 20)
ROUNDS = 5


def codec_ids(stated: Sequence[str]) -> tuple[str, ...]:
    """`stated`, or the usual candidates (images among them) where nothing is; raises CodecError for an unknown id."""
    names = tuple(stated) or (*codec.CANDIDATES, *codec.IMAGE_CANDIDATES)
    for name in names:
        codec.info(name)
    return names


def learned_positions(codecs: Sequence[str]) -> tuple[int, ...]:
    """The cuts of the learned codecs among `codecs`; raises CodecError where one is not here."""
    found = {codec.position_of(name) for name in codecs if name.startswith("learned:")}
    return tuple(sorted(position for position in found if position is not None))


def profile_codecs(
    device: DeviceId,
    codecs: Sequence[str] = (),
    *,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    rounds: int = ROUNDS,
    image: ImageSpec | None = None,
    picture: torch.Tensor | None = None,
    frontiers: Frontiers | None = None,
    progress: Progress | None = None,
) -> tuple[CodecCost, ...]:
    """Encode and decode seconds of each codec here, one thread, as `device`; one that this machine lacks is left out.

    `picture` is a real input, `image` how its pixels became it: image codecs are timed on that one, since their time
    depends on what is seen and they carry nothing else. Learned codecs are timed on the tensor of `frontiers` at their cut.
    """
    names = codec_ids(codecs)
    costs = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    sweep = Sweep()
    try:
        for number, name in enumerate(names):
            tensors = _to_code(name, sizes_bytes, image, picture, frontiers)
            try:
                with collector_off():
                    points = [_codec_times(name, tensor, image, rounds, sweep) for tensor in tensors]
            except CodecError:
                points = []  # no AVIF here
            if not points:
                continue
            encode_fixed, encode_rate = fit_line([(size, encode) for size, encode, _ in points])
            decode_fixed, decode_rate = fit_line([(size, decode) for size, _, decode in points])
            costs.append(
                CodecCost(
                    device=device,
                    codec=name,
                    encode_fixed_s=encode_fixed,
                    encode_s_per_raw_byte=encode_rate,
                    decode_fixed_s=decode_fixed,
                    decode_s_per_raw_byte=decode_rate,
                )
            )
            if progress:
                progress(number + 1, len(names), f"codec {name}")
    finally:
        torch.set_num_threads(before)
    return tuple(costs)


def _to_code(
    name: str,
    sizes_bytes: Sequence[int],
    image: ImageSpec | None,
    picture: torch.Tensor | None,
    frontiers: Frontiers | None,
) -> list[torch.Tensor]:
    if name.startswith("learned:"):
        return [tensors[0] for tensors in (frontiers or {}).get(codec.position_of(name) or 0, ())[:1]]
    if not codec.info(name).is_image:
        return [_activation(size) for size in sizes_bytes]
    return [_picture(size, image) for size in sizes_bytes] if picture is None else [picture]


def _codec_times(
    name: str, tensor: torch.Tensor, image: ImageSpec | None, rounds: int, sweep: Sweep
) -> tuple[float, float, float]:
    """Raw bytes, median seconds to encode and to decode a body of `tensor`."""
    named = [("activation", tensor)]
    body = codec.pack(named, name, image=image)
    codec.unpack(body)  # both are warm now
    encodes, decodes = [], []
    for _ in range(rounds):
        sweep()
        encodes.append(timed_s(lambda: codec.pack(named, name, image=image)))
        sweep()
        decodes.append(timed_s(lambda: codec.unpack(body)))
    return float(tensor.numel() * 4), median_and_spread(encodes)[0], median_and_spread(decodes)[0]


def _activation(size_bytes: int) -> torch.Tensor:
    """Smooth noise after ReLU, as convolutions leave it."""
    return _noise(size_bytes, 64).relu()


def _picture(size_bytes: int, image: ImageSpec | None) -> torch.Tensor:
    """Smooth noise of three channels in 8 bits, as `image` says that pixels become an input."""
    pixels = (128 + 50 * _noise(size_bytes, 3)).round().clamp(0, 255)
    spec = image or ImageSpec()
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (spec.mean, spec.std))
    return (pixels / 255 - mean) / std


def _noise(size_bytes: int, channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size_bytes)
    side = max(4, round((size_bytes / 4 / channels) ** 0.5))
    coarse = torch.randn(1, channels, max(2, side // 4), max(2, side // 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def payloads(
    captured: Captured,
    samples: Sequence[Sequence[torch.Tensor]],
    cuts: Sequence[int],
    codecs: Sequence[str] = (),
    *,
    image: ImageSpec | None = None,
    frontiers: Frontiers | None = None,
    progress: Progress | None = None,
) -> tuple[Payload, ...]:
    """Every cut under every codec that can code it; image codecs at cut 0 only. `samples` are flat inputs.

    `image` says how pixels became the input, as for `codec.pack`: without it image codecs stretch the range of each.
    """
    cuts = tuple(cuts)
    values = frontiers or frontier_values(captured, samples, cuts)
    crossings = Crossings(captured, cuts, codec_ids(codecs), image=image)
    sums = PayloadSums(codec_ids(codecs))
    answers = [Answer(outputs, {}) for outputs in values[cuts[-1]]]
    for number, cut in enumerate(cuts):
        for sent in crossings.sent_at(cut, values[cut], answers):
            sums.add(sent, answers)
        if progress:
            progress(number + 1, len(cuts), f"payloads at {cut}")
    return sums.payloads()


class PayloadSums:
    """What payloads are made of, added up batch by batch: bytes, error and changed decisions at every cut."""

    def __init__(self, codecs: Sequence[str]) -> None:
        self._codecs = tuple(codecs)
        self._bytes: dict[tuple[int, str], tuple[int, int]] = {}  # sum, samples
        self._errors: dict[tuple[int, str], tuple[float, float]] = {}  # by what gives equal values
        self._differ: dict[tuple[int, str], tuple[int, int, int]] = {}  # decisions unlike, decisions, samples

    def add(self, sent: Sent, wanted: Sequence[Answer]) -> None:
        """One batch; `wanted`: the answers with nothing sent."""
        for name, sizes in sent.sizes.items():
            total, count = self._bytes.get((sent.cut, name), (0, 0))
            self._bytes[sent.cut, name] = (total + sum(sizes), count + len(sizes))
        for mine, theirs in zip(sent.answers, wanted, strict=True):
            gap, size = error_terms(mine.outputs, theirs.outputs)
            differ, decisions = count_differing(decided(mine.outputs), decided(theirs.outputs))
            key = (sent.cut, sent.values)
            e, d = self._errors.get(key, (0.0, 0.0)), self._differ.get(key, (0, 0, 0))
            self._errors[key] = (e[0] + gap, e[1] + size)
            self._differ[key] = (d[0] + differ, d[1] + decisions, d[2] + 1)

    def payloads(self) -> tuple[Payload, ...]:
        """By cut, then in the order of the codecs."""
        found = []
        for cut, name in sorted(self._bytes, key=lambda key: (key[0], self._codecs.index(key[1]))):
            total, count = self._bytes[cut, name]
            differ, decisions, samples = self._differ[cut, value_codec(name)]
            error = error_of(*self._errors[cut, value_codec(name)])
            found.append(
                Payload(
                    position=cut, codec=name, size_bytes=total / count, relative_error=min(error, 1e9),
                    disagreement=differ / decisions if decisions else 0.0, num_samples=samples,
                )
            )  # fmt: skip
        return tuple(found)
