"""Whether kinds of decoding that do not keep what was expected are left, and tried again. The oracle counts tokens."""

from __future__ import annotations

import pytest

from ecotone.decoding.speculation import Kind
from ecotone.decoding.worth import Worth

pytestmark = pytest.mark.pure
PLAIN, SERIAL, FRAMES = Kind


def play(
    worth: Worth, expected_s: dict[Kind, float], takes_s: dict[Kind, float], tokens: int
) -> tuple[dict[Kind, int], float]:
    """(tokens by kind, seconds in all): the kind that promises most is taken of those that beat plain, as a policy does."""
    counts, spent_s = dict.fromkeys(Kind, 0), 0.0
    for _ in range(tokens):
        slowness = worth.at(0.1)
        pays = [k for k in expected_s if expected_s[k] * slowness[k] < expected_s[PLAIN] * slowness[PLAIN]]
        kind = min(pays, key=lambda kind: expected_s[kind], default=PLAIN)
        worth.told(kind, takes_s[kind], 1, expected_s[kind])
        counts[kind] += 1
        spent_s += takes_s[kind]
    return counts, spent_s


def test_a_kind_that_keeps_its_promise_is_kept() -> None:
    counts, _ = play(Worth(), {PLAIN: 0.1, SERIAL: 0.05, FRAMES: 0.03}, {PLAIN: 0.1, SERIAL: 0.05, FRAMES: 0.033}, 2000)
    assert counts == {PLAIN: 0, SERIAL: 0, FRAMES: 2000}


@pytest.mark.parametrize("frames_s", [0.105, 0.15, 0.3])
def test_the_kind_that_does_not_pay_is_left_for_one_that_does_and_tried_rarely(frames_s: float) -> None:
    """Frames promise most, and are slower than plain decoding in fact."""
    takes_s = {PLAIN: 0.1, SERIAL: 0.05, FRAMES: frames_s}
    counts, spent_s = play(Worth(), {PLAIN: 0.1, SERIAL: 0.05, FRAMES: 0.03}, takes_s, 20_000)
    assert counts[PLAIN] == 0
    assert 32 <= counts[FRAMES] < 400
    assert spent_s < 20_000 * 0.05 * 1.12


def test_drafting_rests_where_no_kind_of_it_pays() -> None:
    counts, spent_s = play(
        Worth(), {PLAIN: 0.1, SERIAL: 0.05, FRAMES: 0.03}, {PLAIN: 0.1, SERIAL: 0.13, FRAMES: 0.12}, 20_000
    )
    assert counts[PLAIN] > 19_000
    assert spent_s < 20_000 * 0.1 * 1.02


def test_what_comes_to_pay_is_found_again() -> None:
    worth, expected_s = Worth(), {PLAIN: 0.1, FRAMES: 0.03}
    play(worth, expected_s, {PLAIN: 0.1, FRAMES: 0.2}, 3000)
    counts, _ = play(worth, expected_s, {PLAIN: 0.1, FRAMES: 0.03}, 8000)
    assert counts[FRAMES] > 3500  # it rests 4096 tokens at most


def test_nothing_is_judged_by_few_tokens_or_without_a_promise() -> None:
    worth = Worth()
    for _ in range(100):
        worth.told(SERIAL, 1.0, 1, 0.0)
    assert worth.at(0.1) == (1.0, 1.0, 1.0)
    for _ in range(31):
        worth.told(FRAMES, 1.0, 1, 0.1)
    assert worth.at(0.1) == (1.0, 1.0, 1.0)
    worth.told(FRAMES, 1.0, 1, 0.1)
    assert worth.at(0.1) == (1.0, 1.0, pytest.approx(10.0, rel=0.05))


def test_frames_that_bring_fewer_tokens_than_expected_are_worth_less() -> None:
    """As where right drafts come in runs: three tokens a round, four were expected."""
    worth = Worth()
    worth.at(0.1)
    for _ in range(1000):
        worth.told(SERIAL, 0.1, 3, 0.1, 4.0)
    assert worth.at(0.1)[SERIAL] == pytest.approx(4 / 3, rel=0.05)
    hiccups = Worth()
    hiccups.at(0.1)
    for n in range(100):
        hiccups.told(SERIAL, 5.0 if n % 50 == 20 else 0.1, 1, 0.1)
    assert hiccups.at(0.1)[SERIAL] < 1.2


def test_what_was_learned_over_other_links_is_forgotten() -> None:
    worth = Worth()
    play(worth, {PLAIN: 0.1, FRAMES: 0.03}, {PLAIN: 0.1, FRAMES: 0.2}, 100)
    assert worth.at(0.1)[FRAMES] > 2.5
    assert worth.at(0.12)[FRAMES] > 2.5
    assert worth.at(0.4) == (1.0, 1.0, 1.0)
