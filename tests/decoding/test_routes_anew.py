"""A stage that is told its place again keeps what still serves, and a move that breaks at its end is not called done."""

from __future__ import annotations

import pytest

from ecotone.decoding.engine import Engine
from ecotone.decoding.frame import Frame, FrameRow, Result
from ecotone.decoding.messages import Peer, Route, Routed
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.stage import Came, Finished, Stage, StartWork, Tell
from ecotone.decoding.words import (
    Emit,
    Ended,
    Ending,
    Heard,
    NodeDown,
    PipelineReady,
    Reshard,
    Resharded,
    ResultCame,
    Say,
    Settings,
    StageRef,
    Submit,
    Tick,
    WantPipeline,
)
from ecotone.decoding.work import Done, StepWork, TrimWork

pytestmark = pytest.mark.pure


def route(epoch: int, codec: str) -> Route:
    return Route(
        shard=1, epoch=epoch, index=0, count=2, before=Peer(node=""), after=Peer(node="b", shard=2), codec=codec,
        keep=((5, 3),) if epoch > 1 else (),
    )  # fmt: skip


@pytest.mark.parametrize(("codec", "kept"), [("none", 3), ("fp32", 3), ("int8", 0)])
def test_outputs_are_kept_where_the_new_codec_has_the_same_bytes(codec: str, kept: int) -> None:
    """A successor on the stage's own device takes "none" where the lost one took "fp32"."""
    stage = Stage(1, 0, 2)

    def take(item: Frame | Route) -> list[object]:
        effects = stage.handle(Came(item), 0.0)
        work = next(e.work for e in effects if isinstance(e, StartWork))
        assert isinstance(work, TrimWork | StepWork)
        return list(stage.handle(Finished(Done(work=work, payload=b"" if isinstance(work, TrimWork) else bytes(12))), 0.0))

    take(route(1, "fp32"))
    take(Frame(epoch=1, number=1, rows=(FrameRow(5, 0, (7, 8, 9)),)))
    told = take(route(2, codec))
    assert told == [Tell(Routed(shard=1, epoch=2, held=((5, 3, kept),)))]


def stages(*nodes: str) -> tuple[StageRef, ...]:
    return tuple(
        StageRef(peer=Peer(node=node, shard=1 + "abc".index(node)), first=i, last=i + 1, num_blocks=9, makes="x")
        for i, node in enumerate(nodes)
    )


def test_a_stage_lost_while_a_move_takes_place_makes_the_move_fail() -> None:
    engine = Engine(Settings(context=64))

    def routed(*nodes: str) -> list[object]:
        epoch, found = engine.measured().epoch, []
        for node in nodes:
            found += engine.handle(Heard(node, Routed(shard=1 + "abc".index(node), epoch=epoch)), 0.0)
        for frame in [e.frame for e in found if isinstance(e, Emit)]:
            found += engine.handle(ResultCame(Result(epoch=epoch, number=frame.number)), 0.0)
        return found

    engine.handle(Reshard(stages("a", "b")), 0.0)
    routed("a", "b")
    engine.handle(Reshard(stages("a", "c")), 0.0)
    assert engine.stages == stages("a", "c")
    engine.handle(NodeDown("c"), 1.0)
    effects = engine.handle(Tick(), 2.0)
    reports = [e for e in effects if isinstance(e, Resharded)]
    assert [bool(r.error) for r in reports] == [True]
    wanted = next(e for e in effects if isinstance(e, WantPipeline))
    assert wanted.lost == ("c",)
    engine.handle(PipelineReady(wanted.attempt, stages("a", "b")), 2.1)
    assert not [e for e in routed("a", "b") if isinstance(e, Resharded)]


def test_a_token_id_out_of_range_is_refused_before_anyone_computes() -> None:
    engine = Engine(Settings(context=64, vocabulary=10))
    for token in (10, -1):
        effects = engine.handle(Submit(request=1, prompt=(1, token), params=SamplingParams()), 0.0)
        ended = next(e for e in effects if isinstance(e, Ended))
        assert ended.ending is Ending.FAILED
        assert f"token id {token}" in ended.reason
        assert not [e for e in effects if isinstance(e, Say)]
