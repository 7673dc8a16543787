"""Small worlds with round numbers for the simulator's tests: a chain of blocks, devices in a row, stated times and bytes."""

from __future__ import annotations

from itertools import pairwise

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.graph import Block, Graph, Tensor, TensorIndex
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.profile import CodecCost, Profile, SegmentTime

FRONTIER_BYTES = 400_000


def chain(num_blocks: int) -> Graph:
    """Blocks in a row, each frontier one float32 tensor of 400 kB."""
    tensors = tuple(
        Tensor(name=f"t{i}", shape=(FRONTIER_BYTES // 4,), dtype="float32", producer=i - 1) for i in range(num_blocks + 1)
    )
    blocks = tuple(
        Block(name=f"b{i}", inputs=(TensorIndex(i),), outputs=(TensorIndex(i + 1),), flop=1.0) for i in range(num_blocks)
    )
    return Graph(name="chain", blocks=blocks, tensors=tensors, inputs=(TensorIndex(0),), outputs=(TensorIndex(num_blocks),))


def cluster_of(names: str, *, rate: float = 1e8, latency_s: float = 1e-4) -> Cluster:
    """Devices named by letters, the first is source and sink, all joined by alike links."""
    ids = [DeviceId(n) for n in names]
    devices = tuple(Device(name=n, memory_bytes=1 << 30) for n in ids)
    links = tuple(
        Link(source=a, target=b, latency_s=latency_s, bandwidth_bytes_per_s=rate) for a in ids for b in ids if a != b
    )
    return Cluster(name="test", devices=devices, links=links, source=ids[0], sink=ids[0])


def plan_of(graph: Graph, stages: str, *, source: str = "a", epoch: int = 0) -> Plan:
    """One block per stage on the named devices; source and sink as given."""
    ends = [DeviceId(source), *(DeviceId(n) for n in stages), DeviceId(source)]
    transfers = tuple(
        Transfer(source=a, target=b, position=i, codec=LOCAL if a == b else "fp32")
        for i, (a, b) in enumerate(pairwise(ends))
    )
    made = tuple(Stage(device=d, start=i, stop=i + 1) for i, d in enumerate(ends[1:-1]))
    return Plan(graph_hash=graph.content_hash(), stages=made, transfers=transfers, epoch=epoch)


def profile_of(graph: Graph, seconds: dict[str, list[float]], *, coding_s: float = 0.0) -> Profile:
    """`seconds[device][block]`; every segment is the sum of its blocks. Encoding and decoding take `coding_s` each."""
    length = graph.num_blocks
    segments = tuple(
        SegmentTime(
            device=DeviceId(d),
            executor="torch:fp32",
            start=a,
            stop=b,
            median_s=sum(times[a:b]),
            spread_s=0.0,
            memory_bytes=0,
        )
        for d, times in seconds.items()
        for a in range(length)
        for b in range(a + 1, length + 1)
    )
    codecs = tuple(
        CodecCost(
            device=DeviceId(d),
            codec="fp32",
            encode_fixed_s=coding_s,
            encode_s_per_raw_byte=0.0,
            decode_fixed_s=coding_s,
            decode_s_per_raw_byte=0.0,
        )
        for d in seconds
    )
    return Profile(
        graph_hash=graph.content_hash(),
        cluster_name="test",
        num_blocks=length,
        cuts=tuple(range(length + 1)),
        segments=segments,
        codecs=codecs,
    )
