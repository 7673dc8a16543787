"""What whoever asked for an answer is given, piece by piece: text that is certain, its tokens, and how it ended. Values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ecotone.decoding.frame import TokenLogprobs
from ecotone.decoding.words import Ending

__all__ = ["OnPiece", "Piece"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`text` is what `tokens` (and some before, held back until now) make certain; either may be empty.

    Texts of all pieces joined are the answer, without stop strings and what follows them. `logprobs`: one per token where
    asked for. The last piece, and only that, has an `ending`; `reason` says for people why where that is an error. `cached`
    of the prompt's tokens were found computed (known with the last piece).
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    ending: Ending | None = None
    reason: str = ""
    cached: int = 0


OnPiece = Callable[[Piece], None]
"""Called from the engine's thread, once per piece, in order; must return at once."""
