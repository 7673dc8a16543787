"""Actions against cost.py's own predictions, and the list of plans against what exits and cuts allow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_world as world

from ecotone.cluster import Device, DeviceId, Link
from ecotone.cost import CostModel
from ecotone.plan import Plan, Stage, Transfer
from ecotone.policies.actions import device_server_plans, table_of
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure


def test_every_exit_and_cut_and_codec_is_there_once() -> None:
    """The end: here, and cut at 0, 1, 2 in two codecs; the exit behind block 0: here, and cut at 0 only."""
    table = world.table()
    found = set(zip(table.exits, table.cuts, table.codecs, strict=True))
    codecs = ("int4", "int8")
    expected = {("", -1, "none"), ("early", -1, "none"), *(("early", 0, c) for c in codecs)}
    expected |= {("", p, c) for p in range(3) for c in codecs}
    assert found == expected
    assert len(table) == len(expected)
    assert set(zip(table.exits, table.depths, strict=True)) == {("", 3), ("early", 1)}


def test_latency_is_that_of_the_cost_model_at_any_rate_and_load() -> None:
    """Equation 1 at the stated link and load 1 is equation 6 of cost.py; elsewhere, that of a world scaled so."""
    table, model = world.table(), world.model()
    alone = table.latency_s(1e6, 0.002, 1.0, 1.0)
    assert alone == pytest.approx([model.predict(plan).latency_s for plan in table.plans])

    profile = world.profile()
    slower = {world.A: 2.0, world.B: 5.0}
    segments = tuple(replace(s, median_s=s.median_s * slower[s.device]) for s in profile.segments)
    exits = tuple(replace(e, median_s=e.median_s * slower[e.device]) for e in profile.exits)
    scaled = CostModel(world.graph(), world.cluster().scaled_links(0.25), replace(profile, segments=segments, exits=exits))
    loaded = table.latency_s(0.25e6, 0.002, 2.0, 5.0)
    assert loaded == pytest.approx([scaled.predict(plan).latency_s for plan in table.plans])


def test_accuracy_is_the_reference_less_the_cell() -> None:
    table = world.table()
    losses = {(e, c): world.LOSS[e] + world.CODEC_LOSS.get(c, 0.0) for e in world.LOSS for c in ("none", "int4", "int8")}
    assert table.accuracy == pytest.approx(
        [(90 - losses[e, c]) / 100 for e, c in zip(table.exits, table.codecs, strict=True)]
    )


def test_plans_of_another_shape_are_refused() -> None:
    there, here = DeviceId("b"), DeviceId("a")
    plan = Plan(
        graph_hash=world.graph().content_hash(),
        stages=(Stage(device=there, start=0, stop=1), Stage(device=here, start=1, stop=3)),
        transfers=(
            Transfer(source=here, target=there, position=0), Transfer(source=there, target=here, position=1),
            Transfer(source=here, target=here, position=3, codec="none"),
        ),
    )  # fmt: skip
    with pytest.raises(EcotoneError, match="back once"):
        table_of([plan], world.model())
    base, third = world.cluster(), DeviceId("c")
    links = tuple(
        Link(source=s, target=t, latency_s=0.0, bandwidth_bytes_per_s=1e6) for s, t in ((here, third), (third, here))
    )
    three = replace(base, devices=(*base.devices, Device(name=third, memory_bytes=1 << 30)), links=(*base.links, *links))
    segments = tuple(replace(s, device=third) for s in world.profile().segments if s.device == there)
    heads = tuple(replace(e, device=third) for e in world.profile().exits if e.device == there)
    profile = replace(
        world.profile(), segments=(*world.profile().segments, *segments), exits=(*world.profile().exits, *heads)
    )
    model = CostModel(world.graph(), three, profile)
    both = [device_server_plans(model, server, ("int8",))[2] for server in (there, third)]
    with pytest.raises(EcotoneError, match="one server"):
        table_of(both, model)
    with pytest.raises(EcotoneError, match="at least one plan"):
        table_of([], model)
