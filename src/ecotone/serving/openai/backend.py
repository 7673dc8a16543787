"""What the server needs of a language model, and of an encoder that makes vectors. Protocols only; no engine is known here.

Calls that may take long (`encode`, `encode_chat`, `check`, `embed`) are made from threads of the server, one at a time for
text; `start`, `cancel` and the rest are called from its event loop and must return at once. Whatever is refused is raised
as an EcotoneError whose text can be shown to whoever asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ecotone.decoding.answer import OnPiece
from ecotone.decoding.engine import Measured
from ecotone.decoding.params import SamplingParams

__all__ = ["Backend", "Embedder"]


class Backend(Protocol):
    """A language model that can be asked. `context`: tokens of the longest sequence; `stop_tokens` end an answer."""

    @property
    def name(self) -> str: ...

    @property
    def created_s(self) -> int:
        """Seconds since 1970 of the model's files, or of the start."""

    @property
    def context(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def stop_tokens(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
        """Token ids of a conversation by the model's template, with the head of an answer; raises where it refuses them."""

    def token_text(self, token: int) -> tuple[str, bytes]:
        """One token alone, for people and as the bytes that it stands for."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens left out: what `echo` shows of a prompt given as ids."""

    def check(self, params: SamplingParams) -> None:
        """Raise where a request with these parameters cannot be answered, for instance a grammar that does not compile."""

    def start(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        on_piece: OnPiece,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> int:
        """Hand a request in and return its number; `deadline_s` is seconds from now. Raises where nothing is accepted."""

    def cancel(self, request: int) -> None:
        """End a request; nothing happens where it has ended."""

    def is_ready(self) -> bool:
        """Whether a request handed in now can be answered."""

    def status(self) -> dict[str, Any]:
        """What people want to see of it: plan, nodes, pace. Made of what JSON has."""

    def measured(self) -> Measured: ...

    def fingerprint(self) -> str | None:
        """What decides the numbers: model, plan, precisions. Told as `system_fingerprint`."""


class Embedder(Protocol):
    """A model that makes one vector of `size` numbers of a text. `is_nested`: its first numbers are a vector as well."""

    @property
    def name(self) -> str: ...

    @property
    def created_s(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def is_nested(self) -> bool: ...

    def encode(self, text: str) -> list[int]: ...

    def embed(self, inputs: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
        """A vector per input, in order; called from a thread."""

    def is_ready(self) -> bool: ...
