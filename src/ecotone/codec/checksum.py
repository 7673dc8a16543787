"""crc32 of frames and bodies: ISA-L's where it is installed (50 GB/s by carry-less products), else zlib's (2-5 GB/s).

Both compute the same number, so machines with and without it understand each other.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this platform
    from zlib import crc32

__all__ = ["crc32"]
