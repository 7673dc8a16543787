"""A model with two branches, cut through both at once: planned, written, simulated and run from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import Ended

from ecotone.cli import orders, planning, simulating
from ecotone.cli.workflow import Work, load_work, make_plan, read_plan_set
from ecotone.cluster import DeviceId
from ecotone.model import capture
from ecotone.plan import Plan
from ecotone.planner.reordering import profile_in_order
from ecotone.profile import Profile, SegmentTime
from ecotone.profiling import profile_key

pytestmark = [pytest.mark.loopback, pytest.mark.timeout(280)]

TOWERS = """
import torch
from torch import nn


def tower(channels):
    layers = [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = tower(3), tower(3), nn.Linear(32, 5)

    def forward(self, a, b):
        return self.head(torch.cat([self.left(a), self.right(b)], 1))


def two():
    torch.manual_seed(0)
    return Two().eval(), (torch.rand(1, 3, 48, 48), torch.rand(1, 3, 48, 48))
"""


def stated(folder: Path) -> tuple[Work, Profile]:
    """p.json, as if measured in the captured order: near is slow behind the waists of the towers, quick before them."""
    (folder / "towers.py").write_text(TOWERS)
    pair = (folder / "pair.toml").read_text()
    (folder / "pair.toml").write_text(pair.replace("100 Mbit/s", "1 Mbit/s"))  # what crosses decides, not this machine
    work = load_work("towers.py:two", folder / "pair.toml", quiet=True)
    graph = work.captured.graph
    count = graph.num_blocks
    early = [b.name.split(".")[0] in ("left", "right") and b.name.split(".")[1] in ("0", "2") for b in graph.blocks]
    assert sum(early) == 4
    seconds = {"near": [1e-4 if e else 30e-3 for e in early], "far": [1e-4] * count}
    spans = [(0, c) for c in range(1, count + 1)] + [(c, count) for c in range(1, count)]
    segments = tuple(
        SegmentTime(
            device=DeviceId(d), executor="torch:fp32", start=a, stop=b, median_s=sum(each[a:b]), spread_s=0.0, memory_bytes=0
        )
        for d, each in seconds.items() for a, b in spans
    )  # fmt: skip
    key = profile_key(graph, work.cluster, samples=(work.captured.example_inputs,), image=work.preparation.image)
    profile = Profile(
        graph_hash=graph.content_hash(), cluster_name="pair", num_blocks=count, cuts=tuple(range(count + 1)),
        segments=segments, key=key,
    )  # fmt: skip
    (folder / "p.json").write_text(profile.to_json())
    return work, profile


def later(work: Work, profile: Profile, seen: list[tuple[int, ...]], factor: float = 1.0) -> Callable[..., Profile]:
    """Stands for measuring the cuts of another order: what adds up there, `factor` times for parts of the model."""

    def measured(other: Work, nodes: object, *, cuts: tuple[int, ...] = (), **_: object) -> Profile:
        seen.append(cuts)
        graph = other.captured.graph
        made = profile_in_order(work.captured.graph, graph, other.cluster, profile, cuts)
        whole = (0, graph.num_blocks)
        parts = tuple(
            replace(s, median_s=s.median_s * (1.0 if (s.start, s.stop) == whole else factor)) for s in made.segments
        )
        return replace(made, segments=parts)

    return measured


def test_branches_are_cut_where_each_is_narrow(
    ecotone: Callable[..., Ended], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, profile = stated(folder)
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(orders, "make_profile", later(work, profile, seen))
    for command in (planning, simulating):  # nothing is measured here, so no node has to be started
        monkeypatch.setattr(command, "open_nodes", lambda work: nullcontext())
    base = ("towers.py:two", "--cluster", "pair.toml")
    planned = ecotone("plan", *base, "--profile", "p.json", "--require", "codec=fp32", "--compare", "--out", "plan.json")
    assert planned.code == 0, planned.err
    assert "cut through branches" in planned.err
    plan = Plan.from_json((folder / "plan.json").read_text())
    captured = work.captured
    assert sorted(plan.order) == list(range(captured.graph.num_blocks))
    graph = captured.graph.in_order(plan.order)
    assert plan.graph_hash == graph.content_hash()
    assert plan.devices == ("near", "far")
    assert seen == [(plan.stages[0].stop,)]
    assert {b.name.split(".")[0] for b in graph.blocks[: plan.stages[0].stop]} == {"left", "right"}
    assert graph.frontier_bytes(plan.stages[0].stop) == 2 * 24 * 24 * 4  # both waists
    rows = {line.split()[0]: line for line in planned.out.splitlines() if line.split()}
    assert "(blocks reordered)" in rows["dads"]
    assert rows["dads"].split()[1:3] == rows["ecotone"].split()[1:3]  # both found it
    assert rows["neurosurgeon"].split()[1:3] != rows["ecotone"].split()[1:3]
    for command in (("simulate", *base, "--plan", "plan.json", "--requests", "3", "--json"),):
        ended = ecotone(*command)
        assert ended.code == 0, ended.err
        assert '"failed": 0' in ended.out


def test_what_does_not_pay_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the new cuts measure badly the captured order stays; where no order is promising nothing is measured."""
    work, profile = stated(folder)
    captured = work.captured
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(orders, "make_profile", later(work, profile, seen, factor=1e4))
    assert orders.in_best_order(work, None, profile, "latency", ("codec=fp32",)) is profile
    assert len(seen) == 1
    assert work.captured is captured
    assert orders.in_best_order(work, None, profile, "latency", ("device=near",)) is profile
    assert len(seen) == 1


def test_a_slow_moment_of_the_machine_is_no_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything ten times slower when the new cuts are measured: seen on the whole model, and taken out."""
    work, profile = stated(folder)
    exact = later(work, profile, [])

    def slower(other: Work, nodes: object, **more: object) -> Profile:
        made = exact(other, nodes, **more)
        return replace(made, segments=tuple(replace(s, median_s=10 * s.median_s) for s in made.segments))

    found = []
    for measure in (exact, slower):
        again, _ = stated(folder)
        monkeypatch.setattr(orders, "make_profile", measure)
        made = orders.in_best_order(again, None, profile, "latency", ("codec=fp32",))
        found.append(make_plan(again, made, "latency", ("codec=fp32",)))
    assert found[0].plan == found[1].plan
    assert found[0].value == pytest.approx(found[1].value)


def test_a_plan_of_blocks_in_one_row_is_known_too(folder: Path) -> None:
    """As the Python interface captures by default."""
    work, _ = stated(folder)
    inputs = work.captured.example_inputs
    row = capture(work.loaded.module, inputs, name="row")
    assert row.graph.content_hash() != work.captured.graph.content_hash()
    near = DeviceId("near")
    ends = [{"source": near, "target": near, "position": p, "codec": "none"} for p in (0, row.graph.num_blocks)]
    plan = {"schema": "ecotone.plan", "version": 1, "graph_hash": row.graph.content_hash(), "transfers": ends,
            "stages": [{"device": near, "start": 0, "stop": row.graph.num_blocks}]}  # fmt: skip
    (folder / "row.json").write_text(json.dumps(plan))
    read_plan_set(folder / "row.json", work)
    assert work.captured.graph.content_hash() == row.graph.content_hash()
    assert all(torch.equal(a, b) for a, b in zip(work.captured.reference(inputs), row.reference(inputs), strict=True))
