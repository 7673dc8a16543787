"""Where inputs come from: files, directories, cameras, videos, RTSP, standard input; newest frame wins, or all queue.

Every source is an iterator of Items. A finite source knows its length, so that a progress bar can be drawn. Video needs
the extra [video]; a live source (camera, RTSP) drops old frames by default, because an old frame is worth nothing there.
"""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from ecotone.units import EcotoneError

__all__ = ["IMAGE_SUFFIXES", "Item", "Source", "SourceError", "Take", "newest", "open_source"]

Take = Literal["auto", "newest", "all"]
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mjpeg"})
TEXT_SUFFIXES = frozenset({".txt"})
NPY_MAGIC, JPEG_MAGIC, PNG_MAGIC = b"\x93NUMPY", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
MAX_ITEM_BYTES = 256 * 2**20


class SourceError(EcotoneError):
    """A source cannot be opened or read."""


@dataclass(frozen=True, slots=True)
class Item:
    """One input: an image (height, width, 3; uint8), an array of the model's own shape, or a text."""

    name: str
    kind: Literal["image", "array", "text"]
    value: np.ndarray | str


@dataclass(slots=True)
class Source:
    """An iterator of items, its length where it is known, and whether it is live."""

    items: Iterator[Item]
    length: int | None
    live: bool = False
    dropped: int = 0

    def __iter__(self) -> Iterator[Item]:
        return self.items


def open_source(spec: str, take: Take = "auto") -> Source:
    """Open `spec`: a file, a directory, "camera:0", "rtsp://…", a video file, or "-" for standard input.

    Raises SourceError for what does not exist or holds nothing usable. A broken item raises when it is reached.
    """
    if spec == "-":
        source = Source(items=_from_stream(sys.stdin.buffer), length=None)
    elif spec.startswith(("camera:", "rtsp://", "rtsps://")):
        source = Source(items=_from_video(spec), length=None, live=True)
    else:
        source = _from_path(Path(spec))
    if take == "newest" or (take == "auto" and source.live):
        return newest(source)
    return source


def newest(source: Source) -> Source:
    """The same source read in a thread with a single slot: a frame that nobody took before the next one came is dropped."""
    slot: list[Item] = []
    failure: list[BaseException] = []
    changed = threading.Condition()
    ended = threading.Event()
    result = Source(items=iter(()), length=None, live=source.live)

    def read() -> None:
        try:
            for item in source.items:
                with changed:
                    result.dropped += len(slot)
                    slot[:] = [item]
                    changed.notify()
                if ended.is_set():
                    return
        except BaseException as error:
            failure.append(error)
        finally:
            with changed:
                ended.set()
                changed.notify()

    def take() -> Iterator[Item]:
        thread = threading.Thread(target=read, name="newest-frame", daemon=True)
        thread.start()
        try:
            while True:
                with changed:
                    changed.wait_for(lambda: slot or ended.is_set())
                    if not slot:
                        break
                    item = slot.pop()
                yield item
        finally:
            ended.set()
        if failure:
            raise failure[0]

    result.items = take()
    return result


def _from_path(path: Path) -> Source:
    if not path.exists():
        raise SourceError(f"input {path}: no such file or directory; a camera is written camera:0, standard input -")
    if path.is_dir():
        known = IMAGE_SUFFIXES | TEXT_SUFFIXES | {".npy"}
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in known and p.is_file())
        if not files:
            raise SourceError(f"input {path}: holds no file with one of the suffixes {' '.join(sorted(known))}")
        return Source(items=(item for file in files for item in _from_file(file)), length=_length(files))
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return Source(items=_from_video(str(path)), length=None)
    if suffix not in IMAGE_SUFFIXES | TEXT_SUFFIXES | {".npy"}:
        raise SourceError(
            f"input {path}: suffix {suffix or 'none'} is not known; images, videos, .npy, .txt or a directory are"
        )
    return Source(items=_from_file(path), length=_length([path]))


def _length(files: list[Path]) -> int | None:
    """One item a file, unless a file holds several."""
    return None if any(f.suffix.lower() in TEXT_SUFFIXES for f in files) else len(files)


def _from_file(path: Path) -> Iterator[Item]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            yield Item(path.name, "array", np.load(path, allow_pickle=False))
        elif suffix in TEXT_SUFFIXES:
            lines = path.read_text(encoding="utf-8").splitlines()
            yield from (Item(f"{path.name}:{i + 1}", "text", line) for i, line in enumerate(lines) if line.strip())
        else:
            yield Item(path.name, "image", decode_image(path.read_bytes(), str(path)))
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"input {path}: cannot be read as {suffix[1:]}: {error}") from None


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Bytes of an image file -> (height, width, 3) uint8; raises SourceError for noise."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"input {where}: is not a readable image: {error}") from None


