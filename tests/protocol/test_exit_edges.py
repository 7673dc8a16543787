"""Exit edges in the machines: room on both edges, results of any last edge, what is freed, what a late run is."""

from __future__ import annotations

import pytest

from ecotone.cluster import DeviceId
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol import message as msg
from ecotone.protocol.deployments import Deployments
from ecotone.protocol.epochs import EpochWork
from ecotone.protocol.message import BodyId, NodeId
from ecotone.protocol.notices import Begin, Post
from ecotone.protocol.settings import CoordinatorSettings, WorkerSettings
from ecotone.protocol.suspicion import Suspicion
from ecotone.protocol.worker import Worker
from ecotone.schema import SchemaError

pytestmark = pytest.mark.pure

A, B, C = (NodeId(n) for n in "abc")
SESSION = 4


def plan(epoch: int = 0) -> Plan:
    """a sends to b, which may leave; c does the rest; b and c send back to a."""
    a, b, c = (DeviceId(n) for n in "abc")
    return Plan(
        graph_hash="g", epoch=epoch,
        stages=(Stage(device=b, start=0, stop=1, exit="e", threshold=0.5), Stage(device=c, start=1, stop=2)),
        transfers=(
            Transfer(source=a, target=b, position=0), Transfer(source=b, target=c, position=1),
            Transfer(source=c, target=a, position=2),
        ),
        exit_transfers=(Transfer(source=b, target=a, position=2),),
    )  # fmt: skip


class OnB:
    """The worker of b with the plan loaded; requests arrive as decoded tensors."""

    def __init__(self, queue_limit: int = 1) -> None:
        self.worker = Worker(B, WorkerSettings(queue_limit=queue_limit))
        deploy = msg.Deploy(session=SESSION, epoch=0, plan_json=plan().to_json())
        self.worker.letter(A, deploy, 0.0)
        self.worker.prepared((SESSION, 0), 0.0)

    def arrives(self, request: int) -> list:
        body = BodyId(SESSION, 0, 0, request)
        return self.worker.begin(Begin(body, None))

    def computed(self, request: int, exited: bool) -> list:
        return self.worker.computed(BodyId(SESSION, 0, 0, request), exited)


def of(kind: type, items: list) -> list:
    return [item for item in items if isinstance(item, kind)]


def test_who_leaves_goes_over_the_exit_edge_straight_to_the_sink() -> None:
    node = OnB()
    assert of(fx.Compute, node.arrives(1)) == [fx.Compute(body=BodyId(SESSION, 0, 0, 1))]
    assert of(fx.Encode, node.computed(1, True)) == [fx.Encode(body=BodyId(SESSION, 0, 3, 1), codec="fp32")]
    sent = node.worker.encoded(BodyId(SESSION, 0, 3, 1), 100, 0.0)
    assert [item.peer for item in sent if type(item).__name__ == "Transmit"] == [A]
    other = OnB()
    other.arrives(1)
    assert of(fx.Encode, other.computed(1, False)) == [fx.Encode(body=BodyId(SESSION, 0, 1, 1), codec="fp32")]


@pytest.mark.parametrize("exited", [True, False])
def test_a_stage_begins_only_with_room_on_both_edges(exited: bool) -> None:
    node = OnB(queue_limit=1)
    node.arrives(1)
    node.arrives(2)
    after = node.computed(1, exited)  # its output waits to be sent: the queue of that edge is full
    assert of(fx.Compute, after) == []
    body = BodyId(SESSION, 0, 3 if exited else 1, 1)
    assert of(fx.Compute, node.worker.encoded(body, 100, 0.0)) == []
    assert of(fx.Compute, node.worker.sent(body)) == [fx.Compute(body=BodyId(SESSION, 0, 0, 2))]


def test_what_a_retired_plan_still_computed_is_freed_under_the_edge_that_it_took() -> None:
    for exited, edge in ((True, 3), (False, 1)):
        node = OnB()
        node.arrives(1)
        node.worker.letter(A, msg.Retire(session=SESSION, epoch=0), 0.0)
        freed = of(fx.Release, node.computed(1, exited))
        assert BodyId(SESSION, 0, edge, 1) in [release.body for release in freed]


