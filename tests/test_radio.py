"""Rates under interference, against the published check values and the formula written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ecotone.radio import Radio
from ecotone.schema import SchemaError

pytestmark = pytest.mark.pure


def rates_bit_per_s(
    distance: list[float], power: list[float], channel: list[int], sending: list[bool], radio: Radio | None = None
) -> list[float]:
    arrays = np.array(distance), np.array(power), np.array(channel), np.array(sending)
    return (8 * (radio or Radio()).rates_bytes_per_s(*arrays)).tolist()


def test_one_sender_at_50_m_and_1_w_has_the_rate_of_the_published_environment() -> None:
    assert rates_bit_per_s([50.0], [1.0], [0], [True])[0] == pytest.approx(12_965_964.61, abs=0.01)


def test_three_equal_senders_on_a_channel_ruin_one_another() -> None:
    shared = rates_bit_per_s([50.0] * 3, [1.0] * 3, [1] * 3, [True] * 3)
    assert shared == pytest.approx([0.585e6] * 3, rel=2e-3)  # log2(1 + 1/2) of a MHz, noise beside it negligible


def test_who_does_not_send_neither_gets_nor_disturbs() -> None:
    rates = rates_bit_per_s([50.0, 10.0, 20.0], [1.0, 1.0, 0.5], [0, 0, 1], [True, False, True])
    alone = rates_bit_per_s([50.0], [1.0], [0], [True])[0]
    assert rates[:2] == pytest.approx([alone, 0.0])
    assert rates[2] == pytest.approx(1e6 * math.log2(1 + 0.5 / 20**3 / 1e-9))


def test_unequal_senders_follow_the_formula() -> None:
    got = rates_bit_per_s([30.0, 60.0], [0.2, 0.9], [0, 0], [True, True])
    heard = [0.2 / 30**3, 0.9 / 60**3]
    assert got == pytest.approx([1e6 * math.log2(1 + heard[i] / (1e-9 + heard[1 - i])) for i in (0, 1)])


def test_a_radio_without_channels_is_refused() -> None:
    with pytest.raises(SchemaError, match="needs a channel"):
        Radio(num_channels=0)
