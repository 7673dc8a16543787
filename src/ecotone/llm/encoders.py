"""Text embeddings by an encoder (BERT, RoBERTa, XLM-R, MPNet, DistilBERT, MiniLM, ...), whole or deployed over machines.

Not a language model in shards: an encoder computes a text at once, so it is captured like any module and planned, cut and
deployed by the existing runtime. Pooling and unit length are those of sentence-transformers' files (modules.json,
1_Pooling/config.json); without them the mean of all tokens, as there. One capture is for one length of texts: texts are
padded to the least of a few lengths that holds them, so the work wasted on padding is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecotone.llm.config import ModelError
from ecotone.llm.text import TextModel
from ecotone.model import Captured, capture

__all__ = ["POOLINGS", "Infer", "TextEncoder"]

Infer = Callable[[torch.Tensor, torch.Tensor], Any]
"""(token ids, mask), both int64 (N, length) -> (N, width): a module, or a Session of a captured one."""

POOLINGS = ("cls", "mean", "max", "mean_sqrt_len", "lasttoken")
_OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their positions begin behind the padding token
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One model directory. Open with `TextEncoder.open`.

    `poolings` are joined in order; `unit`: vectors have length one; `max_tokens`: longer texts are cut; `width` of a vector.
    """

    text: TextModel
    body: nn.Module
    poolings: tuple[str, ...]
    unit: bool
    max_tokens: int
    width: int
    lower: bool = False

    @staticmethod
    def open(folder: Path) -> TextEncoder:
        """The encoder in `folder`, float32, from safetensors; raises ModelError naming what is missing or not computed."""
        text = TextModel.open(folder)
        poolings, unit, settings = _sentence_settings(folder)
        body = _body(folder)
        config: Any = body.config
        positions = int(getattr(config, "max_position_embeddings", 0) or 512)
        if config.model_type in _OFFSET:
            positions -= int(config.pad_token_id or 0) + 1
        most = min(positions, int(text.tokenizer.model_max_length), int(settings.get("max_seq_length") or positions))
        width = int(config.hidden_size) * len(poolings)
        return TextEncoder(text, body, poolings, unit, most, width, bool(settings.get("do_lower_case")))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths to pad to where any will do: doubling from 32 to `max_tokens`."""
        found = [length for length in (32 << i for i in range(12)) if length < self.max_tokens]
        return (*found, self.max_tokens)

    def module(self) -> nn.Module:
        """The whole encoder with pooling: (token ids, mask) -> (N, width) float32."""
        return _Pooled(self.body, self.poolings, self.unit).eval()

    def capture(self, length: int, name: str = "") -> Captured:
        """The encoder for texts padded to `length` tokens, any number at a time, to be planned and deployed.

        Raises ModelError where `length` is out of range or the architecture cannot be captured.
        """
        if not 1 <= length <= self.max_tokens:
            raise ModelError(f"{self.text.where}: texts of {length} tokens; this encoder takes 1 to {self.max_tokens}")
        ids = torch.full((2, length), int(self.text.tokenizer.pad_token_id or 0))
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length // 2 :] = 0
        made = name or f"{Path(self.text.where).name}-{length}"
        return capture(self.module(), (ids, mask), name=made, dynamic_batch=True)

    def embed(self, texts: Sequence[str], infer: Infer | Mapping[int, Infer], batch: int = 32) -> torch.Tensor:
        """Vectors (N, width), float32, in the order of `texts`; the text decides, not what shares its batch or padding.

        `infer`: what computes, for any length (`module()`) or by the length it was captured for; longer texts are cut to
        the greatest length. At most `batch` texts at a time, those of like length together.
        """
        longest = max(infer, default=0) if isinstance(infer, Mapping) else self.max_tokens
        return self.embed_tokens(self.tokens(texts, max(longest, 1)), infer, batch)

    def embed_tokens(
        self, tokens: Sequence[Sequence[int]], infer: Infer | Mapping[int, Infer], batch: int = 32
    ) -> torch.Tensor:  # fmt: skip
        """As `embed`, of texts that are token ids already, none longer than the greatest length."""
        by_length = dict(sorted(infer.items())) if isinstance(infer, Mapping) else dict.fromkeys(self.lengths, infer)
        if not by_length or max(by_length) > self.max_tokens or batch < 1:
            known = ", ".join(map(str, by_length)) or "none"
            raise ModelError(f"lengths {known} and batches of {batch}; lengths must be 1 to {self.max_tokens}")
        if too_long := max((len(row) for row in tokens if len(row) > max(by_length)), default=0):
            raise ModelError(f"{self.text.where}: a text of {too_long} tokens; at most {max(by_length)} are taken")
        vectors = torch.empty(len(tokens), self.width)
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        while order:
            length = next(n for n in by_length if n >= len(tokens[order[0]]))
            now = [index for index in order[:batch] if len(tokens[index]) <= length]
            order = order[len(now) :]
            made = by_length[length](*self._padded([tokens[index] for index in now], length))
            made = made[0] if isinstance(made, tuple | list) else made
            if tuple(made.shape) != (len(now), self.width):
                text = f"{tuple(made.shape)} came back for {len(now)} texts of width {self.width}"
                raise ModelError(f"{self.text.where}: {text}; deploy what `capture` of this encoder made")
            vectors[now] = made.detach().float()
        return vectors

    def tokens(self, texts: Sequence[str], most: int) -> list[list[int]]:
        """Token ids of texts, with what the encoder expects around them, cut to `most`."""
        if not texts:
            return []
        given = [text.strip().lower() if self.lower else text.strip() for text in texts]
        found = self.text.tokenizer(given, truncation=True, max_length=most, padding=False, verbose=False)
        return [[int(token) for token in ids] for ids in found["input_ids"]]

    def _padded(self, rows: Sequence[Sequence[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.full((len(rows), length), int(self.text.tokenizer.pad_token_id or 0))
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        return ids, mask


class _Pooled(nn.Module):
    def __init__(self, body: nn.Module, poolings: tuple[str, ...], unit: bool):
        super().__init__()
        self.body, self.poolings, self.unit = body, poolings, unit

    def forward(self, ids_NL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
        states_NLW = self.body(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
        parts = [_pool(kind, states_NLW, mask_NL.unsqueeze(-1)) for kind in self.poolings]
        vectors = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return nn.functional.normalize(vectors, dim=-1) if self.unit else vectors


def _pool(kind: str, states_NLW: torch.Tensor, mask_NL1: torch.Tensor) -> torch.Tensor:
    if kind == "cls":
        return states_NLW[:, 0]
    if kind == "max":
        return states_NLW.masked_fill(mask_NL1 == 0, -1e9).amax(1)
    weights = mask_NL1.to(states_NLW.dtype)
    if kind == "lasttoken":
        length = mask_NL1.shape[1]
        places = torch.arange(1, length + 1, device=mask_NL1.device).view(1, length, 1)
        last = (mask_NL1.sum(1, keepdim=True) == places).to(states_NLW.dtype)
        return (states_NLW * last).sum(1)
    total, count = (states_NLW * weights).sum(1), weights.sum(1).clamp(min=1e-9)
    return total / (count.sqrt() if kind == "mean_sqrt_len" else count)


def _sentence_settings(folder: Path) -> tuple[tuple[str, ...], bool, Mapping[str, Any]]:
    """(poolings, unit length, sentence_bert_config.json) as sentence-transformers' files say."""
    modules = _json(folder / "modules.json", [])
    settings = _json(folder / "sentence_bert_config.json", {})
    if not modules:
        return ("mean",), False, settings
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    other = [kind for kind in kinds if kind not in _KNOWN_MODULES]
    if other or kinds[:1] != ["Transformer"] or kinds.count("Pooling") != 1:
        raise ModelError(f"{folder}: modules {', '.join(kinds)}; computed are {', '.join(_KNOWN_MODULES)}, in this order")
    path = Path(str(modules[kinds.index("Pooling")].get("path", "")))
    if path.is_absolute() or ".." in path.parts:
        raise ModelError(f"{folder}: modules.json names {path}, which lies outside; it is not to be trusted")
    pooling = _json(folder / path / "config.json", {})
    flags = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean"}
    flags |= {"pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len", "pooling_mode_lasttoken": "lasttoken"}
    wanted = [flags.get(key, key) for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
    named = pooling.get("pooling_mode", ())
    wanted = wanted or [str(kind) for kind in ([named] if isinstance(named, str) else named)]
    unknown = [kind for kind in wanted if kind not in POOLINGS]
    if unknown or not wanted:
        raise ModelError(f"{folder}: pooling {', '.join(unknown) or 'none'}; computed are {', '.join(POOLINGS)}")
    return tuple(kind for kind in POOLINGS if kind in wanted), "Normalize" in kinds, settings


def _json(path: Path, default: Any) -> Any:
    """What `path` holds, `default` where it is not there; raises ModelError unless it is of the default's kind."""
    if not path.is_file():
        return default
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, type(default)) or (isinstance(found, list) and not all(isinstance(m, dict) for m in found)):
        raise ModelError(f"{path} cannot be read; download it again")
    return found


def _body(folder: Path) -> nn.Module:
    """The bare encoder by transformers: safetensors only, no code of the directory's own."""
    import transformers

    log: Any = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        model, report = transformers.AutoModel.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # whatever a broken directory makes the library raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"{folder}: the encoder cannot be loaded: {reason}") from None
    finally:
        log.set_verbosity(level)
    missing = [key for key in report["missing_keys"] if not str(key).startswith("pooler.")]  # not used here
    if missing:
        raise ModelError(f"{folder}: weights {', '.join(sorted(map(str, missing))[:3])} are missing; download it again")
    if model.config.is_encoder_decoder or getattr(model.config, "is_decoder", False):
        raise ModelError(f"{folder}: {model.config.model_type} is not an encoder; give a model such as BERT or RoBERTa")
    return model.eval()  # type: ignore[no-any-return]
