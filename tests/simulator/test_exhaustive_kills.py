"""Every process killed, restarted and stopped at every event of small runs: the machines of the plan and the asker."""

from __future__ import annotations

import pytest

from ecotone.simulator.exhaustive import SMALL, attacks, num_events, run_attacked, small_scene

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("record", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("name", SMALL)
def test_no_moment_is_a_bad_one(name: str, record: bool) -> None:
    scene = small_scene(name, record=record)
    count = num_events(scene)
    # Two machines at every event; three machines at every fifth (the benchmark takes them all).
    tried = list(attacks(scene, count, 1 if len(scene.devices) == 2 else 5))
    wrong = []
    for attack in tried:
        verdict, hurt = run_attacked(scene, attack)
        if not verdict.is_good:
            wrong.append(f"{attack}: {verdict} {verdict.reasons} {hurt.faults}")
        assert verdict.num_possible == verdict.num_asked == 2, f"{attack}: somebody always stands by"
    assert not wrong, "\n".join(wrong[:5])
    assert len(tried) > 40


def test_attacks_cover_every_machine_way_and_event() -> None:
    scene = small_scene("T2b, three machines", record=True)
    found = {(a.device, a.way) for a in attacks(scene, 5)}
    assert found == {(d, w) for d in "bc" for w in ("kill", "restart", "stall")} | {("a", "restart"), ("a", "stall")}
    assert {a.index for a in attacks(scene, 5)} == set(range(5))
    unrecorded = {(a.device, a.way) for a in attacks(small_scene("T2b, three machines"), 5)}
    assert ("a", "restart") not in unrecorded, "without a journal requests die with the asker"
