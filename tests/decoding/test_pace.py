"""Times of a pipeline, reckoned back from frames whose times were made by known laws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ecotone.decoding.frame import StageTime
from ecotone.decoding.pace import Line, Pace, Slope

pytestmark = pytest.mark.pure
FIXED, ROW, NETWORK = (0.004, 0.002, 0.001), (0.001, 0.003, 0.0), 0.05


def seen(rows: list[int], *, is_few: bool = True) -> Pace:
    """Stages 0 and 2 share a device; each frame also waited 7 ms at the second."""
    pace = Pace(("a", "b", "a"))
    for n in rows:
        times = [StageTime(i, 0.007 * (i == 1), FIXED[i] + ROW[i] * n) for i in range(3)]
        pace.add(times, n, is_few, NETWORK + 0.007 + sum(t.compute_s for t in times))
    return pace


def test_lines_give_the_loop_the_slowest_device_and_the_depth() -> None:
    pace = seen([1, 4, 2, 8, 1])
    for n in (1, 3, 8):
        devices = (FIXED[0] + FIXED[2] + ROW[0] * n, FIXED[1] + ROW[1] * n)
        assert pace.stage_s(n) == pytest.approx(max(devices))
        assert pace.loop_s(n) == pytest.approx(sum(devices) + NETWORK)
        assert pace.depth(n) == math.ceil((sum(devices) + NETWORK) / max(devices) - 0.25)
    assert pace.row_s() == pytest.approx(max(0.011 - 0.003, 0.008) - max(0.006, 0.005))  # at 2 rows against 1 row


def test_what_rows_cost_is_remembered_when_they_vary_no_more() -> None:
    pace = seen([1, 4, 2] + [1] * 500)
    assert pace.loop_s(5) - pace.loop_s(1) == pytest.approx(4 * sum(ROW), rel=1e-6)
    assert seen([1] * 50).loop_s(5) == pytest.approx(seen([1]).loop_s(1))  # never varied: flat
    assert pace.rows_seen == 4


def crowded(gap_s: float, frames: int, *, is_full: bool) -> Pace:
    """Frames of one row, `frames` in flight at once, coming back at those intervals; late, where the pipe is full."""
    pace = seen([1] * 30)
    loop_s = pace.loop_s(1)
    times = [StageTime(i, 0.0, FIXED[i] + ROW[i]) for i in range(3)]
    for n in range(200):
        came_s = 100 + loop_s + n * gap_s
        sent_s = 100 + n * gap_s - (frames * gap_s - loop_s) if is_full else 100 + n * gap_s
        pace.add(times, 1, True, came_s - sent_s, came_s=came_s, beside=frames, is_draft=True)
    return pace


def test_frames_that_a_full_pipe_holds_up_tell_what_they_take_besides_computing() -> None:
    tau = seen([1]).stage_s(1)
    full = crowded(tau + 0.003, 20, is_full=True)
    assert full.frame_s == pytest.approx(0.003, rel=0.02)
    assert full.network_s == pytest.approx(NETWORK)  # though each of them took 20 times as long as they are apart
    even = crowded(0.02, 3, is_full=False)  # sent so far apart that nothing waits
    assert even.frame_s == 0.0
    assert even.network_s == pytest.approx(NETWORK)


def test_a_frame_alone_is_not_compared_with_the_one_before() -> None:
    pace = seen([1] * 30)
    for n in range(50):
        pace.add([StageTime(i, 0.0, FIXED[i] + ROW[i]) for i in range(3)], 1, True, 0.06, came_s=100 + 0.1 * n)
    assert pace.frame_s == 0.0


def test_stale_frames_tell_by_what_they_hold_up_the_next_one() -> None:
    pace = seen([1] * 30)
    for stale in (4, 8, 4, 2) * 20:
        pace.behind(1, stale, pace.loop_s(1) + pace.stage_s(1) / 2 + 0.002 * stale)
    assert pace.stale_s == pytest.approx(0.002, rel=1e-3)


def test_links_that_are_slow_for_rows_are_told_from_noise() -> None:
    """0.7 ms per row more on a link of 10 Mbit/s; and nothing, under noise of 0.5 ms."""
    noise = np.random.default_rng(0).normal(0, 0.0005, 400)
    slow, quick = Slope(), Slope()
    for n, each in enumerate(noise.tolist()):
        rows = 1 + n % 7
        slow.add(rows, 0.003 + 0.0007 * rows + each)
        quick.add(rows, 0.003 + each)
    assert 0.0004 < slow.value <= 0.0008
    assert quick.value < 0.0001
    for _ in range(200):
        slow.add(1, 0.003)
    assert slow.value < 1e-4  # rows vary no more: forgotten


def test_before_anything_was_seen() -> None:
    pace = Pace(("a", "b", "a"))
    assert (pace.stage_s(1), pace.loop_s(1), pace.depth(1)) == (0.0, 0.0, 2)
    assert pace.chunk(1000, 0.1, 32, 2048, 128) == 128


@pytest.mark.parametrize("tokens", [100, 1000, 8000])
def test_the_chunk_is_the_best_of_all_powers_of_two(tokens: int) -> None:
    pace = Pace(tuple("abcd"))
    fixed, rate = 0.01, 0.0005
    for n in (32, 64, 256):
        pace.add([StageTime(i, 0.0, fixed + rate * n) for i in range(4)], n, False, 1.0)

    def takes(size: int) -> float:
        chunks = math.ceil(tokens / size)
        return (chunks + 3) * (fixed + rate * tokens / chunks)

    chosen = pace.chunk(tokens, 10.0, 32, 2048, 128)
    assert takes(chosen) <= 1.25 * min(takes(2**k) for k in range(5, 12))
    held_up = pace.chunk(tokens, 0.05, 32, 2048, 128)
    assert held_up == 32 or fixed + rate * held_up <= 0.05


def test_slow_frames_of_long_ago_do_not_make_every_row_dear() -> None:
    """While a node starts, a frame of eight rows took 0.2 s; since then one row takes 1 ms, and rows did not vary."""
    line = Line(is_flat=True)
    line.add(1, 0.001)
    line.add(8, 0.2)
    for _ in range(200):
        line.add(1, 0.001)
    assert line.at(1) < 0.0011
    assert line.at(8) < 0.009
