"""What a node measured lately, gathered for the asker: seconds of work and of links. Pure; decides nothing.

While something is new a timer runs, one per node; when it fires each session's asker gets a NodeReport letter with the work
of that session's epochs and all links of the node, and a Ping goes over the links that were used, so that round trips stay
fresh where latency changes. An idle node sets no timer. O(1) per event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ecotone.protocol.effects import SetTimer
from ecotone.protocol.link import Sender
from ecotone.protocol.message import BodyId, NodeId, NodeReport, WorkSample
from ecotone.protocol.notices import Item, Post

__all__ = ["REPORT_TIMER", "Observer"]

REPORT_TIMER = ("report",)


class Observer:
    """`report_s`: at most so often a report is sent; 0: never."""

    def __init__(self, report_s: float) -> None:
        self.report_s = report_s
        self._work: dict[tuple[int, int, str, int], list[float]] = {}  # session, epoch, work, index: seconds, count
        self._timer_on = False

    def worked(self, body: BodyId, work: str, seconds: float, now_s: float) -> list[Item]:
        """`work` of `body` took `seconds`."""
        if not self.report_s or not 0 <= seconds < float("inf"):
            return []
        total = self._work.setdefault((body.session, body.epoch, work, body.edge), [0.0, 0.0])
        total[0] += seconds
        total[1] += 1
        return self.woken(now_s)

    def woken(self, now_s: float) -> list[Item]:
        """Something is new, here or at a link: a report will follow."""
        if self._timer_on or not self.report_s:
            return []
        self._timer_on = True
        return [SetTimer(timer=REPORT_TIMER, at_s=now_s + self.report_s)]

    def timer_fired(
        self, askers: Mapping[int, NodeId], senders: Iterable[Sender], num_queued: int, now_s: float
    ) -> list[Item]:
        """Report to `askers` by session; a Ping along `senders` that were used."""
        self._timer_on = False
        items: list[Item] = []
        links = []
        for sender in senders:
            sample = sender.sample() if sender.timing.is_new else None
            if sample is not None:
                links.append(sample)
                if sender.timing.may_ping(now_s):
                    items += sender.ping(now_s)
        work: dict[int, list[WorkSample]] = {}
        for (session, epoch, kind, index), (seconds, count) in self._work.items():
            mean_s = seconds / count
            sample_of_work = WorkSample(epoch=epoch, work=kind, index=index, seconds=mean_s, count=int(count))
            work.setdefault(session, []).append(sample_of_work)
        self._work.clear()
        for session, asker in askers.items():
            if links or session in work:
                told = tuple(work.get(session, ()))
                items.append(Post(asker, NodeReport(session=session, work=told, links=tuple(links), num_queued=num_queued)))
        return items
