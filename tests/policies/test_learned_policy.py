"""Policies with a deadline in the virtual world: the planner's choice before each request, and a network's."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import small_world as world
import torch

from ecotone.linktrace import LinkPoint, LinkTrace
from ecotone.planset import PlanSet, Standby
from ecotone.policies import contender
from ecotone.policies.actions import table_of
from ecotone.policies.belief import FEATURES, Ranges
from ecotone.policies.deadline import DeadlinePolicy
from ecotone.policies.learned import LearnedPolicy, Trained, TrainedAbout, load_trained, save_trained
from ecotone.policies.network import mlp
from ecotone.protocol.controller import Keep, Policy, Switch, Tick
from ecotone.protocol.effects import LinkChanged, Observed
from ecotone.protocol.message import LinkSample, NodeId, NodeReport, WorkSample
from ecotone.protocol.settings import CoordinatorSettings, WorkerSettings
from ecotone.simulator import FollowTrace, Periodic
from ecotone.simulator.adaptive import Adapted, simulate_adaptive
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

RANGES = Ranges(rate_bytes_per_s=(1e4, 4e6), deadline_s=(0.01, 0.1), round_trip_s=0.02, load=5.0, queue=10.0, age_s=2.0)


def plan_set() -> PlanSet:
    """Epochs 1 and up: the whole here (the most accurate), split plans, and the exit here (the fastest without a link)."""
    first, *others = world.table().plans
    return PlanSet(primary=first, standbys=tuple(Standby(plan=p) for p in others)).with_epochs(1)


def about(**changes: object) -> TrainedAbout:
    base = TrainedAbout(
        name="toy", graph_hash=world.graph().content_hash(), device=world.A, server=world.B, plans=world.table().plans,
        ranges=RANGES, features=FEATURES, scenarios=("fading",), seed=0,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def trained(prefers: int, else_: int | None = None, below_rate: float = -1.0) -> Trained:
    """A network of two layers that prefers one action, and another where the rate's feature is below a value."""
    net = mlp((len(FEATURES), 1, len(world.table())))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net[0].weight[0, 0], net[0].bias[0] = -1.0, below_rate  # ReLU(below - rate)
        net[2].bias[prefers] = 1e-4
        if else_ is not None:
            net[2].weight[else_, 0] = 1.0
    return Trained(about(), net)


def key(epoch: int) -> tuple[str, int, str]:
    table = world.table()
    return table.exits[epoch - 1], table.cuts[epoch - 1], table.codecs[epoch - 1]


def number(*wanted: object) -> int:
    return next(i for i in range(len(world.table())) if key(i + 1) == wanted)


def chosen(policy: Policy, now_s: float = 1.0) -> int | None:
    switches = [d.epoch for d in policy.handle(Tick(), now_s) if isinstance(d, Switch)]
    return switches[0] if switches else None


def seen(policy: Policy, rate: float, now_s: float = 0.5, slower: float = 1.0) -> None:
    """A report of the device: a transfer at `rate` with 4 ms round trip; of both machines that work took so much longer."""
    size = 100_000
    link = LinkSample(peer=NodeId(world.B), size_bytes=size, seconds=size / rate + 0.004, rtt_s=0.004)
    work = WorkSample(epoch=1, work="compute", index=0, seconds=0.060 * slower, count=1)
    policy.handle(Observed(peer=NodeId(world.A), report=NodeReport(session=1, work=(work,), links=(link,))), now_s)


def make(deadline_s: float, with_: Trained | None = None) -> DeadlinePolicy:
    parts = (plan_set(), world.graph(), world.cluster(), world.profile(), deadline_s)
    return DeadlinePolicy(*parts, margin=1.0) if with_ is None else LearnedPolicy(with_, *parts)


def test_the_planner_takes_the_most_accurate_plan_in_time() -> None:
    """At 1 MB/s: the whole here takes 60 ms, cut at 0 in int8 14 ms with a loss of 1 point, int4 12 ms with 8."""
    full = world.table()
    table = table_of([p for p, e in zip(full.plans, full.exits, strict=True) if not e], world.model())
    first, *others = table.plans
    plans = PlanSet(primary=first, standbys=tuple(Standby(plan=p) for p in others)).with_epochs(1)
    latency = table.latency_s(1e6, 0.002, 1.0, 1.0)
    for deadline_s in (0.07, 0.03, 0.0135, 0.0125, 0.011, 0.005):
        policy = DeadlinePolicy(plans, world.graph(), world.cluster(), world.profile(), deadline_s, margin=1.0)
        epoch = chosen(policy) or policy.asked
        in_time = [i for i in range(len(table)) if latency[i] <= deadline_s]
        if in_time:
            assert epoch - 1 in in_time
            assert table.accuracy[epoch - 1] == pytest.approx(table.accuracy[in_time].max())
        else:
            assert epoch - 1 == latency.argmin()
            assert "none is in time" in policy.explanation()[0]


def test_the_network_decides_by_the_rate_that_was_seen() -> None:
    fast, slow = number("", 0, "int8"), number("early", -1, "none")
    policy = make(0.05, trained(fast, slow, below_rate=0.5))
    seen(policy, 3e6)
    assert chosen(policy) == fast + 1
    seen(policy, 2e4, 1.5)
    seen(policy, 2e4, 2.0)
    assert chosen(policy, 2.0) == slow + 1
    assert "action" in policy.explanation()[0]


