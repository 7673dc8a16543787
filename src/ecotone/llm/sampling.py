"""How the next token of a request is chosen from a model's logits: a `Chooser` for decoding.tail.

The order is that of decoding.params; each step equals transformers' processor where there is one. A token is drawn by
the Gumbel-max trick (Gumbel 1954; Maddison et al., arXiv 1411.0030): argmax(logit/T + g), where the noise g depends on
(seed, position, token) alone, by a counter-based hash (SplitMix64, Steele et al. 2014). So the text does not depend on
drafts, batches or failures, and a drafter that draws with the same noise agrees more often than chance.

O(vocabulary) per token: a few passes of numpy. Noise has 32 bits, so it is at most 33 ln 2, and a token that cannot win
is left out. Top-p sorts the best few, or, where the distribution is flat, those in the bin of logits where it ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ecotone import schema
from ecotone.decoding.frame import TokenLogprobs
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.tail import Choice, Chooser
from ecotone.units import EcotoneError

__all__ = ["GrammarMasks", "Mask", "check_sampling", "gumbel", "largest", "make_chooser"]

Array = np.ndarray[Any, Any]
_GOLDEN, _MIX_1, _MIX_2, _MASK = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1
_MOST_NOISE = 33 * math.log(2) + 1e-6
_NEAR = 64  # so many of the best are drawn for first; whom they beat for sure is not looked at
_FEW = 512  # top-p looks among so many first
_BINS, _BINS_NATS = 1024, 24.0
_LANES = 64


class Mask(Protocol):
    """What may follow. `tokens` are all before the token to choose, the prompt too, and may be fewer than last time."""

    def allowed(self, tokens: Sequence[int]) -> Array | None:
        """Booleans (vocabulary,), at least one of them true; None where all may follow."""
        ...


class GrammarMasks(Protocol):
    """Begins the mask of a request with a grammar (`llm.grammar.Grammars`)."""

    def begin(self, params: SamplingParams, prompt_length: int) -> Mask: ...


def check_sampling(params: SamplingParams, vocabulary: int) -> None:
    """Raise SchemaError where `params` cannot be used with a model of so many tokens; for whoever takes requests in."""
    beyond = [token for token, _ in params.logit_bias if token >= vocabulary]
    wrong = [f"logit_bias names token {beyond[0]}, the model has {vocabulary}"] if beyond else []
    if params.seed is None and not params.is_greedy:
        wrong.append("a request that is sampled needs a seed; draw one when it is handed in")
    schema.check("sampling", wrong)


def make_chooser(
    params: SamplingParams, prompt_length: int, vocabulary: int, grammar: GrammarMasks | None = None
) -> Chooser:
    """The chooser of one request, whose first `prompt_length` tokens are its prompt.

    It takes logits (vocabulary,) as a float32 torch tensor or array, which it does not change. Raises SchemaError, or
    EcotoneError where the request has a grammar and nothing here that knows grammars, or one that cannot be compiled.
    """
    check_sampling(params, vocabulary)
    mask = None
    if params.grammar is not None:
        if grammar is None:
            raise EcotoneError("this stage cannot constrain answers: load the model with its tokenizer and the extra `llm`")
        mask = grammar.begin(params, prompt_length)
    return _Chooser(params, prompt_length, vocabulary, mask)


class _Chooser:
    def __init__(self, params: SamplingParams, prompt_length: int, vocabulary: int, mask: Mask | None):
        self._params, self._prompt_length, self._vocabulary, self._mask = params, prompt_length, vocabulary, mask
        self._biased = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
        self._bias = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self._stops = np.array(sorted({t for t in params.stop_tokens if t < vocabulary}), dtype=np.int64)
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1)
        self._counts = _Counts(prompt_length, vocabulary) if any(penalties) else None
        self._is_plain = self._counts is None and mask is None and not params.logit_bias

    def choose(self, logits: Any, tokens: Sequence[int]) -> Choice:
        raw = logits.numpy() if hasattr(logits, "numpy") else np.asarray(logits)
        if raw.shape != (self._vocabulary,):
            raise EcotoneError(f"logits of shape {raw.shape} where {self._vocabulary} tokens can be chosen")
        scores = self._adjusted(raw, tokens)
        token = int(scores.argmax())  # the first of equals; of NaN, if there is one
        if not math.isfinite(scores[token]):
            raise EcotoneError(f"position {len(tokens)}: the best logit is {scores[token]}; the model's numbers overflowed")
        if not self._params.is_greedy:
            token = self._draw(scores, float(scores[token]), len(tokens))
        if self._params.logprobs is None:
            return Choice(token)
        return Choice(token, _logprobs(raw, token, self._params.logprobs))

    def _adjusted(self, raw: Array, tokens: Sequence[int]) -> Array:
        """Logits after penalties, bias, grammar and the least length; `raw` itself where nothing of that is asked for."""
        is_short = len(self._stops) > 0 and len(tokens) - self._prompt_length < self._params.min_tokens
        if self._is_plain and not is_short:
            return raw
        scores = raw.copy()
        if self._counts is not None:
            self._counts.follow(tokens)
            self._counts.penalise(scores, self._params)
        np.add.at(scores, self._biased, self._bias)
        allowed = None if self._mask is None else self._mask.allowed(tokens)
        if allowed is not None:
            scores[~allowed] = -np.inf
        if is_short:
            held = scores[self._stops]
            scores[self._stops] = -np.inf
            if scores.max() == -np.inf:  # the grammar is complete: nothing but the end can follow
                scores[self._stops] = held
        return scores

    def _draw(self, scores: Array, best: float, position: int) -> int:
        params, values, ids = self._params, scores, None
        if params.temperature != 1:  # differences are divided, so that a temperature near 0 does not overflow
            values, best = (scores - np.float32(best)) / np.float32(max(params.temperature, 1e-30)), 0.0
        if 0 < params.top_k < len(values):
            least = values[largest(values, params.top_k)[-1]]
            ids = np.flatnonzero(values >= least)  # with all that equal the last one, as transformers
        if params.top_p < 1:
            ids = _nucleus(values, ids, best, params.top_p)
        if params.min_p > 0:
            least = best + math.log(params.min_p)
            ids = np.flatnonzero(values >= least) if ids is None else ids[values[ids] >= least]
        assert params.seed is not None
        return _race(values, ids, params.seed, position)


class _Counts:
    """How often each token stands in the answer so far, and which stand in the prompt; follows roll-backs."""

    def __init__(self, prompt_length: int, vocabulary: int):
        self._prompt_length = prompt_length
        self._prompt, self._is_begun = np.zeros(vocabulary, dtype=bool), False
        self._answer: list[int] = []
        self._counts = np.zeros(vocabulary, dtype=np.int32)

    def follow(self, tokens: Sequence[int]) -> None:
        if not self._is_begun:
            self._prompt[list(tokens[: self._prompt_length])] = True
            self._is_begun = True
        answer = list(tokens[self._prompt_length :])
        agreed = agreeing(self._answer, answer)
        for token in self._answer[agreed:]:
            self._counts[token] -= 1
        for token in answer[agreed:]:
            self._counts[token] += 1
        self._answer = answer

    def penalise(self, scores: Array, params: SamplingParams) -> None:
        if params.repetition_penalty != 1:
            ids = np.flatnonzero((self._counts > 0) | self._prompt)
            found, penalty = scores[ids], np.float32(params.repetition_penalty)
            scores[ids] = np.where(found < 0, found * penalty, found / penalty)
        ids = np.flatnonzero(self._counts)
        scores[ids] -= (params.frequency_penalty * self._counts[ids] + params.presence_penalty).astype(np.float32)


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common beginning; by halving, so that almost all of it is compared at once."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def gumbel(seed: int, position: int, tokens: Array) -> Array:
    """Standard Gumbel noise (float64) of `tokens` at `position`: always the same for the same numbers, else independent."""
    return _noise(_bits(seed, position, tokens))


def _bits(seed: int, position: int, tokens: Array) -> Array:
    """32 random bits of each token, as uint64."""
    key = _mix((_mix(seed + _GOLDEN) + position * _GOLDEN) & _MASK)
    x = tokens.astype(np.uint64)
    x *= np.uint64(_GOLDEN)
    x += np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(_MIX_1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MIX_2)
    x ^= x >> np.uint64(31)
    return np.asarray(x >> np.uint64(32))


def _noise(bits: Array) -> Array:
    return np.asarray(-np.log(-np.log((bits + 0.5) * 2.0**-32)))


def _mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _race(values: Array, ids: Array | None, seed: int, position: int) -> int:
    """argmax of value + noise over `ids` (None: all tokens). Logarithms are taken only where a token can still win."""
    among = values if ids is None else values[ids]
    near = largest(among, _NEAR)
    tokens = near if ids is None else ids[near]
    reached = among[near].astype(np.float64) + gumbel(seed, position, tokens)
    leader = int(reached.argmax())
    score, token = float(reached[leader]), int(tokens[leader])
    if len(near) < _NEAR:
        return token
    far = np.flatnonzero(among >= score - _MOST_NOISE)  # those near once more, who win against themselves by nothing
    bits = _bits(seed, position, far if ids is None else ids[far])
    least = math.exp(-math.exp(float(among[near[-1]]) - score))  # the uniform number that the best of the others needs
    lucky = np.flatnonzero(bits >= np.uint64(max(int(least * 2.0**32) - 2, 0)))
    reached = among[far[lucky]].astype(np.float64) + _noise(bits[lucky])
    if len(lucky) and reached.max() > score:
        place = int(far[lucky[reached.argmax()]])
        token = place if ids is None else int(ids[place])
    return token


def _nucleus(values: Array, ids: Array | None, best: float, top_p: float) -> Array:
    """The fewest tokens of `ids` (None: all) whose probabilities add up to `top_p`; of equal ones the first."""
    among = values if ids is None else values[ids]
    weights = np.exp(among - np.float32(best))
    goal = top_p * float(weights.sum(dtype=np.float64))
    first = largest(among, _FEW)
    mass = np.cumsum(weights[first], dtype=np.float64)
    if mass[-1] < goal and len(first) == _FEW:  # flat: sort only the bin of logits in which the goal is reached
        bins = (np.minimum(np.float32(best) - among, np.float32(_BINS_NATS)) * np.float32((_BINS - 1) / _BINS_NATS)).astype(
            int
        )
        below = np.cumsum(np.bincount(bins, weights=weights, minlength=_BINS))
        last = min(int(np.searchsorted(below, goal)), _BINS - 1)
        border = np.flatnonzero(bins == last)
        border = border[np.argsort(-among[border], kind="stable")]
        sure, before = np.flatnonzero(bins < last), float(below[last - 1]) if last else 0.0
        mass = before + np.cumsum(weights[border], dtype=np.float64)
        kept = np.concatenate([sure, border[: int(np.searchsorted(mass, goal)) + 1]])
    else:
        kept = first[: int(np.searchsorted(mass, goal)) + 1]
    return kept if ids is None else ids[kept]


def largest(values: Array, count: int) -> Array:
    """Indices of the `count` greatest numbers, best first; of equal ones the first; -inf is left out.

    O(n) where `count` is small beside n.
    """
    size, bound = len(values), -np.inf
    lanes = min(_LANES, size // (2 * count))
    if lanes > 1:  # the count-th of the maxima of disjoint groups bounds the count-th of all from below
        heads = values[: size - size % lanes].reshape(lanes, -1).max(axis=0)
        bound = np.partition(heads, len(heads) - count)[len(heads) - count]
    among = np.flatnonzero(values >= bound if bound > -np.inf else values > bound)
    return np.asarray(among[np.argsort(-values[among], kind="stable")[:count]])


def _logprobs(raw: Array, token: int, count: int) -> TokenLogprobs:
    best = raw.max()
    total = float(best) + math.log(float(np.exp(raw - best).sum(dtype=np.float64)))
    top = largest(raw, count) if count else ()
    return TokenLogprobs(float(raw[token]) - total, tuple((int(t), float(raw[t]) - total) for t in top))
