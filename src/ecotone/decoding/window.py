"""How many drafts to have under way, so that tokens come soonest: an explicit model, searched over all windows. Pure.

Letters: T loop_s, tau stage_s, a acceptance (each draft alone), W frames in flight of K rows each, b and r what a row more
adds to T and tau. A *cycle* ends with the first wrong draft; it commits 1/(1-a) tokens: R = a/(1-a) right drafts and one.

    serial, W = 1    K - 1 drafts go with the settled token. Round: T + (K-1)*b + draft time, (1-a^K)/(1-a) tokens
    frames, W > 1    the settled token goes alone, frames of K drafts behind it, s = max(tau + (K-1)*r, T_K/W, K*draft_s)
                     apart, T_K = T + (K-1)*b. Cycle: T + tau/2 (a stale frame in the way) + a*(T_K-T) + s*a/(1-a^K)

With K = 1 the latter is tok/s = (R+1)/(T + R*max(tau, T/W)), the formula of PipeInfer-like frames (arXiv 2407.11798). With n
requests decoding, the slowest device also computes what is in vain: a cycle takes it n*tau_K*(frames used and stale ones),
and no request goes faster than that. n >= T/tau requests fill the pipe, then plain decoding wins.

Acceptance is measured on drafts that are sent and, while none are, on drafts that are only looked at, which cost the
pipeline nothing; the drafter spends at most a share of the time on those. What rows cost is not known before some were
sent: a window has at most twice as many as the pipeline has been seen with, and one before a request's drafts were judged,
since a wrong row holds up its frame, a wrong frame hardly anything. O(windows) per new situation, cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, log

from ecotone.decoding.speculation import PLAIN, SpeculationState, Window
from ecotone.decoding.step import FEW_TOKENS

__all__ = ["AdaptivePolicy", "Costs", "best_window", "tokens_per_s"]

_MOST_ACCEPTED = 0.995
_FRAMES = (*range(1, 17), 18, 20, 23, 26, 29, 32, 36, 40, 45, 50, 57, 64)
_GRAIN = 0.04  # situations so close, as logarithms of their times, are one
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
    num_requests: int = 1


def tokens_per_s(window: Window, acceptance: float, costs: Costs) -> float:
    """Expected tokens per second of one request."""
    a, frames, rows = min(max(acceptance, 0.0), _MOST_ACCEPTED), window.frames, window.rows
    tau = costs.stage_s + (rows - 1) * costs.row_s
    loop_s = costs.loop_s + (rows - 1) * costs.loop_row_s
    n = costs.num_requests
    if frames == 1:
        tokens = (1 - a**rows) / (1 - a)
        drafting_s = costs.answer_s + (rows - 1) * costs.draft_s if rows > 1 else 0.0
        return tokens / max(loop_s + drafting_s, n * tau)
    between_s = max(tau, loop_s / frames, rows * costs.draft_s)
    used = a / (1 - a**rows)  # frames of drafts per cycle in which at least the first one counts
    late_s = costs.answer_s + rows * costs.draft_s if a else 0.0  # the first drafts
    first_s = max(costs.loop_s + costs.stage_s / 2, costs.stage_s + late_s)
    cycle_s = first_s + a * (loop_s - costs.loop_s) + used * between_s
    stale = min(frames - 1, costs.loop_s / between_s)
    return 1 / (1 - a) / max(cycle_s, n * (costs.stage_s + (used + stale) * tau))


def best_window(
    acceptance: float, costs: Costs, most_frames: int = 64, most_rows: int = FEW_TOKENS, least_gain: float = 1.05
) -> Window:
    """The fastest window; PLAIN where none is faster by `least_gain`. Fewest frames and rows among nearly equal ones."""
    best, best_rate = PLAIN, tokens_per_s(PLAIN, acceptance, costs) * least_gain
    deepest = min(most_frames, ceil(costs.loop_s / max(costs.stage_s, 1e-9)) + 1)
    for rows in range(1, most_rows + 1):
        for frames in (each for each in _FRAMES if each <= deepest):
            window = Window(frames=frames, rows=rows)
            rate = tokens_per_s(window, acceptance, costs)
            if rate > best_rate * (1.0 if best == PLAIN else 1.005 if rows == best.rows else 1.03):
                best, best_rate = window, rate
    return best


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
        key = _grains(state.loop_s, state.stage_s, state.row_s, state.loop_row_s, state.draft_s, state.answer_s)
        most_rows = 1 if state.num_drafted < _TRUSTED else min(2 * state.rows_seen, FEW_TOKENS)
        bounds = (self.most_frames, most_rows, self.least_gain)
        window = _cached(round(self._believed(state) * 50), key, state.num_decoding, bounds)
        return window if window != PLAIN else Window(look=self._looks(state))

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
def _cached(acceptance: int, key: tuple[int, ...], num_requests: int, bounds: tuple[int, int, float]) -> Window:
    loop_s, stage_s, row_s, loop_row_s, draft_s, answer_s = (exp(k * _GRAIN) if k > -(10**6) else 0.0 for k in key)
    costs = Costs(
        loop_s=loop_s, stage_s=stage_s, row_s=row_s, loop_row_s=loop_row_s, draft_s=draft_s, answer_s=answer_s,
        num_requests=num_requests,
    )  # fmt: skip
    return best_window(acceptance / 50, costs, *bounds)
