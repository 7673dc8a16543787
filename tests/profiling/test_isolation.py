"""An executor that kills its process is noted and passed over; the others are measured all the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ecotone import executors
from ecotone.model import capture
from ecotone.profiling.isolation import run_isolated
from ecotone.profiling.job import Job, Step, frontier_values, write_model

pytestmark = pytest.mark.torch

COMMAND = (sys.executable, str(Path(__file__).with_name("dying.py")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    captured = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (torch.randn(1, 4),))
    cuts = (0, 1, captured.graph.num_blocks)
    values = frontier_values(captured, [captured.example_inputs], cuts)
    write_model(folder, captured, [(0, cuts[-1]), (0, 1)], values)
    return folder, cuts[-1]


def run(folder, executors, timeout_s=60.0):  # type: ignore[no-untyped-def]
    path, length = folder
    steps = [Step(executor=e, start=0, stop=stop) for e in executors for stop in (length, 1)]
    job = Job(accelerator="cpu", threads=1, rounds=2, steps=tuple(steps))
    ticks: list[str] = []
    return run_isolated(path, job, ticks.append, timeout_s, COMMAND), length, ticks


@pytest.mark.parametrize(
    ("deadly", "reason"),
    [
        ("deadly:abort", "signal 6 (SIGABRT)"),
        ("deadly:exit", "ended with status 3"),
        ("deadly:late", "signal 8 (SIGFPE)"),
    ],
)
def test_death_is_noted_and_passed_over(folder, deadly, reason):
    outcome, length, ticks = run(folder, ["torch:fp32", deadly, "torch:bf16"])
    assert {(e["executor"], e["stop"]) for e in outcome.timed} == {
        (e, stop) for e in ("torch:fp32", "torch:bf16") for stop in (length, 1)
    }
    assert {(s.executor, s.stop) for s, _ in outcome.failed} == {(deadly, length), (deadly, 1)}
    assert all(reason in text for _, text in outcome.failed)
    assert ticks


def test_standstill_is_noted(folder):
    outcome, _, _ = run(folder, ["deadly:hang"], timeout_s=8.0)
    assert not outcome.timed
    assert any("did not come back within 8 s" in text for _, text in outcome.failed)


def test_error_of_an_executor_does_not_stop_the_job(folder):
    outcome, length, _ = run(folder, ["nothing:fp32", "torch:fp32"])
    assert {e["stop"] for e in outcome.timed} == {length, 1}
    with pytest.raises(executors.ExecutorError) as caught:
        executors.by_id("nothing:fp32")
    assert [text for _, text in outcome.failed] == [str(caught.value)] * 2
    facts = outcome.timed[0]
    assert facts["relative_error"] == 0
    assert facts["median_s"] > 0
    assert facts["num_runs"] == 2
