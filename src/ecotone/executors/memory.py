"""Keeps freed memory in the process, so that each request does not fault its activations in anew.

glibc gives large freed blocks back to the system and takes them again at the next request, page by page: with eager
PyTorch that cost a node a quarter to two thirds of its time (MobileNetV2, one request at a time: 25 to 60 ms instead of
19). A process that serves tensors of the same shapes over and over keeps them instead; its resident memory then stays at
its peak. Elsewhere (macOS, musl) this does nothing: their allocators keep memory by themselves.
"""

from __future__ import annotations

import ctypes
import functools

__all__ = ["keep_freed_memory"]

# From glibc's malloc.h. Tensors above 32 MiB (the most that the threshold may be) are still mapped one by one.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
LIMITS = (
    (M_ARENA_MAX, 1),  # the others' heaps end at 64 MiB and are unmapped whole
    (M_MMAP_THRESHOLD, 32 << 20),
    (M_TRIM_THRESHOLD, 2**31 - 1),
    (M_TOP_PAD, 64 << 20),
)


@functools.cache
def keep_freed_memory() -> bool:
    """Tell the C library to keep what is freed; True where it could be told. Call it early: before threads allocate."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    answers = [mallopt(what, limit) for what, limit in LIMITS]  # all of them, also after one is refused
    return all(answer == 1 for answer in answers)
