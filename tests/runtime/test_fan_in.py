"""Fan-in over sessions: fused results equal the whole models', a branch that is killed stops no frame and returns."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from small_nets import cluster, lines, plan

from ecotone.cluster import DeviceId
from ecotone.model import Captured
from ecotone.model.capture import ModelError
from ecotone.protocol.fusion import FusionSettings
from ecotone.runtime import Busy, Nodes, Session, SessionClosed, deploy, in_memory, launch
from ecotone.runtime.fan_in import FanIn, Fused, with_mask
from ecotone.units import EcotoneError

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def exact() -> tuple[Captured, torch.Tensor]:
    return lines()


def total(outputs: Sequence[Any]) -> torch.Tensor:
    return torch.stack([output for output in outputs if output is not None]).sum(0)


def expected(captured: Captured, inputs: Sequence[torch.Tensor], present: Sequence[int]) -> torch.Tensor:
    """The whole model on the inputs of the branches that took part, fused alike."""
    return total([captured.unflatten_outputs(captured.reference((inputs[i],))) for i in present])


@contextlib.contextmanager
def branches(captured: Captured, start: Callable[..., Nodes], count: int) -> Iterator[tuple[list[Nodes], list[Session]]]:
    """`count` endpoints, each with its own nodes and a plan cut between it and the hub."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(start(cluster("hub", f"eye{i}"))) for i in range(count)]
        half, length = captured.graph.num_blocks // 2, captured.graph.num_blocks
        plans = [plan(captured.graph, (f"eye{i}", half), ("hub", length), source="hub") for i in range(count)]
        sessions = [
            stack.enter_context(deploy(one, captured, each, node_timeout_s=1.0))
            for one, each in zip(plans, nodes, strict=True)
        ]
        yield nodes, sessions


@pytest.mark.torch
def test_frames_are_fused_in_order_from_all_branches(exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    frames = [[x + frame, x - frame, x * (frame + 1)] for frame in range(6)]
    with branches(captured, in_memory, 3) as (_, sessions), FanIn(sessions, total) as fan_in:
        found = [future.result(PATIENCE_S) for future in [fan_in.submit(inputs) for inputs in frames]]
        assert [f.frame for f in found] == list(range(6))
        assert all(f.present == (0, 1, 2) and f.missing == () for f in found)
        assert all(torch.equal(f.output, expected(captured, i, f.present)) for f, i in zip(found, frames, strict=True))


@pytest.mark.torch
def test_what_a_caller_may_get_wrong_is_said_before_anything_is_sent(exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    with pytest.raises(EcotoneError, match="no branch"):
        FanIn([], total)
    with branches(captured, in_memory, 2) as (_, sessions):
        with pytest.raises(EcotoneError, match="settings are for 3 branches, there are 2"):
            FanIn(sessions, total, settings=FusionSettings(num_branches=3))
        with FanIn(sessions, lambda outputs: 1 / 0) as fan_in:
            with pytest.raises(EcotoneError, match="inputs for 1 branches, there are 2"):
                fan_in.submit([x])
            with pytest.raises(ModelError):
                fan_in.submit([x, x[:, :3]])
            assert isinstance(fan_in.submit([x, x]).exception(PATIENCE_S), ZeroDivisionError)
        with pytest.raises(SessionClosed):
            fan_in.submit([x, x])


@pytest.mark.torch
def test_too_many_open_frames_are_refused_and_none_is_lost(exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    with branches(captured, in_memory, 2) as (_, sessions):
        with FanIn(sessions, total, settings=FusionSettings(num_branches=2, max_open=2)) as fan_in:
            futures = [fan_in.submit([x, x]) for _ in range(40)]
        outcomes = [future.exception(PATIENCE_S) for future in futures]
        assert outcomes[0] is None
        assert all(error is None or isinstance(error, Busy) for error in outcomes)


@pytest.mark.torch
def test_a_masked_module_gets_zeros_for_a_missing_branch() -> None:
    def module(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (a * mask[0] + b * mask[1]) / mask.sum()

    like = [torch.ones(2), torch.ones(2)]
    fuse = with_mask(module, like)
    assert torch.equal(fuse([torch.full((2,), 4.0), None]), torch.full((2,), 4.0))
    assert torch.equal(fuse([torch.full((2,), 4.0), torch.full((2,), 2.0)]), torch.full((2,), 3.0))


@pytest.mark.loopback
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_branch_whose_process_dies_or_stalls_stops_no_frame(exact: tuple[Captured, torch.Tensor], fault: int) -> None:
    """Frames go on without the branch, their outputs exactly those of the other; a branch that goes on is heard again."""
    captured, x = exact
    settings = FusionSettings(num_branches=2, first_wait_s=1.0, margin_s=0.1)
    with branches(captured, launch, 2) as (nodes, sessions), FanIn(sessions, total, settings=settings) as fan_in:
        assert fan_in(x, x).missing == ()
        victim = nodes[1].children[DeviceId("eye1")]
        found: list[Fused] = []
        try:
            for frame in range(40):
                if frame == 10:
                    os.kill(victim.pid, fault)
                inputs = [x + frame, x - frame]
                fused = fan_in.submit(inputs).result(PATIENCE_S)
                assert torch.equal(fused.output, expected(captured, inputs, fused.present))
                found.append(fused)
        finally:
            if fault == signal.SIGSTOP:
                os.kill(victim.pid, signal.SIGCONT)
        assert [f.frame for f in found] == list(range(1, 41))
        assert all(0 in f.present for f in found)
        assert all(f.missing == () for f in found[:10])
        assert all(f.missing == (1,) for f in found[15:])
        assert fan_in.live == (0,)
        if fault == signal.SIGSTOP:
            end = time.monotonic() + PATIENCE_S
            while fan_in(x, x).missing:
                assert time.monotonic() < end, "the branch was not heard again"
