"""Small random models of every family, as Hugging Face directories, and what transformers computes with them.

The oracle of the tests of decoders and of benchmarks/llm_exact.py. Random numbers stand in every parameter, norms and
biases too, so that nothing that is left out goes unseen. `wide` has matrices as large as those that are kept on disk packed.
"""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LAYERS, VOCABULARY = 3, 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "attn_implementation": "eager",
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "rope_theta": 10_000.0,
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "num_key_value_heads": 1}),
    "llama-tied-llama3": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama-dynamic": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 16},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2}),
    "phi3": ("Phi3Config", {"sliding_window": 11}),
    "phi3-longrope": ("Phi3Config", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": LAYERS, "n_head": 4, "n_positions": 256, "bos_token_id": None},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 24,
         "mlp_only_layers": [1]},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16},
    ),
}  # fmt: skip
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "wide": (
        "LlamaConfig",
        {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4},
    ),
}  # fmt: skip
# Their rotation depends on the length of the one sequence: what transformers makes of one is ours with that `context`.
BY_LENGTH = frozenset({"llama-dynamic", "phi3-longrope"})


def make(name: str, folder: Path) -> torch.nn.Module:
    """A model of family `name` with random numbers in every parameter, saved in `folder`."""
    kind, options = (FAMILIES | WIDE)[name]
    sizes = {"attn_implementation": "eager", "eos_token_id": None} if kind == "GPT2Config" else SIZES
    config = getattr(transformers, kind)(**(sizes | options))
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.3 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
        if "gemma" in name:  # it scales what it embeds, so that a token would foretell itself whatever the layers do
            model.get_input_embeddings().weight.mul_(0.2)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def reference(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one sequence in one pass."""
    return model(ids[None], use_cache=False).logits[0]
