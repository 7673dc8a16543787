"""The world of SAC-d and Edgent: AlexNet for CIFAR-10 with five exits on a small device, a server behind a link.

Measured: A(exit, cut, bits), by branchy_training.py. From the shapes: FLOP and bytes. Assumed: seconds, as FLOP / speed and
a fixed part a block, at effective speeds of a Raspberry Pi 4 class device and a desktop class server (the published
measurements are not public). Shapes: BranchyNet's AlexNet (ICPR 2016), batch norm for LRN; exits after convolutions 1, 2, 3
and 5, the first head with two convolutions, the next two with one, and the end of the network.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from ecotone.accuracy import AccuracyTable
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.graph import Block, Exit, Graph, Tensor, TensorIndex
from ecotone.profile import CodecCost, ExitTime, Profile, SegmentTime

__all__ = ["CODECS", "EXITS", "TABLE", "cluster", "graph", "profile"]

TABLE = Path(__file__).parent / "tables" / "branchy_alexnet.json"
DEVICE, SERVER, EXECUTOR = DeviceId("pi"), DeviceId("pc"), "torch:fp32"
CODECS = {2: "int2", 3: "int3", 4: "int4", 6: "int6", 8: "int8", 16: "fp16"}
SHAPES = ((3, 32, 32), (32, 16, 16), (64, 8, 8), (96, 8, 8), (96, 8, 8), (64, 4, 4), (256,), (10,))
BLOCKS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2")
EXITS = {"exit1": 1, "exit2": 2, "exit3": 3, "exit4": 5}  # name: position; the end of the network is the fifth
# Multiply-adds of each block and each head, from the shapes: output places * kernel * inputs * outputs.
MACS = (
    1024 * 25 * 3 * 32, 256 * 25 * 32 * 64, 64 * 9 * 64 * 96, 64 * 9 * 96 * 96, 64 * 9 * 96 * 64, 1024 * 256,
    256 * 128 + 128 * 10,
)  # fmt: skip
HEAD_MACS = {
    "exit1": 256 * 9 * 32 * 32 + 64 * 9 * 32 * 32 + 512 * 10, "exit2": 64 * 9 * 64 * 32 + 512 * 10,
    "exit3": 64 * 9 * 96 * 32 + 512 * 10, "exit4": 1024 * 10,
}  # fmt: skip
FLOP_PER_S = {DEVICE: 2e9, SERVER: 50e9}
FIXED_S = {DEVICE: 4e-4, SERVER: 5e-5}  # of one block or head
CODEC_S = {DEVICE: (2e-4, 4e-9), SERVER: (3e-5, 4e-10)}  # of one tensor, and of one byte of its float32
RATE_BYTES_PER_S, LATENCY_S = 4e6 / 8, 0.002


def graph() -> Graph:
    """Seven blocks in a chain, four exits."""
    tensors = tuple(
        Tensor(name=f"t{i}", shape=(1, *shape), dtype="float32", producer=i - 1) for i, shape in enumerate(SHAPES)
    )
    blocks = tuple(
        Block(name=name, inputs=(TensorIndex(i),), outputs=(TensorIndex(i + 1),), flop=2.0 * MACS[i])
        for i, name in enumerate(BLOCKS)
    )
    exits = tuple(Exit(name=name, position=p, flop=2.0 * HEAD_MACS[name]) for name, p in EXITS.items())
    last = TensorIndex(len(BLOCKS))
    return Graph(
        name="branchy_alexnet", blocks=blocks, tensors=tensors, inputs=(TensorIndex(0),), outputs=(last,), exits=exits
    )


def cluster() -> Cluster:
    """Device and server; the link as stated, which traces replace."""
    links = tuple(
        Link(source=a, target=b, latency_s=LATENCY_S, bandwidth_bytes_per_s=RATE_BYTES_PER_S)
        for a, b in pairwise((DEVICE, SERVER, DEVICE))
    )
    devices = tuple(Device(name=name, memory_bytes=1 << 30) for name in (DEVICE, SERVER))
    return Cluster(name="pi-pc", devices=devices, links=links, source=DEVICE, sink=DEVICE, emulate=True)


def table() -> AccuracyTable:
    """The measured accuracies."""
    return AccuracyTable.from_json(TABLE.read_bytes(), str(TABLE))


def profile(accuracy: AccuracyTable | None = None) -> Profile:
    """Seconds of every segment, head and codec as assumed, with the measured table (or `accuracy`)."""
    net = graph()
    count = net.num_blocks
    segments = tuple(
        SegmentTime(
            device=d, executor=EXECUTOR, start=a, stop=b, spread_s=0.0, memory_bytes=0,
            median_s=net.segment_flop(a, b) / FLOP_PER_S[d] + (b - a) * FIXED_S[d],
        )
        for d in (DEVICE, SERVER) for a in range(count) for b in range(a + 1, count + 1)
    )  # fmt: skip
    heads = tuple(
        ExitTime(device=d, executor=EXECUTOR, exit=e.name, median_s=e.flop / FLOP_PER_S[d] + FIXED_S[d])
        for d in (DEVICE, SERVER) for e in net.exits
    )  # fmt: skip
    codecs = tuple(
        CodecCost(
            device=d, codec=codec, encode_fixed_s=fixed, encode_s_per_raw_byte=rate, decode_fixed_s=fixed,
            decode_s_per_raw_byte=rate,
        )
        for d, (fixed, rate) in CODEC_S.items() for codec in CODECS.values()
    )  # fmt: skip
    return Profile(
        graph_hash=net.content_hash(), cluster_name="pi-pc", num_blocks=count, cuts=tuple(range(count + 1)),
        segments=segments, exits=heads, codecs=codecs, accuracy=accuracy or table(),
    )  # fmt: skip
