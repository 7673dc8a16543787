"""Ladders of codecs and the fit along them, against two other algorithms for the same optimum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone import codec
from ecotone.codec import CodecError
from ecotone.profiling.ladders import fitted_losses, is_exact, pooled, rung, value_codec

pytestmark = pytest.mark.torch

PAIRS = st.lists(st.tuples(st.floats(-2, 10), st.floats(0.1, 50)), min_size=1, max_size=12)


@given(PAIRS)
def test_pooling_is_the_isotonic_regression(pairs):
    """Oracles: the min-max formula of Barlow et al. (1972), and scikit-learn where it is installed."""
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    found = np.array(pooled(values.tolist(), weights.tolist()))
    count = len(values)

    def mean(a: int, b: int) -> float:
        return float(values[a : b + 1] @ weights[a : b + 1] / weights[a : b + 1].sum())

    minmax = [min(max(mean(a, b) for b in range(i, count)) for a in range(i + 1)) for i in range(count)]
    assert found == pytest.approx(minmax, abs=1e-9)
    isotonic = pytest.importorskip("sklearn.isotonic").IsotonicRegression(increasing=False)
    assert found == pytest.approx(isotonic.fit_transform(np.arange(count), values, sample_weight=weights), abs=1e-9)


def test_rungs_of_one_ladder_differ_in_bits_or_quality_only():
    assert rung("int4+zstd") == rung("int4") == ("int#", 4)
    assert {rung(f"int{b}clip")[0] for b in (4, 3, 2)} == {"int#clip"}
    assert rung("int4c") == ("int#c", 4)
    assert rung("jpeg:90") == ("jpeg:#", 90)
    assert rung("webp:lossless") == ("webp:lossless", 0)
    alone = {rung(name)[0] for name in ("fp16+deflate", "bf16", "png", "pixels")}
    assert alone == {"fp16", "bf16", "png", "pixels"}
    with pytest.raises(CodecError):
        rung("int9")


def test_what_gives_equal_values():
    for known in codec.catalogue():
        assert value_codec(known.name).partition("+")[1] == ""
        assert is_exact(known.name) == (known.name.partition("+")[0] == "fp32")


def test_losses_are_fitted_place_by_place_and_never_below_zero():
    losses = {
        (5, "int8"): (-0.1, 100.0), (5, "int4"): (0.4, 100.0), (5, "int2"): (0.2, 300.0), (5, "int4c"): (3.0, 100.0),
        (9, "int4"): (7.0, 100.0), (9, "int8"): (8.0, 100.0),
    }  # fmt: skip
    fit = fitted_losses(losses)
    assert fit[5, "int8"] == 0.0
    assert fit[5, "int4"] == fit[5, "int2"] == pytest.approx((0.4 + 3 * 0.2) / 4)
    assert fit[5, "int4c"] == 3.0
    assert fit[9, "int4"] == fit[9, "int8"] == 7.5
    assert set(fit) == set(losses)
