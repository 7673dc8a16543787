"""Which frames are sent, and when: admission, prompts in chunks, decoding without bubbles, drafts.

*No bubbles* (EdgeShard, arXiv 2405.14371): a group of requests starts its next token as soon as its own last one is back,
whatever others do. n requests over D devices with slowest part tau take max(n*tau, T) per token each, instead of
T + (n-1)*tau. Here n requests are dealt as evenly as possible into G frames, since a frame of several rows mostly costs an
executor little more than one of one row, while fewer frames than T/tau leave devices idle: G is what makes the greater of
sum(tau(rows)) over all frames, and T(rows) of the longest, least.

*Prompts* are cut into chunks (pace.py), several in flight, so that stages work on different chunks; short prompts go before
the next chunk of a long one, which gets every second frame at least. Prompts and decoding are frames of their own: what a
request waits for is known, and executors by phase are not mixed.

*Memory*: a request is admitted when its prompt fits; where keys run out later, cached prefixes go, then the request that
came last is put back and computed again. O(requests) per frame.

*Faults*: a request whose step failed travels alone until its next token, so that it alone is to blame if that fails too.
"""

from __future__ import annotations

from ecotone.decoding.blocks import KvCacheFull
from ecotone.decoding.drafting import Drafting
from ecotone.decoding.frame import FrameRow, Open
from ecotone.decoding.requests import Request
from ecotone.decoding.speculation import PLAIN, SpeculationPolicy
from ecotone.decoding.state import Mode, State
from ecotone.decoding.words import Ending

__all__ = ["Dispatcher"]

_MAX_ROWS, _REGROUP = 256, 16


