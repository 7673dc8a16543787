"""Asking a drafter, and what its answers are worth: measured here, decided by a policy, sent by dispatch.py.

A drafter is never waited for where the policy wants frames: the settled token travels while drafts for what follows are
made. Where it wants drafts in the same frame, the request waits, but no longer than twice what the answer should take: a
drafter that hangs costs one such wait, since a request has one ask under way at most. Drafts are asked for in pieces that
take no longer than the time between two frames, and before the last ones are used up. What is not sent is compared with the
tokens that come all the same: so acceptance is known at no cost in the pipeline while nothing is speculated (`Window.look`).
"""

from __future__ import annotations

from ecotone.decoding.requests import Request
from ecotone.decoding.speculation import PLAIN, Draft, DraftAsk, Kind, SpeculationPolicy, SpeculationState, Window
from ecotone.decoding.state import State
from ecotone.decoding.words import WantDrafts
from ecotone.decoding.worth import Worth

__all__ = ["Drafting"]

_FIRST_WAIT = 0.05  # of a loop, before the drafter was timed
_LEAST_SHARE = 0.1
_ENOUGH = 8  # frames or drafts, until a window is thought over; a request's first ones sooner
_AS_EXPECTED = (1.0, 1.0, 1.0)


class Drafting:
    """`policy` None: no drafts."""

    def __init__(self, state: State, policy: SpeculationPolicy | None):
        self._state, self._policy = state, policy
        self._tickets = self._num_timed = self._num_answers = 0
        self._accepted, self._judged = 1.0, 2.0  # of all drafts, fading
        self._draft_s = self._answer_s = 0.0
        self._asks: list[DraftAsk] = []
        self._worth = Worth()

    def window(self, request: Request, num_decoding: int) -> Window:
        """What the policy wants for a request now; asked anew once enough came since to know better."""
        if self._policy is None:
            return PLAIN
        state, pace = self._state, self._state.pace
        num_left = request.most_drafts(state.settings.context) + len(request.proposal)
        judged = request.num_drafted // _ENOUGH or -request.num_drafted.bit_length()
        known = (judged, pace.num_frames // _ENOUGH, pace.rows_seen, self._num_answers > 0, num_decoding, num_left > 0)
        if request.window_known == known and request.window.kind is not Kind.PLAIN:
            return request.window
        request.window_known = known
        wanted = self._policy.decide(
            SpeculationState(
                request=request.number, loop_s=pace.loop_s(1), stage_s=pace.stage_s(1), row_s=pace.row_s(),
                loop_row_s=max(pace.loop_s(2) - pace.loop_s(1), 0.0), draft_s=self._draft_s, answer_s=self._answer_s,
                acceptance=request.acceptance, all_acceptance=self._accepted / self._judged,
                num_drafted=request.num_drafted, num_accepted=request.num_accepted, num_decoding=num_decoding,
                num_flying=len(state.flights), depth=pace.depth(1), num_tokens=len(request.tokens),
                num_left=num_left, rows_seen=pace.rows_seen,
                frame_s=pace.frame_s, stale_s=pace.stale_s,
                slowness=self._worth.at(pace.loop_s(1)) if num_decoding == 1 else _AS_EXPECTED,
            )
        )  # fmt: skip
        request.window = wanted
        return wanted

    def told(self, request: Request, tokens: int, *, is_drafts: bool) -> None:
        """The next `tokens` of a request came, by a frame of drafts or one with its settled token."""
        now_s, is_alone, window = self._state.now_s, len(self._state.by_slot) == 1, request.window
        if self._policy is not None and request.told_s and request.told_window.kind is window.kind and is_alone:
            expected_s = window.next_s if is_drafts else window.first_s
            expected = 1.0 if window.kind is Kind.FRAMES and not is_drafts else window.tokens
            self._worth.told(window.kind, now_s - request.told_s, tokens, expected_s, expected)
        request.told_s, request.told_window = now_s, window

    # ---- asking ----------------------------------------------------------------------------------------------------------

    def must_wait(self, request: Request, num_decoding: int) -> bool:
        """Whether the request's next frame waits for drafts, which are asked for; its settled token is not in flight."""
        now_s = self._state.now_s
        if request.ticket and request.wait_until_s is not None:
            return now_s < request.wait_until_s
        if request.ticket or request.proposal or request.is_dry:
            return False
        window = self.window(request, num_decoding)
        count = min(window.rows - 1, request.most_drafts(self._state.settings.context))
        if window.frames > 1 or count < 1:
            return False
        loop_s = self._state.pace.loop_s(1)
        wait_s = max(_FIRST_WAIT * loop_s, 2 * (self._answer_s + count * self._draft_s)) if loop_s else 0.0
        self._ask(request, count)
        request.wait_until_s = now_s + wait_s
        return wait_s > 0

    def ask_ahead(self, request: Request, window: Window) -> None:
        """Ask for drafts of a request that has frames in flight, as far as `window` will need more soon."""
        if request.ticket or request.is_dry:
            return
        if window.frames > 1:
            wanted = (window.frames - len(request.flying) + 1) * window.rows
        elif window.rows > 1 and self._draft_s * window.rows > 0.02 * self._state.pace.loop_s(1):
            wanted = window.rows  # one for the token in flight, and those to go with it
        else:
            wanted = window.look
        wanted -= len(request.proposal)
        if self._draft_s and window.frames > 1:
            pace = self._state.pace
            between_s = max(pace.stage_s(1) + pace.frame_s, pace.loop_s(1) / window.frames)
            wanted = min(wanted, max(window.rows, int(between_s / self._draft_s)))
        count = min(wanted, request.most_drafts(self._state.settings.context))
        if count > 0:
            self._ask(request, count)

    def _ask(self, request: Request, count: int) -> None:
        self._tickets += 1
        request.ticket, request.asked_s, request.wait_until_s = self._tickets, self._state.now_s, None
        context = (*request.tokens, *request.drafts, *request.proposal)
        request.asked_at = len(context)
        self._asks.append(
            DraftAsk(
                request=request.number, ticket=self._tickets, tokens=context, num_settled=len(request.tokens), count=count,
                params=request.params, prompt_length=request.prompt_length,
            )
        )  # fmt: skip

    def flush(self) -> None:
        """Hand the asks over, all at once."""
        if self._asks:
            self._state.out.append(WantDrafts(tuple(self._asks)))
            self._asks = []

    def wake_s(self) -> float | None:
        """When a request has waited long enough."""
        waits = [r.wait_until_s for r in self._state.by_slot.values() if r.ticket and r.wait_until_s is not None]
        return min((at_s for at_s in waits if at_s > self._state.now_s), default=None)

    # ---- answers ---------------------------------------------------------------------------------------------------------

    def answered(self, drafts: tuple[Draft, ...]) -> None:
        """Take what is still of use: what came to be known since it was asked for must agree with it."""
        for draft in drafts:
            request = self._state.requests.get(draft.request)
            if request is None or request.ticket != draft.ticket:
                continue
            self._time(draft, self._state.now_s - request.asked_s)
            is_void = request.is_void
            request.ticket, request.wait_until_s, request.is_void = 0, None, False
            if is_void:
                continue
            request.is_dry = not draft.tokens
            known = (*request.tokens, *request.drafts, *request.proposal)[request.asked_at :]
            room = request.most_drafts(self._state.settings.context)
            for token, truth in zip(draft.tokens, request.tokens[request.asked_at :], strict=False):
                self.judged(request, token == truth, was_sent=False)
                if token != truth:
                    break
            if draft.tokens[: len(known)] == known:
                request.proposal += draft.tokens[len(known) : len(known) + room]

    def _time(self, draft: Draft, waited_s: float) -> None:
        if draft.tokens:
            share = max(_LEAST_SHARE, 1 / (self._num_timed + 1))
            self._draft_s += share * (draft.seconds / len(draft.tokens) - self._draft_s)
            self._num_timed += 1
        share = max(_LEAST_SHARE, 1 / (self._num_answers + 1))
        rest_s = max(waited_s - (draft.seconds if draft.tokens else 0.0), 0.0)
        self._answer_s += share * (rest_s - self._answer_s)
        self._num_answers += 1

    def judged(self, request: Request, is_right: bool, *, was_sent: bool) -> None:
        """A draft turned out right or wrong, sent or not."""
        request.judged(is_right)
        self._accepted = 0.98 * self._accepted + is_right
        self._judged = 0.98 * self._judged + 1
        counts = self._state.counts
        counts["drafts_judged" if was_sent else "drafts_looked_at"] += 1
        counts["drafts_accepted"] += is_right and was_sent
