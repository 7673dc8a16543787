"""The emulated link: times against latency + bytes / rate (ratios, generous), priorities, live changes, a lost peer."""

from __future__ import annotations

import threading
import time

import pytest

from ecotone.units import EcotoneError
from ecotone.wire.memory import Network
from ecotone.wire.shaped import LinkShape, ShapedWire
from ecotone.wire.wire import NodeId, PeerDown, Priority, Received, WireEvent

pytestmark = pytest.mark.pure
A, B = NodeId("a"), NodeId("b")


class Ends:
    """A shaped end `a`, and what arrives at `b` with its times."""

    def __init__(self, **shape: float) -> None:
        self.network = Network()
        self.sender = ShapedWire(self.network.join(A), links={B: LinkShape(**shape)})
        self.arrived: list[tuple[float, bytes]] = []
        self.changed = threading.Condition()
        self.network.join(B).start(self._receive)
        self.lost = threading.Event()
        self.sender.start(lambda event: self.lost.set() if isinstance(event, PeerDown) else None)

    def _receive(self, event: WireEvent) -> None:
        if isinstance(event, Received):
            with self.changed:
                self.arrived.append((time.monotonic(), bytes(event.frame)))
                self.changed.notify()

    def wait(self, count: int) -> list[tuple[float, bytes]]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.arrived) >= count, 20)
        return self.arrived

    def close(self) -> None:
        self.sender.close()
        self.network.close()


@pytest.mark.parametrize(("rate", "latency_s", "size"), [(1e6, 0.05, 100_000), (4e5, 0.0, 100_000), (1e9, 0.2, 1000)])
def test_an_idle_link_takes_latency_plus_bytes_over_rate(rate: float, latency_s: float, size: int) -> None:
    ends = Ends(bytes_per_s=rate, latency_s=latency_s)
    start = time.monotonic()
    ends.sender.send(B, bytes(size), Priority.DATA)
    taken_s = ends.wait(1)[0][0] - start
    ends.close()
    expected_s = latency_s + size / rate
    assert 1.0 <= taken_s / expected_s < 1.5


def test_queued_frames_follow_at_the_rate_without_adding_up_errors() -> None:
    ends = Ends(bytes_per_s=1e6, latency_s=0.03)
    start = time.monotonic()
    for index in range(100):
        ends.sender.send(B, bytes([index]) * 5000, Priority.DATA)
    arrived = ends.wait(100)
    ends.close()
    assert [frame[0] for _, frame in arrived] == list(range(100))
    assert 1.0 <= (arrived[-1][0] - start) / (0.03 + 100 * 5000 / 1e6) < 1.2


def test_control_overtakes_queued_data_and_the_frame_under_way() -> None:
    ends = Ends(bytes_per_s=1e6, latency_s=0.01)
    for _ in range(3):
        ends.sender.send(B, b"d" * 400_000, Priority.DATA)  # 0.4 s each
    ends.sender.send(B, b"w", Priority.BACKGROUND)
    start = time.monotonic()
    ends.sender.send(B, b"c", Priority.CONTROL)
    arrived = ends.wait(5)
    ends.close()
    assert [frame[:1] for _, frame in arrived] == [b"c", b"d", b"d", b"d", b"w"]
    assert arrived[0][0] - start < 0.2, "one slice and the latency, not the 0.4 s of the frame on the link"
    assert arrived[3][0] - start > 1.1, "what control took of the link is not won by data"


def test_a_change_of_rate_acts_on_the_frame_under_way() -> None:
    ends = Ends(bytes_per_s=1e4, latency_s=0.0)  # 100 s for the frame
    start = time.monotonic()
    ends.sender.send(B, bytes(1_000_000), Priority.DATA)
    ends.sender.set_link(B, 5e6, 0.0)
    taken_s = ends.wait(1)[0][0] - start
    ends.close()
    assert 1.0 <= taken_s / 0.2 < 2.5


def test_an_unshaped_link_passes_frames_through() -> None:
    ends = Ends()
    ends.sender.send(B, b"x", Priority.DATA)
    assert ends.wait(1)[0][1] == b"x"
    ends.close()


def test_a_small_frame_on_a_quick_idle_link_goes_in_the_callers_thread_and_takes_its_time() -> None:
    """100 bytes at 1 GB/s go at once; 40 kB at the same rate do not fit in 0.1 ms once some are sent; nothing overtakes."""
    ends, threads = Ends(bytes_per_s=1e9), list[threading.Thread]()
    send = ends.sender._inner.send
    ends.sender._inner.send = lambda *args: (threads.append(threading.current_thread()), send(*args))[1]  # type: ignore[method-assign]
    ends.sender.send(B, b"x" * 100, Priority.DATA)
    assert threads == [threading.current_thread()]
    ends.wait(1)
    start = time.monotonic()
    for number in range(100):
        ends.sender.send(B, bytes([number]) * 40_000, Priority.DATA)
    arrived = ends.wait(101)
    ends.close()
    assert [content[0] for _, content in arrived[1:]] == list(range(100))
    assert arrived[-1][0] - start >= 100 * 40_000 / 1e9 - 2e-4  # 4 ms at the link's rate


def test_frames_on_the_link_die_with_the_peer() -> None:
    ends = Ends(bytes_per_s=1e4, latency_s=0.0)
    ends.sender.send(B, bytes(1000), Priority.DATA)  # due in 0.1 s
    ends.network.cut(A, B)
    assert ends.lost.wait(10)
    ends.network.heal(A, B)
    ends.sender.set_link(B, None, 0.0)
    ends.sender.send(B, b"after", Priority.DATA)
    assert ends.wait(1)[0][1] == b"after"
    time.sleep(0.3)  # that nothing comes cannot be waited for on a condition
    assert len(ends.arrived) == 1
    ends.close()


def test_waiting_burns_no_processor_time() -> None:
    ends = Ends(bytes_per_s=1e6, latency_s=0.5)
    before = time.thread_time(), time.process_time()
    ends.sender.send(B, bytes(100), Priority.DATA)
    ends.wait(1)
    ends.close()
    assert time.process_time() - before[1] < 0.25


@pytest.mark.parametrize("shape", [{"bytes_per_s": 0.0}, {"bytes_per_s": float("nan")}, {"latency_s": -1.0}])
def test_impossible_links_are_refused(shape: dict[str, float]) -> None:
    with pytest.raises(EcotoneError, match="shaped link"):
        LinkShape(**shape)
