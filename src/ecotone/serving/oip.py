"""The Open Inference Protocol v2 (REST) as pure functions: request bytes -> named arrays, named arrays -> response bytes.

Both encodings of the protocol: JSON data, and the binary extension (the JSON header first, its length in the header
`Inference-Header-Content-Length`, then raw little-endian tensors in the order of the inputs). No server here: see http.py.
Source: the Open Inference Protocol specification, "predict protocol v2", and its binary tensor data extension.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecotone.units import EcotoneError

__all__ = ["DATATYPES", "InferRequest", "InputSpec", "ProtocolError", "parse_infer", "render_infer"]

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    "UINT8": np.dtype("uint8"),
    "INT8": np.dtype("int8"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAME_OF = {dtype.newbyteorder("="): name for name, dtype in DATATYPES.items()}


class ProtocolError(EcotoneError):
    """A request that is not the protocol's; the server answers 400 with this text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What the model takes under `name`: a size of -1 is free."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def accepts(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.shape) and all(want in (-1, got) for want, got in zip(self.shape, shape, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """A parsed request: arrays in the order of the model's inputs, and which outputs are wanted in which encoding."""

    id: str
    arrays: tuple[np.ndarray, ...]
    outputs: tuple[str, ...]  # empty: all
    binary_outputs: frozenset[str]
    timeout_s: float | None


def parse_infer(body: bytes, header_bytes: int | None, specs: Sequence[InputSpec]) -> InferRequest:
    """Read an infer request for a model that takes `specs`; raises ProtocolError naming what is wrong and what is known."""
    size = len(body) if header_bytes is None else header_bytes
    if not 0 < size <= len(body):
        raise ProtocolError(f"Inference-Header-Content-Length is {size}, the body has {len(body)} bytes")
    try:
        document = json.loads(body[:size])
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the request is not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("inputs"), list):
        raise ProtocolError('the request must be a JSON object with a list "inputs"')
    given, rest = _given(document["inputs"], body[size:])
    if rest:
        raise ProtocolError(f"{rest} bytes follow the last binary tensor")
    outputs, binary = _wanted(document)
    return InferRequest(
        id=str(document.get("id", "")),
        arrays=tuple(_match(spec, given, specs) for spec in specs),
        outputs=outputs,
        binary_outputs=binary,
        timeout_s=_timeout(document.get("parameters", {})),
    )


def render_infer(
    request: InferRequest, model: str, version: str, outputs: Mapping[str, np.ndarray]
) -> tuple[bytes, int | None]:
    """The response body and, where it holds binary tensors, the length of its JSON header. Raises for unknown outputs."""
    unknown = [name for name in request.outputs if name not in outputs]
    if unknown:
        raise ProtocolError(f"there is no output {unknown[0]!r}; outputs are {', '.join(outputs)}")
    described, blobs = [], []
    for name in request.outputs or tuple(outputs):
        array = np.ascontiguousarray(outputs[name])
        datatype = _NAME_OF[array.dtype.newbyteorder("=")]
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(outputs[name].shape)}
        if name in request.binary_outputs or "*" in request.binary_outputs:
            blob = array.astype(DATATYPES[datatype], copy=False).tobytes()
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            entry["data"] = _json_numbers(array)
        described.append(entry)
    document = {"model_name": model, "model_version": version, "id": request.id, "outputs": described}
    header = json.dumps(document).encode()
    return b"".join([header, *blobs]), len(header) if blobs else None


def _json_numbers(array: np.ndarray) -> list[Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ProtocolError("an output holds infinite or undefined numbers, which JSON cannot; ask for binary_data")
    return array.ravel().tolist()


def _given(inputs: list[Any], blob: bytes) -> tuple[dict[str, np.ndarray], int]:
    """Named arrays of the request, and how many binary bytes are left over."""
    arrays: dict[str, np.ndarray] = {}
    offset = 0
    for index, entry in enumerate(inputs):
        where = f"inputs[{index}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ProtocolError(f'{where} must be an object with a "name"')
        where = f"input {entry['name']!r}"
        if entry["name"] in arrays:
            raise ProtocolError(f"{where} is given twice")
        dtype = DATATYPES.get(str(entry.get("datatype")))
        if dtype is None:
            raise ProtocolError(f"{where}: datatype {entry.get('datatype')!r} is not one of {', '.join(DATATYPES)}")
        shape = _shape(entry.get("shape"), where)
        parameters = entry.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:
            arrays[entry["name"]] = _from_json(entry.get("data"), shape, dtype, where)
            continue
        need = math.prod(shape) * dtype.itemsize
        if size != need or offset + need > len(blob):
            raise ProtocolError(
                f"{where}: shape {list(shape)} needs {need} binary bytes, {size} announced, {len(blob) - offset} left"
            )
        arrays[entry["name"]] = np.frombuffer(blob, dtype, math.prod(shape), offset).reshape(shape)
        offset += need
    return arrays, len(blob) - offset


def _shape(value: Any, where: str) -> tuple[int, ...]:
    good = isinstance(value, list) and len(value) <= 8 and all(type(s) is int and 0 <= s < 2**40 for s in value)
    if not good:
        raise ProtocolError(f"{where}: shape must be a list of at most 8 sizes, is {value!r:.60}")
    return tuple(value)


def _from_json(data: Any, shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> np.ndarray:
    try:
        array = np.asarray(data, dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        raise ProtocolError(f"{where}: data does not hold {dtype.name} numbers only") from None
    if data is None or array.size != math.prod(shape):
        raise ProtocolError(
            f"{where}: shape {list(shape)} needs {math.prod(shape)} numbers, data has {0 if data is None else array.size}"
        )
    return array.reshape(shape)


def _match(spec: InputSpec, given: dict[str, np.ndarray], specs: Sequence[InputSpec]) -> np.ndarray:
    known = ", ".join(s.name for s in specs)
    stranger = next((name for name in given if name not in {s.name for s in specs}), None)
    if stranger is not None:
        raise ProtocolError(f"there is no input {stranger!r}; inputs are {known}")
    if spec.name not in given:
        raise ProtocolError(f"input {spec.name!r} is missing; inputs are {known}")
    array = given[spec.name]
    if not spec.accepts(array.shape):
        raise ProtocolError(f"input {spec.name!r} has shape {list(array.shape)}, the model takes {list(spec.shape)}")
    if array.dtype.newbyteorder("=") != DATATYPES[spec.datatype].newbyteorder("="):
        raise ProtocolError(
            f"input {spec.name!r} is {_NAME_OF[array.dtype.newbyteorder('=')]}, the model takes {spec.datatype}"
        )
    return array


def _wanted(document: dict[str, Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    entries = document.get("outputs", [])
    if not isinstance(entries, list) or any(not isinstance(e, dict) or not isinstance(e.get("name"), str) for e in entries):
        raise ProtocolError('"outputs" must be a list of objects with a "name"')
    binary = {e["name"] for e in entries if isinstance(e.get("parameters"), dict) and e["parameters"].get("binary_data")}
    parameters = document.get("parameters")
    if isinstance(parameters, dict) and parameters.get("binary_data_output"):
        binary.add("*")
    return tuple(e["name"] for e in entries), frozenset(binary)


def _timeout(parameters: Any) -> float | None:
    """`timeout` of the request's parameters, in microseconds as the field's servers have it."""
    value = parameters.get("timeout") if isinstance(parameters, dict) else None
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
        raise ProtocolError(f"parameters.timeout must be microseconds above zero, is {value!r:.40}")
    return float(value) / 1e6
