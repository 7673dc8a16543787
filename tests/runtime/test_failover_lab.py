"""Faults at random in the laboratory: real nodes in namespaces under load, seeded; nothing lost, nothing twice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest
from loads import Load, load_on, set_of
from small_nets import cluster, lines

from ecotone.lab import Laboratory, abilities
from ecotone.runtime import deploy

FOUND = abilities()
pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not (FOUND.has_machines and FOUND.tun), reason=f"no emulated machines here: {FOUND.missing}"),
]

RATE, LATENCY_S = 2e6, 0.003
EDGES = ("b", "c")
KBIT_PER_S = 125.0


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    """a is this process; b and c are machines."""
    with Laboratory(cluster("a", *EDGES, rate=RATE, latency_s=LATENCY_S), fabric="relay", seed=11) as one:
        yield one


def test_random_kills_stops_and_cuts_under_load(laboratory: Laboratory) -> None:
    """Each kind of fault once or more, one after the other, on a machine drawn for it, for a time drawn for it."""
    moments = random.Random(20261121)

    def killed(name: str) -> None:
        laboratory.kill(name)
        hold()
        laboratory.restart(name)

    def stopped(name: str) -> None:
        laboratory.stop(name)
        hold()
        laboratory.cont(name)

    def cut(name: str) -> None:
        laboratory.cut("a", name)
        hold()
        laboratory.heal()

    def cut_one_way(name: str) -> None:
        laboratory.cut(*moments.choice([("a", name), (name, "a")]), one_way=True)
        hold()
        laboratory.heal()

    def thin(name: str) -> None:
        laboratory.link("a", name, bytes_per_s=KBIT_PER_S)
        hold()
        laboratory.link("a", name, bytes_per_s=RATE)

    def lossy(name: str) -> None:
        laboratory.link("a", name, loss=0.2)
        hold()
        laboratory.link("a", name, loss=0.0)

    def both_gone(name: str) -> None:
        for each in EDGES:
            laboratory.kill(each)
        hold()
        for each in EDGES:
            laboratory.restart(each)

    def hold() -> None:
        time.sleep(moments.uniform(0.1, 2.5))

    acts: list[Callable[[str], None]] = [killed, stopped, cut, cut_one_way, thin, lossy, both_gone]
    moments.shuffle(acts)
    exact = lines()
    plans = set_of(exact[0], ("a", "b"), ("a", "c"), ("a",))
    with deploy(plans, exact[0], laboratory.nodes()) as session:
        with load_on(session, exact) as load:
            load.more(epoch=1)
            for act in acts:
                act(moments.choice(EDGES))
                some_more(load)
            load.more(epoch=1)  # everything is healed: the preferred plan is back
        assert session.num_waiting == 0


def some_more(load: Load) -> None:
    """Whatever fault is over, answers go on coming."""
    have = len(load.answers)
    load.until(lambda: len(load.answers) >= have + 5)
