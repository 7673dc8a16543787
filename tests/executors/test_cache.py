"""The disk cache: whole or not at all, and a damaged file costs time, never an answer."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecotone import executors
from ecotone.executors import ExecutorError
from ecotone.executors.cache import Store, executor_store, joined, key_of, parted

pytestmark = pytest.mark.torch


def test_what_was_put_is_got(tmp_path):
    store = Store(folder=tmp_path / "new")
    assert store.get("a") is None
    store.put("a", b"content")
    assert store.get("a") == b"content"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer"])
def test_damaged_file_is_a_miss_and_goes(tmp_path, damage):
    store = Store(folder=tmp_path)
    store.put("a", b"content" * 100)
    data = store.path("a").read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    store.path("a").write_bytes({"cut": data[:-3], "flip": flipped, "empty": b"", "longer": data + b"x"}[damage])
    assert store.get("a") is None
    assert not store.path("a").exists()


def test_least_recently_used_goes_first(tmp_path):
    store = Store(folder=tmp_path, cap_bytes=3 * 137)  # 100 bytes and a head of 37 each
    for age, key in enumerate("abc"):
        store.put(key, key.encode() * 100)
        os.utime(store.path(key), (1000 + age, 1000 + age))
    assert store.get("a") is not None  # used now, so b is the oldest
    store.put("d", b"d" * 100)
    assert [key for key in "abcd" if store.path(key).exists()] == ["a", "c", "d"]


def test_content_over_the_cap_is_not_kept(tmp_path):
    store = Store(folder=tmp_path, cap_bytes=100)
    store.put("a", b"x" * 100)
    assert store.get("a") is None


def test_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = Store(folder=tmp_path / "file" / "below")
    store.put("a", b"x")
    assert store.get("a") is None


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_joined_comes_apart(parts):
    assert parted(joined(parts)) == tuple(parts)


@given(st.binary(max_size=60))
def test_noise_does_not_come_apart_into_something_else(data):
    with contextlib.suppress(ValueError):
        assert joined(parted(data)) == data


def test_key_tells_lists_apart():
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("c", "ab")}) == 4


@pytest.mark.parametrize("name", ["openvino:fp32", "onnxruntime:fp32"])
def test_second_preparation_comes_from_the_cache(name, convolutions, monkeypatch):
    segment, inputs = convolutions
    executor = executors.by_id(name)
    if reason := executor.available("cpu"):
        pytest.skip(reason)
    wanted = executor.compile(segment, inputs, "cpu", 1)(inputs)
    assert len(list(executor_store().folder.glob("*.bin"))) == 1

    def convert(*arguments):  # type: ignore[no-untyped-def]
        raise AssertionError("converted although it was in the cache")

    monkeypatch.setattr(f"ecotone.executors.{name.partition(':')[0]}.Core", convert)
    assert torch.equal(executor.compile(segment, inputs, "cpu", 1)(inputs)[0], wanted[0])
    with pytest.raises(ExecutorError, match="converted although"):
        executor.compile(segment, tuple(torch.randn(2, *t.shape[1:]) for t in inputs), "cpu", 1)  # another shape: a miss


@pytest.mark.parametrize("name", ["openvino:fp32", "onnxruntime:fp32"])
@pytest.mark.parametrize("damage", ["bytes", "content"])
def test_damaged_entry_is_prepared_again(name, damage, convolutions):
    segment, inputs = convolutions
    executor = executors.by_id(name)
    if reason := executor.available("cpu"):
        pytest.skip(reason)
    wanted = executor.compile(segment, inputs, "cpu", 1)(inputs)
    store = executor_store()
    (path,) = store.folder.glob("*.bin")
    whole = path.read_bytes()
    if damage == "bytes":
        path.write_bytes(whole[:200])
    else:  # whole by its checksum, yet nothing that the engine can read
        store.put(path.stem, b"not a model")
    assert torch.allclose(executor.compile(segment, inputs, "cpu", 1)(inputs)[0], wanted[0])
    assert len(path.read_bytes()) > 1000
