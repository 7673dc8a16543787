"""Whether what somebody names is a language model: a Hugging Face directory, or the hub id of such a one."""

from __future__ import annotations

import json
import re
from pathlib import Path

__all__ = ["is_encoder", "is_language_model"]

_MAX_CONFIG_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_language_model(name: str) -> bool:
    """A directory whose config.json names a causal language model, or the hub id of one that the hub knows as such."""
    return any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in _architectures(name))


def is_encoder(name: str) -> bool:
    """Likewise of an encoder that makes vectors of texts."""
    found = _architectures(name)
    return bool(found) and all(str(a).endswith(("Model", "ForMaskedLM")) and "LMHead" not in str(a) for a in found)


def _architectures(name: str) -> list[object]:
    config = _config_file(name)
    try:
        if config is None or config.stat().st_size > _MAX_CONFIG_BYTES:
            return []
        document = json.loads(config.read_bytes())
        found = document.get("architectures") if isinstance(document, dict) else None
    except (OSError, ValueError, RecursionError):
        return []
    return list(found) if isinstance(found, list) else []


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
