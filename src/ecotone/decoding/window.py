"""How many drafts to have under way, so that tokens come soonest: an explicit model, searched over all windows. Pure.

Letters: T loop_s, tau stage_s, a acceptance (each draft alone), W frames in flight of K rows each, b and r what a row more
adds to T and tau; f what a frame takes besides computing, g what a stale frame costs the one behind it (both by pace.py).
A *cycle* ends with the first wrong draft; it commits 1/(1-a) tokens: R = a/(1-a) right drafts and one.

    serial, W = 1    K - 1 drafts go with the settled token. Round: T + (K-1)*b + draft time, (1-a^K)/(1-a) tokens
    frames, W > 1    the settled token goes alone, frames of K drafts behind it, s = max(tau_K + f, T_K/W, K*draft_s)
                     apart, tau_K = tau + (K-1)*r, T_K = T + (K-1)*b. Cycle: T + tau/2 + g*min(W-1, T/s) (stale frames in
                     the way) + a*(T_K-T) + s*a/(1-a^K)

With K = 1 the latter is tok/s = (R+1)/(T + R*max(tau, T/W)), the formula of PipeInfer-like frames (arXiv 2407.11798). With n
requests decoding, the slowest device also computes what is in vain: a cycle takes it n*tau_K*(frames used and stale ones),
and no request goes faster than that. n >= T/tau requests fill the pipe, then plain decoding wins.

What this model does not know, such as processors that are shared, is measured by its result (worth.py): seconds and
tokens as they came over those expected, by kind. A kind that does not pay by that is not used for a while.

Acceptance is measured on drafts that are sent and, while none are, on drafts that are only looked at, which cost the
pipeline nothing; the drafter spends at most a share of the time on those. What rows cost is not known before some were
sent: a window has at most twice as many as the pipeline has been seen with. O(windows) per new situation, cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, exp, log

import numpy as np
import numpy.typing as npt

from ecotone.decoding.speculation import PLAIN, Kind, SpeculationState, Window
from ecotone.decoding.step import FEW_TOKENS

__all__ = ["AdaptivePolicy", "Costs", "best_window", "tokens_per_s"]

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
_MOST_ACCEPTED = 0.995
_FRAMES = (*range(1, 17), 18, 20, 23, 26, 29, 32, 36, 40, 45, 50, 57, 64)
_GRAIN = 0.08  # situations so close, as logarithms of their times, are one
_TRUSTED = 4  # drafts of a request before its own acceptance counts as much as all requests'


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds, as in SpeculationState; `num_requests` decode at once."""

    loop_s: float
    stage_s: float
    row_s: float = 0.0
    loop_row_s: float = 0.0
    draft_s: float = 0.0
    answer_s: float = 0.0
    frame_s: float = 0.0
    stale_s: float = 0.0
    num_requests: int = 1


@dataclass(frozen=True, slots=True)
class _Expected:
    """Of many windows, an array each: tokens per second of a request, and what Window promises."""

    per_s: Values
    tokens: Values
    first_s: Values
    next_s: Values


def tokens_per_s(window: Window, acceptance: float, costs: Costs) -> float:
    """Expected tokens per second of one request."""
    return float(_expected(np.array([window.frames]), np.array([window.rows]), acceptance, costs).per_s[0])


def _expected(frames: Counts, rows: Counts, acceptance: float, costs: Costs) -> _Expected:
    a, n = min(max(acceptance, 0.0), _MOST_ACCEPTED), costs.num_requests
    tau = costs.stage_s + (rows - 1) * costs.row_s + costs.frame_s
    loop_s = costs.loop_s + (rows - 1) * costs.loop_row_s
    right, is_serial = a**rows, frames == 1
    drafting_s = np.where(rows > 1, costs.answer_s + (rows - 1) * costs.draft_s, 0.0)
    round_s = np.maximum(loop_s + drafting_s, n * tau)
    between_s = np.maximum(np.maximum(tau, loop_s / frames), rows * costs.draft_s)
    used = a / (1 - right)  # frames of drafts per cycle in which at least the first one counts
    late_s = costs.answer_s + rows * costs.draft_s if a else 0.0  # the first drafts
    first_s = np.maximum(costs.loop_s + costs.stage_s / 2, costs.stage_s + late_s)
    stale = np.minimum(frames - 1, costs.loop_s / between_s)
    first_s = first_s + stale * costs.stale_s
    cycle_s = first_s + a * (loop_s - costs.loop_s) + used * between_s
    cycle_s = np.maximum(cycle_s, n * (costs.stage_s + costs.frame_s + (used + stale) * tau))
    tokens: Values = np.asarray((1 - right) / (1 - a), dtype=np.float64)
    per_s = np.where(is_serial, tokens / round_s, 1 / (1 - a) / cycle_s)
    return _Expected(per_s, tokens, np.where(is_serial, round_s, first_s), np.where(is_serial, round_s, between_s))


