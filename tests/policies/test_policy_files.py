"""Files of policies: what is written is read, and nothing else is believed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ecotone.policies import network
from ecotone.policies.network import mlp, mlp_of, read_file, tensors_of, write_file
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    name: str
    count: int


def written(path: Path) -> bytes:
    torch.manual_seed(0)
    write_file(path, tensors_of(mlp((3, 4, 2))), About(name="x", count=2), "test", 1)
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, path = mlp((3, 4, 2)), tmp_path / "p.safetensors"
    write_file(path, tensors_of(net), About(name="x", count=2), "test", 1)
    about, tensors = read_file(path, About, "test", 1)
    again = mlp_of(tensors, 3, 2, "policy")
    x = torch.rand(5, 3)
    assert about == About(name="x", count=2)
    assert torch.allclose(again(x), net(x), atol=1e-2)  # float16 on disk
    assert not any(p.requires_grad for p in again.parameters())


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_file_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any byte changed, the end cut, or bytes put behind: an EcotoneError, or (weights changed) another network."""
    path = tmp_path_factory.mktemp("files") / "p.safetensors"
    whole = bytearray(written(path))
    kind = data.draw(st.sampled_from(["change", "cut", "more"]))
    if kind == "change":
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        whole += data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(bytes(whole))
    with contextlib.suppress(EcotoneError):
        mlp_of(read_file(path, About, "test", 1)[1], 3, 2, "policy")


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(EcotoneError, match=match):
        read_file(path, About, "test", 1)


def document(**changes: object) -> dict[str, str]:
    return {"ecotone": json.dumps({"schema": "test", "version": 1, "name": "x", "count": 2} | changes)}


def test_each_thing_that_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"weight_0": torch.zeros(2, 3), "bias_0": torch.zeros(2)}
    refused(tmp_path, b"", "no safetensors")
    refused(tmp_path, (1 << 60).to_bytes(8, "little") + b"{}", "was cut")
    refused(tmp_path, save(good), "says nothing of a policy")
    refused(tmp_path, save(good, document(version=2)), "version")
    refused(tmp_path, save(good, document(surprise=1)), "surprise")
    refused(tmp_path, save(good, document(count="two")), "count")
    refused(tmp_path, save(good | {"bias_0": torch.tensor([float("nan"), 0.0])}, document()), "not finite")
    refused(tmp_path, save(good | {"bias_0": torch.zeros(2, dtype=torch.int64)}, document()), "int64")
    with pytest.raises(EcotoneError, match="give the file"):
        read_file(tmp_path / "none", About, "test", 1)
    monkeypatch.setattr(network, "LARGEST_BYTES", 10)
    refused(tmp_path, save(good, document()), "at most 10")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({}, "not the layers"),
        ({"weight_0": (2, 3), "bias_1": (2,)}, "not the layers"),
        ({"weight_0": (2, 4), "bias_0": (2,)}, "expected"),
        ({"weight_0": (2, 3), "bias_0": (2, 1)}, "expected"),
        ({"weight_0": (5, 3), "bias_0": (5,)}, "its actions are 2"),
        ({"weight_0": (0, 3), "bias_0": (0,)}, "expected"),
    ],
)
def test_networks_of_other_shapes_are_refused(tensors: dict[str, tuple[int, ...]], match: str) -> None:
    with pytest.raises(EcotoneError, match=match):
        mlp_of({name: torch.zeros(shape) for name, shape in tensors.items()}, 3, 2, "policy x")
