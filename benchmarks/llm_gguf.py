"""A Llama of random weights as GGUF, for llama.cpp and what descends from it, by the `gguf` package.

Matrices are float32, Q8_0 (8.5 bits) or Q4_0 (4.5 bits, one half-precision scale per 32 weights); the head's precision is
given apart, so that effective bits per weight can be made those of another engine. The tokenizer is a SentencePiece-like
list of specials, bytes and fillers: prompts are given as token ids.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

from benchmarks.llm_weights import NORM_EPS, NUM_SPECIAL, ROPE_THETA, interleaved, tensors, words
from ecotone.llm.config import DecoderConfig

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32, "8": gguf.GGMLQuantizationType.Q8_0, "4": gguf.GGMLQuantizationType.Q4_0,
}  # fmt: skip
FILE_TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "8": gguf.LlamaFileType.MOSTLY_Q8_0, "4": gguf.LlamaFileType.MOSTLY_Q4_0}
BITS = {"f32": 32.0, "8": 8.5, "4": 4.5}
NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def write(path: Path, config: DecoderConfig, seed: int, precision: str, head: str) -> float:
    """Write the file; returns effective bits per weight of the matrices that a token is multiplied with."""
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, config, precision)
    bits = weights = 0.0
    for name, tensor in tensors(config, seed):
        parts = name.removesuffix(".weight").split(".")
        kind = NAMES[parts[-1]]
        target = f"blk.{parts[1]}.{kind}.weight" if parts[0] == "layers" else f"{kind}.weight"
        if kind in ("attn_q", "attn_k"):
            tensor = interleaved(tensor, config.num_heads if kind == "attn_q" else config.num_kv_heads)
        stored = "f32" if tensor.dim() == 1 else head if kind == "output" else precision
        if tensor.dim() == 2 and kind != "token_embd":
            bits, weights = bits + BITS[stored] * tensor.numel(), weights + tensor.numel()
        add(writer, target, tensor, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return bits / weights


def add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, stored: str) -> None:
    """One tensor in precision `stored`."""
    values = tensor.contiguous().numpy()
    if stored == "f32":
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quantize(values, TYPES[stored]), raw_dtype=TYPES[stored])


def describe(writer: gguf.GGUFWriter, config: DecoderConfig, precision: str) -> None:
    """Shape, and a tokenizer that no prompt is put through."""
    writer.add_name("random llama")
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(config.vocabulary)
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    fillers = words(config.vocabulary - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *fillers])
    writer.add_token_scores([-float(index) for index in range(config.vocabulary)])
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * len(fillers)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(NUM_SPECIAL - 1)
    writer.add_add_bos_token(False)
