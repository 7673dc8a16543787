"""The laboratory's end of the relay process (relay.py): started, told rules, asked for counters, ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ecotone.lab.commands import RELAY, LabError, entering

__all__ = ["RelayProcess"]

ANSWER_S = 10.0


class RelayProcess:
    """A running relay; its TUN devices exist while it does. Its standard input is its lifeline."""

    def __init__(self, interfaces: Sequence[str], addresses: Sequence[str], seed: int):
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [*entering("", parent=os.getpid()), sys.executable, "-I", str(RELAY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._ask({"interfaces": list(interfaces), "addresses": list(addresses), "seed": seed})

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def set_rules(self, rules: Iterable[Mapping[str, Any]]) -> None:
        """Give ordered pairs these rules; they hold when this returns."""
        self._ask({"rules": list(rules)})

    def counters(self) -> list[tuple[int, int, dict[str, int]]]:
        """(source, target, counts) of every pair that has a rule."""
        return [(int(s), int(t), counts) for s, t, counts in self._ask({"counters": True})["counters"]]

    def close(self) -> None:
        """End it; a second time does nothing."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(3.0)

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(command).encode() + b"\n")
                self._process.stdin.flush()
                if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
                    raise LabError(
                        f"the relay has not answered within {ANSWER_S:g} s; end the laboratory and start it again"
                    )
                answer = json.loads(self._process.stdout.readline() or b"{}")
            except (OSError, ValueError):
                answer = {}
            if not answer:
                raise LabError("the relay has ended; end the laboratory and start it again")
            if "failed" in answer:
                raise LabError(str(answer["failed"]))
            return dict(answer)
