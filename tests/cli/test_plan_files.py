"""`ecotone plan --survive`: the set that it writes and what it says; run and simulate take it; bad options in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import CLUSTER, Ended

from ecotone.planset import PlanSet, shared_edge

pytestmark = [pytest.mark.loopback, pytest.mark.timeout(280)]

SLOW = CLUSTER.replace("slowdown = 4", "slowdown = 60")  # so slow that the far device is worth its link


def test_the_set_is_written_explained_and_run(ecotone: Callable[..., Ended], folder: Path) -> None:
    (folder / "slow.toml").write_text(SLOW)
    base = ("net.py:net", "--cluster", "slow.toml")
    planned = ecotone("plan", *base, "--profile", "p.json", "--survive", "auto", "--bounds", "--out", "set.json")
    assert planned.code == 0, planned.err
    found = PlanSet.from_json((folder / "set.json").read_text())
    assert "far" in found.primary.devices
    fallback = found.standbys[0]
    assert (fallback.label, fallback.mode, fallback.plan.devices) == ("local fallback on near", "passive", ("near",))
    assert shared_edge(found.primary, fallback.plan) == (1 if found.primary.devices[0] == "near" else 0)
    for said in (
        "topology: local",
        "far fails every 8 h for 1 min: answered by local fallback",
        "near holds",
        "none instead",
    ):
        assert said in planned.out
    assert "bounded channels" in planned.out
    np.save(folder / "x.npy", np.zeros((1, 3, 32, 32), np.float32))
    ran = ecotone("run", "net.py:net", "x.npy", "--cluster", "slow.toml", "--plan", "set.json", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.out.splitlines()) == 1
    simulated = ecotone("simulate", *base, "--profile", "p.json", "--plan", "set.json", "--requests", "5")
    assert simulated.code == 0, simulated.err
    assert str(fallback.plan) in simulated.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "net.py:net", "--survive", "maybe"), ("--survive 'maybe'", "auto, none, local, standby, active")),
        (("plan", "net.py:net", "--survive", "auto", "--mtbf", "8"), ("--mtbf", "has no unit")),
        (("plan", "net.py:net", "--survive", "auto", "--mtbf", "0s"), ("above zero",)),
        (("plan", "net.py:net", "--mtbf", "8h"), ("add --survive auto",)),
        (("run", "net.py:net", "x.npy", "--plan", "set.json", "--survive", "auto"), ("give one of them",)),
        (("serve", "net.py:net", "--survive", "perhaps"), ("--survive 'perhaps'",)),
    ],
)
def test_bad_options_end_in_one_line(
    ecotone: Callable[..., Ended], folder: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    ended = ecotone(*arguments)
    assert ended.code == 2
    assert all(word in ended.err for word in words), ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_a_broken_set_is_named(ecotone: Callable[..., Ended], folder: Path) -> None:
    (folder / "set.json").write_text('{"schema": "ecotone.planset", "version": 1, "primary": 7}')
    np.save(folder / "x.npy", np.zeros((1, 3, 32, 32), np.float32))
    ended = ecotone("run", "net.py:net", "x.npy", "--cluster", "pair.toml", "--plan", "set.json")
    assert ended.code == 2
    assert "set.json" in ended.err
    assert "primary" in ended.err
