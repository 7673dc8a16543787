"""Prepared segments on disk: one file per key, checksummed, written aside and renamed, oldest use evicted first.

A file is b"ECOX1" + sha256 of the rest (32 bytes) + the content. A file that is cut short or altered is removed and
counts as a miss, so a damaged cache costs time and never an answer. A folder that cannot be written is no error:
then nothing is kept. No pickle: contents are OpenVINO IR or ONNX, made on this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ecotone import schema
from ecotone.units import EcotoneError

__all__ = ["Store", "cache_root", "executor_store", "joined", "key_of", "parted"]

MAGIC = b"ECOX1"
HEAD_BYTES = len(MAGIC) + 32
DEFAULT_CAP_BYTES = 4 << 30


def cache_root() -> Path:
    """$ECOTONE_CACHE, or ~/.cache/ecotone where it is not set."""
    stated = os.environ.get("ECOTONE_CACHE")
    return Path(stated) if stated else Path.home() / ".cache" / "ecotone"


def key_of(*parts: object) -> str:
    """Hex sha256 of `parts`, each as text with its length, so that no two lists of parts run together."""
    digest = hashlib.sha256()
    for part in parts:
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def joined(parts: Sequence[bytes]) -> bytes:
    """Several byte strings as one: count, lengths, contents."""
    return struct.pack(f"<Q{len(parts)}Q", len(parts), *map(len, parts)) + b"".join(parts)


def parted(data: bytes) -> tuple[bytes, ...]:
    """What `joined` joined; raises ValueError where `data` was not made by it."""
    if len(data) < 8 or (count := struct.unpack_from("<Q", data)[0]) > (len(data) - 8) // 8:
        raise ValueError("not a joined entry")
    lengths = struct.unpack_from(f"<{count}Q", data, 8)
    at = 8 + 8 * count
    if at + sum(lengths) != len(data):
        raise ValueError("not a joined entry")
    ends = [at := at + length for length in lengths]
    return tuple(data[end - length : end] for end, length in zip(ends, lengths, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Byte strings by hex key under `folder`, at most `cap_bytes` in all."""

    folder: Path
    cap_bytes: int = DEFAULT_CAP_BYTES

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.bin"

    def get(self, key: str) -> bytes | None:
        """The content under `key`, or None where there is none that is whole; a damaged file is removed."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        content = data[HEAD_BYTES:]
        if data[: len(MAGIC)] != MAGIC or data[len(MAGIC) : HEAD_BYTES] != hashlib.sha256(content).digest():
            self.drop(key)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # last use, which is what eviction goes by
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep `content` under `key`; does nothing where it exceeds the cap or the folder cannot be written."""
        if len(content) + HEAD_BYTES > self.cap_bytes:
            return
        try:
            schema.write_aside(self.path(key), MAGIC + hashlib.sha256(content).digest() + content)
        except EcotoneError:
            return
        self._evict(keep=key)

    def drop(self, key: str) -> None:
        """Forget `key`."""
        with contextlib.suppress(OSError):
            self.path(key).unlink(missing_ok=True)

    def _evict(self, keep: str) -> None:
        found = []
        for path in self.folder.glob("*.bin"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((path.stem != keep, status.st_mtime, status.st_size, path))
        total = sum(size for _, _, size, _ in found)
        for other, _, size, path in sorted(found, key=lambda item: item[1]):
            if total > self.cap_bytes and other:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size


def executor_store() -> Store:
    """Where prepared segments are kept; $ECOTONE_CACHE_CAP_BYTES changes the cap of 4 GiB."""
    cap = os.environ.get("ECOTONE_CACHE_CAP_BYTES", "")
    return Store(folder=cache_root() / "executors", cap_bytes=int(cap) if cap.isdigit() else DEFAULT_CAP_BYTES)
