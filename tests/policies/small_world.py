"""A small device-server world with exits and a measured accuracy table, for the tests of learned policies."""

from __future__ import annotations

from itertools import pairwise

from ecotone.accuracy import NOWHERE, AccuracyTable, Cell, ExitPolicy
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.cost import CostModel
from ecotone.graph import Block, Exit, Graph, Tensor, TensorIndex
from ecotone.policies.actions import ActionTable, device_server_plans, table_of
from ecotone.profile import ExitTime, Profile, SegmentTime

A, B = DeviceId("a"), DeviceId("b")
SIZES = (4000, 1000, 1000, 10)  # float32 elements of the frontiers
SECONDS = {A: (0.010, 0.020, 0.030), B: (0.001, 0.002, 0.003)}
LOSS = {"": 0.0, "early": 20.0}
CODEC_LOSS = {"int4": 8.0, "int8": 1.0}


def graph() -> Graph:
    """Three blocks; an exit behind the first."""
    tensors = tuple(Tensor(name=f"t{i}", shape=(1, n), dtype="float32", producer=i - 1) for i, n in enumerate(SIZES))
    blocks = tuple(Block(name=f"b{i}", inputs=(TensorIndex(i),), outputs=(TensorIndex(i + 1),), flop=1.0) for i in range(3))
    exits = (Exit(name="early", position=1, flop=0.1),)
    return Graph(
        name="small", blocks=blocks, tensors=tensors, inputs=(TensorIndex(0),), outputs=(TensorIndex(3),), exits=exits
    )


def cluster() -> Cluster:
    links = tuple(Link(source=s, target=t, latency_s=0.002, bandwidth_bytes_per_s=1e6) for s, t in pairwise((A, B, A)))
    devices = tuple(Device(name=n, memory_bytes=1 << 30) for n in (A, B))
    return Cluster(name="two", devices=devices, links=links, source=A, sink=A, emulate=True)


def accuracy() -> AccuracyTable:
    """Losses of exit and codec add up; 90 points at best."""

    def cell(position: int, codec: str, policy: str) -> Cell:
        loss = LOSS[policy] + CODEC_LOSS.get(codec, 0.0)
        return Cell(
            position=position, codec=codec, policy=policy, num_decisions=1000, points=90 - loss, loss_points=loss,
            low_points=loss - 1, high_points=loss + 1, fitted_points=loss,
        )  # fmt: skip

    places = [(p, c, "") for p in range(3) for c in CODEC_LOSS] + [(0, c, "early") for c in CODEC_LOSS]
    policy = ExitPolicy(name="early", exits=("early",), thresholds=(0.0,), shares=(1.0,), loss_points=LOSS["early"])
    return AccuracyTable(
        graph_hash=graph().content_hash(), data_hash="none", is_labelled=True, reference_points=90.0,
        cells=(cell(NOWHERE, "none", "early"), *(cell(*place) for place in places)), policies=(policy,),
    )  # fmt: skip


def profile() -> Profile:
    segments = tuple(
        SegmentTime(device=d, executor="torch:fp32", start=i, stop=j, median_s=sum(SECONDS[d][i:j]), spread_s=0.0,
                    memory_bytes=0)
        for d in SECONDS for i in range(3) for j in range(i + 1, 4)
    )  # fmt: skip
    heads = tuple(ExitTime(device=d, executor="torch:fp32", exit="early", median_s=0.001) for d in SECONDS)
    return Profile(
        graph_hash=graph().content_hash(), cluster_name="two", num_blocks=3, cuts=(0, 1, 2, 3), segments=segments,
        exits=heads, accuracy=accuracy(),
    )  # fmt: skip


def model() -> CostModel:
    return CostModel(graph(), cluster(), profile())


def table() -> ActionTable:
    """All ten actions: the end and the early exit here, the end cut at 0, 1, 2 and the exit at 0, in two codecs each."""
    return table_of(device_server_plans(model(), B, ("int4", "int8")), model())
