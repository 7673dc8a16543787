"""Incarnations: numbers that grow from each start of a node's machine to the next, so that peers know a restart by them."""

from __future__ import annotations

import threading
import time

__all__ = ["next_incarnation"]

_EPOCH_S = 1_735_689_600  # 2025-01-01: tenths of seconds since then fit into 32 bits until 2038
_lock = threading.Lock()
_last = 0


def next_incarnation() -> int:
    """A number above that of every earlier machine of this node, here and in earlier processes."""
    global _last
    with _lock:
        _last = max(_last + 1, int((time.time() - _EPOCH_S) * 10))
        return _last
