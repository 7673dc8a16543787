"""The slotted radio cell: the published check values, cases worked out by hand, and what must hold in every slot."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.offload import PUBLISHED, OffloadProfile
from ecotone.radio import Radio
from ecotone.simulator.cell import Cell, Tally, run_static, slot_reward
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure

# One device at 50 m, 1 W, no interference: ms and mJ of a task by point (the published table's last two columns).
CHECK = {
    "vgg11": ((92.876, 92.876), (31.068, 49.837), (52.740, 126.288), (104.465, 291.753), (138.752, 417.010),
              (189.300, 488.299)),
    "resnet18": ((92.876, 92.876), (12.099, 17.715), (20.340, 47.232), (27.412, 75.347), (38.715, 112.753),
                 (45.887, 98.446)),
    "mobilenetv2": ((92.876, 92.876), (20.871, 25.622), (12.878, 26.214), (17.353, 41.351), (25.922, 55.903),
                    (52.676, 77.945)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("point", range(6))
def test_one_task_alone_costs_what_the_published_table_says(name: str, point: int) -> None:
    profile = PUBLISHED[name]
    cell = Cell(profile, num_devices=1, slot_s=10.0)
    cell.reset(0, test=True, num_tasks=2)  # the first runs here, whatever is asked for
    result = cell.step(point, 0, 1.0)
    here_s, here_joule = profile.compute_s[5], profile.compute_s[5] * profile.compute_watt[5]
    ms, mj = CHECK[name][point]
    assert result.is_done
    assert result.finished.tolist() == [2]
    assert 1e3 * (result.busy_s[0] - here_s) == pytest.approx(ms, abs=6e-4)
    assert 1e3 * (result.joule[0] - here_joule) == pytest.approx(mj, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "ms", "mj"), [("resnet18", 47.5, 98), ("vgg11", 190, 488), ("mobilenetv2", 55, 78)]
)  # 200 tasks take 200 t seconds, rounded up to whole slots of 0.5 s
def test_computing_all_here_costs_the_published_row(name: str, ms: float, mj: float) -> None:
    tally = run_static(Cell(PUBLISHED[name]), 5, [0, 1, 0, 1, 0], 1.0)
    assert 1e3 * tally.s_per_task == pytest.approx(ms)
    assert 1e3 * tally.joule_per_task == pytest.approx(mj, abs=0.5)
    assert tally.finished == 5 * 200
    assert tally.is_done


def test_raw_upload_at_equal_powers_is_ruinous_as_published() -> None:
    # Three on a channel get 0.585 Mbit/s each: 1,204,224 bits take 2.058 s, and 200 of them 411 s.
    tally = run_static(Cell(PUBLISHED["resnet18"]), 0, [0, 1, 0, 1, 0], 1.0)
    assert 1e3 * tally.s_per_task == pytest.approx(2050.0)


def two_unequal(slot_s: float = 10.0) -> Cell:
    """Two devices: points are (upload 1000 bytes), (compute 2 s at 3 W, upload 500 bytes), (compute 4 s at 5 W)."""
    profile = OffloadProfile(
        name="toy", compute_s=(0.0, 2.0, 4.0), compute_watt=(0.0, 3.0, 5.0), payload_bytes=(1000.0, 500.0, 0.0), norm_s=4.0
    )
    radio = Radio(num_channels=2, width_hz=8.0 * 500, path_loss_exponent=1.0, noise_watt=0.01)
    return Cell(profile, radio, num_devices=2, slot_s=slot_s, mean_tasks=2)


def test_an_overlap_of_two_uploads_by_hand() -> None:
    """Both begin with a task here (4 s). Then A uploads 1000 bytes at 0.5 W; B computes 2 s, then uploads 500 at 1 W.

    From 50 m they are heard with 0.01 and 0.02 W over a noise of 0.01 W, in a channel of 500 * log2(1 + SNR) bytes/s.
    A is alone for 2 s at 500 * log2(2) = 500 bytes/s: done exactly when B begins. With A at half of that it is not.
    """
    cell = two_unequal()
    cell.reset(0, test=True)
    result = cell.step([0, 1], [0, 0], [0.5, 1.0])
    b_s = 500 / (500 * math.log2(3))
    assert result.is_done
    assert result.busy_s.tolist() == pytest.approx([4 + 2, 4 + 2 + b_s])
    assert result.joule.tolist() == pytest.approx([4 * 5 + 2 * 0.5, 4 * 5 + 2 * 3 + b_s * 1.0])

    cell.reset(0, test=True)
    result = cell.step([0, 1], [0, 0], [0.25, 1.0])
    alone = 500 * math.log2(1 + 0.005 / 0.01)  # A for 2 s
    a_rate, b_rate = 500 * math.log2(1 + 0.005 / 0.03), 500 * math.log2(1 + 0.02 / 0.015)
    b_s = 500 / b_rate  # B ends first: A is far from done
    a_left = 1000 - 2 * alone - b_s * a_rate
    a_s = 2 + b_s + a_left / alone
    assert a_left > 0
    assert result.busy_s.tolist() == pytest.approx([4 + a_s, 4 + 2 + b_s])
    assert result.joule.tolist() == pytest.approx([20 + 0.25 * a_s, 20 + 6 + b_s])


def test_another_channel_does_not_disturb() -> None:
    cell = two_unequal()
    cell.reset(0, test=True)
    result = cell.step([0, 0], [0, 1], [0.5, 1.0])
    assert result.busy_s.tolist() == pytest.approx([4 + 2, 4 + 1000 / (500 * math.log2(3))])


def test_power_changes_at_once_and_the_point_with_the_next_task() -> None:
    cell = two_unequal(slot_s=5.0)
    cell.reset(0, test=True)
    first = cell.step([0, 2], [0, 0], [0.5, 1.0])  # A uploads from 4 s on, at 500 bytes/s
    assert first.finished.tolist() == [1, 1]
    assert first.busy_s.tolist() == [5.0, 5.0]
    second = cell.step([1, 1], [1, 1], [1.0, 1.0])  # its other 500 bytes go at 500 log2(3) on channel 0, from point 0
    assert second.is_done
    assert second.busy_s[0] == pytest.approx(1 / math.log2(3))
    assert second.busy_s[1] == pytest.approx(3.0)
    assert second.joule.tolist() == pytest.approx([1 / math.log2(3), 15.0])


def test_the_state_is_the_published_one() -> None:
    cell = Cell(PUBLISHED["vgg11"], num_devices=3)
    state = cell.reset(7)
    assert state.shape == (3, 4)
    assert (state[:, 0] == 1).all()
    assert ((state[:, 3] >= 0) & (state[:, 3] <= 1)).all()
    point = np.array([PUBLISHED["vgg11"].compute_s.index(pytest.approx(s * 0.092876)) for s in state[:, 1]])
    assert state[:, 2].tolist() == [PUBLISHED["vgg11"].payload_bytes[k] / 150528 for k in point]
    assert (cell.reset(7) == state).all()
    assert (cell.reset(8) != state).any()
    test = cell.reset(0, test=True)
    assert test.tolist() == [[1.0, 0.1893 / 0.092876, 0.0, 49 / 99]] * 3  # all here: above 1, as in the published code
    assert cell.training_slots == 60


def test_the_reward_is_the_published_one() -> None:
    cell = two_unequal()
    cell.reset(0, test=True)
    result = cell.step(2, 0, 1.0)  # two tasks of 4 s at 5 W each
    assert slot_reward(result) == pytest.approx(-(10.0 + 1.0 * 40.0) / 2)
    assert slot_reward(result, 0.5) == pytest.approx(-(10.0 + 0.5 * 40.0) / 2)
    cell.reset(0, test=True)
    few = two_unequal(slot_s=1.0)
    few.reset(0, test=True)
    assert slot_reward(few.step(2, 0, 1.0)) == pytest.approx(-(1.0 + 5.0) / 0.8)  # nothing finished counts as 0.8


def test_fading_and_more_tasks_take_effect_between_slots() -> None:
    cell = two_unequal()
    cell.reset(0, test=True, num_tasks=1)
    cell.add_tasks([1, 0])
    cell.fade([2.0, 1.0])  # heard as with twice the power
    result = cell.step([0, 2], [0, 0], [0.5, 1.0])
    assert result.busy_s.tolist() == pytest.approx([4 + 1000 / (500 * math.log2(3)), 4.0])
    assert result.is_done
    cell.add_tasks(1)
    assert not cell.is_done
    assert cell.step(2, 0, 1.0).finished.tolist() == [1, 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(sorted(PUBLISHED)))
def test_in_every_slot_tasks_and_joules_add_up(seed: int, count: int, name: str) -> None:
    profile, random = PUBLISHED[name], np.random.default_rng(seed)
    cell, twin = Cell(profile, num_devices=count), Cell(profile, num_devices=count)
    cell.reset(seed)
    twin.reset(seed)
    before, tally = np.array(cell.left), Tally(num_devices=count)
    for _ in range(4):
        action = random.integers(6, size=count), random.integers(2, size=count), random.uniform(0.01, 1, count)
        result, again = cell.step(*action), twin.step(*action)
        assert result.joule.tolist() == again.joule.tolist()
        assert (result.left == before - result.finished).all()
        assert (result.left >= 0).all()
        assert ((result.busy_s == cell.slot_s) | (result.left == 0)).all()  # back to back while there is a task
        watts = np.maximum(action[2], max(profile.compute_watt))
        assert (result.joule <= watts * result.busy_s + 1e-9).all()
        before, tally = result.left, tally + result
        assert cell.state().shape == (count, 4)
        assert ((cell.state() >= 0) & np.isfinite(cell.state())).all()
    assert tally.seconds == pytest.approx(4 * 0.5 * count)
    assert tally.finished == sum(cell.total) - sum(cell.left)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ((6, 0, 1.0), "point"),
        ((0, 2, 1.0), "channel"),
        ((0.5, 0, 1.0), "whole numbers"),
        ((0, 0, 1.5), "powers"),
        ((0, 0, math.nan), "powers"),
    ],
)
def test_an_action_out_of_range_is_refused(action: tuple[float, float, float], words: str) -> None:
    cell = Cell(PUBLISHED["vgg11"])
    cell.reset(0)
    with pytest.raises(EcotoneError, match=words):
        cell.step(*action)


def test_cells_and_profiles_that_make_no_sense_are_refused() -> None:
    with pytest.raises(EcotoneError, match="at least one device"):
        Cell(())
    with pytest.raises(EcotoneError, match="above zero"):
        Cell(PUBLISHED["vgg11"], slot_s=0.0)
    with pytest.raises(EcotoneError, match="at least one"):
        Cell(PUBLISHED["vgg11"]).reset(0, num_tasks=0)
    with pytest.raises(EcotoneError, match="last point sends nothing"):
        OffloadProfile(name="x", compute_s=(0.0, 1.0), compute_watt=(0.0, 1.0), payload_bytes=(1.0, 1.0), norm_s=1.0)
