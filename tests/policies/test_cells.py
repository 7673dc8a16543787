"""Many cells at once against the one cell, slot by slot, and the worlds that change."""

from __future__ import annotations

import numpy as np
import pytest

from ecotone.offload import PUBLISHED
from ecotone.policies.cells import Cells, World
from ecotone.radio import Radio
from ecotone.simulator.cell import Cell
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_same_slots_as_one_cell_after_another(name: str) -> None:
    random, size = np.random.default_rng(1), 3
    radio = Radio(num_channels=3)
    many = Cells(PUBLISHED[name], radio, num_copies=size, num_devices=4, mean_tasks=60)
    many.reset(0, test=True)
    single = [Cell(PUBLISHED[name], radio, num_devices=4, mean_tasks=60) for _ in range(size)]
    for cell in single:
        cell.reset(0, test=True)
    for _ in range(14):
        points, channels = random.integers(6, size=(size, 4)), random.integers(3, size=(size, 4))
        watts = 10 ** random.uniform(-4, 0, (size, 4))
        found = many.step(points, channels, watts)
        for i, cell in enumerate(single):
            expected = cell.step(points[i], channels[i], watts[i])
            assert found.finished[i].tolist() == expected.finished.tolist()
            assert found.joule[i] == pytest.approx(expected.joule)
            assert found.busy_s[i] == pytest.approx(expected.busy_s)
            assert bool(found.is_done[i]) == expected.is_done
            assert many.state()[i] == pytest.approx(cell.state(), abs=1e-4)


def test_a_copy_is_reset_alone() -> None:
    cells = Cells(PUBLISHED["vgg11"], num_copies=3)
    cells.reset(4)
    cells.step(np.zeros((3, 5), dtype=int), np.zeros((3, 5), dtype=int), np.ones((3, 5)))
    before = cells.state()
    cells.reset(None, np.array([False, True, False]))
    after = cells.state()
    assert np.array_equal(before[[0, 2]], after[[0, 2]])
    assert after[1, :, 0] == pytest.approx(np.ones(5))
    assert cells.slot.tolist() == [1, 0, 1]


def test_what_others_send_is_heard_on_its_channel() -> None:
    """Only device 1 uploads, on channel 1, with 0.1 W from 50 m over 1e-9 W of noise: log10(1 + 800) / 5 for the others."""
    cells = Cells(PUBLISHED["vgg11"], num_copies=1, num_devices=3, slot_s=0.25)
    cells.reset(0, test=True)
    points, channels = np.array([[5, 0, 5]]), np.array([[0, 1, 0]])
    cells.step(points, channels, np.full((1, 3), 0.1))  # the first task, 189 ms here, is over: device 1 uploads now
    heard = cells.channel_occupancy[0]
    loud = np.log10(1 + 0.1 * 50.0**-3 / 1e-9) / 5
    assert heard[0] == pytest.approx([0.0, loud])
    assert heard[1] == pytest.approx([0.0, 0.0])


def test_a_world_walks_fades_and_brings_work() -> None:
    world = World(walk_m_per_s=10.0, fading_db=4.0, batches_per_s=0.5, batch=10.0, slots=30)
    cells = Cells(PUBLISHED["resnet18"], num_copies=50, mean_tasks=5, world=world)
    cells.reset(1)
    assert world.fading_db * np.log(10) / 10 == pytest.approx(cells._fading.std(), rel=0.2)
    shape, finished, steps = (50, 5), 0, []
    for slot in range(30):
        before = cells.distance_m.copy()
        found = cells.step(np.ones(shape, dtype=int), np.zeros(shape, dtype=int), np.full(shape, 0.5))
        finished += int(found.finished.sum())
        steps.append(np.abs(cells.distance_m - before).max())
        assert found.is_done.all() == (slot == 29)
    assert max(steps) == pytest.approx(5.0)
    assert finished > 50 * 5 * 5 + 0.5 * 15 * 10 * 250 * 0.5  # the first tasks, and most of the half batch a second
    assert cells._fading.std() == pytest.approx(4.0 * np.log(10) / 10, rel=0.2)


def test_senseless_cells_and_worlds_are_refused() -> None:
    with pytest.raises(EcotoneError, match="above zero"):
        Cells(PUBLISHED["vgg11"], num_copies=0)
    with pytest.raises(EcotoneError, match="how many slots"):
        World(batches_per_s=1.0)
