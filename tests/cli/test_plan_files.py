"""`ecotone plan --survive`: the set that it writes and what it says; that run takes it; bad options in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import Ended

from ecotone.cli.workflow import load_work
from ecotone.cluster import DeviceId
from ecotone.planset import PlanSet, shared_edge
from ecotone.profile import Profile, SegmentTime
from ecotone.profiling import profile_key

pytestmark = [pytest.mark.loopback, pytest.mark.timeout(280)]


def stated_profile(folder: Path) -> None:
    """p.json, as if measured: the first block is quick on both, every other one takes near 10 ms and far 0.1 ms."""
    work = load_work("net.py:net", folder / "pair.toml", quiet=True)
    graph, blocks = work.captured.graph, work.captured.graph.num_blocks
    segments = tuple(
        SegmentTime(
            device=DeviceId(device), executor="torch:fp32", start=a, stop=b, spread_s=0, memory_bytes=0,
            median_s=sum(1e-5 if i == 0 else later for i in range(a, b)),
        )
        for device, later in (("near", 10e-3), ("far", 1e-4))
        for a in range(blocks)
        for b in range(a + 1, blocks + 1)
    )  # fmt: skip
    inputs, image = (work.captured.example_inputs,), work.preparation.image
    profile = Profile(
        graph_hash=graph.content_hash(), cluster_name="pair", num_blocks=blocks, cuts=tuple(range(blocks + 1)),
        segments=segments, key=profile_key(graph, work.cluster, samples=inputs, image=image),
    )  # fmt: skip
    (folder / "p.json").write_text(profile.to_json())


def test_the_set_is_written_explained_and_run(ecotone: Callable[..., Ended], folder: Path) -> None:
    stated_profile(folder)
    base = ("net.py:net", "--cluster", "pair.toml")
    planned = ecotone("plan", *base, "--profile", "p.json", "--survive", "auto", "--bounds", "--out", "set.json")
    assert planned.code == 0, planned.err
    assert "an assumption" in planned.err
    found = PlanSet.from_json((folder / "set.json").read_text())
    assert found.primary.devices == ("near", "far")
    fallback = found.standbys[0]
    assert (fallback.label, fallback.mode, fallback.plan.devices) == ("local fallback on near", "passive", ("near",))
    assert shared_edge(found.primary, fallback.plan) == 1
    answered = "far fails every 8 h for 1 min: answered by local fallback"
    for said in ("topology: local", answered, "near holds", "none instead"):
        assert said in planned.out
    assert "bounded channels" in planned.out
    np.save(folder / "x.npy", np.zeros((1, 3, 32, 32), np.float32))
    ran = ecotone("run", "net.py:net", "x.npy", "--cluster", "pair.toml", "--plan", "set.json", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.out.splitlines()) == 1


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


def test_other_worlds_and_a_front_are_shown_and_drawn(ecotone: Callable[..., Ended], folder: Path) -> None:
    stated_profile(folder)
    base = ("plan", "net.py:net", "--cluster", "pair.toml", "--profile", "p.json")
    ended = ecotone(*base, "--what-if", "link=1kbit/s", "--what-if", "far=gone", "--pareto", "bytes", "--plot", "f.png")
    assert ended.code == 0, ended.err
    assert "link=1kbit/s" in ended.out
    assert "far=gone" in ended.out
    assert (folder / "f.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(ecotone(*base, "--what-if", "near=100x", "--pareto", "bytes", "--json").out)
    assert told["what_if"][0]["best"]["value"] <= told["what_if"][0]["today"]["latency_s"]
    assert told["front"]["points"][-1]["other"] == 0  # near alone sends nothing
    for wrong, said in (("moon=2x", "no device or link"), ("link=fast", "link=fast")):
        ended = ecotone(*base, "--what-if", wrong)
        assert (ended.code, said in ended.err) == (2, True), ended.err
    assert "add --pareto" in ecotone(*base, "--plot", "f.png").err
    assert "cannot be traded" in ecotone(*base, "--pareto", "latency").err
