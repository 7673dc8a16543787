"""Quantities: the worked examples are by hand; the property is that what we print reads back as what it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.units import UnitError, format_quantity, parse_quantity, unit_of_field

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("40 Mbit/s", "bytes_per_s", 5e6),  # 40e6 bit / 8
        ("5 MB/s", "bytes_per_s", 5e6),
        ("1 kbit/s", "bytes_per_s", 125.0),
        ("8 Kibit/s", "bytes_per_s", 1024.0),
        ("22 ms", "s", 0.022),
        ("3us", "s", 3e-6),
        ("1.5 h", "s", 5400.0),
        ("4 GiB", "bytes", 4 * 2.0**30),
        ("4 GB", "bytes", 4e9),
        ("2.5e-1 W", "watt", 0.25),
        ("100 nJ/B", "joule_per_byte", 1e-7),
        ("3 GFLOP/s", "flop_per_s", 3e9),
        ("1 MHz", "hz", 1e6),
        ("0.2 km", "m", 200.0),
        ("90 /min", "per_s", 1.5),
    ],
)
def test_quantities_by_hand(text: str, unit: str, value: float) -> None:
    assert parse_quantity(text, unit) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["40 Mb", "40 mbps", "40 Mbps", "40", "40 MB", "fast", "", "4 4 MB/s", "1e400 MB/s", "40 M"]
)
def test_a_rate_that_could_be_misread_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(UnitError, match=r"link wifi.*40 Mbit/s"):
        parse_quantity(text, "bytes_per_s", "link wifi")


UNITS = ["s", "bytes", "bytes_per_s", "flop", "flop_per_s", "joule", "watt", "joule_per_byte", "hz", "m", "per_s"]


@pytest.mark.parametrize("unit", UNITS)
@given(st.floats(min_value=1e-8, max_value=1e14))
def test_what_is_printed_reads_back(unit: str, value: float) -> None:
    assert parse_quantity(format_quantity(value, unit), unit) == pytest.approx(value, rel=1e-3)


def test_field_names_state_their_unit() -> None:
    assert unit_of_field("bandwidth_bytes_per_s") == "bytes_per_s"
    assert unit_of_field("memory_bytes") == "bytes"
    assert unit_of_field("latency_s") == "s"
    assert unit_of_field("rate_per_s") == "per_s"
    assert unit_of_field("stages") is None
