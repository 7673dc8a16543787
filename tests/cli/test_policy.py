"""`ecotone policy`: trained on a stated profile, shown, run; and what is refused, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import Ended
from test_plan_files import stated_profile

from ecotone.policies.training import Asked

pytestmark = [pytest.mark.loopback, pytest.mark.timeout(280)]
pytest.importorskip("gymnasium", reason="the extra `learn` is not installed")
pytest.importorskip("torchrl", reason="the extra `learn` is not installed")

TRAIN = ("policy", "train", "net.py:net", "--cluster", "pair.toml", "--profile", "p.json")


def test_a_policy_is_trained_shown_and_run(
    ecotone: Callable[..., Ended], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty updates in short episodes make no good policy, but a whole one. Training needs no nodes: all is measured."""
    stated_profile(folder)
    monkeypatch.setattr("ecotone.cli.policy.Asked", partial(Asked, num_requests=20))
    monkeypatch.setattr("ecotone.cli.policy.open_nodes", lambda _: nullcontext())
    world = ("--deadline", "10ms,30ms", "--rates", "100kbit/s,100Mbit/s", "--plans", "3")
    made = ecotone(*TRAIN, *world, "--updates", "20", "--out", "p.safetensors")
    assert made.code == 0, made.err
    for said in ("near and far, ", "best static", "oracle", "beside the best static plan"):
        assert said in made.out
    shown = ecotone("policy", "show", "p.safetensors", "--json")
    assert shown.code == 0, shown.err
    about = json.loads(shown.out)
    assert 2 <= len(about["plans"]) <= 3
    assert about["measured"]["oracle_reward"] >= about["measured"]["policy_reward"]

    np.save(folder / "x.npy", np.zeros((1, 3, 32, 32), np.float32))
    base = ("run", "net.py:net", "x.npy", "--cluster", "pair.toml", "--profile", "p.json")
    without = ecotone(*base, "--policy", "p.safetensors")
    assert without.code == 2
    assert "add --adapt and --require latency" in without.err
    ran = ecotone(*base, "--policy", "p.safetensors", "--adapt", "--require", "latency=20ms", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out.splitlines()[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*TRAIN, "--deadline", "fast", "--out", "x"), "--deadline"),
        ((*TRAIN, "--deadline", "20ms", "--rates", "5Mbit/s", "--out", "x"), "slowest and the fastest"),
        (("policy", "show", "pair.toml"), "no safetensors file"),
        (("policy", "show", "nothing"), "give the file"),
    ],
)
def test_bad_input_ends_in_one_line(
    ecotone: Callable[..., Ended], folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    stated_profile(folder)
    ended = ecotone(*arguments)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1
