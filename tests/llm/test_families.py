"""Defaults of every family are those of transformers' own configuration classes."""

from __future__ import annotations

import pytest

from ecotone.llm.families import SUPPORTED, read_config

transformers = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
pytestmark = pytest.mark.torch

CLASSES = {
    "llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
    "gemma": "GemmaConfig", "gemma2": "Gemma2Config", "gemma3_text": "Gemma3TextConfig", "phi": "PhiConfig",
    "phi3": "Phi3Config", "gpt2": "GPT2Config", "mixtral": "MixtralConfig", "qwen2_moe": "Qwen2MoeConfig",
    "qwen3_moe": "Qwen3MoeConfig",
}  # fmt: skip


def test_every_family_is_compared() -> None:
    assert set(CLASSES) == set(SUPPORTED)


@pytest.mark.parametrize("family", SUPPORTED)
def test_an_empty_configuration_means_what_transformers_takes_it_for(family: str) -> None:
    theirs = getattr(transformers, CLASSES[family])()
    full = theirs.to_dict() | {"model_type": family}
    assert read_config({"model_type": family, "eos_token_id": full.get("eos_token_id")}, "x") == read_config(full, "x")
