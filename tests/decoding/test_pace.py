"""Times of a pipeline, reckoned back from frames whose times were made by known laws."""

from __future__ import annotations

import math

import pytest

from ecotone.decoding.frame import StageTime
from ecotone.decoding.pace import Line, Pace

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