def test_bodies_of_an_exit_edge_are_wanted_by_the_sink_from_its_own_node_only() -> None:
    sink = Worker(A, WorkerSettings())
    sink.letter(A, msg.Deploy(session=SESSION, epoch=0, plan_json=plan().to_json()), 0.0)
    assert sink.wants(B, BodyId(SESSION, 0, 3, 1), 10)
    assert not sink.wants(C, BodyId(SESSION, 0, 3, 1), 10)
    assert not sink.wants(B, BodyId(SESSION, 0, 4, 1), 10)
    sink.prepared((SESSION, 0), 0.0)
    finished = [item.content for item in of(Post, sink.begin(Begin(BodyId(SESSION, 0, 3, 1), None)))]
    assert finished == [msg.RequestFinished(session=SESSION, epoch=0, request=1, edge=3)]


def test_queues_of_an_epoch_know_their_edges() -> None:
    work = EpochWork(plan(), A, ())
    assert work.exit_edges == {0: 3}
    assert [work.feeds_stage(edge) for edge in range(4)] == [True, True, False, False]
    assert work.has_room(2, DeviceId("a"), 0)  # the sink always takes
    assert work.has_room(3, DeviceId("a"), 0)


def deployments() -> Deployments:
    sets = Deployments(A, CoordinatorSettings(session=SESSION))
    sets.deploy(ev.DeployRequested(plan=plan()), 0.0)
    return sets


def test_results_come_over_the_last_edge_or_an_exit_and_over_no_other() -> None:
    assert list(deployments()[0].last_edges) == [2, 3]


def test_early_leavers_do_not_make_impatient_with_those_who_go_on() -> None:
    sets = deployments()
    suspicion, deployment = Suspicion(sets.settings, lambda _: 0.0), sets[0]
    suspicion.took(deployment, 0.01, 3)  # left early: nothing is known of the others yet
    assert suspicion.known_s(deployment) == 0
    suspicion.took(deployment, 0.4, 2)
    for _ in range(100):
        suspicion.took(deployment, 0.01, 3)
    assert suspicion.known_s(deployment) == pytest.approx(0.4)
    suspicion.took(deployment, 0.9, 3)  # even one that left took longer: then the others will too
    assert suspicion.known_s(deployment) == pytest.approx(0.9)


def test_a_plan_with_an_exit_at_its_end_or_a_stray_exit_transfer_is_no_plan() -> None:
    good = plan()
    with pytest.raises(SchemaError, match="the last stage has an exit"):
        Plan(
            graph_hash="g", transfers=good.transfers,
            stages=(good.stages[0], Stage(device=DeviceId("c"), start=1, stop=2, exit="f")),
            exit_transfers=(*good.exit_transfers, Transfer(source=DeviceId("c"), target=DeviceId("a"), position=2)),
        )  # fmt: skip
    with pytest.raises(SchemaError, match="must lead from b to the sink"):
        Plan(
            graph_hash="g", stages=good.stages, transfers=good.transfers,
            exit_transfers=(Transfer(source=DeviceId("b"), target=DeviceId("c"), position=2),),
        )  # fmt: skip
    for threshold in (-0.1, float("nan")):
        with pytest.raises(SchemaError, match=r"threshold .* of exit e must be 0 \(all leave\) or more"):
            Plan(
                graph_hash="g", transfers=good.transfers, exit_transfers=good.exit_transfers,
                stages=(Stage(device=DeviceId("b"), start=0, stop=1, exit="e", threshold=threshold), good.stages[1]),
            )  # fmt: skip
    local = Plan(
        graph_hash="g", stages=(Stage(device=DeviceId("a"), start=0, stop=1, exit="e"), good.stages[1]),
        transfers=(
            Transfer(source=DeviceId("a"), target=DeviceId("a"), position=0, codec=LOCAL),
            Transfer(source=DeviceId("a"), target=DeviceId("c"), position=1), good.transfers[2],
        ),
        exit_transfers=(Transfer(source=DeviceId("a"), target=DeviceId("a"), position=2, codec=LOCAL),),
    )  # fmt: skip
    assert local.exit_edge(0) == 3
    assert str(local) == "a -> a[0:1] torch:fp32 exit e>=0 -> (fp32) c[1:2] torch:fp32 -> (fp32) a"
