"""Clusters of many users for tests: end devices u0, u1, ... each with links of its own to a server s (and a cloud c)."""

from __future__ import annotations

from collections.abc import Sequence

from worlds import chain, profile_of

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.graph import Graph
from ecotone.media import RadioCell, Sender, SharedWire
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.profile import Profile
from ecotone.workload import User, Workload

SERVER = DeviceId("s")


def ends(count: int) -> list[DeviceId]:
    return [DeviceId(f"u{i}") for i in range(count)]


def star(
    count: int, *, rate: float = 1e7, latency_s: float = 1e-3, shared: float = 0.0, back: float = 1e9
) -> tuple[Graph, Cluster]:
    """A chain of two blocks; `rate` of each uplink, `back` of each downlink, `shared` of a wire that all uplinks pass."""
    devices = tuple(Device(name=d, memory_bytes=1 << 30) for d in (*ends(count), SERVER))
    links = tuple(
        Link(source=a, target=b, latency_s=latency_s, bandwidth_bytes_per_s=r)
        for u in ends(count)
        for a, b, r in ((u, SERVER, rate), (SERVER, u, back))
    )
    wires = (SharedWire(name="wire", bandwidth_bytes_per_s=shared, links=("*>s",)),) if shared else ()
    cluster = Cluster(name="test", devices=devices, links=links, source=ends(1)[0], sink=ends(1)[0], shared=wires)
    return chain(2), cluster


def cell_of(distances: Sequence[float], *, num_channels: int = 2) -> tuple[Graph, Cluster]:
    """The same over a radio cell, senders at these distances; the way back is quick."""
    names = ends(len(distances))
    radio = RadioCell(
        name="cell", receiver=SERVER, num_channels=num_channels,
        sender=tuple(Sender(device=n, distance_m=d) for n, d in zip(names, distances, strict=True)),
    )  # fmt: skip
    devices = tuple(Device(name=d, memory_bytes=1 << 30) for d in (*names, SERVER))
    up = [Link(source=n, target=SERVER, latency_s=0.0, bandwidth_bytes_per_s=radio.alone_bytes_per_s(n)) for n in names]
    down = [Link(source=SERVER, target=n, latency_s=0.0, bandwidth_bytes_per_s=1e10) for n in names]
    cluster = Cluster(
        name="test", devices=devices, links=(*up, *down), source=names[0], sink=names[0], radios=(radio,)
    )  # fmt: skip
    return chain(2), cluster


def seconds_of(graph: Graph, count: int, here: Sequence[float], server: Sequence[float]) -> Profile:
    """Seconds of the two blocks on every end device and on the server; coding is free."""
    return profile_of(graph, {**{d: list(here) for d in ends(count)}, SERVER: list(server)})


def offloading(graph: Graph, user: str, cut: int, codec: str = "fp32") -> Plan:
    """Blocks up to `cut` on the user's device, the rest on the server; the result comes back."""
    source = DeviceId(user)
    if cut == graph.num_blocks:
        stages = (Stage(device=source, start=0, stop=cut),)
        moves = [(source, source, 0), (source, source, cut)]
    elif cut == 0:
        stages = (Stage(device=SERVER, start=0, stop=graph.num_blocks),)
        moves = [(source, SERVER, 0), (SERVER, source, graph.num_blocks)]
    else:
        stages = (Stage(device=source, start=0, stop=cut), Stage(device=SERVER, start=cut, stop=graph.num_blocks))
        moves = [(source, source, 0), (source, SERVER, cut), (SERVER, source, graph.num_blocks)]
    transfers = tuple(
        Transfer(source=a, target=b, position=p, codec=LOCAL if a == b else codec) for a, b, p in moves
    )  # fmt: skip
    return Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)


def open_users(count: int, rate_per_s: float, **more: object) -> Workload:
    """Poisson users u0, u1, ... of one rate."""
    users = tuple(User(name=str(d), source=d, rate_per_s=rate_per_s, **more) for d in ends(count))  # type: ignore[arg-type]
    return Workload(name="test", users=users)


def closed_users(count: int, in_flight: int = 1, **more: object) -> Workload:
    """Users u0, u1, ... with so many requests under way at once."""
    users = tuple(User(name=str(d), source=d, in_flight=in_flight, **more) for d in ends(count))  # type: ignore[arg-type]
    return Workload(name="test", users=users)
