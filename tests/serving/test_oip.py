"""The protocol's two encodings, by hand and by round trip; whatever arrives gives a request or a ProtocolError."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.serving.oip import InputSpec, ProtocolError, parse_infer, render_infer

pytestmark = pytest.mark.pure

SPECS = (
    InputSpec(name="image", datatype="FP32", shape=(-1, 2, 2)),
    InputSpec(name="mask", datatype="BOOL", shape=(3,)),
)
IMAGE = {"name": "image", "datatype": "FP32", "shape": [1, 2, 2], "data": [1, 2, 3, 4.5]}
MASK = {"name": "mask", "datatype": "BOOL", "shape": [3], "data": [True, False, True]}


def body(*inputs: object, **more: object) -> bytes:
    return json.dumps({"id": "7", "inputs": inputs, **more}).encode()


def test_json_request() -> None:
    request = parse_infer(body(MASK, IMAGE, parameters={"timeout": 250000}), None, SPECS)
    assert request.id == "7"
    assert request.timeout_s == 0.25
    np.testing.assert_array_equal(request.arrays[0], np.array([[[1, 2], [3, 4.5]]], dtype=np.float32))
    np.testing.assert_array_equal(request.arrays[1], [True, False, True])
    nested = IMAGE | {"data": [[[1, 2], [3, 4.5]]]}
    np.testing.assert_array_equal(parse_infer(body(MASK, nested), None, SPECS).arrays[0], request.arrays[0])


def test_binary_request_and_response() -> None:
    array = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    image = {"name": "image", "datatype": "FP32", "shape": [2, 2, 2], "parameters": {"binary_data_size": 32}}
    header = body(image, MASK, parameters={"binary_data_output": True})
    request = parse_infer(header + array.tobytes(), len(header), SPECS)
    np.testing.assert_array_equal(request.arrays[0], array)
    content, size = render_infer(request, "net", "1", {"y": array, "z": np.array([1, 2], dtype=np.int64)})
    assert size is not None
    document = json.loads(content[:size])
    assert document["outputs"][0] == {
        "name": "y",
        "datatype": "FP32",
        "shape": [2, 2, 2],
        "parameters": {"binary_data_size": 32},
    }
    assert content[size:] == array.tobytes() + np.array([1, 2], dtype="<i8").tobytes()


def test_json_response_with_chosen_outputs() -> None:
    request = parse_infer(body(IMAGE, MASK, outputs=[{"name": "z"}]), None, SPECS)
    content, size = render_infer(request, "net", "1", {"y": np.zeros(2), "z": np.array([[1, 2]], dtype=np.int64)})
    assert size is None
    want = {"name": "z", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}
    assert json.loads(content) == {"model_name": "net", "model_version": "1", "id": "7", "outputs": [want]}


@pytest.mark.parametrize(
    ("raw", "header", "says"),
    [
        (b"{", None, "not JSON"),
        (b"[]", None, 'a list "inputs"'),
        (body(IMAGE), None, "input 'mask' is missing"),
        (body(IMAGE, MASK, MASK), None, "given twice"),
        (body(IMAGE, MASK, MASK | {"name": "x"}), None, "no input 'x'; inputs are image, mask"),
        (body(IMAGE | {"shape": [1, 2, 3]}, MASK), None, "needs 6 numbers, data has 4"),
        (body(IMAGE | {"shape": [1, 4, 1]}, MASK), None, "the model takes [-1, 2, 2]"),
        (body(IMAGE | {"shape": [-1, 2, 2]}, MASK), None, "shape must be a list"),
        (body(IMAGE | {"shape": [2**62, 2**62]}, MASK), None, "shape must be a list"),
        (body(IMAGE | {"datatype": "FP31"}, MASK), None, "datatype 'FP31' is not one of"),
        (body(IMAGE | {"datatype": "INT32", "data": [1, 2, 3, 4]}, MASK), None, "is INT32, the model takes FP32"),
        (body(IMAGE | {"data": ["a", "b", "c", "d"]}, MASK), None, "does not hold float32 numbers"),
        (body(IMAGE, MASK, parameters={"timeout": -1}), None, "microseconds above zero"),
        (body(IMAGE, MASK, outputs=["y"]), None, '"outputs" must be'),
        (body(IMAGE, MASK) + b"xx", len(body(IMAGE, MASK)), "2 bytes follow"),
        (body(IMAGE, MASK), 10**6, "the body has"),
        (body({**IMAGE, "parameters": {"binary_data_size": 16}}, MASK), None, "16 announced, 0 left"),
    ],
)
def test_what_is_wrong_is_named(raw: bytes, header: int | None, says: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_infer(raw, header, SPECS)
    assert says in str(caught.value)


def test_unknown_output_and_numbers_json_cannot_hold() -> None:
    request = parse_infer(body(IMAGE, MASK, outputs=[{"name": "q"}]), None, SPECS)
    with pytest.raises(ProtocolError, match="no output 'q'; outputs are y"):
        render_infer(request, "net", "1", {"y": np.zeros(1)})
    request = parse_infer(body(IMAGE, MASK), None, SPECS)
    with pytest.raises(ProtocolError, match="ask for binary_data"):
        render_infer(request, "net", "1", {"y": np.array([np.nan])})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6), lambda s: st.lists(s, max_size=3)
)


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("name", "datatype", "shape", "data", "parameters"), JSON)),
    st.binary(max_size=20),
)
def test_noise_gives_a_protocol_error(entry: dict[str, object], tail: bytes) -> None:
    header = body(entry, IMAGE)
    with pytest.raises(ProtocolError):
        parse_infer(header + tail, len(header), SPECS)
