"""Drafts: who guesses, who judges, and how many pay, each against a plain reckoning of its own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.decoding.frame import FrameRow, Open
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import PLAIN, DraftAsk, Kind, PromptLookup, SpeculationState, Window
from ecotone.decoding.tail import Choice, Tail
from ecotone.decoding.window import AdaptivePolicy, Costs, best_window, tokens_per_s
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure
PARAMS = SamplingParams(temperature=0.0)


# ---- prompt lookup ---------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([1, 2, 256, 1 << 24]), max_size=30), st.integers(1, 4), st.integers(0, 3), st.integers(1, 5))
@settings(max_examples=200)
def test_prompt_lookup_finds_what_followed_the_longest_latest_match(tokens, least, more, count) -> None:
    found = PromptLookup(min_match=least, max_match=least + more).draft([ask(tokens, count)])[0]
    best = None
    for at in range(1, len(tokens)):  # tokens[:at] end the earlier occurrence
        same = 0
        while same < least + more and same < at and tokens[at - 1 - same] == tokens[-1 - same]:
            same += 1
        if same >= least and (best is None or same >= best[0]):
            best = (same, at)
    assert list(found) == (tokens[best[1] : best[1] + count] if best else [])


def ask(tokens, count: int) -> DraftAsk:
    return DraftAsk(request=1, ticket=1, tokens=tuple(tokens), num_settled=len(tokens), count=count, params=PARAMS)


@pytest.mark.parametrize(("frames", "rows", "look"), [(0, 1, 0), (1, 0, 0), (1, 9, 0), (1, 1, -1)])
def test_a_window_out_of_bounds_is_refused(frames: int, rows: int, look: int) -> None:
    with pytest.raises(ValueError, match="window"):
        Window(frames=frames, rows=rows, look=look)


# ---- judging ---------------------------------------------------------------------------------------------------------


class Counter:
    """The next token is the sum of all before, modulo 7: what is wrong anywhere before shows."""

    def choose(self, logits, tokens) -> Choice:
        assert logits == tokens[-1]  # the logits of the very position
        return Choice(sum(tokens) % 7)


def answer(prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(sum(text) % 7)
    return text


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=12),
)
def test_the_tail_commits_the_models_own_text_whatever_is_drafted(prompt: list[int], windows) -> None:
    tail, text = Tail(lambda params, length: Counter()), answer(prompt, 80)
    tail.open(Open(1, len(prompt), PARAMS.to_bytes(), ()))
    known, start, tokens = list(prompt), 0, prompt
    for rows, wrong_at in windows:
        logits = 1 if start == 0 else len(tokens)
        row = FrameRow(1, start, tuple(tokens), logits, 0)
        (found,) = tail.judge([row], tokens[len(tokens) - logits :])
        drafts = tokens[len(tokens) - logits + 1 :]
        right = 0
        while right < len(drafts) and drafts[right] == text[len(known) + right]:
            right += 1
        assert list(found.tokens) == text[len(known) : len(known) + right + 1]
        assert found.stop == len(known) + right  # so much is computed of what counts
        assert found.start == found.stop - len(found.tokens)
        known += found.tokens
        drafted = [(t + (i == wrong_at)) % 7 for i, t in enumerate(text[len(known) : len(known) + rows - 1])]
        start, tokens = len(known) - 1, [known[-1], *drafted]
    assert known == text[: len(known)]


def test_the_tail_refuses_rows_that_cannot_be() -> None:
    tail = Tail(lambda params, length: Counter())
    with pytest.raises(EcotoneError, match="never opened"):
        tail.judge([FrameRow(1, 0, (1,), 1)], [1])
    tail.open(Open(1, 1, PARAMS.to_bytes(), ()))
    with pytest.raises(EcotoneError, match="starts at 5"):
        tail.judge([FrameRow(1, 5, (1,), 1)], [1])
    tail.cut(1, 0)
    assert tail.slots() == ()


# ---- what pays -------------------------------------------------------------------------------------------------------

COSTS = st.builds(
    Costs, loop_s=st.floats(0.01, 0.5), stage_s=st.floats(0.001, 0.01), row_s=st.floats(0, 0.01),
    loop_row_s=st.floats(0, 0.1), draft_s=st.sampled_from([0.0, 0.001, 0.1]), num_requests=st.integers(1, 9),
)  # fmt: skip


@given(st.floats(0, 1), COSTS)
@settings(max_examples=40)
def test_no_window_is_much_better_than_the_best(acceptance: float, costs: Costs) -> None:
    best = best_window(acceptance, costs)
    most = max(tokens_per_s(Window(frames=w, rows=k), acceptance, costs) for w in range(1, 33) for k in range(1, 9))
    assert tokens_per_s(best, acceptance, costs) >= most / 1.06
    assert best_window(0.0, costs) == PLAIN


def test_the_model_is_the_published_formula_where_rows_are_single() -> None:
    for a in (0.5, 0.9):
        for frames in (6, 16):
            costs, run = Costs(loop_s=0.378, stage_s=0.015), a / (1 - a)
            formula = (run + 1) / (0.378 + run * max(0.015, 0.378 / frames))
            assert tokens_per_s(Window(frames=frames), a, costs) == pytest.approx(formula, rel=0.025)  # tau/2 is ours
    for rows in (2, 9 - 1):
        serial = (1 - 0.9**rows) / 0.1 / (0.378 + (rows - 1) * 0.09)
        costs = Costs(loop_s=0.378, stage_s=0.015, row_s=0.015, loop_row_s=0.09)
        assert tokens_per_s(Window(rows=rows), 0.9, costs) == pytest.approx(serial)


def test_a_full_pipe_a_slow_drafter_and_one_machine_make_it_plain() -> None:
    alone = {"loop_s": 0.3, "stage_s": 0.03}
    assert best_window(0.9, Costs(**alone)).frames > 4
    assert best_window(0.9, Costs(**alone, row_s=0.03, loop_row_s=0.3, num_requests=10)) == PLAIN
    assert best_window(0.9, Costs(**alone, draft_s=0.5)) == PLAIN
    assert best_window(0.9, Costs(loop_s=0.03, stage_s=0.03, row_s=0.03, loop_row_s=0.03)) == PLAIN
    assert best_window(0.9, Costs(loop_s=0.03, stage_s=0.03)).rows > 4  # rows cost nothing


def test_what_frames_take_besides_computing_makes_them_fewer_and_longer() -> None:
    """By enumeration: messages of 2 ms per frame, and stale frames that hold up the next one by 1 ms each."""
    alone = {"loop_s": 0.04, "stage_s": 0.001}
    free, dear = best_window(0.9, Costs(**alone)), best_window(0.9, Costs(**alone, frame_s=0.002, stale_s=0.001))
    assert dear.rows > 1
    assert dear.frames < free.frames
    for costs in (Costs(**alone, frame_s=0.002), Costs(**alone, frame_s=0.002, stale_s=0.001)):
        best = tokens_per_s(best_window(0.9, costs), 0.9, costs)
        assert (
            best >= max(tokens_per_s(Window(frames=w, rows=k), 0.9, costs) for w in range(1, 33) for k in range(1, 9)) / 1.06
        )
    cycle_s = 0.04 + 0.0005 + 3 * 0.001 + 0.9 / 0.1 * max(0.003, 0.04 / 4)  # four frames of one row
    assert tokens_per_s(Window(frames=4), 0.9, costs) == pytest.approx(10 / cycle_s)


def test_a_kind_that_is_slower_than_expected_gives_way() -> None:
    costs = Costs(loop_s=0.04, stage_s=0.001)
    assert best_window(0.9, costs).kind is Kind.FRAMES
    assert best_window(0.9, costs, slowness=(1.0, 1.0, 3.0)).kind is Kind.FRAMES  # slower than expected, yet it pays
    serial = best_window(0.9, costs, slowness=(1.0, 1.0, 20.0))
    assert serial.kind is Kind.SERIAL
    assert (serial.first_s, serial.next_s) == (0.04, 0.04)  # rows cost nothing here
    assert best_window(0.9, costs, slowness=(1.0, 20.0, 20.0)) == PLAIN


def state(**changes) -> SpeculationState:
    values = {"request": 1, "loop_s": 0.3, "stage_s": 0.03, "row_s": 0.0, "draft_s": 0.0, "num_decoding": 1, "depth": 10}
    values |= {"acceptance": 0.9, "all_acceptance": 0.9, "num_drafted": 100, "num_accepted": 90, "num_flying": 0}
    values |= {"num_tokens": 120, "num_left": 50, "rows_seen": 1}
    return SpeculationState(**(values | changes))


def test_the_policy_looks_before_it_leaps_and_goes_on_looking() -> None:
    policy = AdaptivePolicy()
    assert policy.decide(state(loop_s=0.0)) == PLAIN
    assert policy.decide(state()).frames > 4
    assert policy.decide(state()).rows <= 2  # twice what was seen
    new = policy.decide(state(num_drafted=0, acceptance=0.0, all_acceptance=0.9, rows_seen=8))
    assert new == policy.decide(state(rows_seen=8))  # before a request's own drafts were judged all requests' count
    stopped = policy.decide(state(acceptance=0.0, all_acceptance=0.0))
    assert (stopped.frames, stopped.rows, stopped.look) == (1, 1, policy.look)
    slow = [policy.decide(state(acceptance=0.0, all_acceptance=0.0, draft_s=0.1, num_tokens=n)).look for n in range(400)]
    assert 0 < sum(slow) * 0.1 <= 1.1 * policy.look_share * 400 * 0.3  # seconds of drafting in all
