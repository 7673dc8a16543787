"""Random scripts of load, faults and change against whole deployments.

Invariants, whatever happens to every node but the asker: each accepted request ends once; where every set has a plan on the
asker alone no request ends with an error; no shell is asked for what it does not hold; nothing stays behind after a close.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rig import NAMES, A, Rig, asked

from ecotone.protocol import events as ev
from ecotone.protocol.message import NodeId

pytestmark = pytest.mark.pure

SETS = [("bc", "aa"), ("ab", "aa"), ("bb", "cc", "aa"), ("ab", "ac", "aa"), ("bc", "cd", "db", "aa"), ("aa", "bb")]
ALONE = [("bc",), ("bb",), ("bc", "bd"), ("ab", "cb"), ("db",)]
ACTIVE = ["", "cc", "ac", "aa"]
KINDS = [
    *["submit"] * 4, *["wait"] * 3, "burst", "hurry", "cancel", "kill", "restart", "cut", "heal", "one_way", "stall",
    "resume", "slow", "replan", "replan", "prefer", "pause",
]  # fmt: skip
scripts = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 11)), max_size=40)


class Script:
    """Does what the lines of a script say."""

    def __init__(self, rig: Rig, sets: list[tuple[str, ...]], active: str) -> None:
        self.rig, self.sets, self.active = rig, sets, active
        self.num_requests, self.epoch = 0, 0
        self.stalled: set[NodeId] = set()

    def replan(self, n: int, pause: bool = False) -> None:
        self.rig.do(asked(self.epoch, *self.sets[n % len(self.sets)], active=self.active, pause=pause, boundary_bytes=10))
        self.epoch += 5

    def submit(self, count: int, deadline_s: float | None = None) -> None:
        for _ in range(count):
            self.rig.submit(self.num_requests, deadline_s=deadline_s)
            self.num_requests += 1

    def line(self, kind: str, n: int) -> None:
        world, node, other = self.rig.world, NAMES[1 + n % 3], NAMES[(n // 3) % 4]
        match kind:
            case "submit":
                self.submit(1)
            case "burst":
                self.submit(n)
            case "hurry":
                self.submit(1, 0.02 * (n + 1))
            case "wait":
                self.rig.let_pass(0.002 * 2**n)
            case "kill" if world.machines[node].is_alive:
                world.kill(node, 0.01 * n)
                self.stalled.discard(node)
            case "restart":
                self.rig.restart(node)
                self.stalled.discard(node)
            case "cut" if node != other:
                world.cut(node, other, 0.01 * n)
            case "one_way" if node != other:
                world.cut_one_way(node, other)
            case "heal" if node != other:
                world.heal(node, other)
            case "stall":
                world.stall(node)
                self.stalled.add(node)
            case "resume":
                world.resume(node)
            case "slow" if node != other:
                world.set_link(node, other, 1e-3, 1e5 * (n + 1))
            case "replan" | "pause":
                self.replan(n, pause=kind == "pause")
            case "prefer":
                self.rig.do(ev.Prefer(epoch=max(0, self.epoch - 5 + n % 3)))
            case "cancel" if self.num_requests:
                self.rig.do(ev.CancelRequest(request=n % self.num_requests))

    def make_whole(self) -> None:
        """All machines and links are there again, and a set is in force (after a pause that failed there is none)."""
        for node in NAMES[1:]:
            self.rig.world.resume(node)
            if not self.rig.world.machines[node].is_alive:
                self.rig.restart(node)
        self.rig.world.heal_all()
        self.rig.let_pass(10.0)
        mind = self.rig.world.machines[A].node.coordinator
        if mind is not None and mind.in_force is None:
            self.replan(0)


def run(script: list[tuple[str, int]], sets: list[tuple[str, ...]], active: str, **bounds: object) -> Script:
    rig = Rig(deploy_timeout_s=3.0, **bounds)
    story = Script(rig, sets, active)
    story.replan(0)
    rig.let_pass(0.5)
    for kind, n in script:
        story.line(kind, n)
    return story


def check(story: Script) -> None:
    rig = story.rig
    assert set(rig.ends) == set(range(story.num_requests))
    assert all(len(ends) == 1 for ends in rig.ends.values()), rig.ends
    rig.close()
    assert rig.world.machines[A].node.coordinator.num_requests == 0  # type: ignore[union-attr]
    rig.check_nothing_left()
    assert rig.world.violations == []


@settings(max_examples=300, deadline=None)
@given(scripts, st.sampled_from(ACTIVE), st.booleans())
@example([("submit", 0), ("restart", 1), ("cut", 1), ("replan", 1)], "", False)  # a body parked where its plan never comes
def test_with_a_local_fallback_no_request_is_ever_lost(script: list[tuple[str, int]], active: str, ordered: bool) -> None:
    story = run(script, SETS, active, ordered=ordered)
    story.rig.let_pass(60.0)
    ends = {end for ends in story.rig.ends.values() for end in ends}
    assert ends <= {"result", "busy", "cancelled", "deadline"}, story.rig.ends
    story.make_whole()
    story.rig.let_pass(60.0)
    check(story)


@settings(max_examples=300, deadline=None)
@given(scripts, st.sampled_from(ACTIVE), st.booleans())
def test_without_one_every_request_still_ends_once(script: list[tuple[str, int]], active: str, ordered: bool) -> None:
    story = run(script, ALONE, active, ordered=ordered)
    story.make_whole()
    story.rig.let_pass(60.0)
    check(story)
