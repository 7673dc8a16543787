"""Rate and round trip of a link, from traffic that is there anyway. Pure; decides nothing.

A link serves frames one after the other at some rate r. If chunks were handed to the wire at s_1 <= ... <= s_n, and the
last one left the link at d, then d >= max(s_i, e) + B_i / r for every i, with B_i the bytes of chunks i to n and e the end
of those acknowledged before; equality holds for the chunk at which the link last became busy. So r is the greatest of
B_i / (d - max(s_i, e)), and a link that idled between two bodies is not taken for a slow one. (BBR, Cardwell et al., ACM
Queue 14(5), 2016, has the same idea of delivery rate, and marks samples with such gaps as limited by the application.) d is
the time of the acknowledgement less its delay at the receiver less the least recent round trip of a small frame. What was
sent twice is not timed (Karn). An idle link is timed by a probe: a small Ping, then a padded one. O(1) per chunk.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from ecotone.protocol.message import PROBE_LIMIT_BYTES, LinkSample, NodeId, Ping

__all__ = ["LinkTiming"]

_RECENT_RATES = 4
_RECENT = 8  # round trips of which the least counts
_PING_BYTES, _PING_SHARE = 256, 0.05  # of a link's time at most that goes into Pings of its own accord
_FIRST_NONCE = 1 << 62  # those of other Pings are below


class LinkTiming:
    """Of one sender. Times are the shell's clock in seconds."""

    def __init__(self, peer: NodeId) -> None:
        self.peer = peer
        self.is_new = False  # something was measured since `take`
        self._round_trips: deque[float] = deque(maxlen=_RECENT)
        self._size_bytes, self._busy_s = 0, 0.0  # since `take`
        self._end_s = -math.inf  # when the last acknowledgement would have come without delay
        self._clean_s = -math.inf  # what was handed over before is not timed
        self._nonce = _FIRST_NONCE
        self._pings: dict[int, tuple[float, int]] = {}  # nonce: when, size
        self._pinged_s = -math.inf
        self._rates: deque[float] = deque(maxlen=_RECENT_RATES)
        self._wanted_bytes = 0  # the padded Ping to send once the small one is answered
        self._opens: list[float] = []

    @property
    def rtt_s(self) -> float:
        """Least recent round trip of a small frame; 0: none was timed."""
        return min(self._round_trips, default=0.0)

    @property
    def bytes_per_s(self) -> float:
        """Greatest of the last few rates (a lost acknowledgement makes one look low); 0: none was measured."""
        return max(self._rates, default=0.0)

    def restart(self, now_s: float) -> None:
        """The connection is new: what was under way is not timed."""
        self._pings.clear()
        self._opens.clear()
        self._wanted_bytes = 0
        self._clean_s = now_s

    # ---- round trips ------------------------------------------------------------------------------------------------

    @property
    def num_opens(self) -> int:
        """LinkOpens under way without an answer."""
        return len(self._opens)

    def open_age_s(self, now_s: float) -> float:
        """How long the last LinkOpen has been without an answer; infinite where none is."""
        return now_s - self._opens[-1] if self._opens else math.inf

    def unanswered_s(self, now_s: float) -> float:
        """How long LinkOpens have been without an answer; 0 where none is under way."""
        return now_s - self._opens[0] if self._opens else 0.0

    def open_sent(self, now_s: float) -> None:
        self._opens.append(now_s)

    def open_answered(self, now_s: float) -> None:
        """Timed only where a single LinkOpen was under way: else it is not known which one is answered."""
        if len(self._opens) == 1:
            self._took(now_s - self._opens[0])
        self._opens.clear()

    def ping(self, now_s: float, size_bytes: int = 0) -> Ping:
        """The next Ping; its Pong is timed."""
        self._nonce += 1
        self._pings[self._nonce] = (now_s, size_bytes)
        self._pinged_s = now_s
        if len(self._pings) > _RECENT:
            del self._pings[next(iter(self._pings))]
        return Ping(nonce=self._nonce, size_bytes=size_bytes)

    def may_ping(self, now_s: float) -> bool:
        """Whether a Ping more would still be little traffic."""
        return not self._pings and (now_s - self._pinged_s) * self.bytes_per_s * _PING_SHARE >= _PING_BYTES

    def probe(self, size_bytes: int, now_s: float) -> Ping:
        """Begin to time an idle link with `size_bytes` of padding (capped)."""
        self._wanted_bytes = min(max(size_bytes, 1), PROBE_LIMIT_BYTES)
        return self.ping(now_s)

    def ponged(self, nonce: int, is_idle: bool, now_s: float) -> Ping | None:
        """An answer; the padded Ping to send next, if a probe asked for it and the link is idle."""
        sent = self._pings.pop(nonce, None)
        if sent is None:
            return None
        sent_s, size_bytes = sent
        if not size_bytes:
            self._took(now_s - sent_s)
            wanted, self._wanted_bytes = self._wanted_bytes, 0
            return self.ping(now_s, wanted) if wanted and is_idle else None
        if self._clean_s <= sent_s and is_idle:
            self._measured(size_bytes, now_s - sent_s - self.rtt_s)
        self._clean_s = now_s
        return None

    # ---- rate -------------------------------------------------------------------------------------------------------

    def acknowledged(self, chunks: Sequence[tuple[float, int]], delay_s: float, now_s: float) -> None:
        """Chunks (handed over at, bytes) in order that an acknowledgement held back `delay_s` names.

        None of them was sent twice, or they are empty: then the time only is noted.
        """
        came_s = now_s - delay_s
        padded = [nonce for nonce, (_, size_bytes) in self._pings.items() if size_bytes]
        for nonce in padded:  # the chunks waited behind it, or its Pong is lost
            del self._pings[nonce]
            self._clean_s = now_s
        if not chunks or self._clean_s > chunks[0][0] or came_s <= chunks[-1][0]:
            self._end_s = came_s
            return
        if came_s - chunks[-1][0] < self.rtt_s:
            self._took(came_s - chunks[-1][0])
        rtt_s, jitter_s = self.rtt_s, 0.0
        if chunks[0][0] != chunks[-1][0]:
            jitter_s = sorted(self._round_trips or [0.0])[(len(self._round_trips) - 1) // 2] - rtt_s
        left_s = self._end_s - rtt_s  # when those before had left the link
        best, size_bytes = (0.0, 0, 0.0), 0
        for i in range(len(chunks) - 1, -1, -1):
            sent_s, length = chunks[i]
            size_bytes += length
            busy_s = came_s - rtt_s - max(sent_s, left_s)
            if (i == 0 or chunks[i - 1][0] != sent_s) and busy_s > 0:
                best = max(best, (size_bytes / (busy_s + jitter_s), size_bytes, busy_s))
        self._end_s = came_s
        self._measured(best[1], best[2])

    def take(self) -> LinkSample | None:
        """All that was measured since, as one sample: rate = size / (seconds - round trip)."""
        self.is_new = False
        if not self._size_bytes:
            return None
        rtt_s = self.rtt_s
        sample = LinkSample(peer=self.peer, size_bytes=self._size_bytes, seconds=self._busy_s + rtt_s, rtt_s=rtt_s)
        self._size_bytes, self._busy_s = 0, 0.0
        return sample

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _took(self, seconds: float) -> None:
        if seconds > 0:
            self._round_trips.append(seconds)

    def _measured(self, size_bytes: int, busy_s: float) -> None:
        if busy_s > 0 and size_bytes:
            self._size_bytes += size_bytes
            self._busy_s += busy_s
            self._rates.append(size_bytes / busy_s)
            self.is_new = True
