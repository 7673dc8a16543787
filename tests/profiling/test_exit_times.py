"""Exits are timed per device and executor, cuts lie where they stand, and a profile prices plans that leave early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ecotone.accuracy import ExitPolicy
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.cost import predict
from ecotone.model import Captured, capture
from ecotone.model.exit_heads import capture_head, default_rule
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner.exiting import leaving_early
from ecotone.profile import Profile
from ecotone.profiling import AccuracyOptions, MeasureOptions, candidate_cuts, measure, work
from ecotone.profiling.calibration import policy_table
from ecotone.profiling.device import before_exits
from ecotone.profiling.exit_outcomes import observe
from ecotone.runtime import in_memory
from ecotone.runtime import measure as measure_cluster

pytestmark = pytest.mark.torch

OPTIONS = MeasureOptions(
    executors=("torch:fp32",), codecs=("fp32",), rounds=3, screening_rounds=1, isolate=False, max_cuts=2
)


@pytest.fixture(autouse=True)
def no_memory_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks here how much memory a segment takes, and collecting garbage round each costs half of the time."""
    monkeypatch.setattr(work, "_trim", lambda: None)


class Wide(nn.Module):
    """Dear heads on a cheap chain, so that their time shows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layers(x),)


@pytest.fixture(scope="module")
def exiting() -> Captured:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.ReLU())]
    captured = capture(nn.Sequential(*layers, nn.Linear(32, 3)).eval(), (torch.randn(1, 32),), name="steps")
    rule = default_rule(captured.graph)
    heads = [("thin", 2, 8), ("thick", 5, 20_000)]
    return captured.with_exits([capture_head(captured, name, p, Wide(width), rule) for name, p, width in heads])


def cluster(*names: str, emulate: bool) -> Cluster:
    devices = tuple(
        Device(name=DeviceId(n), memory_bytes=1 << 30, slowdown=1.0 + 2 * i * emulate) for i, n in enumerate(names)
    )
    links = tuple(
        Link(source=DeviceId(a), target=DeviceId(b), latency_s=0.001, bandwidth_bytes_per_s=1e7)
        for a in names for b in names if a != b
    )  # fmt: skip
    return Cluster(
        name="two", devices=devices, links=links, source=DeviceId(names[0]), sink=DeviceId(names[0]), emulate=emulate
    )


def check(exiting: Captured, profile: Profile) -> None:
    assert {2, 5} <= set(profile.cuts)  # though only two cuts were asked for
    took = {(e.device, e.executor, e.exit): e.median_s for e in profile.exits}
    executors = {s.executor for s in profile.segments if s.start > 0}
    assert {(d, x) for d, x, _ in took} == {(d, x) for d in ("a", "b") for x in executors}
    for device in ("a", "b"):
        for executor in executors:
            assert took[device, executor, "thick"] > took[device, executor, "thin"] >= 0
    assert all(e.relative_error < 0.1 for e in profile.exits)


def plan_with(exiting: Captured, policy: ExitPolicy, executor: str) -> Plan:
    a, b, last = DeviceId("a"), DeviceId("b"), exiting.graph.num_blocks
    plain = Plan(
        graph_hash=exiting.graph.content_hash(),
        stages=(Stage(device=a, start=0, stop=5, executor=executor), Stage(device=b, start=5, stop=last, executor=executor)),
        transfers=(
            Transfer(source=a, target=a, position=0, codec=LOCAL), Transfer(source=a, target=b, position=5),
            Transfer(source=b, target=a, position=last),
        ),
    )  # fmt: skip
    return leaving_early(plain, exiting.graph, policy)


def test_an_emulated_cluster_has_exit_times_stretched_and_prices_the_policies_it_was_given(
    exiting: Captured, tmp_path: Path
) -> None:
    world = cluster("a", "b", emulate=True)
    outcomes = observe(exiting, [((torch.randn(1, 32),), None) for _ in range(20)])
    policy = ExitPolicy(name="p", exits=("thin",), thresholds=(0.4,), shares=(0.5,), loss_points=0.3)
    table = policy_table(exiting.graph, outcomes, (policy,))
    profile = measure(exiting, world, options=OPTIONS, table=AccuracyOptions(given=table), path=tmp_path / "p.json")
    check(exiting, profile)
    took = {(e.device, e.executor, e.exit): e.median_s for e in profile.exits}
    executor = next(iter(took))[1]
    assert took["b", executor, "thick"] == pytest.approx(3 * took["a", executor, "thick"])
    chosen = plan_with(exiting, policy, executor)
    cost = predict(chosen, exiting.graph, world, profile)
    assert cost.stages[0].exit_s == pytest.approx(took["a", executor, "thin"])
    assert [round(s.share, 3) for s in cost.stages] == [1.0, 0.5, 0.5]
    assert cost.loss_points == pytest.approx(0.3)
    # The file is used again, with the table of today.
    again = measure(
        exiting, world, options=OPTIONS, table=AccuracyOptions(given=replace(table, policies=())), path=tmp_path / "p.json"
    )
    assert again.segments == profile.segments
    assert again.accuracy is not None
    assert again.accuracy.policies == ()


def test_a_node_that_measures_itself_gets_the_heads_and_times_them_too(exiting: Captured, tmp_path: Path) -> None:
    with in_memory(cluster("a", "b", emulate=False)) as nodes:
        profile = measure_cluster(exiting, nodes, options=OPTIONS, path=tmp_path / "p.json")
    check(exiting, profile)


def test_cuts_lie_where_exits_stand_and_each_is_measured_behind_the_cut_before(exiting: Captured) -> None:
    cuts = candidate_cuts(exiting.graph, 1)
    assert {0, 2, 5, exiting.graph.num_blocks} <= set(cuts)
    for place, start in before_exits(exiting.graph, cuts):
        assert start < place.position
        assert not [c for c in cuts if start < c < place.position]
