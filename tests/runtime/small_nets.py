"""Small models, clusters and plans for the runtime's tests."""

from __future__ import annotations

import torch

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.graph import Graph
from ecotone.model import Captured, capture
from ecotone.plan import LOCAL, Plan, Stage, Transfer

EXECUTOR = "torch:fp32"


class Convolutions(torch.nn.Module):
    """A small network with a skip over three convolutions, so that several tensors cross some cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.body = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 3, 1, 1) for _ in range(5))
        self.head = torch.nn.Linear(8, 10)

    def forward(self, picture: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.stem(picture))
        kept = x
        for layer in self.body:
            x = torch.relu(layer(x))
        return {"logits": self.head((x + kept).mean((2, 3))), "map": x}


class Lines(torch.nn.Module):
    """Linear layers with a skip: eager float32 gives the same bits in one piece or many, whatever the memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x
        for layer in self.layers:
            x = torch.relu(layer(x)) + kept
        return x


def lines() -> tuple[Captured, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    return capture(Lines().eval(), (x,), name="lines"), x


def convolutions() -> tuple[Captured, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(1, 3, 32, 32)
    return capture(Convolutions().eval(), (x,), name="convolutions"), x


def cluster(
    *names: str, rate: float = 1e9, latency_s: float = 0.0, slowdown: float = 1.0, emulate: bool = True, sink: str = ""
) -> Cluster:
    """All pairs linked alike; the first name is the source, and the sink unless another is named."""
    ids = [DeviceId(name) for name in names]
    devices = tuple(Device(name=name, memory_bytes=1 << 30, slowdown=slowdown if name != ids[0] else 1.0) for name in ids)
    links = tuple(
        Link(source=a, target=b, latency_s=latency_s, bandwidth_bytes_per_s=rate) for a in ids for b in ids if a != b
    )
    return Cluster(
        name="test", emulate=emulate, devices=devices, links=links, source=ids[0], sink=DeviceId(sink) if sink else ids[0]
    )


def plan(graph: Graph, *placed: tuple[str, int], codec: str = "fp32", source: str = "a", executor: str = EXECUTOR) -> Plan:
    """Stages ("device", stop) in order; every transfer between different devices in `codec`."""
    starts = [0, *(stop for _, stop in placed)]
    stages = tuple(
        Stage(device=DeviceId(device), start=start, stop=stop, executor=executor)
        for start, (device, stop) in zip(starts, placed, strict=False)
    )
    ends = [source, *(device for device, _ in placed), source]
    transfers = tuple(
        Transfer(source=DeviceId(s), target=DeviceId(t), position=p, codec=LOCAL if s == t else codec)
        for s, t, p in zip(ends, ends[1:], starts, strict=False)
    )
    return Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)


def even(graph: Graph, *devices: str, codec: str = "fp32", executor: str = EXECUTOR) -> Plan:
    """The blocks in equal parts over `devices`, in order."""
    length = graph.num_blocks
    return plan(
        graph, *((d, length * (i + 1) // len(devices)) for i, d in enumerate(devices)), codec=codec, executor=executor
    )


def shared_server(source: str, *, address: str = "", slowdown: float = 1.0) -> Cluster:
    """A device `source` and a server that is slow enough to be what users wait for; links are quick."""
    ends = DeviceId(source), DeviceId("server")
    devices = (
        Device(name=ends[0], memory_bytes=1 << 30),
        Device(name=ends[1], memory_bytes=1 << 30, slowdown=slowdown, address=address),
    )
    links = tuple(
        Link(source=a, target=b, latency_s=0.0, bandwidth_bytes_per_s=1e9) for a, b in (ends, ends[::-1])
    )  # fmt: skip
    return Cluster(name="shared", emulate=True, devices=devices, links=links, source=ends[0], sink=ends[0])
