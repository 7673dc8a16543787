"""Learned codecs in plans: nodes get the weights beside their stages, answers are right, errors are clear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_nets import cluster, plan
from torch import nn

from ecotone import codec
from ecotone.cluster import DeviceId
from ecotone.codec import CodecError, LearnedCodec
from ecotone.cost import predict
from ecotone.model import Captured, ModelError, capture
from ecotone.plan import Plan, Transfer
from ecotone.planner import Latency, solve
from ecotone.profiling import BottleneckOptions, MeasureOptions, train_bottleneck
from ecotone.protocol.message import Blob
from ecotone.runtime import DeployError, Nodes, deploy, in_memory, launch, measure
from ecotone.runtime.stages import CapturedModel, codecs_from_store, parts_of
from ecotone.runtime.store import Store
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

CUT = 2


@pytest.fixture(scope="module")
def captured() -> Captured:
    torch.manual_seed(0)
    layers = [layer for width in (3, 8, 8) for layer in (nn.Conv2d(width, 8, 3, padding=1), nn.ReLU())]
    return capture(nn.Sequential(*layers, nn.Conv2d(8, 4, 1)).eval(), (torch.rand(1, 3, 16, 16),), name="maps")


def trained(captured: Captured, seed: int = 0, cut: int = CUT) -> LearnedCodec:
    samples = [(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(i)),) for i in range(6)]
    options = BottleneckOptions(latents=6, hidden=4, epochs=1, batch=2, seed=seed)
    return train_bottleneck(captured, cut, samples, name=f"maps-{seed}", options=options).codec


@pytest.fixture(scope="module")
def made(captured: Captured) -> LearnedCodec:
    return trained(captured)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with in_memory(cluster("a", "b", "c")) as found:
        yield found


def crossing(captured: Captured, name: str, *placed: tuple[str, int], at: int = CUT) -> Plan:
    """These stages; the frontier `at` crosses in `name`, all else in fp32."""
    found = plan(captured.graph, *placed)
    return replace(found, transfers=tuple(replace(t, codec=name) if t.position == at else t for t in found.transfers))


def by_hand(captured: Captured, made: LearnedCodec, x: torch.Tensor) -> torch.Tensor:
    head, tail = captured.segment(0, CUT).module(), captured.segment(CUT, captured.graph.num_blocks).module()
    with codec.holding([made]), torch.no_grad():
        return tail(codec.unpack(codec.pack([("x", head(x)[0])], made.id))[0])[0]


def is_known(made: LearnedCodec) -> bool:
    try:
        codec.position_of(made.id)
    except CodecError:
        return False
    return True


def test_answers_are_those_of_codec_and_model_and_weights_leave_with_the_plan(
    captured: Captured, made: LearnedCodec, nodes: Nodes
) -> None:
    other, length, x = trained(captured, seed=1), captured.graph.num_blocks, torch.rand(1, 3, 16, 16)
    first = crossing(captured, made.id, ("a", CUT), ("b", length))
    with deploy(first, captured, nodes, bottlenecks=[made, other]) as session:
        torch.testing.assert_close(session(x), by_hand(captured, made, x), rtol=1e-4, atol=1e-5)
        assert is_known(made)
        assert not is_known(other)
        between = crossing(captured, other.id, ("b", CUT), ("c", length))  # the asker neither codes nor decodes it
        session.replan(between)
        torch.testing.assert_close(session(x), by_hand(captured, other, x), rtol=1e-4, atol=1e-5)
        session.replan(plan(captured.graph, ("a", length)))
    assert not is_known(made)
    assert not is_known(other)


@pytest.mark.loopback
def test_processes_get_the_weights(captured: Captured, made: LearnedCodec) -> None:
    x = torch.rand(1, 3, 16, 16)
    with launch(cluster("a", "b")) as started:
        chosen = crossing(captured, made.id, ("a", CUT), ("b", captured.graph.num_blocks))
        with deploy(chosen, captured, started, bottlenecks=[made]) as session:
            torch.testing.assert_close(session(x), by_hand(captured, made, x), rtol=1e-4, atol=1e-5)


def test_a_plan_whose_codec_was_not_given_is_refused(captured: Captured, made: LearnedCodec, nodes: Nodes) -> None:
    length = captured.graph.num_blocks
    with pytest.raises(DeployError, match="--bottleneck"):
        deploy(crossing(captured, made.id, ("a", CUT), ("b", length)), captured, nodes)
    with pytest.raises(DeployError, match=f"is for cut {CUT}, not for 3"):
        deploy(crossing(captured, made.id, ("a", 3), ("b", length), at=3), captured, nodes, bottlenecks=[made])
    torch.manual_seed(5)
    foreign = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(), (torch.rand(1, 3, 16, 16),))
    with pytest.raises(EcotoneError, match="trained for another model"):
        deploy(plan(foreign.graph, ("a", foreign.graph.num_blocks)), foreign, nodes, bottlenecks=[made])


def test_parts_carry_each_codec_to_the_devices_that_use_it(captured: Captured, made: LearnedCodec) -> None:
    length = captured.graph.num_blocks
    chosen = crossing(captured, made.id, ("a", 1), ("b", CUT), ("c", 3), ("a", length))
    parts = parts_of(CapturedModel(captured, codecs=[made]), chosen)
    carried = [[blob.name for blob in part.weights if blob.name.startswith("@codec")] for part in parts]
    assert carried == [[], [f"@codec/{made.id}"], [f"@codec/{made.id}"], []]


def test_weights_are_what_their_id_says(captured: Captured, made: LearnedCodec, tmp_path: Path) -> None:
    """A node that is sent other weights under an id, or no codec at all, refuses the plan."""
    store = Store(tmp_path / "blobs", 1 << 20)
    part = parts_of(CapturedModel(captured, codecs=[made]), crossing(captured, made.id, ("b", CUT), ("c", 4)))[0]
    good = next(blob for blob in part.weights if blob.name.startswith("@codec"))
    store.put(made.data)
    assert [found.id for found in codecs_from_store(store, [part, part])] == [made.id]
    for data, error in ((trained(captured, seed=1).data, ModelError), (b"noise", CodecError)):
        other = Blob(sha256=store.put(data), size_bytes=len(data), name=good.name)
        with pytest.raises(error):
            codecs_from_store(store, [replace(part, weights=(other,))])
    store.close()


def test_nodes_time_it_and_the_planner_takes_it_at_its_cut(captured: Captured, made: LearnedCodec, tmp_path: Path) -> None:
    """Over a link of 4 kB/s the codec of fewest bytes wins, at the one cut where it was measured; the plan then runs."""
    world = cluster("a", "b", rate=4e3, latency_s=0.001, emulate=False)
    options = MeasureOptions(
        executors=("torch:fp32",), codecs=("fp32", "int8"), rounds=1, screening_rounds=1, max_cuts=1, isolate=False
    )
    with in_memory(cluster("a", "b", emulate=False)) as found:
        profile = measure(captured, found, options=options, bottlenecks=[made], path=tmp_path / "p.json")
        costs = {c.device: c for c in profile.codecs if c.codec == made.id}
        assert set(costs) == {"a", "b"}
        assert [p.position for p in profile.payloads if p.codec == made.id] == [CUT]
        assert CUT in profile.cuts
        slow = [replace(s, median_s=10.0) for s in profile.segments if s.device == "a" and s.stop > CUT]
        fast = [s for s in profile.segments if s.device == "b" or s.stop <= CUT]
        priced = replace(profile, segments=tuple(fast + slow), links=())
        chosen = solve(captured.graph, world, priced, Latency(), ("device=a,b",)).plan
        assert [(t.position, t.codec) for t in chosen.transfers if t.codec.startswith("learned")] == [(CUT, made.id)]
        assert predict(chosen, captured.graph, world, priced).latency_s > 0
        with deploy(chosen, captured, found, bottlenecks=[made]) as session:
            x = torch.rand(1, 3, 16, 16)
            assert session(x).shape == captured.reference((x,))[0].shape
    assert not is_known(made)
    never = Transfer(source=DeviceId("a"), target=DeviceId("b"), position=3, codec=made.id)
    with pytest.raises(EcotoneError):  # no size is known there
        predict(
            replace(chosen, stages=chosen.stages, transfers=(never, *chosen.transfers[1:])), captured.graph, world, priced
        )
