"""One request at the driver, and one frame in flight: what has been sent, what is settled, what is only guessed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from ecotone.decoding.boundary import joined
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import PLAIN, Window

__all__ = ["Flight", "Request"]

_LEAST_SHARE = 0.03  # of the newest draft in what is believed of acceptance


@dataclass(slots=True, eq=False)
class Request:
    """`tokens`: prompt and settled answer. `drafts` follow them: guessed, and in flight. `sent`: positions in the pipeline.

    `slot` 0: waits. `fence` rises when what is in flight does not count any more. `again`: (start, stop) of rows to be
    computed as they were, when a sequence is rebuilt from its token ids. `flying`: numbers of its frames in flight.
    `is_suspect`: a step with it failed since its last token; `faults`: so many in which it was alone.
    """

    number: int
    prompt_length: int
    tokens: list[int]
    params: SamplingParams
    order: int
    priority: int = 0
    deadline_s: float | None = None
    slot: int = 0
    fence: int = 0
    sent: int = 0
    cached: int = -1  # prompt tokens found in the cache when it first began
    drafts: list[int] = field(default_factory=list)
    proposal: list[int] = field(default_factory=list)  # drafted, not sent
    ticket: int = 0  # of the drafts that were asked for; 0: none
    asked_at: int = 0  # the position of the first of them
    asked_s: float = 0.0
    wait_until_s: float | None = None  # until when its next frame waits for them at most
    is_void: bool = False  # the answer will be of no use any more
    is_dry: bool = False  # the drafter had nothing more
    flying: set[int] = field(default_factory=set)
    again: list[tuple[int, int]] = field(default_factory=list)
    served: int = 0  # when it last sent, in frames
    is_suspect: bool = False
    faults: int = 0
    num_drafted: int = 0
    window: Window = PLAIN  # as last decided
    window_known: tuple[int, ...] = ()  # what was known then
    told_window: Window = PLAIN  # when its last tokens came
    told_s: float = 0.0  # when its last tokens came
    num_accepted: int = 0
    acceptance: float = 0.5

    @property
    def num_pending(self) -> int:
        """Settled tokens that are not in the pipeline yet."""
        return len(self.tokens) - self.sent

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def is_prefilling(self) -> bool:
        return self.num_pending > 1

    @property
    def num_again(self) -> int:
        """Tokens of its next row, where that is to be computed as it was; else 0."""
        index = bisect_right(self.again, self.sent, key=lambda row: row[0]) - 1
        return max(self.again[index][1] - self.sent, 0) if index >= 0 else 0

    def most_drafts(self, context: int) -> int:
        """Drafts that may still be of use: they end before the answer or the context does."""
        end = min(self.prompt_length + self.params.max_tokens, context)
        return max(end - 1 - len(self.tokens) - len(self.drafts) - len(self.proposal), 0)

    def judged(self, is_right: bool) -> None:
        """A draft was accepted or refused."""
        self.num_drafted += 1
        self.num_accepted += is_right
        self.acceptance += max(_LEAST_SHARE, 1 / (self.num_drafted + 1)) * (is_right - self.acceptance)

    def compute_again(self, pieces: Sequence[tuple[int, int]]) -> None:
        """(start, count) of rows are to be computed as they were, and then what was to be computed again before."""
        end = sum(pieces[-1]) if pieces else 0
        rest = [(first, last - first) for first, last in self.again if first >= end]
        self.again = list(joined([*pieces, *rest]))

    def forget_flight(self) -> None:
        """What is in flight does not count any more."""
        self.fence += 1
        self.drafts.clear()
        self.flying.clear()
        self.forget_drafts()

    def forget_drafts(self) -> None:
        """Drafts that were not sent, and those that are being made, do not follow what is settled."""
        self.proposal.clear()
        self.wait_until_s, self.is_dry, self.is_void = None, False, self.ticket > 0


@dataclass(slots=True)
class Flight:
    """A frame in flight. `parts`: (request, fence, start, count) of rows. `kind`: "decode", "draft", "prefill", "order"."""

    number: int
    kind: str
    sent_s: float
    num_tokens: int
    parts: tuple[tuple[int, int, int, int], ...] = ()
    opened: tuple[int, ...] = ()  # requests that it opens
    size_bytes: int = 0
    beside: int = 1  # frames in flight with it when it was sent, itself among them