def best_window(
    acceptance: float, costs: Costs, most_frames: int = 64, most_rows: int = FEW_TOKENS, least_gain: float = 1.05,
    slowness: Sequence[float] = (1.0, 1.0, 1.0),
) -> Window:  # fmt: skip
    """The fastest window; PLAIN where none is faster by `least_gain`. Fewest frames and rows among nearly equal ones.

    `slowness`: by Kind, how many times as long as this model expects a token takes. A kind that is then no faster than
    plain decoding is left out; it does not decide between kinds, since it is known less well than what the model rests on.
    """
    deepest = min(most_frames, ceil(costs.loop_s / max(costs.stage_s, 1e-9)) + 1)
    frames, rows, kinds = _windows(deepest, most_rows)
    expected = _expected(frames, rows, acceptance, costs)
    rates, kind_of = expected.per_s.tolist(), kinds.tolist()
    plain = rates[0] * least_gain / slowness[Kind.PLAIN]
    best, best_rate = 0, rates[0] * least_gain
    for index in range(1, len(rates)):
        if rates[index] <= plain * slowness[kind_of[index]]:
            continue
        if rates[index] > best_rate * (1.0 if best == 0 else 1.005 if rows[index] == rows[best] else 1.03):
            best, best_rate = index, rates[index]
    return Window(
        frames=int(frames[best]), rows=int(rows[best]), first_s=float(expected.first_s[best]),
        next_s=float(expected.next_s[best]), tokens=float(expected.tokens[best]),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _windows(deepest: int, most_rows: int) -> tuple[Counts, Counts, Counts]:
    """Frames, rows and kind of each window to choose from, plain decoding first."""
    depths = [each for each in _FRAMES if each <= deepest]
    windows = [Window(frames=frames, rows=rows) for rows in range(1, most_rows + 1) for frames in depths]
    return np.array([w.frames for w in windows]), np.array([w.rows for w in windows]), np.array([w.kind for w in windows])


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptivePolicy:
    """`look` drafts at a time are only looked at while none are sent, for `look_share` of the time at most."""

    most_frames: int = 64
    least_gain: float = 1.05
    look: int = 4
    look_share: float = 0.05

    def decide(self, state: SpeculationState) -> Window:
        """The window of a request now."""
        if not state.loop_s or state.num_left < 1:
            return PLAIN
        key = _grains(
            state.loop_s, state.stage_s, state.row_s, state.loop_row_s, state.draft_s, state.answer_s, state.frame_s,
            state.stale_s,
        )  # fmt: skip
        most_rows = min(2 * state.rows_seen, FEW_TOKENS)
        bounds = (self.most_frames, most_rows, self.least_gain)
        slowness = tuple(max(round(each, 1), 0.1) for each in state.slowness)
        window = _cached(round(self._believed(state) * 40), key, state.num_decoding, bounds, slowness)
        return window if window != PLAIN else replace(window, look=self._looks(state))

    def _believed(self, state: SpeculationState) -> float:
        own = state.num_drafted / (state.num_drafted + _TRUSTED)
        return own * state.acceptance + (1 - own) * state.all_acceptance

    def _looks(self, state: SpeculationState) -> int:
        """All the time where drafts cost next to nothing, else now and then."""
        spent_s = state.answer_s + self.look * state.draft_s
        period = ceil(spent_s / (self.look_share * state.loop_s * self.look)) if state.num_drafted >= _TRUSTED else 1
        return self.look if period <= 1 or state.num_tokens % (period * self.look) < 1 else 0


def _grains(*seconds: float) -> tuple[int, ...]:
    return tuple(round(log(s) / _GRAIN) if s > 1e-7 else -(10**6) for s in seconds)


@lru_cache(maxsize=4096)
def _cached(
    acceptance: int, key: tuple[int, ...], num_requests: int, bounds: tuple[int, int, float], slowness: tuple[float, ...]
) -> Window:  # fmt: skip
    loop_s, stage_s, row_s, loop_row_s, draft_s, answer_s, frame_s, stale_s = (
        exp(k * _GRAIN) if k > -(10**6) else 0.0 for k in key
    )
    costs = Costs(
        loop_s=loop_s, stage_s=stage_s, row_s=row_s, loop_row_s=loop_row_s, draft_s=draft_s, answer_s=answer_s,
        frame_s=frame_s, stale_s=stale_s, num_requests=num_requests,
    )  # fmt: skip
    return best_window(acceptance / 40, costs, *bounds, slowness=slowness)
