"""A span of a decoder as an OpenVINO model with paged attention, built operator by operator (no tracing).

The graph is first written with keys and values as model state, in the pattern that OpenVINO's own pass turns into its
PagedAttention operator: then one call computes a ragged batch over the very blocks of our KvCache, and rolling back or
sharing a prefix needs nothing from the model. Rotary angles come in as inputs, so every scaling is the one of `rope.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ecotone.llm.config import DecoderConfig, LayerConfig
from ecotone.llmplan import Span

__all__ = ["arrays", "build", "paged", "unsupported"]

Read = Callable[[str], Any]
"""Canonical name of the layer or end at hand -> float32 or float16 array, None where the span has none."""

WINDOW_INPUT = 10  # of OpenVINO's PagedAttention operator


def unsupported(config: DecoderConfig) -> str:
    """ "" when `build` knows every option of `config`, else which it does not."""
    if any(layer.sparse for layer in config.layers):
        return "experts are not computed by OpenVINO shards; use torch or native"
    if config.attention_softcap:
        return "soft-capped attention is not computed by OpenVINO's paged attention; use torch or native"
    return ""


def paged(ov: Any, model: Any, layers: tuple[LayerConfig, ...]) -> None:
    """Turn the state of `model` into paged attention, with each layer's window."""
    from openvino._offline_transformations import paged_attention_transformation

    if not layers:
        return
    paged_attention_transformation(model)
    found = [op for op in model.get_ordered_ops() if op.get_type_name() == "PagedAttentionExtension"]
    # Operators come in the order of layers, because each needs the one before.
    for operator, layer in zip(found, layers, strict=True):
        if layer.window:
            window = ov.opset13.constant(np.array(layer.window, dtype=np.int32))
            operator.input(WINDOW_INPUT).replace_source_output(window.output(0))
    model.validate_nodes_and_infer_types()


def build(ov: Any, config: DecoderConfig, span: Span, layers: list[Read], ends: Read) -> Any:
    """The stateful model of `span` (without its embedding): hidden states in, hidden states or logits out."""
    graph = _Graph(ov, config)
    x = hidden = graph.parameter("inputs_embeds", [-1, -1, config.width])
    for index, read in enumerate(layers):
        hidden = graph.layer(hidden, index, config.layers[span.start + index], read)
    if span.head:
        wanted = graph.parameter("wanted", [-1], "i32")
        hidden = graph.op.gather(hidden, wanted, graph.op.constant(0))
        hidden = graph.linear(graph.norm(hidden, "final_norm", ends), "head", ends)
        if config.logit_softcap:
            cap = graph.number(config.logit_softcap)
            hidden = graph.op.multiply(graph.op.tanh(graph.op.divide(hidden, cap)), cap)
    return ov.Model([graph.op.result(hidden)], graph.sinks, [x, *graph.parameters[1:]], "shard")


