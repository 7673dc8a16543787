"""One stage at a time: fences, routes, replays and exports, as sequences of what comes and what goes."""

from __future__ import annotations

import pytest

from ecotone.decoding.frame import Cut, Fork, Frame, FrameRow, Kind, Replay, RowResult
from ecotone.decoding.messages import Export, ExportPiece, Fault, Fence, Imported, KvPiece, Peer, Route, Routed
from ecotone.decoding.stage import Came, Finished, SendFrame, SendKv, SendResult, Stage, StartWork, Tell
from ecotone.decoding.work import Done, ExportWork, StepWork, TrimWork

pytestmark = pytest.mark.pure
NEXT = Peer(node="b", shard=8)


class Bench:
    """A stage, and a shell that ends work when told to. Hidden states are 4 bytes per token: the token id."""

    def __init__(self, index: int = 0, count: int = 2):
        self.stage, self.work, self.out = Stage(7, 0, 2), [], []
        self.route(1, index, count)

    def take(self, item) -> None:
        self._apply(self.stage.handle(Came(item), 0.0))

    def route(self, epoch: int, index: int = 0, count: int = 2, keep=()) -> None:
        self.take(
            Route(shard=7, epoch=epoch, index=index, count=count, before=Peer(node=""), after=NEXT, codec="fp32", keep=keep)
        )
        self.end_all()

    def end(self, error: str = "") -> None:
        work, payload, results = self.work.pop(0), b"", ()
        if isinstance(work, StepWork):
            payload = b"".join(t.to_bytes(4, "little") for row in work.rows for t in row.tokens)
            results = tuple(RowResult(r.slot, r.fence, r.stop - 1, r.stop, (99,)) for r in work.rows) if work.is_last else ()
        self._apply(self.stage.handle(Finished(Done(work=work, payload=payload, results=results, error=error)), 0.0))

    def end_all(self) -> list:
        while self.work:
            self.end()
        out, self.out = self.out, []
        return out

    def frame(self, number: int, *rows: FrameRow, epoch: int = 1, orders=(), kind: Kind = Kind.STEP) -> list:
        payload = b"".join(t.to_bytes(4, "little") for row in rows for t in row.tokens)
        self.take(Frame(kind=kind, epoch=epoch, number=number, rows=rows, orders=orders, codec="fp32", payload=payload))
        return self.work

    def _apply(self, effects) -> None:
        self.work += [e.work for e in effects if isinstance(e, StartWork)]
        self.out += [e for e in effects if not isinstance(e, StartWork)]
        assert len(self.work) <= 1  # one thing at a time


def row(slot: int, start: int, *tokens: int, fence: int = 0) -> FrameRow:
    return FrameRow(slot, start, tokens, 1, fence)


def sent_rows(effects: list) -> list[tuple[int, int]]:
    return [(r.slot, r.fence) for e in effects if isinstance(e, SendFrame) for r in e.frame.rows]


def test_a_fence_that_overtakes_takes_queued_rows_out_and_the_frame_goes_on() -> None:
    bench = Bench()
    bench.frame(1, row(1, 0, 5))
    bench.frame(2, row(1, 1, 6), row(2, 0, 7, 8))
    bench.frame(3, row(1, 2, 9))
    bench.take(Fence(shard=7, raised=((1, 1),)))
    out = bench.end_all()
    assert sent_rows(out) == [(1, 0), (2, 0)]  # the first was being computed
    frames = [e.frame for e in out]
    assert [f.number for f in frames] == [1, 2, 3]  # each frame leaves
    assert frames[1].rows == (row(2, 0, 7, 8),)
    assert bytes(frames[1].payload) == b"\x07\0\0\0\x08\0\0\0"  # the part of the row that stayed
    bench.frame(4, row(1, 1, 6, fence=1))
    assert sent_rows(bench.end_all()) == [(1, 1)]


def test_fences_of_freed_slots_leave_nothing_behind() -> None:
    bench = Bench()
    bench.frame(1, row(1, 0, 5), row(2, 0, 5))
    bench.frame(2, orders=(Cut(1, 0),))
    bench.end_all()
    bench.take(Fence(shard=7, raised=((1, 4), (2, 1), (3, 1))))
    assert bench.stage.slots_known() == {2, 3}  # 3 may be on its way


def test_replays_are_never_stale() -> None:
    bench = Bench(index=1, count=3)
    bench.take(Fence(shard=7, raised=((1, 9),)))
    bench.frame(5, row(1, 0, 3, 4), kind=Kind.REPLAY)
    (sent,) = bench.end_all()
    assert isinstance(sent, SendResult)  # `until` is 0
    assert sent.result.is_replay
    assert bench.stage.lengths == {1: 2}


