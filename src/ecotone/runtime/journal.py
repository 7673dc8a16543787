"""The asker's journal as a file: one writer, each record on the disk before it counts, room made again when most is done.

A thread of its own takes all that waits, writes it in one piece and syncs once (group commit), then answers; so the loop of
the shell never waits for the disk. A lock file beside the journal lets one process alone use it, and names that process to
the second. A write that fails (disk full) is taken back, so that what is there stays whole; the next one tries again. When
most of the file is of acknowledged requests, what is left is written aside and put in its place. The bytes are
ecotone.protocol.journal's; which requests are recorded is the session's affair.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ecotone.protocol import journal as form
from ecotone.protocol.journal import Entry, JournalDamaged, JournalError, JournalState, Place, Record

__all__ = ["JournalFile"]

_COMPACT_FROM_BYTES = 4 << 20
_Waiting = tuple[Callable[[], Record], Callable[[str], None]]


class JournalFile:
    """The journal at `path`, made where there is none. Safe for threads; `close` it.

    Raises JournalError where it cannot be used (another process has it, no permission) or is damaged, naming the file.
    `cap_bytes`: what unacknowledged requests may take; above it new ones are refused, never old ones dropped.
    """

    def __init__(self, path: str | os.PathLike[str], *, cap_bytes: int = 4 << 30):
        self.path, self.cap_bytes = Path(path), cap_bytes
        self._lock = threading.RLock()
        self._owner = _own(self.path)
        self._failed = ""
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._state = self._replay()
            self._begin()
        except OSError as error:
            self._owner.close()
            raise JournalError(f"journal {self.path}: {error.strerror or error}; give a file that can be written") from None
        except JournalDamaged as error:
            self._owner.close()
            raise JournalDamaged(f"journal {self.path}: {error}") from None
        self._jobs: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    # ---- what it says ------------------------------------------------------------------------------------------------

    def find(self, request_id: str) -> Entry | None:
        """The request of this id, where it was accepted and is not acknowledged."""
        with self._lock:
            return self._state.find(request_id)

    def is_acknowledged(self, request_id: str) -> bool:
        with self._lock:
            return request_id in self._state.acknowledged

    @property
    def unfinished(self) -> tuple[Entry, ...]:
        with self._lock:
            return self._state.unfinished

    @property
    def finished(self) -> tuple[Entry, ...]:
        """Requests with an outcome that nobody has acknowledged."""
        with self._lock:
            return tuple(entry for entry in self._state.entries.values() if entry.is_finished)

    @property
    def next_number(self) -> int:
        """Above every number that was ever used in this journal."""
        with self._lock:
            return self._state.next_number

    def read_inputs(self, number: int) -> form.Accepted | None:
        """An unfinished request as it was accepted; None where it is not here (any more). Raises JournalError."""
        with self._lock:
            entry = self._state.entries.get(number)
            found = self._read(entry.accepted, number) if entry and not entry.is_finished else None
        return found if isinstance(found, form.Accepted) else None

    def read_outcome(self, request_id: str) -> form.Delivered | form.Failed | None:
        """How the request of this id ended; None where it has not, or is not here. Raises JournalError."""
        with self._lock:
            entry = self._state.find(request_id)
            found = self._read(entry.outcome, entry.number) if entry and entry.outcome else None
        return found if isinstance(found, form.Delivered | form.Failed) else None

    def _read(self, place: Place, number: int) -> Record:
        try:
            payload = os.pread(self._file, place.size, place.offset)
        except OSError as error:
            raise JournalError(f"journal {self.path}: cannot be read: {error.strerror or error}") from None
        if len(payload) != place.size:
            raise JournalError(f"journal {self.path}: ends before a record that it held; was it cut while in use?")
        return form.payload_of(place, payload, number)

    # ---- what is written ---------------------------------------------------------------------------------------------

    def append(self, make: Callable[[], Record], done: Callable[[str], None]) -> None:
        """Write the record that `make` gives; then `done("")`, or `done(reason)`, both in the journal's thread."""
        self._jobs.put((make, done))

    def append_and_wait(self, record: Record) -> None:
        """Write `record` and return when it is on the disk; raises JournalError."""
        told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.append(lambda: record, told.put)
        reason = told.get()
        if reason:
            raise JournalError(reason)

    def close(self) -> None:
        """Write what waits, then let another process have the file. Twice is well."""
        with self._lock:
            if self._owner.closed:
                return
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(30.0)
        with self._lock:
            os.close(self._file)
            self._owner.close()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        ending = False
        while not ending:
            jobs = [self._jobs.get()]
            while not self._jobs.empty():
                jobs.append(self._jobs.get())
            ending = None in jobs
            self._commit([job for job in jobs if job is not None])

    def _commit(self, jobs: list[_Waiting]) -> None:
        """One write and one sync for all of `jobs`."""
        made: list[tuple[bytes, Callable[[str], None]]] = []
        for make, done in jobs:
            try:
                record = make()
                if isinstance(record, form.Accepted):
                    self._check_cap(record)
                made.append((form.encode(record, self._state.salt), done))
            except Exception as error:
                done(f"journal {self.path}: {error}")
        reason = self._write(b"".join(data for data, _ in made)) if made else ""
        if not reason:
            with self._lock:
                for data, _ in made:
                    form.apply(self._state, data[: form.START_BYTES], len(data))
        for _, done in made:
            done(reason)
        if made and not reason:
            self._compact_if_due()

    def _check_cap(self, record: form.Accepted) -> None:
        with self._lock:
            held = self._state.live_bytes
        if held + len(record.inputs) > self.cap_bytes:
            raise JournalError(
                f"{held} bytes of requests are not acknowledged, the cap is {self.cap_bytes}; acknowledge results"
            )

    def _write(self, data: bytes) -> str:
        """Append and sync; "" or why not. After a failure the file ends where it did."""
        end = self._state.end
        try:
            if self._failed:  # what a failed write left behind could not be taken back then
                os.ftruncate(self._file, end)
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
            self._failed = ""
            return ""
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            what = "the disk is full; free some space" if full else error.strerror or str(error)
            self._failed = f"journal {self.path}: {what}"
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
            return self._failed

    def _replay(self) -> JournalState:
        size = os.fstat(self._file).st_size
        if size == 0:
            return JournalState()
        with mmap.mmap(self._file, size, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                return form.replay(view)
            except JournalDamaged as error:
                problem = str(error)
            finally:
                view.release()
        raise JournalDamaged(problem)

    def _begin(self) -> None:
        """Cut a torn tail off; give an empty file its head."""
        if self._state.torn_bytes:
            os.ftruncate(self._file, self._state.end)
        if self._state.end == 0:
            head = form.head(secrets.randbits(32))
            os.write(self._file, head)
            os.fsync(self._file)
            _sync_folder(self.path)
            self._state = form.replay(head)

    def _compact_if_due(self) -> None:
        with self._lock:
            if self._state.end < max(_COMPACT_FROM_BYTES, 2 * self._state.live_bytes):
                return
        with contextlib.suppress(OSError):  # no room for the copy: the journal goes on as it is
            self._compact()

    def _compact(self) -> None:
        aside = self.path.with_name(self.path.name + ".new")
        with self._lock:
            try:
                with open(aside, "wb") as file, mmap.mmap(self._file, self._state.end, access=mmap.ACCESS_READ) as data:
                    with memoryview(data) as view:
                        for piece in form.compacted(self._state, view, secrets.randbits(32)):
                            file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, self.path)
            except OSError:
                aside.unlink(missing_ok=True)
                raise
            _sync_folder(self.path)
            os.close(self._file)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            self._state = self._replay()


def _own(path: Path) -> IO[str]:
    """The lock beside the journal, with our process id in it; raises JournalError naming the process that has it."""
    lock = path.with_name(path.name + ".lock")
    try:
        file = open(lock, "a+")  # noqa: SIM115 (held while we live)
    except OSError as error:
        raise JournalError(
            f"journal {path}: {error.strerror or error}; give a file in a folder that can be written"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise JournalError(
            f"journal {path} is in use by another asker (process {holder}); stop that one, or give each its own journal"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _sync_folder(path: Path) -> None:
    """Let the name of the file survive a power cut as well."""
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
