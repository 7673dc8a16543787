"""A model's tokenizer on its way to the node with the head, which needs it for answers by a grammar. Text files alone.

Opened beside the loading of weights, in a thread: `GrammarsSoon` is handed out at once and waits where somebody begins a
request with a grammar before the tokenizer is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from ecotone.decoding.params import SamplingParams
from ecotone.llm.config import ModelError
from ecotone.llm.grammar import GrammarError, Grammars
from ecotone.llm.sampling import Mask
from ecotone.units import EcotoneError

__all__ = ["GrammarsSoon", "has_tokenizer", "read_files", "write_files"]

_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "config.json",
)  # fmt: skip
_MAX_BYTES = 48 << 20
_PATIENCE_S = 60.0


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def read_files(folder: Path) -> dict[str, str]:
    """The files of a tokenizer by name; {} where the folder has none that can be sent. Raises ModelError."""
    if not has_tokenizer(folder):
        return {}
    found = {name: (folder / name) for name in _NAMES if (folder / name).is_file()}
    if sum(path.stat().st_size for path in found.values()) > _MAX_BYTES:
        raise ModelError(f"{folder}: its tokenizer is larger than {_MAX_BYTES} bytes")
    return {name: path.read_text(encoding="utf-8") for name, path in found.items()}


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Keep what `read_files` gave; names that are not a tokenizer's are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        if name not in _NAMES:
            raise ModelError(f"{name!r} is no file of a tokenizer")
        (folder / name).write_text(text, encoding="utf-8")


class GrammarsSoon:
    """Begins masks by the grammars that `make` gives, once it has; `make` runs in a thread of its own from now on."""

    def __init__(self, make: Callable[[], Grammars]):
        self._make, self._made = make, threading.Event()
        self._grammars: Grammars | None = None
        self._reason = ""
        threading.Thread(target=self._run, name="llm-tokenizer", daemon=True).start()

    def begin(self, params: SamplingParams, prompt_length: int) -> Mask:
        """See Grammars.begin."""
        if not self._made.wait(_PATIENCE_S):
            raise GrammarError(f"the tokenizer has not come within {_PATIENCE_S:g} s")
        if self._grammars is None:
            raise GrammarError(f"this stage cannot keep answers to a grammar: {self._reason}")
        return self._grammars.begin(params, prompt_length)

    def _run(self) -> None:
        try:
            self._grammars = self._make()
        except EcotoneError as error:
            self._reason = str(error)
        except Exception as error:  # whatever a tokenizer makes a library raise: told where it is needed
            self._reason = f"{type(error).__name__}: {error}"[:200]
        finally:
            self._made.set()
