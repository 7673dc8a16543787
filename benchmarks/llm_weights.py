"""The random Llama of the peers' benchmarks, tensor by tensor under its Hugging Face names, and as a Hugging Face folder.

Every engine reads the same numbers, each in its own format (llm_gguf.py, llm_distributed_llama_file.py). The head rows of
specials, bytes and the last two tokens are zero, so that greedy text never holds one that some engine takes for an end, or
holds back because its text is no whole character.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ecotone.llm.config import DecoderConfig
from ecotone.llm.recipes import span_recipes
from ecotone.llm.weights import RandomWeights
from ecotone.llmplan import Span

NUM_SPECIAL = 3  # unknown, begin, end
NUM_SILENT = NUM_SPECIAL + 256  # and single bytes
ROPE_THETA, NORM_EPS = 10_000.0, 1e-5


def tensors(config: DecoderConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name without "model.", float32 tensor) of a Llama: embedding, layers in order, final norm, head."""
    source = RandomWeights(config=config, seed=seed)
    before, layers, after = span_recipes(config, Span(start=0, stop=config.num_layers, embedding=True, head=True))
    heights = {"q_proj": config.query_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    for recipe in [*before, *(r for layer in layers for r in layer), *after]:
        whole = source.read(recipe)
        if recipe.name == "head.weight":
            whole[:NUM_SILENT] = whole[-2:] = 0
        kinds = [name.removesuffix(".weight").rsplit(".", 1)[-1] for name in recipe.sources]
        rows = [heights.get(kind, whole.shape[0] // len(kinds)) for kind in kinds]
        yield from zip(recipe.sources, whole.split(rows), strict=True)


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a q or k projection for engines that rotate neighbours instead of halves: 0, n/2, 1, n/2 + 1, ... per head."""
    half = weight.shape[0] // num_heads // 2
    return weight.view(num_heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)


def hugging_face_config(config: DecoderConfig) -> dict[str, Any]:
    """config.json of the model."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocabulary,
        "hidden_size": config.width, "intermediate_size": config.ffn_width, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "hidden_act": "silu",
        "max_position_embeddings": config.max_positions, "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def write_folder(folder: Path, config: DecoderConfig, seed: int) -> None:
    """config.json and model.safetensors, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {n if n == "lm_head.weight" else f"model.{n}": t.contiguous() for n, t in tensors(config, seed)}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config), indent=1) + "\n")


def words(count: int) -> list[str]:
    """`count` different words of eight letters, none of which is two others joined."""
    letters = "abcdefghijklmnop"
    return ["".join(letters[(number >> (4 * place)) & 15] for place in range(8)) for number in range(count)]
