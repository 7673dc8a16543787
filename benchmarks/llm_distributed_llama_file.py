"""A Llama of random weights as distributed-llama reads it: `.m` (weights) and `.t` (tokenizer), by the format's description.

`.m`: int32 magic, int32 header size with both words, int32 (key, value) pairs, then nameless tensors: embedding float32; per
layer q, k, v, o, gate, down, up in the weight type and two norms; final norm; head in the weight type. Rows of q and k are
those of an engine that rotates neighbours. Q40 has the bytes of GGUF's Q4_0. `.t`: one token per printable character, so
that a prompt of n characters is n tokens, then fillers, begin and end.
"""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import torch

from benchmarks.llm_weights import ROPE_THETA, interleaved, tensors, words
from ecotone.llm.config import DecoderConfig

MODEL_MAGIC, TOKENIZER_MAGIC, LLAMA, SILU = 0xA00ABCD, 0x567124, 0xABCD00, 1
WEIGHT_TYPES = {"f32": 0, "4": 2}
NORM_EPS_CODE = 5  # 1e-5
CHARACTERS = [chr(code) for code in (10, *range(32, 127))]
PAIR = "[/"  # one token of two characters: version 0.16.4 reads one past a prompt that no merge has shortened
END = "\x7f" * 4  # no text holds it
TEMPLATE = b"[INST]"  # what it knows the Llama 2 chat template by
LAYER_ORDER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj",
    "mlp.up_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip


def write_model(path: Path, config: DecoderConfig, seed: int, precision: str) -> None:
    """Write `.m` with matrices in `precision`, "f32" or "4"."""
    pairs = {
        0: 1, 1: LLAMA, 2: config.width, 3: config.ffn_width, 4: config.num_layers, 5: config.num_heads,
        6: config.num_kv_heads, 7: 0, 8: 0, 9: config.vocabulary, 10: config.max_positions, 11: SILU, 12: int(ROPE_THETA),
        13: WEIGHT_TYPES[precision], 19: config.head_size, 20: NORM_EPS_CODE,
    }  # fmt: skip
    header = [value for pair in pairs.items() for value in pair]
    with path.open("wb") as file:
        file.write(struct.pack(f"<{2 + len(header)}i", MODEL_MAGIC, 4 * (2 + len(header)), *header))
        layer: dict[str, torch.Tensor] = {}
        for name, tensor in tensors(config, seed):
            kind = name.removesuffix(".weight")
            if not kind.startswith("layers."):
                file.write(packed(tensor, "f32" if kind != "lm_head" else precision))
                continue
            layer[kind.split(".", 2)[2]] = tensor
            if len(layer) == len(LAYER_ORDER):
                for part in LAYER_ORDER:
                    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}.get(part)
                    file.write(packed(interleaved(layer[part], heads) if heads else layer[part], precision))
                layer = {}


def packed(tensor: torch.Tensor, precision: str) -> bytes:
    """The tensor's bytes; vectors are always float32."""
    values = tensor.contiguous().numpy()
    if precision == "f32" or tensor.dim() == 1:
        return values.tobytes()
    return gguf.quantize(values, gguf.GGMLQuantizationType.Q4_0).tobytes()


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """Write `.t`: characters, fillers, then begin and end, the last two ids."""
    pieces = [*CHARACTERS, PAIR, *words(vocabulary - len(CHARACTERS) - 3), "\x7f", END]
    begin, end = vocabulary - 2, vocabulary - 1
    pairs = {0: 1, 1: vocabulary, 2: max(map(len, pieces)), 3: begin, 7: len(TEMPLATE), 9: 1, 10: 0}
    header = [value for pair in pairs.items() for value in pair]
    with path.open("wb") as file:
        file.write(struct.pack(f"<{2 + len(header)}i", TOKENIZER_MAGIC, 4 * (2 + len(header)), *header))
        file.write(TEMPLATE + struct.pack("<i", end))
        for index, piece in enumerate(pieces):
            text = piece.encode()
            file.write(struct.pack("<fI", -float(index), len(text)) + text)


def chat_message(num_tokens: int, salt: int) -> str:
    """A message that makes a prompt of `num_tokens` tokens inside the Llama 2 template; `salt` makes it another one."""
    wrapped = num_tokens - len("[INST] ") - (len(" [/INST]") - 1) - 1
    if wrapped < 8:
        raise ValueError(f"a prompt of {num_tokens} tokens does not hold the chat template")
    return (f"{salt:06d} " + "abcdefghijklmnop " * (wrapped // 17 + 1))[:wrapped]
