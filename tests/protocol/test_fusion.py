"""Fan-in on whatever branches are there: each frame ends once, in order, within bounds, whatever comes in whatever order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.protocol.fusion import Ask, Discard, Effect, Fire, Fusion, FusionSettings, Refuse, Unfused
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure


def made(num_branches: int = 2, **changes: object) -> Fusion:
    return Fusion(FusionSettings(num_branches=num_branches, **changes))  # type: ignore[arg-type]


def fires(effects: list[Effect]) -> list[tuple[int, tuple[int, ...]]]:
    return [(e.frame, e.present) for e in effects if isinstance(e, Fire)]


def test_a_frame_fires_when_all_branches_have_come_and_not_before() -> None:
    fusion = made(3)
    assert fusion.open(0, 0.0) == [Ask(branch=i, frame=0) for i in range(3)]
    assert fusion.arrived(2, 0, 0.1) == fusion.arrived(0, 0, 0.2) == []
    assert fusion.arrived(1, 0, 0.3) == [Fire(frame=0, present=(0, 1, 2), missing=())]
    assert fusion.num_open == fusion.num_held == 0
    assert fusion.due_s is None


def test_it_waits_for_the_99th_percentile_of_the_lateness_and_a_margin() -> None:
    """Lateness 1..100 ms, so that the nearest rank of 99 % is 99 ms; a frame waits 99 + 20 ms."""
    fusion = made(2, margin_s=0.02, window=100)
    for frame in range(100):
        opened_s = 10.0 * frame
        fusion.open(frame, opened_s)
        fusion.arrived(0, frame, opened_s + 1e-3 * (frame + 1))
        fusion.arrived(1, frame, opened_s + 1e-3)
    assert fusion.wait_s(0) == pytest.approx(0.119)
    fusion.open(100, 2000.0)
    fusion.arrived(1, 100, 2000.001)
    assert fusion.due_s == pytest.approx(2000.119)
    assert fires(fusion.passed(2000.118)) == []
    assert fires(fusion.passed(2000.12)) == [(100, (1,))]


def test_a_late_token_is_discarded_but_makes_the_next_frames_wait_longer() -> None:
    fusion = made(1, min_heard=1, margin_s=0.01, least_present=0)
    fusion.open(0, 0.0)
    fusion.arrived(0, 0, 0.1)
    fusion.open(1, 1.0)
    assert fires(fusion.passed(1.2)) == [(1, ())]
    assert fusion.arrived(0, 1, 1.3) == [Discard(branch=0, frame=1)]
    assert fusion.wait_s(0) == pytest.approx(0.31)
    assert fusion.arrived(0, 1, 1.4) == [Discard(branch=0, frame=1)]  # the same token again says nothing
    assert fusion.wait_s(0) == pytest.approx(0.31)


def test_a_branch_that_lets_frames_pass_goes_to_rate_0_and_comes_back_when_heard() -> None:
    fusion = made(2, first_wait_s=1.0, dead_after=3)
    for frame in range(3):
        fusion.open(frame, float(10 * frame))
        fusion.arrived(0, frame, 10 * frame + 0.1)
        assert fires(fusion.passed(10 * frame + 1.0)) == [(frame, (0,))]
    assert fusion.live == (0,)
    assert fusion.open(3, 30.0) == [Ask(branch=0, frame=3)]  # branch 1 owes three frames: it is not asked for more
    assert fires(fusion.arrived(0, 3, 30.1)) == [(3, (0,))]  # and not waited for
    assert fusion.arrived(1, 2, 30.2) == [Discard(branch=1, frame=2)]
    assert fusion.live == (0, 1)
    assert Ask(branch=1, frame=4) in fusion.open(4, 40.0)
    assert fires(fusion.arrived(0, 4, 40.1)) == []
    assert fires(fusion.arrived(1, 4, 40.2)) == [(4, (0, 1))]


def test_a_dead_branch_that_owes_nothing_is_asked_for_one_frame_and_not_waited_for() -> None:
    fusion = made(2)
    fusion.branch_down(1)
    assert fusion.open(0, 0.0) == [Ask(branch=0, frame=0), Ask(branch=1, frame=0)]
    assert fusion.open(1, 0.0) == [Ask(branch=0, frame=1)]
    assert fires(fusion.arrived(0, 0, 0.1)) == [(0, (0,))]
    assert fusion.failed(1, 0) == []
    assert fusion.live == (0,)
    assert Ask(branch=1, frame=2) in fusion.open(2, 1.0)
    assert fires(fusion.arrived(0, 1, 1.0)) == [(1, (0,))]
    fusion.arrived(1, 2, 1.1)
    assert fires(fusion.arrived(0, 2, 1.2)) == [(2, (0, 1))]  # it came in time: it counts


def test_being_told_that_a_branch_died_releases_the_frames_that_wait_for_it() -> None:
    fusion = made(2)
    fusion.open(0, 0.0)
    fusion.open(1, 0.0)
    fusion.arrived(0, 1, 0.1)
    fusion.arrived(0, 0, 0.2)
    assert fires(fusion.branch_down(1)) == [(0, (0,)), (1, (0,))]


def test_frames_end_in_order_where_asked_and_as_they_come_where_not() -> None:
    for ordered, first in ((True, []), (False, [(1, (0,))])):
        fusion = made(1, ordered=ordered)
        fusion.open(0, 0.0)
        fusion.open(1, 0.0)
        assert fires(fusion.arrived(0, 1, 0.1)) == first
        assert fires(fusion.arrived(0, 0, 0.2)) == ([(0, (0,)), (1, (0,))] if ordered else [(0, (0,))])


def test_too_many_frames_are_refused_and_too_few_branches_are_no_result() -> None:
    fusion = made(2, max_open=1, least_present=2)
    fusion.open(0, 0.0)
    (refused,) = fusion.open(1, 0.0)
    assert isinstance(refused, Refuse)
    assert "1 frames are open" in refused.reason
    fusion.arrived(1, 0, 0.1)
    assert fusion.failed(0, 0) == [Unfused(frame=0, present=(1,), missing=(0,))]
    (again,) = fusion.open(0, 0.0)
    assert isinstance(again, Refuse)


def test_with_too_few_branches_a_frame_waits_on_for_a_late_one_and_gives_up_in_the_end() -> None:
    fusion = made(2, first_wait_s=1.0, longest_wait_s=2.0, give_up_s=5.0)
    fusion.open(0, 0.0)
    fusion.open(1, 0.0)
    assert fusion.passed(1.0) == []
    assert fusion.due_s == 5.0
    assert fires(fusion.arrived(1, 0, 1.5)) == [(0, (1,))]
    assert fusion.passed(4.9) == []
    assert fusion.passed(5.0) == [Unfused(frame=1, present=(), missing=(0, 1))]
    assert fusion.due_s is None


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(EcotoneError, match="num_branches is 0"):
        FusionSettings(num_branches=0)
    with pytest.raises(EcotoneError, match="least_present is 3, there are 2"):
        FusionSettings(num_branches=2, least_present=3)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open")),
        st.tuples(st.just("arrived"), st.integers(0, 2), st.integers(0, 12)),
        st.tuples(st.just("failed"), st.integers(0, 2), st.integers(0, 12)),
        st.tuples(st.sampled_from(["down", "up"]), st.integers(0, 2)),
        st.tuples(st.just("passed"), st.floats(0.0, 2.0)),
    ),
    max_size=80,
)


@given(steps=STEPS, ordered=st.booleans(), max_open=st.integers(1, 5), dead_after=st.integers(1, 3), least=st.integers(0, 3))
@settings(max_examples=400, deadline=None)
def test_whatever_comes_every_frame_ends_once_and_every_token_is_used_once_or_discarded(
    steps: list[tuple], ordered: bool, max_open: int, dead_after: int, least: int
) -> None:
    """Any order, duplicates, tokens never asked for, deaths and returns. Arrivals are numbered over the frames opened."""
    fusion = made(3, ordered=ordered, max_open=max_open, dead_after=dead_after, least_present=least, window=4, min_heard=2)
    now_s, frames, opened, ended = 0.0, 0, [], []
    came: Counter[tuple[int, int]] = Counter()
    used: Counter[tuple[int, int]] = Counter()
    discarded: Counter[tuple[int, int]] = Counter()
    excused: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}  # branch -> frames that need not wait for it
    due_s: dict[tuple[int, int], float] = {}

    def see(effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Fire | Unfused):
                ended.append(effect.frame)
                used.update((branch, effect.frame) for branch in effect.present)
                assert isinstance(effect, Fire) == (len(effect.present) >= least)
                assert sorted((*effect.present, *effect.missing)) == [0, 1, 2]
                assert all(effect.frame in excused[branch] for branch in effect.missing)
            elif isinstance(effect, Discard):
                discarded[effect.branch, effect.frame] += 1

    for step in steps:
        match step:
            case ("open",):
                effects = fusion.open(frames, now_s)
                if not any(isinstance(e, Refuse) for e in effects):
                    opened.append(frames)
                    for branch in {0, 1, 2} - set(fusion.live):
                        excused[branch].add(frames)
                    due_s |= {(branch, frames): now_s + fusion.wait_s(branch) for branch in fusion.live}
                frames += 1
                see(effects)
            case ("arrived", branch, frame):
                came[branch, frame] += 1
                see(fusion.arrived(branch, frame, now_s))
            case ("failed", branch, frame):
                excused[branch].add(frame)
                live = set(fusion.live)
                effects = fusion.failed(branch, frame)
                for silent in live - set(fusion.live):
                    excused[silent].update(opened)
                see(effects)
            case ("down", branch):
                excused[branch].update(opened)
                see(fusion.branch_down(branch))
            case ("up", branch):
                see(fusion.branch_up(branch))
            case ("passed", seconds):
                now_s += seconds
                for (branch, frame), due in due_s.items():
                    if due <= now_s:
                        excused[branch].add(frame)
                live = set(fusion.live)
                effects = fusion.passed(now_s)
                for silent in live - set(fusion.live):
                    excused[silent].update(opened)
                see(effects)
                assert fusion.due_s is None or fusion.due_s > now_s
        assert fusion.num_open <= max_open
        assert fusion.num_held == sum(came.values()) - sum(used.values()) - sum(discarded.values()) <= 3 * max_open
    for branch in range(3):
        excused[branch].update(opened)
    see(fusion.close())
    assert sorted(ended) == opened
    assert not ordered or ended == opened
    assert max(used.values(), default=1) == 1
    assert came == used + discarded