class _Graph:
    """Operators in the making; `x` has shape (batch, time, width) until paged() makes that (tokens, 1, width)."""

    def __init__(self, ov: Any, config: DecoderConfig):
        self.ov, self.op, self.config = ov, ov.opset13, config
        self.parameters: list[Any] = []
        self.sinks: list[Any] = []
        self._shared: dict[str, Any] = {}

    def parameter(self, name: str, shape: list[int], kind: str = "f32") -> Any:
        made = self.op.parameter(shape, getattr(self.ov.Type, kind), name=name)
        made.output(0).set_names({name})
        self.parameters.append(made)
        return made

    def shared(self, name: str, shape: list[int], kind: str = "f32") -> Any:
        if name not in self._shared:
            self._shared[name] = self.parameter(name, shape, kind)
        return self._shared[name]

    def number(self, value: float) -> Any:
        return self.op.constant(np.array(value, dtype=np.float32))

    def wide(self, value: np.ndarray[Any, Any]) -> Any:
        made = self.op.constant(value)
        return made if value.dtype == np.float32 else self.op.convert(made, "f32")

    def linear(self, x: Any, name: str, read: Read) -> Any:
        y = self.op.matmul(x, self.wide(read(f"{name}.weight")), False, True)
        bias = read(f"{name}.bias")
        return y if bias is None else self.op.add(y, self.op.constant(bias.astype(np.float32)))

    def norm(self, x: Any, name: str, read: Read, own: str = "") -> Any:
        op, epsilon = self.op, self.config.norm_epsilon
        weight, bias = self.op.constant(read(own or f"{name}.weight")), read(f"{name}.bias")
        last = op.constant(np.array([-1], dtype=np.int64))
        if bias is not None:
            return op.add(op.multiply(op.mvn(x, last, True, epsilon, "inside_sqrt"), weight), op.constant(bias))
        mean = op.reduce_mean(op.power(x, self.number(2)), last, True)
        scale = op.divide(self.number(1), op.sqrt(op.add(mean, self.number(epsilon))))
        return op.multiply(weight, op.multiply(x, scale))

    def layer(self, x: Any, index: int, kind: LayerConfig, read: Read) -> Any:
        config, op = self.config, self.op
        normed = self.norm(x, "attention_norm", read)
        attended = self.linear(self.attention(self.linear(normed, "qkv", read), index, kind, read), "output", read)
        if config.parallel:
            return op.add(op.add(x, attended), self.feed_forward(normed, read))
        if config.post_norms:
            attended = self.norm(attended, "attention_post_norm", read)
        x = op.add(x, attended)
        made = self.feed_forward(self.norm(x, "ffn_norm", read), read)
        return op.add(x, self.norm(made, "ffn_post_norm", read) if config.post_norms else made)

    def feed_forward(self, x: Any, read: Read) -> Any:
        inner = self.linear(x, "gate_up", read)
        if not self.config.gated:
            return self.linear(self.activate(inner), "down", read)
        gate, up = self.split(inner, [self.config.ffn_width] * 2)
        return self.linear(self.op.multiply(self.activate(gate), up), "down", read)

    def activate(self, x: Any) -> Any:
        kind = self.config.activation
        if kind == "silu":
            return self.op.swish(x)
        if kind == "relu":
            return self.op.relu(x)
        return self.op.gelu(x, "tanh" if kind == "gelu_tanh" else "erf")

    def split(self, x: Any, sizes: list[int]) -> list[Any]:
        made = self.op.variadic_split(x, self.op.constant(-1), self.op.constant(sizes))
        return [made.output(i) for i in range(len(sizes))]

    def heads(self, x: Any, count: int) -> Any:
        shape = self.op.constant([0, 0, count, self.config.head_size])
        return self.op.reshape(x, shape, True)

    def attention(self, qkv: Any, index: int, kind: LayerConfig, read: Read) -> Any:
        config, op = self.config, self.op
        q, k, v = self.split(qkv, [config.query_size, config.kv_size, config.kv_size])
        q, k = self.heads(q, config.num_heads), self.heads(k, config.num_kv_heads)
        if config.qk_norm:
            q, k = self.norm(q, "", read, "q_norm"), self.norm(k, "", read, "k_norm")
        order = op.constant([0, 2, 1, 3])
        q, k, v = op.transpose(q, order), op.transpose(k, order), op.transpose(self.heads(v, config.num_kv_heads), order)
        if kind.rope >= 0:
            q, k = self.rotated(q, kind.rope), self.rotated(k, kind.rope)
        keys, values = self.remembered(k, f"keys.{index}"), self.remembered(v, f"values.{index}")
        mask = self.shared("attention_mask", [-1, 1, -1, -1])
        made = op.scaled_dot_product_attention(q, keys, values, mask, self.number(config.scale))
        return op.reshape(op.transpose(made, order), op.constant([0, 0, config.query_size]), True)

    def rotated(self, x: Any, rope: int) -> Any:
        op, size = self.op, self.config.ropes[rope].rotary_size
        rest = self.config.head_size - size
        turned, kept = self.split(x, [size, rest]) if rest else (x, None)
        cos, sin = (op.unsqueeze(self.shared(f"{n}.{rope}", [-1, -1, size]), op.constant(1)) for n in ("cos", "sin"))
        first, second = self.split(turned, [size // 2] * 2)
        half = op.concat([op.multiply(second, self.number(-1)), first], -1)
        made = op.add(op.multiply(turned, cos), op.multiply(half, sin))
        return made if kept is None else op.concat([made, kept], -1)

    def remembered(self, x: Any, name: str) -> Any:
        """`x` appended to the state `name`, and repeated for the query heads that share it."""
        config, op = self.config, self.op
        from openvino.opset6 import assign, read_value

        beams = self.shared("beam_idx", [-1], "i32")
        batch = op.gather(op.shape_of(self.parameters[0]), op.constant([0]), op.constant(0))
        empty = op.broadcast(self.number(0), op.concat([batch, op.constant([config.num_kv_heads, 0, config.head_size])], 0))
        shape = self.ov.PartialShape([-1, config.num_kv_heads, -1, config.head_size])
        past = op.gather(read_value(empty, name, self.ov.Type.f32, shape), beams, op.constant(0))
        whole = op.concat([past, x], 2)
        self.sinks.append(assign(whole, name))
        shared = config.num_heads // config.num_kv_heads
        if shared == 1:
            return whole
        sizes = op.shape_of(whole)
        front, back = (op.gather(sizes, op.constant(part), op.constant(0)) for part in ([0, 1], [2, 3]))
        repeated = op.broadcast(op.unsqueeze(whole, op.constant(2)), op.concat([front, op.constant([shared]), back], 0))
        return op.reshape(repeated, op.constant([0, config.num_heads, -1, config.head_size]), True)


def arrays(tensors: Mapping[str, np.ndarray[Any, Any]]) -> Read:
    """A `Read` of tensors by canonical name."""
    return lambda name: tensors.get(name)
