"""Whether what somebody names is a language model: a Hugging Face directory, or the hub id of such a one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["is_encoder", "is_language_model"]

_MAX_CONFIG_BYTES = 1 << 20
_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "electra", "albert")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_language_model(name: str) -> bool:
    """A directory whose config.json names a causal language model, or the hub id of one that the hub knows as such."""
    found = _config(name).get("architectures")
    return isinstance(found, list) and any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in found)


def is_encoder(name: str) -> bool:
    """Likewise of an encoder that makes vectors of texts (ecotone.llm.encoders)."""
    document = _config(name)
    found = document.get("architectures") or []
    is_body = isinstance(found, list) and all(str(a).endswith(("Model", "ForMaskedLM")) for a in found)
    return is_body and document.get("model_type") in _ENCODERS


def _config(name: str) -> dict[str, Any]:
    config = _config_file(name)
    try:
        if config is None or config.stat().st_size > _MAX_CONFIG_BYTES:
            return {}
        document = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _config_file(name: str) -> Path | None:
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder / "config.json"
    if folder.exists() or not _HUB_ID.fullmatch(name):
        return None
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "config.json"))
    except Exception:  # no such package, no network, no such model: it is not one that can be told
        return None
