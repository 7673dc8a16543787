"""Tokens are chosen as transformers' processors would have it, and drawn from that distribution, drafts or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ecotone.decoding.frame import FrameRow, Open
from ecotone.decoding.params import Grammar, SamplingParams
from ecotone.decoding.tail import Tail
from ecotone.llm.sampling import agreeing, gumbel, largest, make_chooser
from ecotone.schema import SchemaError
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch
VOCABULARY, PROMPT = 3000, (3, 8, 8, 21)
VARIANTS = (
    {},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.5, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.5, "min_p": 0.02},
    {"temperature": 3.0, "min_p": 0.1},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 6.0, "top_p": 0.9},  # flat: more than half of all tokens stay
    {"repetition_penalty": 1.4, "top_p": 0.9},
    {"min_tokens": 5, "stop_tokens": (4, 7, 10**6), "temperature": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.7, "min_tokens": 4, "stop_tokens": (2,)},
)


def logits_of(tokens, scale=3.0, vocabulary=VOCABULARY) -> torch.Tensor:
    """A model made of noise: logits that depend on all tokens."""
    return torch.from_numpy(np.random.default_rng(list(tokens)).normal(size=vocabulary).astype(np.float32) * scale)


def processed(params: SamplingParams, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """What transformers makes of `logits`, by its processors in its order."""
    made = pytest.importorskip("transformers.generation.logits_process", reason="the extra `hub` is not installed")
    steps = made.LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(made.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        stops = [token for token in params.stop_tokens if token < VOCABULARY]
        steps.append(made.MinNewTokensLengthLogitsProcessor(len(PROMPT), params.min_tokens, stops))
    if params.temperature not in (0, 1):
        steps.append(made.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(made.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(made.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(made.MinPLogitsWarper(params.min_p))
    return steps(torch.tensor([tokens]), logits[None].clone())[0]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_choice_is_that_of_transformers_processors_with_noise_on_every_token(variant: dict) -> None:
    for seed in range(12):
        params = SamplingParams(seed=seed, **variant)
        chooser, tokens = make_chooser(params, len(PROMPT), VOCABULARY), list(PROMPT)
        for _ in range(10):
            logits = logits_of((seed, *tokens))
            before = logits.clone()
            scores = processed(params, tokens, logits).double().numpy()
            noise = 0 if params.is_greedy else gumbel(seed, len(tokens), np.arange(VOCABULARY))
            token = chooser.choose(logits, tokens).token
            assert token == int(np.argmax(scores + noise))
            assert torch.equal(logits, before)
            tokens.append(token)


def test_presence_frequency_and_bias_are_subtracted_and_added() -> None:
    params = SamplingParams(
        temperature=0.0, presence_penalty=0.7, frequency_penalty=0.3, logit_bias=((5, 2.5), (9, -100.0), (21, 1.0))
    )
    chooser, tokens = make_chooser(params, len(PROMPT), VOCABULARY), [*PROMPT, 30, 30, 30, 41, 8]
    for _ in range(20):
        logits = logits_of(tokens, scale=0.5)
        expected = logits.clone().double()
        for token in set(tokens[len(PROMPT) :]):
            expected[token] -= 0.7 + 0.3 * tokens[len(PROMPT) :].count(token)
        for token, bias in params.logit_bias:
            expected[token] += bias
        tokens.append(chooser.choose(logits, tokens).token)
        assert tokens[-1] == int(expected.argmax())


def test_tokens_taken_back_are_not_counted() -> None:
    params = SamplingParams(seed=5, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3, temperature=0.8)
    random, one, tokens = np.random.default_rng(0), make_chooser(params, len(PROMPT), VOCABULARY), list(PROMPT)
    for _ in range(200):
        del tokens[max(len(PROMPT), len(tokens) - int(random.integers(0, 4))) :]
        tokens += random.integers(0, 30, size=random.integers(1, 4)).tolist()
        fresh = make_chooser(params, len(PROMPT), VOCABULARY)
        assert one.choose(logits_of(tokens), tokens) == fresh.choose(logits_of(tokens), tokens)


def test_greedy_takes_the_first_of_equals_and_refuses_what_is_no_number() -> None:
    chooser = make_chooser(SamplingParams(temperature=0.0), 1, 6)
    with torch.inference_mode():
        assert chooser.choose(torch.tensor([0.0, 2, 1, 2, 2, 0]), [1]).token == 1
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(EcotoneError, match="position 1: the best logit is"):
            chooser.choose(torch.full((6,), bad), [1])
    with pytest.raises(EcotoneError, match="shape"):
        chooser.choose(torch.zeros(5), [1])


def test_a_temperature_near_zero_is_greedy_and_does_not_overflow() -> None:
    chooser = make_chooser(SamplingParams(temperature=1e-300, top_p=0.5, min_p=0.5, top_k=3, seed=1), 1, VOCABULARY)
    logits = logits_of((1, 2)) * 1e6
    assert chooser.choose(logits, [1]).token == int(logits.argmax())


def test_log_probabilities_are_those_of_the_model_before_any_change() -> None:
    params = SamplingParams(seed=1, temperature=0.3, top_k=5, logprobs=7, logit_bias=((3, -50.0),))
    logits = logits_of((4,))
    choice = make_chooser(params, 1, VOCABULARY).choose(logits, [4])
    right = torch.log_softmax(logits.double(), 0)
    assert choice.logprobs is not None
    assert choice.logprobs.logprob == pytest.approx(float(right[choice.token]), abs=1e-5)
    best = right.topk(7)
    assert [token for token, _ in choice.logprobs.top] == best.indices.tolist()
    assert [value for _, value in choice.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    only = make_chooser(replace(params, logprobs=0), 1, VOCABULARY).choose(logits, [4])
    assert only.logprobs is not None
    assert only.logprobs.top == ()


@pytest.mark.parametrize("by", ["seed", "position"])
def test_noise_is_gumbel_and_independent_of_its_neighbours(by: str) -> None:
    at = range(20_000)
    noise = np.concatenate([gumbel(s, 7, np.arange(3)) if by == "seed" else gumbel(7, s, np.arange(3)) for s in at])
    noise = noise.reshape(-1, 3)
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
    pairs = [(noise[:, 0], noise[:, 1]), (noise[:, 1], noise[:, 2]), (noise[:-1, 0], noise[1:, 0])]
    assert all(abs(np.corrcoef(one, other)[0, 1]) < 0.03 for one, other in pairs)  # four standard deviations


def test_noise_is_the_same_on_every_machine_and_in_every_version() -> None:
    pinned = [1.6092782785270103, -0.7290306437828525, 1.4253252087787727]
    assert gumbel(42, 17, np.array([0, 1, 31999])).tolist() == pytest.approx(pinned, abs=1e-12)


@pytest.mark.parametrize("variant", [{}, {"temperature": 1.7}, {"top_k": 6, "top_p": 0.9}], ids=str)
def test_drawn_tokens_follow_the_distribution(variant: dict) -> None:
    logits = logits_of((1, 2, 3), scale=1.5, vocabulary=40)
    params, count = SamplingParams(seed=0, **variant), 6000
    chances = processed(params, [1], logits).softmax(0).double().numpy()
    choosers = [make_chooser(replace(params, seed=seed), 1, 40) for seed in range(30)]
    drawn = [chooser.choose(logits, [0] * (1 + i)).token for chooser in choosers for i in range(count // 30)]
    found = np.bincount(drawn, minlength=40)
    assert found[chances == 0].sum() == 0
    often = chances * count >= 5
    expected = np.append(chances[often], chances[~often].sum()) * count
    observed = np.append(found[often], found[~often].sum())
    if expected[-1] == 0:
        expected, observed = expected[:-1], observed[:-1]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def generate(params: SamplingParams, draft, count: int = 40, window: int = 4) -> tuple[list[int], int]:
    """Text of the noise model by a Tail that judges windows of drafts; (text, drafts accepted)."""
    tail, tokens, accepted = Tail(lambda p, n: make_chooser(p, n, 60)), list(PROMPT), 0
    tail.open(Open(1, len(PROMPT), params.to_bytes(), PROMPT[:-1]))
    while len(tokens) < len(PROMPT) + count:
        drafts = tuple(draft(tokens, i) for i in range(window))
        row = FrameRow(1, len(tokens) - 1, (tokens[-1], *drafts), num_logits=1 + window)
        logits = [logits_of((*tokens, *drafts[:i]), 2.0, 60) for i in range(1 + window)]
        found = tail.judge([row], logits)[0].tokens
        tokens += found
        accepted += len(found) - 1
    return tokens[len(PROMPT) : len(PROMPT) + count], accepted


def test_drafts_do_not_change_the_text_right_wrong_or_mixed() -> None:
    params = SamplingParams(seed=11, temperature=0.9, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.5)
    plain, _ = generate(params, lambda tokens, i: 0, window=0)
    whole = [*PROMPT, *plain]

    def right(tokens: list[int], i: int) -> int:
        return whole[len(tokens) + i] if len(tokens) + i < len(whole) else 0

    assert generate(params, right) == (plain, 32)
    text, accepted = generate(params, lambda tokens, i: (right(tokens, i) + 1) % 60)
    assert text == plain
    assert accepted == 0
    text, accepted = generate(params, lambda tokens, i: right(tokens, i) if (len(tokens) + i) % 3 else 5)
    assert text == plain
    assert 0 < accepted < 32


def test_with_drafts_the_distribution_over_seeds_is_the_models() -> None:
    """The second token, when the first was a draft: conditional and joint frequencies over seeds are the model's."""
    logits = [logits_of((1,), 1.0, 4), logits_of((2,), 1.0, 4)]
    first, second = (each.double().softmax(0).numpy() for each in logits)
    found = np.zeros((4, 4))
    for seed in range(2000):
        params, draft = SamplingParams(seed=seed), seed % 4
        tail = Tail(lambda p, n: make_chooser(p, n, 4))
        tail.open(Open(1, 1, params.to_bytes()))
        result = tail.judge([FrameRow(1, 0, (0, draft), num_logits=2)], logits)[0]
        follow = result.tokens[1:]
        if not follow:  # refused: the right token is sent, and the next one is judged
            follow = tail.judge([FrameRow(1, 1, result.tokens, num_logits=1)], logits[1:])[0].tokens
        found[result.tokens[0], follow[0]] += 1
    assert stats.chisquare(found.ravel(), 2000 * np.outer(first, second).ravel()).pvalue > 1e-3


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.sampled_from([-np.inf, -3.0, 0.0, 0.5, 0.5, 1.0, 9.0]), min_size=1, max_size=400),
    count=st.integers(1, 70),
)
def test_largest_is_a_stable_sort_cut_short(values: list[float], count: int) -> None:
    given_ = np.array(values, dtype=np.float32)
    right = [i for i in np.argsort(-given_, kind="stable") if given_[i] > -np.inf][:count]
    assert largest(given_, count).tolist() == right


@given(one=st.lists(st.integers(0, 2)), other=st.lists(st.integers(0, 2)))
def test_agreeing_is_the_common_beginning(one: list[int], other: list[int]) -> None:
    right = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert agreeing(one, other) == right


def test_what_cannot_be_used_is_refused_when_the_request_is_opened() -> None:
    with pytest.raises(SchemaError, match="logit_bias names token 60, the model has 60"):
        make_chooser(SamplingParams(seed=1, logit_bias=((60, 1.0),)), 1, 60)
    with pytest.raises(SchemaError, match="needs a seed"):
        make_chooser(SamplingParams(), 1, 60)
    with pytest.raises(EcotoneError, match="extra `llm`"):
        make_chooser(SamplingParams(seed=1, grammar=Grammar(kind="json")), 1, 60)
