"""Node processes of this computer: started, awaited with a deadline, spoken to over their pipes, and never left behind.

A child reads one JSON line per command from its standard input and answers with one per event on its standard output (see
node_main.py). Its standard input is also its lifeline: it ends when the pipe closes, so a parent killed with SIGKILL leaves
no process. The last lines of its standard error are kept for the message that says why it died.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, Any

from ecotone.units import EcotoneError

__all__ = ["Child", "ChildError"]

_LAST_WORDS_S = 1.0  # for reading what an ended process wrote


class ChildError(EcotoneError):
    """A node process did not start, did not answer in time, or died."""


class Child:
    """One node process called `name`. Commands and answers are JSON objects; each command is answered once, in order."""

    def __init__(self, name: str, arguments: tuple[str, ...], environment: Mapping[str, str] | None = None):
        self.name = name
        self._errors: collections.deque[str] = collections.deque(maxlen=30)
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        try:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C at the terminal is the parent's to handle: it drains first
            )
        except OSError as error:
            raise ChildError(f"node {name}: cannot start a process: {error.strerror or error}") from None
        pipes = ((self._process.stdout, self._take_answer), (self._process.stderr, self._errors.append))
        self._pumps = [threading.Thread(target=_pump, args=pipe, name=f"{name}-pipe", daemon=True) for pipe in pipes]
        for pump in self._pumps:
            pump.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, command: Mapping[str, Any] | None, deadline_s: float) -> dict[str, Any]:
        """Send `command` (None: only wait for what comes next) and return the answer; raises ChildError in bounded time."""
        with self._lock:
            if command is not None:
                self._write(command)
            end = time.monotonic() + deadline_s
            while True:
                try:
                    answer = self._answers.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    raise ChildError(f"node {self.name}: no answer within {deadline_s:g} s; {self.last_words()}") from None
                if answer is None:
                    raise ChildError(f"node {self.name} ended with status {self._status()}; {self.last_words()}")
                if "failed" in answer:
                    raise ChildError(f"node {self.name}: {answer['failed']}")
                return answer

    def last_words(self) -> str:
        """The last line of its standard error, for a one-line message; of one that ended, once all of it was read."""
        if not self.is_alive:
            self._pumps[-1].join(_LAST_WORDS_S)
        lines = [line.strip() for line in tuple(self._errors) if line.strip()]
        return f"it said last: {lines[-1][:300]}" if lines else "it said nothing"

    def close(self, deadline_s: float = 10.0) -> None:
        """Ask it to drain and end; after `deadline_s` terminate it, then kill it. Returns when it is gone."""
        with contextlib.suppress(ChildError):
            self._write({"stop": True})
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        for finish in (None, self._process.terminate, self._process.kill):
            if finish is not None:
                finish()
            try:
                self._process.wait(deadline_s if finish is None else 3.0)
                break
            except subprocess.TimeoutExpired:
                continue
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None and not self.is_alive:
                stream.close()

    def kill(self) -> None:
        """Kill it at once, as a crash would."""
        self._process.kill()
        self._process.wait(10)

    def terminate(self) -> None:
        """Send SIGTERM: it drains and ends by itself."""
        self._process.terminate()

    def wait(self, deadline_s: float) -> int:
        """Its exit status; raises ChildError when it has not ended after `deadline_s`."""
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise ChildError(f"node {self.name} has not ended after {deadline_s:g} s") from None

    def _status(self) -> int | str:
        try:
            return self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            return "unknown"

    def _write(self, command: Mapping[str, Any]) -> None:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise ChildError(f"node {self.name} has ended (status {self._status()}); {self.last_words()}") from None

    def _take_answer(self, line: str) -> None:
        if not line:
            self._answers.put(None)
            return
        try:
            answer = json.loads(line)
        except ValueError:
            return  # a library printed something: not for us
        if isinstance(answer, dict):
            self._answers.put(answer)


def _pump(stream: IO[str] | None, take: Any) -> None:
    assert stream is not None
    try:
        for line in stream:
            if line.strip():
                take(line)
    except (OSError, ValueError):
        pass
    take("")
