"""The generator of link traces: the shipped files are what it makes, and each model has the shape that it claims."""

from __future__ import annotations

import numpy as np
import pytest

from ecotone.linktrace import LinkTrace, load_trace, shipped_traces
from ecotone.schema import SchemaError
from ecotone.simulator.linkmodels import DURATION_S, NAMES, SHIPPED_SEED, STEP_S, make
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure

CHANGING = tuple(name for name in NAMES if name != "stable_wifi")


def rates(trace: LinkTrace) -> np.ndarray:
    return np.array([trace.at(t).bytes_per_s for t in np.arange(0.0, DURATION_S, STEP_S)])


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_file_is_what_the_generator_writes(name: str) -> None:
    assert load_trace(name) == make(name, SHIPPED_SEED)


def test_every_model_is_shipped() -> None:
    assert set(shipped_traces()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_names_one_trace(name: str) -> None:
    assert make(name, 3) == make(name, 3)
    assert make(name, 3).points != make(name, 4).points


@pytest.mark.parametrize("name", CHANGING)
def test_changing_links_change_tenfold(name: str) -> None:
    """The issue: links in the field change tenfold within seconds. Over several seeds, leaving the extreme tenths out."""
    folds = [np.divide(*np.quantile(rates(make(name, seed)), (0.95, 0.05)) + 1e3) for seed in range(1, 9)]
    assert np.median(folds) >= 7


def test_the_stable_link_stays_within_a_fifth() -> None:
    for seed in range(1, 6):
        values = rates(make("stable_wifi", seed))
        assert values.min() > 0.8 * 5e6
        assert values.max() < 1.2 * 5e6


def test_walking_away_gets_slower() -> None:
    for seed in range(1, 6):
        values = rates(make("walking_away", seed))
        assert values[:40].mean() > 4 * values[-40:].mean()


def test_a_train_loses_the_link_now_and_then() -> None:
    """Every run has a tunnel of at least a second."""
    assert all((rates(make("lte_train", seed)) == 0).sum() >= 4 for seed in range(1, 9))


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(EcotoneError, match="walking_away"):
        make("elevator", 1)
    with pytest.raises(EcotoneError, match="walking_away"):
        load_trace("elevator")


def test_a_file_with_a_negative_rate_is_refused(tmp_path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("time_s,bytes_per_s,latency_s,loss\n0,1000,0.01,0\n1,-5,0.01,0\n")
    with pytest.raises(SchemaError, match="not negative"):
        load_trace(path)
