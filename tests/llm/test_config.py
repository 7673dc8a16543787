"""Configurations: what is refused and how; any JSON gives a model or a ModelError, never another error."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ecotone
from ecotone.decoding.step import Row, Step
from ecotone.llm.config import DecoderConfig, LayerConfig, ModelError
from ecotone.llm.families import SUPPORTED, load_config, read_config
from ecotone.llm.recipes import span_recipes, weight_bytes
from ecotone.llmplan import Span
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure

LLAMA2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000,
    "num_hidden_layers": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["config", "families", "recipes"])
def test_what_a_planner_reads_needs_no_torch(name: str) -> None:
    tree = ast.parse((Path(ecotone.__file__).parent / "llm" / f"{name}.py").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = [n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in found]
    ours = {module.removeprefix("ecotone.llm.") for module in imported if module and module.startswith("ecotone.llm.")}
    assert not {"torch", "transformers", "numpy"} & {str(module).split(".")[0] for module in imported}
    assert ours <= {"config", "families", "recipes"}


def test_a_known_model_has_its_known_size() -> None:
    config = read_config(LLAMA2_7B, "here")
    whole = Span(start=0, stop=32, embedding=True, head=True)
    # 6,738,415,616 parameters is the published count; in two bytes each.
    before, layers, after = span_recipes(config, whole)
    assert sum(r.num_elements for part in (before, *layers, after) for r in part) == 6_738_415_616
    assert weight_bytes(config, whole, 16, 2) == 2 * 6_738_415_616
    assert config.kv_bytes_per_token(32, 2) == 2 * 32 * 4096 * 2
    assert config.stop_tokens == (2,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported; supported: llama"),
        ({"model_type": None}, "architecture None"),
        ({"hidden_act": "xielu"}, "activation 'xielu'"),
        ({"quantization_config": {"bits": 4}}, "already quantised"),
        ({"rope_scaling": {"type": "abf"}}, "rope type 'abf'"),
        ({"rope_scaling": 3}, "rope_scaling is 3, not an object"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers is '12', not a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 5}, "32 heads do not divide into 5"),
        ({"attention_bias": 1}, "attention_bias is 1, not true or false"),
        ({"vocab_size": -4}, "vocabulary is -4"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
    ],
)
def test_what_is_not_supported_is_named_on_one_line(change: dict[str, object], words: str) -> None:
    with pytest.raises(EcotoneError) as caught:
        read_config(LLAMA2_7B | change, "models/x")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_that_change_the_result_are_refused() -> None:
    for document in (
        {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
        {"model_type": "gpt2", "scale_attn_weights": False},
        {"model_type": "phi", "qk_layernorm": True},
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        {"model_type": "qwen2", "layer_types": ["linear_attention"] * 32},
    ):
        with pytest.raises(ModelError):
            read_config(document, "x")


def test_old_and_new_spelling_of_rope_mean_the_same() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    old = read_config(LLAMA2_7B | {"rope_theta": 5e5, "rope_scaling": scaling}, "x")
    new = read_config(LLAMA2_7B | {"rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 5e5}}, "x")
    assert old == new
    assert old.ropes[0].theta == 5e5


def test_text_part_of_a_model_that_also_sees() -> None:
    text = {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 512}
    config = read_config({"model_type": "gemma3", "text_config": text}, "x")
    assert [layer.window for layer in config.layers] == [512] * 5 + [0, 512]
    assert [layer.rope for layer in config.layers] == [1] * 5 + [0, 1]


NAMES = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "vocab_size",
    "rope_scaling", "rope_parameters", "sliding_window", "eos_token_id", "hidden_act", "num_experts", "n_embd", "n_head",
    "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "mlp_only_layers", "query_pre_attn_scalar",
    "decoder_sparse_step", "sliding_window_pattern", "final_logit_softcapping", "partial_rotary_factor", "layer_types",
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.text(max_size=4))
ROPES = st.one_of(
    st.integers(-2, 9), st.floats(), st.sampled_from(["yarn", "longrope", "linear"]), st.lists(st.floats(), max_size=2)
)
ROPE_NAMES = st.sampled_from(["rope_type", "type", "factor", "short_factor", "rope_theta", "full_attention"])
VALUES = st.one_of(SCALARS, st.lists(st.integers(-1, 5), max_size=3), st.dictionaries(ROPE_NAMES, ROPES))


@given(st.sampled_from(SUPPORTED), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6))
def test_any_document_gives_a_model_or_a_clear_error(family: str, changes: dict[str, object]) -> None:
    try:
        config = read_config({"model_type": family, **changes}, "x")
    except EcotoneError:
        return
    assert config.num_layers >= 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_configuration(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match="JSON"):
        load_config(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        load_config(tmp_path / "nowhere")


def test_stop_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 99_999_999]}))
    assert load_config(tmp_path).stop_tokens == (2, 7)


def test_spans_and_steps_refuse_nonsense() -> None:
    for build in (
        lambda: Span(start=2, stop=1),
        lambda: Span(start=1, stop=1),
        lambda: Row(slot=-1, start=0, count=1),
        lambda: Row(slot=0, start=0, count=0),
        lambda: Row(slot=0, start=0, count=1, num_logits=2),
        lambda: Step(rows=()),
        lambda: Step(rows=(Row(slot=0, start=0, count=1), Row(slot=0, start=1, count=1))),
        lambda: DecoderConfig(
            family="x", vocabulary=1, width=1, num_heads=1, num_kv_heads=1, head_size=1, ffn_width=1, max_positions=1,
            layers=(LayerConfig(rope=0),),
        ),
    ):  # fmt: skip
        with pytest.raises(EcotoneError):
            build()


def test_flat_places_of_a_ragged_step() -> None:
    step = Step(
        rows=(
            Row(slot=4, start=7, count=3, num_logits=2),
            Row(slot=1, start=0, count=2),
            Row(slot=2, start=5, count=1, num_logits=1),
        )
    )
    assert step.offsets == (0, 3, 5, 6)
    assert step.positions() == [7, 8, 9, 0, 1, 5]
    assert step.logit_indices() == [1, 2, 5]