class Dispatcher:
    """Sends what may be sent now. `policy` None: no drafts."""

    def __init__(self, state: State, policy: SpeculationPolicy | None):
        self._state, self.drafting = state, Drafting(state, policy)
        self._last_long = False  # the last chunk was of a long prompt
        self._has_policy = policy is not None
        self._grouped = ((0, 0), 1)  # (requests, age), groups

    def run(self) -> None:
        """Admit and send until nothing more may be sent."""
        state = self._state
        if state.mode is not Mode.RUNNING:
            return
        self._admit()
        self._send_prompts()
        self._send_decoding()
        if self._has_policy:
            self._send_drafts()
        self.drafting.flush()

    # ---- admission -------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        state = self._state
        while state.waiting and len(state.by_slot) < state.settings.max_slots:
            request = state.waiting[0]
            if not self._fits(request):
                return
            state.waiting.pop(0)
            request.slot, state.next_slot = state.next_slot, state.next_slot + 1
            request.sent = state.ledger.begin(request.slot, request.tokens)
            if request.cached < 0:
                request.cached = request.sent
                state.counts["prompt_tokens"] += request.prompt_length
                state.counts["cached_tokens"] += request.sent
            state.by_slot[request.slot] = request
            if request.is_suspect:
                state.launch("order", ())  # what follows is its own frame
            known = tuple(request.tokens[: request.sent])
            state.ledger.orders.append(Open(request.slot, request.prompt_length, request.params.to_bytes(), known))
            if request.is_suspect:
                state.launch("order", ())

    def _fits(self, request: Request) -> bool:
        """Whether the request's tokens fit with a block to spare for everyone who is at work."""
        ledger, state = self._state.ledger, self._state
        need = ledger.tables.blocks_for(len(request.tokens) + 1) - ledger.matched(request.tokens) // ledger.block_tokens
        free = ledger.num_free_blocks - len(state.by_slot)
        return free >= need or ledger.blocks_at_hand() - len(state.by_slot) >= need or not state.by_slot

    # ---- prompts ---------------------------------------------------------------------------------------------------------

    def _send_prompts(self) -> None:
        state = self._state
        while True:
            waiting = [r for r in state.by_slot.values() if r.is_prefilling]
            flying = sum(flight.kind == "prefill" for flight in state.flights.values())
            if not waiting or flying > len(set(state.nodes())) or len(state.flights) >= state.settings.most_flights:
                return
            if not self._send_chunks(waiting):
                return

    def _send_chunks(self, waiting: list[Request]) -> bool:
        """One frame of chunks; False where keys ran out."""
        state, settings = self._state, self._state.settings
        total = sum(request.num_pending for request in waiting)
        is_alone = not any(not r.is_prefilling for r in state.by_slot.values())
        most_s = settings.chunk_s * (4 if is_alone and len(waiting) == 1 else 1)
        budget = state.pace.chunk(
            total, most_s, settings.least_chunk_tokens, settings.most_chunk_tokens, settings.chunk_tokens
        )
        order = sorted(waiting, key=lambda r: (r.priority, r.num_pending > budget, r.order))
        long = next((r for r in order if r.num_pending > budget), None)
        if long is not None and not self._last_long:
            order = [long, *(r for r in order if r is not long)]
        order.sort(key=lambda r: not r.is_suspect)
        rows: list[FrameRow] = []
        parts: list[tuple[int, int, int, int]] = []
        for request in order[:_MAX_ROWS]:
            if rows and (request.is_suspect or state.requests[parts[0][0]].is_suspect):
                continue  # a suspect goes alone
            count = self._chunk_of(request, budget) if request.slot else 0  # put back meanwhile, to make room
            if count < 1:
                continue
            row = self._row(request, tuple(request.tokens[request.sent : request.sent + count]), rows)
            if row is None:
                continue  # one that came earlier may find room where this one does not
            budget -= count
            rows.append(row)
            parts.append((request.number, request.fence, row.start, count))
        if not rows:
            return False
        self._keep_alone(parts)
        self._last_long = long is not None and parts[0][0] == long.number
        self._launch("prefill", rows, parts)
        return True

    def _chunk_of(self, request: Request, budget: int) -> int:
        """Tokens of its next row: as they were computed before, else as many as the budget leaves."""
        return (request.num_again or min(request.num_pending, budget)) if budget > 0 else 0

    # ---- decoding --------------------------------------------------------------------------------------------------------

    def _decoding(self) -> list[Request]:
        return [r for r in self._state.by_slot.values() if not r.is_prefilling]

    def _send_decoding(self) -> None:
        state = self._state
        decoding = self._decoding()
        ready = [r for r in decoding if r.num_pending == 1 and not r.flying]
        ready = [r for r in ready if not self.drafting.must_wait(r, len(decoding))]
        if not ready:
            return
        num_groups = self._num_groups(len(decoding))
        flying = sum(flight.kind == "decode" for flight in state.flights.values())
        most = -(-len(decoding) // num_groups)
        ready.sort(key=lambda r: (r.priority, r.served))
        ready.sort(key=lambda r: r.is_suspect)
        while ready and flying < num_groups and len(state.flights) < state.settings.most_flights:
            size = min(most, -(-len(ready) // (num_groups - flying)), _MAX_ROWS)
            count = 1 if ready[0].is_suspect else min(size, sum(not r.is_suspect for r in ready))
            group, ready = ready[:count], ready[count:]
            flying += self._send_group(group)

    def _num_groups(self, num_decoding: int) -> int:
        """Into how many frames that many requests are dealt; reckoned anew now and then."""
        pace = self._state.pace
        key = (num_decoding, pace.num_frames // _REGROUP)
        if key != self._grouped[0]:
            costs = []
            for groups in range(1, num_decoding + 1):
                each, more = divmod(num_decoding, groups)  # rows of a frame, and how many have one more
                all_s = (groups - more) * pace.stage_s(each) + more * pace.stage_s(each + 1)
                costs.append(max(all_s, pace.loop_s(each + (more > 0))))
            most = 1.01 * min(costs)  # among equals the most frames: what rows cost may not be known yet
            best = max(g for g, cost in enumerate(costs, 1) if cost <= most)
            if not most:
                best = min(num_decoding, len(set(self._state.nodes())))
            self._grouped = (key, best)
        return self._grouped[1]

    def _send_group(self, group: list[Request]) -> bool:
        """The next token of each of `group`, with the first of its drafts; whether anything was sent."""
        rows: list[FrameRow] = []
        parts: list[tuple[int, int, int, int]] = []
        for request in group:
            if request.slot not in self._state.by_slot:
                continue  # put back meanwhile, to make room
            window = self.drafting.window(request, len(self._decoding())) if request.proposal else PLAIN
            drafts = request.proposal[: window.rows - 1]
            row = self._row(request, (request.tokens[-1], *drafts), rows, num_logits=1 + len(drafts))
            if row is None:
                continue
            request.proposal = request.proposal[len(drafts) :]
            request.drafts += drafts
            rows.append(row)
            parts.append((request.number, request.fence, row.start, len(row.tokens)))
        if rows:
            self._keep_alone(parts)
            self._launch("decode", rows, parts)
        return bool(rows)

    # ---- drafts ----------------------------------------------------------------------------------------------------------

    def _send_drafts(self) -> None:
        """Further frames of requests that have some in flight, as far as the policy wants and drafts are there."""
        state = self._state
        decoding = self._decoding()
        for request in [r for r in decoding if r.flying and r.num_pending <= 0]:
            window = self.drafting.window(request, len(decoding))
            while (
                request.proposal
                and len(request.flying) < window.frames
                and len(state.flights) < state.settings.most_flights
                and request.slot
            ):
                drafts = request.proposal[: window.rows]
                row = self._row(request, tuple(drafts), [], num_logits=len(drafts))
                if row is None:
                    break
                request.proposal = request.proposal[len(drafts) :]
                request.drafts += drafts
                self._launch("draft", [row], [(request.number, request.fence, row.start, len(drafts))])
            if request.slot:
                self.drafting.ask_ahead(request, window)

    # ---- both ------------------------------------------------------------------------------------------------------------

    def _keep_alone(self, parts: list[tuple[int, int, int, int]]) -> None:
        """Orders of others do not travel with a suspect."""
        state = self._state
        if state.ledger.orders and any(state.requests[number].is_suspect for number, *_ in parts):
            state.launch("order", ())

    def _launch(self, kind: str, rows: list[FrameRow], parts: list[tuple[int, int, int, int]]) -> None:
        state = self._state
        number = state.launch(kind, rows, parts)
        for request, *_ in parts:
            state.requests[request].flying.add(number)
            state.requests[request].served = number

    def _row(
        self, request: Request, tokens: tuple[int, ...], beside: list[FrameRow], num_logits: int | None = None
    ) -> FrameRow | None:
        """The row of these tokens from where the request is, counted in the ledger; None where keys cannot be had.

        `beside`: rows of the same frame, whose requests cannot be put back any more.
        """
        state, start = self._state, request.sent
        if num_logits is None:
            num_logits = int(start + len(tokens) == len(request.tokens))
        while True:
            try:
                state.ledger.extend(request.slot, start, len(tokens), len(request.tokens))
                break
            except KvCacheFull:
                if not self._make_room(request, {row.slot for row in beside}):
                    return None
        request.sent = start + len(tokens)
        return FrameRow(request.slot, start, tokens, num_logits, request.fence)

    def _make_room(self, request: Request, held: set[int]) -> bool:
        """Put the request back that came last and is least urgent, unless that is `request` itself or one ahead of it."""
        state = self._state
        last = max((r for r in state.by_slot.values() if r.slot not in held), key=lambda r: (r.priority, r.order))
        if last is not request and (last.priority, last.order) > (request.priority, request.order):
            state.counts["put_back"] += 1
            state.put_back(last)
            return True
        if len(state.by_slot) == 1:
            ending = Ending.LENGTH if request.num_generated else Ending.TOO_LONG
            state.end(request, ending, "the stages' memory for keys and values is full")
        return False
