"""Shrinking on planted bugs: a world that loses results on one fault, and on two together, ends at just these."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.protocol import effects as fx
from ecotone.protocol.message import NodeId
from ecotone.simulator import faults as ft
from ecotone.simulator.chaos import Verdict, run_scene
from ecotone.simulator.draw import draw_scene
from ecotone.simulator.scene import Scene
from ecotone.simulator.shrink import same_failure, shortest, shrink
from ecotone.simulator.world import Machine, World

pytestmark = pytest.mark.pure


class Forgetful(World):
    """The planted bug: once a device was slowed down, results are swallowed at the asker."""

    def _hand_out(self, name: NodeId, machine: Machine, effect: fx.Deliver | fx.Output) -> None:
        if not self.is_spoiled():
            super()._hand_out(name, machine, effect)

    def is_spoiled(self) -> bool:
        return any(machine.condition.factor > 1 for machine in self.machines.values())


class Fussy(Forgetful):
    """It takes two: a slow device and a bent clock."""

    def is_spoiled(self) -> bool:
        bent = any(machine.condition.drift != 1 for machine in self.machines.values())
        return bent and super().is_spoiled()


def failing(world_class: type[World], kinds: set[type]) -> Scene:
    """The first random scene with several faults, these among them, that the bug breaks."""
    for seed in range(2000):
        scene = draw_scene(seed)
        if len(scene.faults) >= 4 and kinds <= {type(f) for f in scene.faults} and run_scene(scene).is_good:
            verdict = run_scene(scene, world_class)
            if verdict.lost or verdict.stuck:
                return scene
    raise AssertionError("no scene fails")


@pytest.mark.parametrize(
    ("world_class", "kinds"),
    [(Forgetful, {ft.SlowDevice}), (Fussy, {ft.SlowDevice, ft.BendClock})],
    ids=["one fault", "two together"],
)
def test_a_planted_bug_is_cut_down_to_its_cause(world_class: type[World], kinds: set[type]) -> None:
    scene = failing(world_class, kinds)
    run = partial(run_scene, world_class=world_class)
    fails = same_failure(run(scene), run)
    short = shrink(scene, fails)
    assert {type(f) for f in short.faults} == kinds
    assert len(short.faults) == len(kinds)
    assert len(short.asks) == 1
    assert fails(short)
    assert shrink(scene, fails) == short, "deterministic"
    again = Scene.from_toml(short.to_toml(str(run(short))))
    assert again == short
    assert not run(again).is_good
    assert run_scene(again).is_good, "without the bug nothing is wrong with it"


@given(st.lists(st.integers(0, 50), unique=True, max_size=30), st.data())
def test_shortest_finds_exactly_the_cause(items: list[int], data: st.DataObject) -> None:
    cause = set(data.draw(st.lists(st.sampled_from(items), unique=True, max_size=4))) if items else set()

    def fails(kept: Sequence[int]) -> bool:
        return cause <= set(kept)

    found = shortest(items, fails)
    assert set(found) == cause
    assert list(found) == [item for item in items if item in cause], "in their order"


def test_a_good_scene_is_no_failure() -> None:
    scene = draw_scene(0)
    assert not same_failure(Verdict(lost=(1,)))(scene)
