"""Frozen dataclasses from JSON or TOML documents and back, naming every violation at once.

The dataclass is the schema: its field names, types and defaults are what a document may hold. A field whose name states
a unit (`bandwidth_bytes_per_s`) also takes text under the short name (`bandwidth = "40 Mbit/s"`). Each file format has a
schema name and version in its document. Not a general serialiser: no references, no subclasses, no code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from ecotone.units import EcotoneError, UnitError, parse_quantity, unit_of_field

__all__ = ["SchemaError", "check", "dump_json", "load_json", "read", "write", "write_aside"]

T = TypeVar("T")


class SchemaError(EcotoneError):
    """A document or value breaks its rules; `violations` lists every one of them."""

    def __init__(self, where: str, violations: Iterable[str]):
        self.where, self.violations = where, tuple(violations)
        super().__init__(f"{where}: " + "; ".join(self.violations))


def check(where: str, violations: Iterable[str]) -> None:
    """Raise SchemaError naming all `violations` of `where`; do nothing when there are none."""
    found = tuple(violations)
    if found:
        raise SchemaError(where, found)


def read(cls: type[T], document: object, where: str) -> T:
    """Build `cls` (a dataclass) from plain `document`; raises SchemaError with every violation, never another error."""
    violations: list[str] = []
    value = _read(cls, document, "", violations)
    check(where, violations)
    return typing.cast(T, value)


def write(value: object) -> Any:
    """The plain document (dicts, lists, numbers, strings) of a dataclass; fields that are None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init)
        return {name: write(item) for name, item in pairs if item is not None}
    if isinstance(value, tuple | list):
        return [write(item) for item in value]
    if isinstance(value, dict):
        return {str(key): write(item) for key, item in value.items()}
    return value


def dump_json(value: object, schema: str, version: int) -> str:
    """JSON text of a dataclass with its schema name and version on top."""
    return json.dumps({"schema": schema, "version": version} | write(value), indent=1, allow_nan=False)


def load_json(cls: type[T], text: str | bytes, schema: str, version: int, where: str) -> T:
    """Read what dump_json wrote; raises SchemaError for broken JSON, another schema or version, or any violation."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(where, [f"not JSON: {error}"]) from None
    if not isinstance(document, dict) or document.get("schema") != schema:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise SchemaError(where, [f"schema is {found!r}, expected {schema!r}"])
    if document.get("version") != version:
        raise SchemaError(where, [f"version is {document.get('version')!r}, this Ecotone reads {version}; make it again"])
    return read(cls, {k: v for k, v in document.items() if k not in ("schema", "version")}, where)


def write_aside(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a whole file or none: to a temporary neighbour first, then rename."""
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EcotoneError(f"{target}: cannot write: {error.strerror or error}") from error


def _read(kind: Any, value: object, at: str, violations: list[str]) -> object:
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_union(kind, value, at, violations)
    if origin is tuple:
        return _read_tuple(typing.get_args(kind), value, at, violations)
    if origin is dict:
        return _read_dict(typing.get_args(kind)[1], value, at, violations)
    if origin is typing.Literal:
        if value in typing.get_args(kind):
            return value
        allowed = ", ".join(map(repr, typing.get_args(kind)))
        violations.append(f"{at or 'value'} is {value!r}, must be one of {allowed}")
        return None
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type, kind), value, at, violations)
    return _read_plain(kind, value, at, violations)


def _read_union(kind: Any, value: object, at: str, violations: list[str]) -> object:
    arms = [arm for arm in typing.get_args(kind) if arm is not type(None)]
    if value is None and len(arms) < len(typing.get_args(kind)):
        return None
    best: list[str] = []
    for arm in arms:
        tried: list[str] = []
        result = _read(arm, value, at, tried)
        if not tried:
            return result
        best = tried if not best or len(tried) < len(best) else best
    violations.extend(best)
    return None


def _read_tuple(args: tuple[Any, ...], value: object, at: str, violations: list[str]) -> object:
    if not isinstance(value, list | tuple):
        violations.append(f"{at or 'value'} must be a list, is {type(value).__name__}")
        return ()
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_read(args[0], item, f"{at}[{i}]", violations) for i, item in enumerate(value))
    if len(args) != len(value):
        violations.append(f"{at} must have {len(args)} items, has {len(value)}")
        return ()
    return tuple(_read(arg, item, f"{at}[{i}]", violations) for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _read_dict(kind: Any, value: object, at: str, violations: list[str]) -> object:
    if not isinstance(value, dict):
        violations.append(f"{at or 'value'} must be a table, is {type(value).__name__}")
        return {}
    return {str(k): _read(kind, v, f"{at}.{k}".lstrip("."), violations) for k, v in value.items()}


def _read_dataclass(kind: type, value: object, at: str, violations: list[str]) -> object:
    if not isinstance(value, dict):
        violations.append(f"{at or 'document'} must be a table, is {type(value).__name__}")
        return None
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    short = {name.removesuffix("_" + unit): name for name in fields if (unit := unit_of_field(name))}
    prefix, before = f"{at}." if at else "", len(violations)
    found: dict[str, object] = {}
    for key, item in value.items():
        name = key if key in fields else short.get(key, "")
        if not name:
            violations.append(f"{prefix}{key} is not known; known are {', '.join(sorted(fields))}")
        elif name in found:
            violations.append(f"{prefix}{key} is given twice")
        else:
            found[name] = _read_field(name, hints[name], item, prefix + key, violations)
    for name, field in fields.items():
        if name not in found and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            violations.append(f"{prefix}{name} is missing")
    if len(violations) > before:
        return None
    try:
        return kind(**found)
    except SchemaError as error:
        violations.extend(f"{prefix}{text}" for text in error.violations)
    except EcotoneError as error:
        violations.append(f"{prefix}{error}")
    return None


def _read_field(name: str, kind: Any, item: object, at: str, violations: list[str]) -> object:
    unit = unit_of_field(name)
    if unit and isinstance(item, str):
        try:
            number = parse_quantity(item, unit, at)
        except UnitError as error:
            violations.append(str(error))
            return None
        return _read(kind, round(number) if kind is int else number, at, violations)
    return _read(kind, item, at, violations)


def _read_plain(kind: Any, value: object, at: str, violations: list[str]) -> object:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
        violations.append(f"{at} must be finite, is {value}")
        return 0.0
    if kind is Any or kind is object or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    violations.append(f"{at or 'value'} must be {kind.__name__}, is {type(value).__name__} {value!r:.40}")
    return None
