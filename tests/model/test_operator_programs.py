"""The travelling form: what it may hold, what a hostile one may not, and that it runs under the compilers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo

from ecotone.model import Captured, ModelError, Segment, capture
from ecotone.model.operators import ALLOWED, is_allowed, resolve

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def captured() -> Captured:
    module, args, kwargs = zoo.build("unet")
    return capture(module, args, kwargs)


@pytest.fixture(scope="module")
def segment(captured: Captured) -> Segment:
    return captured.segment(1, 5)


def rebuilt(segment: Segment, text: str, blobs: dict[str, bytes] | None = None) -> Segment:
    found = {sha256: segment.blob(name) for name, (sha256, _) in segment.manifest().items()}
    return Segment.from_parts(text, (found | (blobs or {})).__getitem__)


def test_a_program_is_plain_json_and_stable(segment: Segment, captured: Captured) -> None:
    document = json.loads(segment.program_json())
    assert (document["schema"], document["version"]) == ("ecotone.program", 1)
    assert (document["start"], document["stop"], document["graph_hash"]) == (1, 5, captured.graph.content_hash())
    assert rebuilt(segment, segment.program_json()).program == segment.program
    assert captured.segment(1, 5).content_hash() == segment.content_hash() != captured.segment(1, 4).content_hash()


EDITS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("import", lambda d: d["nodes"][0].update(op="os.system"), "'os.system' is not on the list"),
    ("file", lambda d: d["nodes"][0].update(op="aten.from_file.default"), "is not on the list"),
    ("in place", lambda d: d["nodes"][0].update(op="aten.relu_.default"), "is not on the list"),
    ("out", lambda d: d["nodes"][0].update(op="aten.add.out"), "is not on the list"),
    ("overload", lambda d: d["nodes"][0].update(op="aten.add.__class__"), "is not on the list"),
    ("random", lambda d: d["nodes"][0].update(op="aten.rand.default"), "is not on the list"),
    ("uninitialised", lambda d: d["nodes"][0].update(op="aten.empty.memory_format"), "is not on the list"),
    ("future", lambda d: d["nodes"][0]["args"].__setitem__(0, {"v": 10**6}), "not made before it"),
    ("negative", lambda d: d["nodes"][0]["args"].__setitem__(0, {"v": -1}), "not made before it"),
    ("tag", lambda d: d["nodes"][0]["args"].__setitem__(0, {"pickle": "x"}), "is not known"),
    ("dtype", lambda d: d["nodes"][0]["args"].__setitem__(0, {"dtype": "object"}), "is not known"),
    ("huge number", lambda d: d["nodes"][0]["args"].append(2**70), "64 bits"),
    ("long text", lambda d: d["nodes"][0]["args"].append("x" * 1000), "1000 characters"),
    ("deep list", lambda d: d["nodes"][0]["args"].append([[[[[1]]]]]), "too deep"),
    ("too many", lambda d: d["nodes"][0].update(args=[1] * 50), "50 arguments"),
    ("keyword", lambda d: d["nodes"][0].update(kwargs={"nope": 1}), "'nope' is not known"),
    ("missing", lambda d: d["nodes"][0].update(args=[]), "is missing"),
    ("makes", lambda d: d["nodes"][0].update(op="aten.zeros.default", args=[[2**20, 2**20]]), "over the limit of 2**36"),
    ("batch", lambda d: d["nodes"][0]["args"].__setitem__(0, {"batch": [0, 1]}), "names no source"),
    ("source", lambda d: d.update(batch={"input": 9, "dim": 0}), "batch source"),
    ("results", lambda d: d["results"].append(0), "results for"),
    ("result", lambda d: d["results"].__setitem__(0, 10**6), "result 1000000 does not exist"),
    ("shape", lambda d: d["inputs"][0].update(shape=[-1, 2]), "none negative"),
    ("order", lambda d: d["inputs"][0].update(order=[0, 0]), "not an order"),
    ("tensor dtype", lambda d: d["inputs"][0].update(dtype="pickle"), "dtype 'pickle'"),
    ("name", lambda d: d["weights"][0].update(name="a\nb"), "printable"),
    ("twice", lambda d: d["weights"][1].update(name=d["weights"][0]["name"]), "two weights have one name"),
    ("sha", lambda d: d["weights"][0].update(sha256="../../etc/passwd"), "64 hexadecimal digits"),
    ("size", lambda d: d["weights"][0].update(size_bytes=10**12), "cannot hold shape"),
    ("range", lambda d: d.update(start=7), "is not one"),
    ("field", lambda d: d.update(code="import os"), "code is not known"),
    ("version", lambda d: d.update(version=2), "version is 2"),
    ("schema", lambda d: d.update(schema="x"), "schema is 'x'"),
    ("type", lambda d: d.update(nodes=3), "must be a list"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "expected"), [case[1:] for case in EDITS], ids=[case[0] for case in EDITS])
def test_a_hostile_program_is_refused(segment: Segment, edit: Callable[[dict[str, Any]], Any], expected: str) -> None:
    document = json.loads(segment.program_json())
    edit(document)
    with pytest.raises(ModelError) as caught:
        rebuilt(segment, json.dumps(document))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_violations_are_named_at_once(segment: Segment) -> None:
    document = json.loads(segment.program_json())
    document["nodes"][0]["op"], document["nodes"][1]["op"] = "os.system", "aten.rand.default"
    with pytest.raises(ModelError, match=r"os\.system.*aten\.rand"):
        rebuilt(segment, json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null", "\x00"])
def test_what_is_no_program_is_refused(segment: Segment, text: str) -> None:
    with pytest.raises(ModelError):
        rebuilt(segment, text)


def test_an_oversized_program_is_refused_before_it_is_read(segment: Segment) -> None:
    with pytest.raises(ModelError, match="over the limit"):
        rebuilt(segment, " " * (1 << 26) + "{}")


def test_blobs_are_checked(segment: Segment) -> None:
    name, (sha256, _) = next(iter(segment.manifest().items()))
    good = segment.blob(name)
    for blob in (b"", good[:-1], good[:-1] + bytes([good[-1] ^ 1]), good + b"x"):
        with pytest.raises(ModelError, match="fetch it again"):
            rebuilt(segment, segment.program_json(), {sha256: blob})
    document = json.loads(segment.program_json())
    document["weights"][0]["shape"] = document["weights"][0]["shape"][::-1]
    with pytest.raises(ModelError, match=f"{name}.*mismatched weights"):
        rebuilt(segment, json.dumps(document))
    with pytest.raises(ModelError, match="has no weight 'nope'"):
        segment.blob("nope")


def test_no_allowed_operator_mutates_draws_or_reads_files() -> None:
    for packet in sorted(ALLOWED):
        overloads = getattr(torch.ops.aten, packet).overloads()
        allowed = [name for o in overloads if is_allowed(name := f"aten.{packet}.{o}")]
        assert allowed, packet
        for name in allowed:
            operator = resolve(name)
            assert not operator._schema.is_mutable  # type: ignore[attr-defined]
    for name in (
        "rand",
        "randn",
        "randperm",
        "bernoulli",
        "multinomial",
        "normal",
        "from_file",
        "empty",
        "empty_like",
        "set_",
    ):
        assert name not in ALLOWED
    with pytest.raises(ModelError, match="not on the list"):
        resolve("aten.rand.default")


def test_modules_trace_under_export_and_compile(captured: Captured, segment: Segment) -> None:
    inputs = captured.segment(0, 1).module()(*captured.example_inputs)
    module = segment.module()
    wanted = module(*inputs)
    exported = torch.export.export(module, tuple(inputs)).module()(*inputs)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs)
    for a, b, c in zip(exported, compiled, wanted, strict=True):
        assert torch.equal(a, c)
        assert torch.allclose(b, c, rtol=1e-5, atol=1e-6)


def test_values_are_dropped_after_their_last_use(captured: Captured) -> None:
    """The most that lives at once is far below the sum of all activations."""
    module = captured.segment(0, captured.graph.num_blocks).module()
    alive: list[int] = []
    values: list[Any] = [None] * module._num_values
    module.run(captured.example_inputs, values, lambda number, made: alive.append(sum(v is not None for v in values)))
    assert max(alive) < len(captured.segment(0, captured.graph.num_blocks).weights) + 1 + 6
