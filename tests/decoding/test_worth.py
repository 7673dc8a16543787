"""Whether drafting rests where it did not pay, and for how long. The oracle is a loop that counts tokens."""

from __future__ import annotations

import pytest

from ecotone.decoding.worth import Worth

pytestmark = pytest.mark.pure


def share_drafted(worth: Worth, plain_s: float, drafted_s: float, tokens: int) -> tuple[float, float]:
    """(share of tokens with drafts, seconds over those of plain decoding) of so many tokens, drafting whenever it may."""
    drafted, spent_s = 0, 0.0
    for _ in range(tokens):
        is_drafted = not worth.is_resting
        seconds = drafted_s if is_drafted else plain_s
        worth.told(seconds, 1, is_drafted=is_drafted)
        drafted, spent_s = drafted + is_drafted, spent_s + seconds
    return drafted / tokens, spent_s / (plain_s * tokens)


def known(plain_s: float) -> Worth:
    worth = Worth()
    for _ in range(8):
        worth.told(plain_s, 1, is_drafted=False)
    return worth


def test_what_pays_goes_on() -> None:
    assert share_drafted(known(0.1), 0.1, 0.03, 2000) == (1.0, pytest.approx(0.3))


@pytest.mark.parametrize("slower", [1.05, 1.3, 2.0])
def test_what_does_not_pay_is_tried_ever_more_rarely(slower: float) -> None:
    share, cost = share_drafted(known(0.1), 0.1, 0.1 * slower, 4000)
    assert 0 < share < 0.03
    assert cost < 1.021
    assert share_drafted(known(0.1), 0.1, 0.1 * slower, 300)[1] < 1 + 0.11 * (slower - 1) + 1e-9


def test_another_world_ends_a_rest() -> None:
    """A link that becomes slow makes plain decoding slow: what did not pay before may pay now."""
    worth = known(0.003)
    share_drafted(worth, 0.003, 0.004, 3000)
    assert worth.is_resting
    assert share_drafted(worth, 0.075, 0.02, 200)[0] > 0.9


def test_nothing_is_judged_before_plain_decoding_was_timed() -> None:
    worth = Worth()
    for _ in range(100):
        worth.told(1.0, 1, is_drafted=True)
    assert not worth.is_resting
