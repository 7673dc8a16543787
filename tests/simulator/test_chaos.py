"""Random scenes: nothing is lost, doubled, stuck or left; same seed, same run; the oracle errs on the late side."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ecotone.cluster import DeviceId
from ecotone.simulator import faults as ft
from ecotone.simulator.chaos import run_scene, run_seed
from ecotone.simulator.exhaustive import small_scene
from ecotone.simulator.oracle import RECOVERY_S, Oracle
from ecotone.simulator.scene import Scene, predicted_s, sets_of

pytestmark = pytest.mark.pure

B, C = DeviceId("b"), DeviceId("c")


@pytest.mark.parametrize("block", range(4))
def test_random_scenes_lose_nothing(block: int) -> None:
    wrong = []
    for seed in range(100_000 + 75 * block, 100_075 + 75 * block):
        verdict = run_seed(seed)
        if not verdict.is_good:
            wrong.append(f"seed {seed}: {verdict}; python -m benchmarks.fault_simulation --replay {seed}")
    assert not wrong, "\n".join(wrong)


def test_many_scenes_are_hard_and_many_requests_possible() -> None:
    verdicts = [run_seed(seed) for seed in range(200_000, 200_060)]
    asked, possible = sum(v.num_asked for v in verdicts), sum(v.num_possible for v in verdicts)
    assert 0.4 * asked < possible < asked, "the oracle promises neither nothing nor everything"
    assert sum(v.num_rerouted for v in verdicts) > 20, "faults hit requests on their way"


def test_the_same_seed_is_the_same_run() -> None:
    for seed in range(20):
        one, two = run_seed(seed), run_seed(seed)
        assert one == two
        assert one.digest == two.digest
    assert len({run_seed(seed).digest for seed in range(20)}) > 15


# ---- the oracle by hand: T2b, S = the slower plan alone ------------------------------------------------------------------


def promised(scene: Scene) -> list[float]:
    by = Oracle(scene).answered_by({n: at_s for n, (at_s, _) in enumerate(scene.asks)})
    return [by[n] for n in sorted(by)]


def test_without_faults_requests_are_promised_after_their_work() -> None:
    scene = small_scene("T2b, three machines", ordered=False)
    slowest_s = max(predicted_s(scene, plan) for group in sets_of(scene) for plan in group.plans)
    first, second = promised(scene)
    assert 2 * slowest_s <= first < 2.6 * slowest_s, "both are under way together; acknowledgements take a little"
    assert second == pytest.approx(first + 0.05)


def test_a_standby_keeps_the_promise_and_without_one_there_is_none() -> None:
    scene = small_scene("T2b, three machines")
    dead = replace(scene, faults=(ft.KillNode(at_s=0.01, device=B),))
    assert all(by_s < 2.0 for by_s in promised(dead)), "c stands by"
    both = replace(scene, faults=(*dead.faults, ft.CutOneWay(at_s=0.01, source=C, target=DeviceId("a"))))
    assert promised(both) == [math.inf, math.inf]


def test_a_machine_that_comes_back_in_time_is_promised() -> None:
    scene = small_scene("T2b, three machines", ordered=False)
    away = (ft.KillNode(at_s=0.0, device=B), ft.KillNode(at_s=0.0, device=C), ft.RestartNode(at_s=4.0, device=C))
    first, _ = promised(replace(scene, faults=away))
    assert 4.0 + RECOVERY_S < first < 6.0
    late = replace(scene, asks=((0.0, 4.5), (0.05, 10.0)), faults=away)
    assert promised(late)[0] == math.inf, "its deadline is before the recovery"


def test_an_error_where_nothing_was_possible_is_no_loss() -> None:
    scene = small_scene("T1, two machines")
    alone = replace(scene, deployments=(replace(scene.deployments[0], plans=("b:3",)),))
    verdict = run_scene(replace(alone, faults=(ft.KillNode(at_s=0.0, device=B),)))
    assert verdict.is_good, verdict
    assert verdict.num_possible == 0
    assert verdict.num_answered == 0
