"""The weight store: checked, resumable, bounded. What is expected follows from sha256 and from sizes alone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.runtime.store import Store, StoreCorrupted, StoreError, StoreFull

pytestmark = pytest.mark.torch


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", cap_bytes=1000)


def test_what_was_put_is_read_back(store: Store) -> None:
    name = store.put(b"weights")
    assert name == name_of(b"weights")
    assert store.has(name)
    assert store.read(name) == b"weights"


@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(1, 100), max_size=8))
def test_pieces_in_order_make_the_whole_however_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int]
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    offset, finished = 0, False
    for size in [*cuts, len(data)]:
        piece = data[offset : offset + size]
        if piece or not data:
            assert store.partial_bytes(name_of(data)) == offset
            finished = store.append(name_of(data), offset, piece, len(data))
            offset += len(piece)
        if offset == len(data):
            break
    assert finished
    assert store.read(name_of(data)) == data
    store.close()


def test_a_download_goes_on_where_it_stopped_also_after_a_restart(tmp_path: Path) -> None:
    data = bytes(range(200))
    first = Store(tmp_path)
    assert not first.append(name_of(data), 0, data[:120], 200)
    first.close()
    second = Store(tmp_path)
    assert second.partial_bytes(name_of(data)) == 120
    assert not second.has(name_of(data))
    with pytest.raises(StoreError, match="does not continue"):
        second.append(name_of(data), 100, data[100:], 200)
    assert second.append(name_of(data), 120, data[120:], 200)
    assert second.read(name_of(data)) == data


def test_wrong_content_is_refused_and_leaves_nothing(store: Store) -> None:
    with pytest.raises(StoreCorrupted):
        store.append(name_of(b"right"), 0, b"wrong", 5)
    assert not store.has(name_of(b"right"))
    assert store.partial_bytes(name_of(b"right")) == 0
    assert store.used_bytes() == 0


def test_a_flipped_bit_on_disk_is_found_and_the_file_removed(store: Store) -> None:
    name = store.put(b"weights")
    (store.folder / name).write_bytes(b"weighty")
    with pytest.raises(StoreCorrupted, match="fetch it again"):
        store.read(name)
    assert not store.has(name)


def test_the_longest_unused_goes_first_and_a_deployed_plan_keeps_its_own(store: Store) -> None:
    old, pinned, used = (store.put(bytes([i]) * 300) for i in range(3))
    for age, name in enumerate((old, pinned, used)):
        os.utime(store.folder / name, ns=(age, age))
    store.pin("plan", [pinned])
    store.read(old)  # makes it the most recently used
    store.put(b"x" * 300)
    assert store.has(pinned)
    assert store.has(old)
    assert not store.has(used)
    assert store.used_bytes() <= 1000


def test_no_room_is_named_and_an_unpinned_plan_gives_it_back(store: Store) -> None:
    first = store.put(b"a" * 600)
    store.pin("plan", [first])
    with pytest.raises(StoreFull, match="cap"):
        store.put(b"b" * 600)
    assert store.has(first)
    store.unpin("plan")
    store.put(b"b" * 600)
    assert not store.has(first)


def test_two_nodes_do_not_share_a_folder(tmp_path: Path) -> None:
    first = Store(tmp_path)
    with pytest.raises(StoreError, match="another node"):
        Store(tmp_path)
    first.close()
    Store(tmp_path).close()


def test_a_name_that_is_no_hash_cannot_leave_the_folder(store: Store) -> None:
    for name in ("../../etc/passwd", "", "A" * 64, "a" * 63):
        with pytest.raises(StoreError, match="not a sha256"):
            store.read(name)


def test_a_full_disk_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real full disk: the file-size limit of the kernel would end the process, /dev/full answers ENOSPC."""
    monkeypatch.setattr(store, "_partial", lambda name: Path("/dev/full"))
    monkeypatch.setattr(store, "partial_bytes", lambda name: 0)
    with pytest.raises(StoreFull, match="disk is full"):
        store.append(name_of(b"abc"), 0, b"abc", 3)
