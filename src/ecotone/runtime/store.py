"""Weights and programs on a node's disk, each under the sha256 of its content.

A blob is written in pieces beside its place, checked whole, and then renamed into it, so a reader sees all of it or none. A
download that was cut goes on where it stopped. When the cap is reached the blob used longest ago goes first, never one that
is pinned by a deployed plan. One process owns a folder at a time. Not a cache of compiled segments: see ecotone.executors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from ecotone.units import EcotoneError, format_quantity

__all__ = ["Store", "StoreCorrupted", "StoreError", "StoreFull"]

_NAME = re.compile(r"^[0-9a-f]{64}$")
_PIECE_BYTES = 1 << 20


class StoreError(EcotoneError):
    """The weight store cannot do what was asked."""


class StoreFull(StoreError):
    """Neither the cap nor the disk has room for a blob, even after what no plan uses was removed."""


class StoreCorrupted(StoreError):
    """A blob's bytes are not those of its name; it was removed, fetch it again."""


class Store:
    """Blobs by content hash in `folder`, at most `cap_bytes` of them; safe for several threads of one process.

    Raises StoreError where the folder cannot be used or another process holds it.
    """

    def __init__(self, folder: str | os.PathLike[str], cap_bytes: int = 8 << 30):
        self.folder, self.cap_bytes = Path(folder), cap_bytes
        self._pins: dict[str, frozenset[str]] = {}
        self._lock = threading.RLock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._owner: IO[str] | None = open(self.folder / ".owner", "w")  # noqa: SIM115 (held while we live)
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"weight store {self.folder} belongs to another node that runs; give each its own folder"
            ) from None
        except OSError as error:
            raise StoreError(
                f"weight store {self.folder}: {error.strerror or error}; give a folder that can be written"
            ) from None

    def has(self, name: str) -> bool:
        """Whether the whole blob `name` (hex sha256) is here; its content is checked when it is read."""
        return self._path(name).exists()

    def read(self, name: str) -> bytes:
        """The checked bytes of `name`, now the most recently used; raises StoreCorrupted or StoreError (absent)."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"weight store {self.folder}: {name[:12]} is not here; fetch it first") from None
        except OSError as error:
            raise StoreError(f"weight store {path}: cannot read: {error.strerror or error}") from None
        if hashlib.sha256(data).hexdigest() != name:
            path.unlink(missing_ok=True)
            raise StoreCorrupted(f"weight store {path}: the content does not match its hash; removed, fetch it again")
        with self._lock:
            _touch(path)
        return data

    def put(self, data: bytes | bytearray | memoryview) -> str:
        """Store a whole blob and return its name; raises StoreFull."""
        name = hashlib.sha256(data).hexdigest()
        if not self.has(name):
            self.discard(name)
            self.append(name, 0, data, len(data))
        return name

    def partial_bytes(self, name: str) -> int:
        """How many bytes of an unfinished download of `name` are here: where to resume."""
        try:
            return self._partial(name).stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, name: str, offset: int, piece: bytes | bytearray | memoryview, size_bytes: int) -> bool:
        """Add `piece` of the blob `name` (of `size_bytes`) at `offset`; True once it is whole, checked and in its place.

        A piece that does not continue what is here raises StoreError; a whole blob whose hash is wrong raises StoreCorrupted
        and leaves nothing; no room raises StoreFull and keeps what was there.
        """
        with self._lock:
            have = self.partial_bytes(name)
            if offset != have or offset + len(piece) > size_bytes:
                raise StoreError(f"weight store: {name[:12]}: a piece at {offset} does not continue the {have} bytes here")
            self._make_room(size_bytes - have, keep=name)
            path = self._partial(name)
            try:
                with open(path, "ab") as file:
                    file.write(piece)
                if have + len(piece) < size_bytes:
                    return False
                if _hash_file(path) != name:
                    path.unlink(missing_ok=True)
                    raise StoreCorrupted(f"weight store: {name[:12]} arrived with another content; removed, fetch it again")
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(path, self._path(name))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise StoreFull(f"weight store {self.folder}: the disk is full; free {size_bytes} bytes") from None
                raise StoreError(f"weight store {path}: {error.strerror or error}") from None
        return True

    def discard(self, name: str) -> None:
        """Forget an unfinished download."""
        self._partial(name).unlink(missing_ok=True)

    def pin(self, owner: str, names: Iterable[str]) -> None:
        """Blobs that `owner` (a plan) uses are not evicted until unpin(owner); a second call replaces the first."""
        with self._lock:
            self._pins[owner] = frozenset(names)

    def unpin(self, owner: str) -> None:
        with self._lock:
            self._pins.pop(owner, None)

    def used_bytes(self) -> int:
        """Bytes of whole blobs and unfinished downloads."""
        return sum(size for _, _, size in self._files())

    def close(self) -> None:
        """Let another process have the folder."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.close()

    def _make_room(self, need: int, keep: str) -> None:
        pinned = set().union(*self._pins.values(), {keep})
        files = sorted(self._files())
        excess = sum(size for _, _, size in files) + need - self.cap_bytes
        free = sum(size for _, path, size in files if path.name.removesuffix(".part") not in pinned)
        if excess > free:
            cap = format_quantity(self.cap_bytes, "bytes")
            raise StoreFull(f"weight store {self.folder}: {need} bytes more exceed the cap of {cap}; raise it")
        for _, path, size in files:
            if excess <= 0:
                return
            if path.name.removesuffix(".part") not in pinned:
                path.unlink(missing_ok=True)
                excess -= size

    def _files(self) -> list[tuple[int, Path, int]]:
        found = []
        for path in self.folder.iterdir():
            if _NAME.match(path.name.removesuffix(".part")):
                stat = path.stat()
                found.append((stat.st_mtime_ns, path, stat.st_size))
        return found

    def _path(self, name: str) -> Path:
        if not _NAME.match(name):
            raise StoreError(f"weight store: {name[:80]!r} is not a sha256 in hexadecimal")
        return self.folder / name

    def _partial(self, name: str) -> Path:
        return self._path(name).with_name(name + ".part")


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):  # a read-only folder still serves its blobs
        os.utime(path)


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
