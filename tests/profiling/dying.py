"""The measuring process with an executor in it that really kills it, by division by zero or abort, or that hangs."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

from ecotone import executors
from ecotone.executors import by_id
from ecotone.profiling import work


class Dying:
    """Named "deadly:<how>"; dies while it prepares a segment, "late" when it runs one."""

    def __init__(self, how: str) -> None:
        self.id = f"deadly:{how}"
        self.how = how

    def available(self, accelerator: str) -> str:
        return ""

    def compile(self, segment, examples, accelerator, threads):  # type: ignore[no-untyped-def]
        inner = by_id("torch:fp32").compile(segment, examples, accelerator, threads)
        if self.how == "late":
            return lambda tensors: (self.die(), inner(tensors))[1]
        self.die()
        return inner

    def die(self) -> None:
        if self.how == "abort":
            ctypes.CDLL(None).abort()
        if self.how == "exit":
            os._exit(3)
        if self.how == "hang":
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGFPE)  # what an integer division by zero in native code does


executors._ALL = (*executors._ALL, *(Dying(how) for how in ("abort", "exit", "hang", "late")))

if __name__ == "__main__":
    sys.exit(work.main(sys.argv[1:]))
