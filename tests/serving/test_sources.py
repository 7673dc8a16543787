"""Sources read back what was written, in order, and name what is broken; the newest frame wins where that is asked."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ecotone.serving.sources import Item, Source, SourceError, _from_stream, newest, open_source

pytestmark = pytest.mark.torch


def picture(seed: int, size: tuple[int, int] = (17, 23)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def test_directory_in_name_order(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(i), "PNG"))
    np.save(tmp_path / "3.npy", np.arange(6.0))
    (tmp_path / "notes.doc").write_text("not an input")
    source = open_source(str(tmp_path))
    items = list(source)
    assert source.length == 4
    assert [i.name for i in items] == ["0.png", "1.png", "2.png", "3.npy"]
    for i in range(3):
        np.testing.assert_array_equal(items[i].value, picture(i))
    np.testing.assert_array_equal(items[3].value, np.arange(6.0))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}, {"optimize": True, "subsampling": 0}])
def test_stream_of_jpegs_is_taken_apart_at_the_right_bytes(options: dict[str, object]) -> None:
    files = [encoded(picture(i, (40 + i, 50)), "JPEG", **options) for i in range(5)]
    items = list(_from_stream(io.BytesIO(b"".join(files))))
    assert len(items) == 5
    for item, file in zip(items, files, strict=True):
        np.testing.assert_array_equal(item.value, np.asarray(Image.open(io.BytesIO(file))))


def test_mixed_stream() -> None:
    buffer = io.BytesIO()
    buffer.write(encoded(picture(1), "PNG"))
    np.save(buffer, np.ones((2, 3)))
    buffer.write("grüße\n\nzwei\n".encode())
    buffer.write(encoded(picture(2), "JPEG"))
    kinds = [(i.kind, i.name) for i in _from_stream(io.BytesIO(buffer.getvalue()))]
    assert kinds == [
        ("image", "stdin#0"),
        ("array", "stdin#1"),
        ("text", "stdin#2"),
        ("text", "stdin#3"),
        ("image", "stdin#4"),
    ]


@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"]))
def test_noise_gives_items_or_a_source_error(noise: bytes, magic: bytes) -> None:
    try:
        items = list(_from_stream(io.BytesIO(magic + noise)))
    except SourceError:
        items = []
    assert all(isinstance(item, Item) for item in items)


@given(st.integers(0, 2000))
def test_truncated_images_are_named(cut: int) -> None:
    data = encoded(picture(1), "JPEG")
    with pytest.raises(SourceError, match="stdin#0"):
        list(_from_stream(io.BytesIO(data[: 3 + cut % (len(data) - 4)])))


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    (tmp_path / "noise.jpg").write_bytes(b"\xff\xd8\xffnoise")
    (tmp_path / "model.bin").write_bytes(b"x")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPYrubbish")
    (tmp_path / "empty").mkdir()
    for name, says in [
        ("missing.png", "no such file"),
        ("noise.jpg", "not a readable image"),
        ("model.bin", "suffix .bin is not known"),
        ("bad.npy", "cannot be read as npy"),
        ("empty", "holds no file"),
    ]:
        with pytest.raises(SourceError, match=name) as caught:
            list(open_source(str(tmp_path / name)))
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_objects_in_npy_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(SourceError, match="cannot be read"):
        list(open_source(str(tmp_path / "o.npy")))


def test_newest_frame_wins() -> None:
    """The consumer takes frame 0, then lets nine more arrive before it looks again: it gets the ninth, eight are dropped."""
    taken, produced = threading.Event(), threading.Event()

    def frames() -> Iterator[Item]:
        yield Item("0", "text", "0")
        taken.wait(10)
        for i in range(1, 10):
            yield Item(str(i), "text", str(i))
        produced.set()

    source = newest(Source(items=frames(), length=None, live=True))
    items = iter(source)
    assert next(items).name == "0"
    taken.set()
    assert produced.wait(10)
    assert [item.name for item in items] == ["9"]
    assert source.dropped == 8


def test_a_failing_live_source_tells_its_consumer() -> None:
    def frames() -> Iterator[Item]:
        yield Item("0", "text", "0")
        raise SourceError("camera unplugged")

    with pytest.raises(SourceError, match="unplugged"):
        list(newest(Source(items=frames(), length=None, live=True)))


def test_video_frames_in_order_and_in_rgb(tmp_path: Path) -> None:
    """Five plain frames, lossless, each of its own colour: what comes back is that colour, red first, not blue first."""
    cv2 = pytest.importorskip("cv2", reason="video needs the extra [video]")
    colours = [(250, 10, 20), (10, 250, 20), (20, 10, 250), (90, 90, 90), (255, 255, 255)]
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 10, (64, 48))
    assert writer.isOpened()
    for red, green, blue in colours:
        writer.write(np.full((48, 64, 3), (blue, green, red), np.uint8))
    writer.release()
    items = list(open_source(str(tmp_path / "v.avi")))
    assert len(items) == len(colours)
    for item, colour in zip(items, colours, strict=True):
        np.testing.assert_allclose(np.median(item.value, axis=(0, 1)), colour, atol=6)
    (tmp_path / "noise.mp4").write_bytes(b"noise")
    with pytest.raises(SourceError, match=r"noise\.mp4"):
        list(open_source(str(tmp_path / "noise.mp4")))
    with pytest.raises(SourceError, match="camera:0"):
        list(open_source("camera:front", "all"))
