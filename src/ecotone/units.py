"""Quantities at the door: text such as "40 Mbit/s" in, SI floats out, and back to text for people.

Inside the program every quantity is a plain number in SI units whose unit stands in its name (`_s`, `_bytes`,
`_bytes_per_s`, `_flop`, `_flop_per_s`, `_joule`, `_watt`, `_hz`, `_m`, `_per_s`). Only this file knows k, M, G and bits.
It also holds the root of the one exception family, because every other file may import it.
"""

from __future__ import annotations

import math
import re

__all__ = ["EcotoneError", "UnitError", "format_quantity", "parse_quantity", "unit_of_field"]


class EcotoneError(Exception):
    """Root of every error that is the caller's to mend: says what was wrong, where, and what to do, on one line."""


class UnitError(EcotoneError):
    """A quantity could not be read."""


_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9}

_SCALES: dict[str, dict[str, float]] = {
    "s": {p + "s": f for p, f in _SMALL.items()} | {"min": 60.0, "h": 3600.0},
    "bytes": {p + "B": f for p, f in (_DECIMAL | _BINARY).items()} | {"byte": 1.0, "bytes": 1.0},
    "bytes_per_s": {p + "B/s": f for p, f in (_DECIMAL | _BINARY).items()}
    | {p + "bit/s": f / 8 for p, f in (_DECIMAL | _BINARY).items()},
    "flop": {p + "FLOP": f for p, f in _DECIMAL.items()},
    "flop_per_s": {p + "FLOP/s": f for p, f in _DECIMAL.items()},
    "joule": {p + "J": f for p, f in (_SMALL | _DECIMAL).items()} | {"Wh": 3600.0},
    "joule_per_byte": {p + "J/B": f for p, f in (_SMALL | _DECIMAL).items()},
    "watt": {p + "W": f for p, f in (_SMALL | _DECIMAL).items()},
    "hz": {p + "Hz": f for p, f in _DECIMAL.items()},
    "m": {"m": 1.0, "cm": 0.01, "km": 1000.0},
    "per_s": {"/s": 1.0, "/min": 1 / 60, "/h": 1 / 3600},
    "money_per_s": {"/s": 1.0, "/min": 1 / 60, "/h": 1 / 3600, "/d": 1 / 86400},
    "money_per_byte": {f"/{p}B": 1 / f for p, f in (_DECIMAL | _BINARY).items()},
}
_EXAMPLES = {
    "s": '"22 ms"',
    "bytes": '"4 GB" or "4 GiB"',
    "bytes_per_s": '"40 Mbit/s" or "5 MB/s"',
    "flop": '"3.2 GFLOP"',
    "flop_per_s": '"50 GFLOP/s"',
    "joule": '"1.5 J"',
    "joule_per_byte": '"100 nJ/B"',
    "watt": '"7.5 W"',
    "hz": '"1 MHz"',
    "m": '"50 m"',
    "per_s": '"5 /s"',
    "money_per_s": '"0.90 /h"',
    "money_per_byte": '"0.09 /GB"',
}
# Written often, meant in two ways: refused by name.
_AMBIGUOUS = re.compile(r"^(?:[kKMGT]i?)?(?:b|bps|b/s|Bps)$|^[kKMGT]$")
_TEXT = re.compile(r"^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S*)\s*$")


def unit_of_field(field: str) -> str | None:
    """The unit that a field name states (`bandwidth_bytes_per_s` -> `bytes_per_s`), or None."""
    found = [unit for unit in _SCALES if field == unit or field.endswith("_" + unit)]
    return max(found, key=len, default=None)


def parse_quantity(text: str, unit: str, where: str = "value") -> float:
    """Read `text` ("40 Mbit/s") as a number of `unit` (a key such as "bytes_per_s"); `where` names it in errors.

    Raises UnitError for a missing, unknown or ambiguous unit, or a number that is not finite.
    """
    scales = _SCALES[unit]
    match = _TEXT.match(text)
    if match is None:
        raise UnitError(f'{where}: "{text}" is not a quantity; write for example {_EXAMPLES[unit]}')
    number, symbol = float(match[1]), match[2]
    if symbol in scales and math.isfinite(number * scales[symbol]):
        return number * scales[symbol]
    if symbol == "":
        raise UnitError(f'{where}: "{text}" has no unit; write for example {_EXAMPLES[unit]}')
    if _AMBIGUOUS.match(symbol):
        raise UnitError(f'{where}: "{text}" is ambiguous; write for example {_EXAMPLES[unit]}')
    raise UnitError(f'{where}: "{text}" is not a number of {unit}; write for example {_EXAMPLES[unit]}')


def format_quantity(value: float, unit: str) -> str:
    """Write `value` of `unit` for a person, four significant digits: 5e6 bytes_per_s -> "40 Mbit/s"."""
    if not math.isfinite(value):
        return str(value)
    if unit == "bytes_per_s":
        return _scaled(value * 8, "bit/s", _DECIMAL)
    if unit == "bytes":
        return _scaled(value, "B", _DECIMAL)
    if unit == "per_s":
        return f"{value:.4g} /s"
    if unit == "money_per_s":
        return f"{value * 3600:.4g} /h"
    if unit == "money_per_byte":
        return f"{value * 1e9:.4g} /GB"
    if unit in ("s", "joule", "joule_per_byte", "watt"):
        symbol = {"s": "s", "joule": "J", "joule_per_byte": "J/B", "watt": "W"}[unit]
        return _scaled(value, symbol, {k: v for k, v in _SMALL.items() if k != "u"})
    if unit == "m":
        return f"{value:.4g} m"
    return _scaled(value, {"flop": "FLOP", "flop_per_s": "FLOP/s", "hz": "Hz"}[unit], _DECIMAL)


def _scaled(value: float, symbol: str, prefixes: dict[str, float]) -> str:
    size = abs(value)
    fitting = [(f, p) for p, f in prefixes.items() if size >= f] or [min((f, p) for p, f in prefixes.items())]
    factor, prefix = max(fitting) if size else (1.0, "")
    return f"{value / factor:.4g} {prefix}{symbol}"
