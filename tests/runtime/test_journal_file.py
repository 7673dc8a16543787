"""The journal as a file, and sessions that survive: restarts, kill -9 of the asker, a full disk, a second coordinator."""

from __future__ import annotations

import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_nets import cluster, even, lines

from ecotone.model import Captured
from ecotone.protocol import journal as form
from ecotone.protocol.journal import JournalDamaged, JournalError
from ecotone.runtime import DeployError, RequestError, Session, UnknownRequest, Unrecorded, deploy, in_memory
from ecotone.runtime.durable import Durable
from ecotone.runtime.journal import JournalFile

pytestmark = pytest.mark.torch

PATIENCE_S = 60.0
HASH = "cd" * 32


@pytest.fixture(scope="module")
def exact() -> tuple[Captured, torch.Tensor]:
    return lines()


def expected(captured: Captured, x: torch.Tensor) -> torch.Tensor:
    return captured.unflatten_outputs(captured.reference((x,)))


def accepted(number: int, size: int = 100) -> form.Accepted:
    return form.Accepted(number=number, request_id=f"r{number}", inputs=bytes([number % 256]) * size)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size`: a full disk, without needing one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def session_of(journal: Path, exact: tuple[Captured, torch.Tensor]) -> Iterator[Session]:
    plan = even(exact[0].graph, "a", "b")
    with in_memory(cluster("a", "b")) as nodes, deploy(plan, exact[0], nodes, journal=journal) as session:
        yield session


# ---- the file ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_there_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = JournalFile(path)
    assert first.next_number == 1
    for number in range(1, 6):
        first.append_and_wait(accepted(number))
    first.append_and_wait(form.Delivered(number=2, result=b"two", graph_hash=HASH, epoch=3))
    first.append_and_wait(form.Acknowledged(number=5, request_id="r5"))
    first.close()
    second = JournalFile(path)
    assert [entry.request_id for entry in second.unfinished] == ["r1", "r3", "r4"]
    assert second.next_number == 6
    assert second.read_outcome("r2") == form.Delivered(number=2, result=b"two", graph_hash=HASH, epoch=3)
    assert second.read_inputs(3) == accepted(3)
    assert second.is_acknowledged("r5")
    second.close()


def test_many_writers_share_a_sync_and_each_is_answered(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "journal")
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in range(1, 201):
        file.append(lambda number=number: accepted(number), told.put)  # type: ignore[misc]
    assert [told.get(timeout=PATIENCE_S) for _ in range(200)] == [""] * 200
    assert len(file.unfinished) == 200
    file.close()


def test_a_second_coordinator_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    first = JournalFile(tmp_path / "journal")
    with pytest.raises(JournalError, match=rf"in use by another asker \(process {os.getpid()}\)"):
        JournalFile(tmp_path / "journal")
    first.close()
    JournalFile(tmp_path / "journal").close()


def test_a_torn_tail_is_cut_off_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    file = JournalFile(path)
    for number in (1, 2):
        file.append_and_wait(accepted(number))
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    file = JournalFile(path)
    assert [entry.number for entry in file.unfinished] == [1]
    file.append_and_wait(accepted(3))
    file.close()
    again = JournalFile(path)
    assert [entry.number for entry in again.unfinished] == [1, 3]
    again.close()


def test_damage_and_strange_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    file = JournalFile(path)
    for number in (1, 2):
        file.append_and_wait(accepted(number))
    file.close()
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalDamaged, match=rf"{path}: the journal is damaged at byte 16"):
        JournalFile(path)
    path.write_bytes(b"something else entirely")
    with pytest.raises(JournalDamaged, match="no journal of Ecotone"):
        JournalFile(path)
    assert path.read_bytes() == b"something else entirely"
    with pytest.raises(JournalError, match="give a file in a folder that can be written"):
        JournalFile(tmp_path / "absent" / "journal")


def test_a_full_disk_refuses_and_recovers_without_harm(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    file = JournalFile(path)
    file.append_and_wait(accepted(1))
    with files_of_at_most(4096):
        with pytest.raises(JournalError, match="the disk is full; free some space"):
            file.append_and_wait(accepted(2, size=8192))
        file.append_and_wait(accepted(3))  # small enough: what the failed write left was taken back
    file.append_and_wait(accepted(2, size=8192))
    file.close()
    again = JournalFile(path)
    assert [entry.number for entry in again.unfinished] == [1, 2, 3]
    again.close()


def test_a_disk_that_is_full_from_the_start_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "journal").symlink_to("/dev/full")
    with pytest.raises(JournalError, match="No space left on device; give a file that can be written"):
        JournalFile(tmp_path / "journal")


def test_room_is_made_again_when_most_is_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    file = JournalFile(path)
    for number in range(1, 40):
        file.append_and_wait(accepted(number, size=300_000))
        if number % 10:
            file.append_and_wait(form.Delivered(number=number, result=b"r", graph_hash=HASH))
            file.append_and_wait(form.Acknowledged(number=number, request_id=f"r{number}"))
    assert path.stat().st_size < 8_000_000 < 39 * 300_000
    assert [entry.number for entry in file.unfinished] == [10, 20, 30]
    assert file.read_inputs(20) == accepted(20, size=300_000)
    assert file.is_acknowledged("r1")
    file.append_and_wait(accepted(40))
    file.close()
    again = JournalFile(path)
    assert [entry.number for entry in again.unfinished] == [10, 20, 30, 40]
    again.close()


def test_results_that_nobody_acknowledges_end_at_the_cap_and_are_not_dropped(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "journal", cap_bytes=10_000)
    file.append_and_wait(accepted(1, size=6000))
    with pytest.raises(JournalError, match="acknowledge results"):
        file.append_and_wait(accepted(2, size=6000))
    file.append_and_wait(form.Delivered(number=1, result=b"r", graph_hash=HASH))
    file.append_and_wait(accepted(3, size=6000))  # of a finished request only the result counts
    file.close()


# ---- sessions ------------------------------------------------------------------------------------------------------------


def test_a_result_is_kept_until_it_is_acknowledged(tmp_path: Path, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    with session_of(tmp_path / "j", exact) as session:
        first = session.submit((x,), request_id="one")
        assert torch.equal(first.result(PATIENCE_S), expected(captured, x))
        assert first.is_accepted
        again = session.submit((x,), request_id="one")
        assert torch.equal(again.result(0), expected(captured, x))
        assert again.epoch == first.epoch
        assert len(session.report()) == 1  # it did not run again
        with pytest.raises(RequestError, match="was accepted with other inputs"):
            session.submit((x + 1,), request_id="one")
        assert torch.equal(session.submit((x,)).result(PATIENCE_S), expected(captured, x))  # without id: not recorded
    with session_of(tmp_path / "j", exact) as session:
        assert torch.equal(session.claim("one", 0), expected(captured, x))
        session.acknowledge("one")
        session.acknowledge("one")
        with pytest.raises(UnknownRequest, match="was acknowledged"):
            session.claim("one")
        with pytest.raises(UnknownRequest, match="was acknowledged"):
            session.submit((x,), request_id="one")
        with pytest.raises(UnknownRequest, match="is not known here"):
            session.claim("two")
        assert not session.report()


def test_an_error_is_an_outcome_and_a_closed_session_is_none(tmp_path: Path, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    with in_memory(cluster("a", "b", rate=1e9)) as nodes:
        session = deploy(even(captured.graph, "a", "b"), captured, nodes, journal=tmp_path / "j")
        nodes.set_links(cluster("a", "b", rate=5e3).links)
        late = session.submit((x,), request_id="late", deadline_s=0.2)
        assert type(late.exception(PATIENCE_S)).__name__ == "DeadlinePassed"
        given_up = session.submit((x,), request_id="given up")
        assert given_up.wait_accepted(PATIENCE_S)
        session.close(drain=False)
        assert type(given_up.exception(0)).__name__ == "SessionClosed"
    with session_of(tmp_path / "j", exact) as session:
        with pytest.raises(RequestError, match="no result within its time"):
            session.claim("late")
        assert torch.equal(session.claim("given up", PATIENCE_S), expected(captured, x))


def test_a_journal_of_another_model_is_refused(tmp_path: Path, exact: tuple[Captured, torch.Tensor]) -> None:
    durable, told = Durable(tmp_path / "j"), queue.SimpleQueue[str]()
    durable.begin(1, "strange")
    durable.record(1, (torch.zeros(3),), None, told.put)
    assert told.get(timeout=PATIENCE_S) == ""
    durable.close()
    with (
        pytest.raises(DeployError, match="journal holds request 'strange' of another model"),
        session_of(tmp_path / "j", exact),
    ):
        pass


def test_a_second_session_on_one_journal_is_refused(tmp_path: Path, exact: tuple[Captured, torch.Tensor]) -> None:
    with session_of(tmp_path / "j", exact):
        before = threading.active_count()
        with pytest.raises(JournalError, match="in use by another asker"), session_of(tmp_path / "j", exact):
            pass
        assert threading.active_count() <= before + 1


def test_a_full_disk_refuses_requests_by_name_and_space_brings_them_back(
    tmp_path: Path, exact: tuple[Captured, torch.Tensor]
) -> None:
    captured, x = exact
    with session_of(tmp_path / "j", exact) as session:
        with files_of_at_most(1024):
            refused = session.submit((x,), request_id="one")
            error = refused.exception(PATIENCE_S)
            assert isinstance(error, Unrecorded)
            assert "the disk is full" in str(error)
            assert torch.equal(session.submit((x,)).result(PATIENCE_S), expected(captured, x))
        again = session.submit((x,), request_id="one")
        assert torch.equal(again.result(PATIENCE_S), expected(captured, x))


ASKER = """
import sys
sys.path[:0] = [sys.argv[1]]
from pathlib import Path
from small_nets import cluster, even, lines
from ecotone.runtime import deploy, in_memory
captured, x = lines()
with in_memory(cluster("a", "b", rate=1e9)) as nodes:
    session = deploy(even(captured.graph, "a", "b"), captured, nodes, journal=Path(sys.argv[2]), queue_limit=64)
    nodes.set_links(cluster("a", "b", rate=2e4).links)
    futures = [session.submit((x + i,), request_id=f"r{i}") for i in range(20)]
    for i, future in enumerate(futures):
        assert future.wait_accepted(60) and not (future.done() and future.exception())
        print("accepted", i, flush=True)
    for i, future in enumerate(futures):
        future.result(60)
        print("answered", i, flush=True)
    sys.stdin.read()
"""


@pytest.mark.loopback
def test_after_kill_9_of_the_asker_the_next_one_gets_each_result_once(
    tmp_path: Path, exact: tuple[Captured, torch.Tensor]
) -> None:
    captured, x = exact
    last_words = "answered 2"
    arguments = [sys.executable, "-c", ASKER, str(Path(__file__).parent), str(tmp_path / "j")]
    asker = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    said: list[str] = []
    for line in asker.stdout:
        said.append(line.strip())
        if said[-1] == last_words:
            break
    assert said[-1] == last_words
    asker.send_signal(signal.SIGKILL)
    asker.wait(PATIENCE_S)
    ids = [f"r{line.split()[1]}" for line in said if line.startswith("accepted")]
    file = JournalFile(tmp_path / "j")
    unfinished, finished = {e.request_id for e in file.unfinished}, {e.request_id for e in file.finished}
    file.close()
    assert set(ids) <= unfinished | finished
    assert {f"r{line.split()[1]}" for line in said if line.startswith("answered")} <= finished
    with session_of(tmp_path / "j", exact) as session:
        for name in sorted(unfinished | finished):
            assert torch.equal(session.claim(name, PATIENCE_S), expected(captured, x + int(name[1:])))
            session.acknowledge(name)
        assert len(session.report()) == len(unfinished)  # finished ones did not run again
    with session_of(tmp_path / "j", exact) as session:
        assert session.num_waiting == 0
        for name in ids:
            with pytest.raises(UnknownRequest):
                session.claim(name)