def _from_video(spec: str) -> Iterator[Item]:
    try:
        import cv2
    except ImportError:
        raise SourceError(f'input {spec}: video needs OpenCV; install it with  pip install "ecotone[video]"') from None
    if spec.startswith("camera:") and not spec[7:].isdigit():
        raise SourceError(f"input {spec}: write the camera's number, for example camera:0")
    capture = cv2.VideoCapture(int(spec[7:]) if spec.startswith("camera:") else spec)
    if not capture.isOpened():
        raise SourceError(f"input {spec}: cannot be opened; is it there, and may this user read it?")
    try:
        number = 0
        while True:
            good, frame = capture.read()
            if not good:
                if number == 0:
                    raise SourceError(f"input {spec}: opened, but gives no frame")
                return
            yield Item(f"{spec}#{number}", "image", np.ascontiguousarray(frame[:, :, ::-1]))
            number += 1
    finally:
        capture.release()


class _Ahead:
    """A byte stream that can be looked into before it is read; bounded by MAX_ITEM_BYTES per item."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.buffer = stream, bytearray()

    def fill(self, count: int) -> bool:
        """Have at least `count` bytes in the buffer; False where the stream ends before."""
        while len(self.buffer) < count:
            chunk = self.stream.read1(1 << 16) if hasattr(self.stream, "read1") else self.stream.read(1 << 16)
            if not chunk:
                return False
            self.buffer += chunk
        return True

    def read(self, count: int = -1) -> bytes:
        """At most `count` bytes, fewer only at the end of the stream (the file interface that numpy reads from)."""
        self.fill(count if count >= 0 else MAX_ITEM_BYTES)
        size = len(self.buffer) if count < 0 else count
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def exactly(self, count: int, name: str) -> bytes:
        if count > MAX_ITEM_BYTES or not self.fill(count):
            raise SourceError(f"input {name}: the image ends early")
        return self.read(count)

    def until(self, pattern: re.Pattern[bytes], name: str) -> bytes:
        """Everything before the first match of `pattern` (two bytes long)."""
        start = 0
        while not (found := pattern.search(self.buffer, start)):
            start = max(len(self.buffer) - 1, 0)
            if len(self.buffer) > MAX_ITEM_BYTES or not self.fill(len(self.buffer) + 1):
                raise SourceError(f"input {name}: the image ends early")
        return self.read(found.start())


def _from_stream(stream: BinaryIO) -> Iterator[Item]:
    """Items from a byte stream: .npy arrays, JPEG or PNG files in a row, or lines of text, told by the first bytes."""
    reader, number = _Ahead(stream), 0
    while reader.fill(1):
        reader.fill(8)
        head, name = bytes(reader.buffer[:8]), f"stdin#{number}"
        if head.startswith(NPY_MAGIC):
            try:
                yield Item(name, "array", np.lib.format.read_array(reader, allow_pickle=False))
            except (ValueError, EOFError, OSError) as error:
                raise SourceError(f"input {name}: broken .npy array: {error}") from None
        elif head.startswith((JPEG_MAGIC, PNG_MAGIC)):
            data = _read_jpeg(reader, name) if head.startswith(JPEG_MAGIC) else _read_png(reader, name)
            yield Item(name, "image", decode_image(data, name))
        elif text := _read_line(reader, name).strip():
            yield Item(name, "text", text)
        else:
            continue
        number += 1


def _read_line(reader: _Ahead, name: str) -> str:
    at = -1
    while (at := reader.buffer.find(b"\n")) < 0 and len(reader.buffer) < MAX_ITEM_BYTES:
        if not reader.fill(len(reader.buffer) + 1):
            break
    line = reader.read(at + 1 if at >= 0 else len(reader.buffer))
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise SourceError(f"input {name}: is neither .npy, JPEG, PNG nor UTF-8 text") from None


def _read_png(reader: _Ahead, name: str) -> bytes:
    """One PNG by its chunks: length, type, data, checksum, up to IEND."""
    parts, size = [reader.exactly(8, name)], 8
    while size <= MAX_ITEM_BYTES:
        head = reader.exactly(8, name)
        parts += [head, reader.exactly(int.from_bytes(head[:4], "big") + 4, name)]
        size += 8 + len(parts[-1])
        if head[4:] == b"IEND":
            return b"".join(parts)
    raise SourceError(f"input {name}: the image is larger than {MAX_ITEM_BYTES} bytes")


# In entropy-coded data 0xFF is followed by 0x00 (a stuffed byte), 0xD0-0xD7 (a restart) or 0xFF (fill).
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def _read_jpeg(reader: _Ahead, name: str) -> bytes:
    """One JPEG by its marker structure: segments carry their length, scan data runs up to the next real marker."""
    out = bytearray(reader.exactly(2, name))
    while len(out) <= MAX_ITEM_BYTES:
        marker = reader.exactly(2, name)
        out += marker
        if marker == b"\xff\xd9":
            return bytes(out)
        if marker[0] != 0xFF:
            raise SourceError(f"input {name}: broken JPEG structure")
        size = reader.exactly(2, name)
        out += size + reader.exactly(max(int.from_bytes(size, "big") - 2, 0), name)
        if marker[1] == 0xDA:
            out += reader.until(_MARKER, name)
    raise SourceError(f"input {name}: the image is larger than {MAX_ITEM_BYTES} bytes")