def test_outside_what_it_was_trained_on_the_planner_decides_and_says_so() -> None:
    fast = number("early", 0, "int4")
    policy = make(0.05, trained(fast))
    seen(policy, 3e6)
    assert chosen(policy) == fast + 1
    seen(policy, 5e7, 1.2)
    found = [d for d in policy.handle(Tick(), 1.3) if isinstance(d, Switch)]
    assert "rate is outside the trained range" in found[0].reason
    assert key(found[0].epoch) != key(fast + 1)
    assert any("not in charge" in line for line in policy.explanation())
    for now_s in (1.4, 1.5, 1.6, 1.7, 1.8, 1.9):
        seen(policy, 3e6, now_s)
    assert chosen(policy, 2.0) == fast + 1
    for now_s in range(3, 30):
        seen(policy, 3e6, float(now_s), slower=40.0)
    assert "device load is outside" in next(d for d in policy.handle(Tick(), 30.0) if isinstance(d, Switch | Keep)).reason
    loose = make(5.0, trained(fast))
    seen(loose, 3e6)
    assert "deadline is outside" in str(loose.handle(Tick(), 1.0)[-1])


def test_plans_that_are_not_resident_or_cannot_run_are_masked() -> None:
    fast, second = number("", 0, "int8"), number("early", -1, "none")
    full = trained(fast, second, below_rate=10.0)  # the second is the network's first choice, whatever the rate
    with torch.no_grad():
        full.network[2].bias[fast] = 0.5
        full.network[2].weight[second, 0] = 0.01
    policy = make(0.05, full)
    seen(policy, 3e6)
    assert chosen(policy) == fast + 1
    policy.handle(LinkChanged(peer=NodeId(world.B), state="down"), 1.5)
    assert policy.asked == second + 1
    without = PlanSet(primary=plan_set().primary, standbys=tuple(s for s in plan_set().standbys if s.plan.epoch != fast + 1))
    small = LearnedPolicy(full, without, world.graph(), world.cluster(), world.profile(), 0.05)
    seen(small, 3e6)
    assert chosen(small) == second + 1
    foreign = PlanSet(primary=replace(plan_set().primary, stages=(replace(plan_set().primary.stages[0], executor="x"),)))
    with pytest.raises(EcotoneError, match=r"not|none of its plans"):
        LearnedPolicy(full, foreign, world.graph(), world.cluster(), world.profile(), 0.05)


def test_a_policy_of_another_model_or_cluster_is_refused() -> None:
    other = replace(world.graph(), exits=())
    with pytest.raises(EcotoneError, match="another model"):
        LearnedPolicy(trained(0), plan_set(), other, world.cluster(), world.profile(), 0.05)
    with pytest.raises(EcotoneError, match="no such link"):
        LearnedPolicy(trained(0), plan_set(), world.graph(), replace(world.cluster(), links=()), world.profile(), 0.05)
    with pytest.raises(EcotoneError, match="above zero"):
        make(0.0)
    with pytest.raises(EcotoneError, match="train it again"):
        about(features=FEATURES[:-1])
    with pytest.raises(EcotoneError, match="twice"):
        about(plans=world.table().plans[:1] * 2)


def test_a_policy_in_a_file(tmp_path: Path) -> None:
    path, one = tmp_path / "policy.safetensors", trained(3)
    save_trained(path, one.network, about(measured={"policy_reward": 0.5}))
    again = load_trained(path)
    assert again.about == about(measured={"policy_reward": 0.5})
    assert again.plan_set().plans == world.table().plans
    save_trained(path, mlp((len(FEATURES), 4, 2)), about())
    with pytest.raises(EcotoneError, match="its actions are"):
        load_trained(path)


def played(name: str, rates: tuple[float, ...], with_: Trained | None = None) -> Adapted:
    points = tuple(LinkPoint(time_s=4.0 * i, bytes_per_s=rate, latency_s=0.002) for i, rate in enumerate(rates))
    trace = LinkTrace(name="steps", points=points, duration_s=4.0 * len(rates))
    one = contender(name, world.graph(), world.cluster(), world.profile(), deadline_s=0.07, trained=with_ or trained(0))
    follow = tuple(FollowTrace(at_s=0.0, source=s, target=t, trace=trace) for s, t in pairwise((world.A, world.B, world.A)))
    found = simulate_adaptive(
        one.plans.with_epochs(1), one.policy, world.graph(), world.cluster(), world.profile(), script=follow,
        requests=round(trace.duration_s / 0.25), arrivals=Periodic(period_s=0.25), max_in_flight=1, trace=False,
        worker=WorkerSettings(report_s=0.02), coordinator=CoordinatorSettings(session=1, node_timeout_s=60.0),
    )  # fmt: skip
    assert len(found.report.completed) == round(trace.duration_s / 0.25)
    assert not found.report.violations
    return found


def test_both_run_in_the_simulator_and_answer_in_time() -> None:
    """The rate falls to a fortieth and comes back: the request at the fall is late at most, whoever decides.

    The most accurate plan, the whole here, is in time all along, so the planner has no reason to leave it.
    """
    fast, slow = number("", 0, "int8"), number("", -1, "none")
    for name, with_ in (("deadline", None), ("learned", trained(fast, slow, below_rate=0.6))):
        found = played(name, (2e6, 5e4, 2e6), with_)
        late = [o for o in found.report.outcomes if o.latency_s > 0.07]
        assert len(late) <= 1, name
        assert (found.num_switches >= 2) == (name == "learned")
        assert found.explanation


def test_a_deadline_and_a_policy_must_be_given() -> None:
    parts = (world.graph(), world.cluster(), world.profile())
    with pytest.raises(EcotoneError, match="needs a deadline"):
        contender("deadline", *parts)
    with pytest.raises(EcotoneError, match="trained policy"):
        contender("learned", *parts, deadline_s=0.1)
