"""Clusters and model shapes for planning language models without machines: EdgeShard's testbed, and random homes.

Times follow what bounds a phase: decoding reads the weights once per frame (bytes / memory bandwidth) and computes little
per row; a prompt computes 2 FLOP per weight and token. EdgeShard's figure for Llama2-7B in full precision on one AGX Orin,
140 ms per token, is 27 GB at 0.95 of its 205 GB/s: the model is calibrated there and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecotone.cluster import Cluster, Device, DeviceId, KindLink, Link
from ecotone.llmprofile import EMBEDDING, HEAD, Curve, ExecutorFacts, LayerPart, LlmProfile, PartTime

GIGABYTE = 1_000_000_000
EFFICIENCY = 0.95  # of memory bandwidth, see above
BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.5, "int4": 4.7}
LOSS = {"fp32": 0.0, "bf16": 0.0005, "int8": 0.001, "int4": 0.03}


@dataclass(frozen=True)
class Model:
    """A Llama shape: layers, width, FFN width, key-value width, vocabulary."""

    name: str
    layers: int
    width: int
    ffn: int
    kv: int
    vocabulary: int = 32_000

    @property
    def layer_weights(self) -> int:
        return 2 * self.width * (self.width + self.kv) + 3 * self.width * self.ffn

    @property
    def table_weights(self) -> int:
        return self.vocabulary * self.width


LLAMA2 = (
    Model("llama2-7b", 32, 4096, 11008, 4096),
    Model("llama2-13b", 40, 5120, 13824, 5120),
    Model("llama2-70b", 80, 8192, 28672, 1024),
)
SMALLER = (Model("llama-1b", 16, 2048, 8192, 512), Model("llama-3b", 28, 3072, 8192, 1024), LLAMA2[0])


@dataclass(frozen=True)
class Kind:
    """A kind of machine: FLOP/s, bytes/s of memory, bytes of memory."""

    name: str
    flop_per_s: float
    bytes_per_s: float
    memory_bytes: int


AGX = Kind("agx-orin", 3.33e12, 204.8e9, 32 * GIGABYTE)
NX = Kind("orin-nx", 1.88e12, 102.4e9, 16 * GIGABYTE)
RTX = Kind("rtx3090", 36e12, 936e9, 24 * GIGABYTE)


def profile(model: Model, kinds: Sequence[Kind], precisions: Sequence[str]) -> LlmProfile:
    """Times of every part on every kind, by what bounds them."""
    times = [row for kind in kinds for precision in precisions for row in _parts(model, kind, precision)]
    facts = tuple(
        ExecutorFacts(
            executor=f"torch:{p}", kv_bytes_per_token=2 * model.kv * (4 if p == "fp32" else 2), loss=LOSS[p], is_assumed=True
        )
        for p in precisions
    )
    return LlmProfile(
        model_hash=model.name, model=model.name, width=model.width, max_positions=4096, kinds=(LayerPart(part="0"),),
        layers=("0",) * model.layers, times=tuple(times), executors=facts, codec_losses={"bf16": 0.0005},
    )  # fmt: skip


def _parts(model: Model, kind: Kind, precision: str) -> list[PartTime]:
    made = []
    for part, weights in (("0", model.layer_weights), (HEAD, model.table_weights), (EMBEDDING, 0)):
        size = weights * BITS[precision] / 8
        read_s, token_s = size / (kind.bytes_per_s * EFFICIENCY), 2 * weights / kind.flop_per_s
        pair_s = 4 * model.width / kind.flop_per_s if part == "0" else 0.0
        held = int(size) if part != EMBEDDING else model.table_weights * (4 if precision == "fp32" else 2)
        made.append(
            PartTime(
                device=kind.name, executor=f"torch:{precision}", part=part, weight_bytes=held,
                prefill=Curve(fixed_s=1e-5, token_s=max(token_s, 1e-9), pair_s=pair_s),
                decode=Curve(fixed_s=read_s + 1e-5, token_s=token_s, pair_s=pair_s),
            )
        )  # fmt: skip
    return made


def edgeshard_testbed(source_bytes_per_s: float, others_bytes_per_s: float = 125e6) -> Cluster:
    """12 AGX Orin, 2 Orin NX and an RTX 3090, the first AGX the source, whose links to and from the others are stated."""
    kinds = [AGX] * 12 + [NX] * 2 + [RTX]
    names = [DeviceId(f"{kind.name}-{i}") for i, kind in enumerate(kinds)]
    devices = tuple(
        Device(name=name, kind=kind.name, memory_bytes=kind.memory_bytes) for name, kind in zip(names, kinds, strict=True)
    )
    own = tuple(
        Link(source=a, target=b, latency_s=5e-4, bandwidth_bytes_per_s=source_bytes_per_s)
        for other in names[1:]
        for a, b in ((names[0], other), (other, names[0]))
    )
    by_kind = tuple(
        KindLink(source_kind=a.name, target_kind=b.name, latency_s=5e-4, bandwidth_bytes_per_s=others_bytes_per_s)
        for a, b in itertools.product((AGX, NX, RTX), repeat=2)
    )
    return Cluster(name="edgeshard", devices=devices, links=own, kind_links=by_kind, source=names[0], sink=names[0])


def random_home(seed: int) -> tuple[LlmProfile, Cluster]:
    """3 to 7 machines that share no kind, memory not following speed, links from a local network to a wide-area one.

    All of them together hold 1.3 to 4 times the model in int8.
    """
    rng = np.random.default_rng(seed)
    model = SMALLER[int(rng.integers(len(SMALLER)))]
    count = int(rng.integers(3, 8))
    size = (model.layers * model.layer_weights + 2 * model.table_weights) * BITS["int8"] / 8
    shares = rng.uniform(0.2, 1.0, count)
    shares *= rng.uniform(1.3, 4.0) / shares.sum()
    kinds = [
        Kind(
            f"k{i}",
            float(10 ** rng.uniform(10.5, 13)),
            float(10 ** rng.uniform(10, 11.7)),
            int(shares[i] * size) + GIGABYTE // 2,
        )
        for i in range(count)
    ]
    names = [DeviceId(f"m{i}") for i in range(count)]
    wide = rng.random() < 0.5
    links = []
    for a, b in itertools.permutations(range(count), 2):
        latency = rng.uniform(5e-3, 4e-2) if wide else rng.uniform(1e-4, 3e-3)
        rate = 10 ** (rng.uniform(5.8, 7.3) if wide else rng.uniform(6.5, 8.2))
        links.append(Link(source=names[a], target=names[b], latency_s=float(latency), bandwidth_bytes_per_s=float(rate)))
    devices = tuple(Device(name=n, kind=k.name, memory_bytes=k.memory_bytes) for n, k in zip(names, kinds, strict=True))
    cluster = Cluster(name=f"home-{seed}", devices=devices, links=tuple(links), source=names[0], sink=names[0])
    return profile(model, kinds, ("bf16", "int8")), cluster