def test_the_last_stage_leaves_out_what_follows_a_refused_draft() -> None:
    bench = Bench(index=1, count=2)
    bench.frame(1, row(1, 0, 5))  # chooses 99
    bench.frame(2, row(1, 1, 98))  # a draft for what 99 is
    bench.frame(3, row(1, 2, 97))
    results = [e.result for e in bench.end_all()]
    assert [[r.tokens for r in result.rows] for result in results] == [[(99,)], [], []]
    bench.frame(4, row(1, 1, 99, fence=1))
    assert [r.tokens for r in bench.end_all()[0].result.rows] == [(99,)]


def test_a_route_waits_for_work_drops_former_frames_and_tells_what_is_there() -> None:
    bench = Bench()
    bench.frame(1, row(1, 0, 5, 6, 7), row(2, 0, 5))
    bench.frame(2, row(1, 3, 8))
    bench.take(
        Route(shard=7, epoch=3, index=0, count=2, before=Peer(node=""), after=NEXT, codec="fp32", keep=((1, 2), (9, 4)))
    )
    assert isinstance(bench.work[0], StepWork)  # still the first
    bench.end()
    assert bench.work == [TrimWork(keep=((1, 2),))]
    out = bench.end_all()
    assert out == [Tell(Routed(shard=7, epoch=3, held=((1, 2, 0),)))]  # of outputs nothing was kept: never sent on
    bench.frame(1, row(1, 2, 5), epoch=2)
    assert not bench.work  # an epoch that never was
    bench.frame(1, row(1, 2, 5), epoch=3)
    assert bench.work


def test_a_step_that_fails_is_told_with_its_frame() -> None:
    bench = Bench()
    bench.frame(4, row(1, 0, 5))
    bench.end("no room")
    assert bench.out == [Tell(Fault(shard=7, epoch=1, number=4, reason="no room"))]


def test_kept_outputs_are_sent_again_before_the_frame_that_asks() -> None:
    bench = Bench()
    bench.frame(1, row(1, 0, *range(10)))
    bench.frame(2, row(1, 10, 10))
    bench.frame(3, row(1, 11, 11))
    bench.frame(4, orders=(Fork(1, 2, 8),))
    bench.end_all()
    bench.route(2, keep=((1, 12), (2, 8)))
    assert bench.stage.boundary.length(1) == 12
    assert bench.stage.boundary.length(2) == 8
    bench.frame(1, epoch=2, orders=(Replay(0, 1, 1, 0, 12), Replay(0, 1, 2, 0, 8)))
    out = bench.end_all()
    assert [e.frame.kind for e in out] == [Kind.REPLAY, Kind.REPLAY, Kind.STEP]
    rows = [(r.slot, r.start, r.tokens) for e in out for r in e.frame.rows]
    assert rows == [(1, 0, tuple(range(10))), (2, 0, tuple(range(8))), (1, 10, (10, 11))]  # side by side, short ones joined
    assert bytes(out[1].frame.payload) == b"".join(t.to_bytes(4, "little") for t in (10, 11))


def test_what_was_cut_since_an_export_was_asked_for_is_not_read() -> None:
    bench = Bench()
    bench.frame(1, row(1, 0, *range(8)), row(2, 0, *range(8)))
    bench.end_all()
    pieces = (ExportPiece(slot=1, start=0, stop=8), ExportPiece(slot=2, start=0, stop=8))
    bench.frame(2, row(2, 8, 1))
    bench.take(Export(shard=7, target=NEXT, first=0, last=2, codec="raw", move=0, round=1, pieces=pieces))
    bench.frame(3, orders=(Cut(2, 0),))
    bench.end()
    assert isinstance(bench.work[0], ExportWork)
    bench.end()  # then the frame that cuts, then nothing to read
    out = [e for e in bench.end_all() if isinstance(e, SendKv)]
    assert [(e.piece.piece and e.piece.piece.slot, e.piece.is_last) for e in out] == [(1, False), (None, True)]


def test_imports_count_where_all_layers_came_and_only_outside_a_route() -> None:
    stage = Stage(9, 0, 4)
    done = []
    for first, last, stop in ((0, 2, 8), (2, 4, 5)):
        piece = KvPiece(
            shard=9, move=first, round=1, first=first, last=last, codec="raw", is_last=True, payload=b"k",
            piece=ExportPiece(slot=1, start=0, stop=stop),
        )  # fmt: skip
        (start,) = stage.handle(Came(piece), 0.0)
        done += stage.handle(Finished(Done(work=start.work)), 0.0)
    assert done == [Tell(Imported(shard=9, move=m, round=1, size_bytes=1)) for m in (0, 2)]
    route = Route(
        shard=9, epoch=1, index=0, count=1, before=Peer(node=""), after=Peer(node=""), codec="none", keep=((1, 8),)
    )
    (start,) = stage.handle(Came(route), 0.0)
    assert start.work == TrimWork(keep=((1, 5),))
    stage.handle(Finished(Done(work=start.work)), 0.0)
    assert stage.handle(Came(piece), 0.0) == []  # too late
