"""From a torch.nn.Module to one flat functional graph: torch.export, then only the rewriting that cutting needs.

The export's own operators are kept, because they call the kernels that the module calls: in-place operators become their
twins that return, dropout outside training and assertions vanish, regions without gradient are inlined. Only where memory
is mutated through views does the graph go through `run_decompositions({})`, which makes it functional. Whatever is left
that cannot be cut (control flow, random numbers, writes to buffers) is refused with its operator and source line.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ecotone.model.errors import ModelError

__all__ = ["Exported", "export", "source_line"]

_aten = torch.ops.aten
_TORCH_FOLDER = str(Path(torch.__file__).parent)
_IDENTITIES = {"detach", "detach_", "alias", "lift_fresh", "lift_fresh_copy"}
_DROPOUTS = {"dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_ASSERTIONS = {
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size", "sym_constrain_range",
    "_assert_data_dependent",
}  # fmt: skip
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_RANDOM_ONLY_IN_TRAINING = (*_RECURRENT, "scaled_dot_product_attention", "rrelu")
_UNSET = {"empty": "zeros", "new_empty": "new_zeros", "empty_like": "zeros_like"}
_CONSTANT_KINDS = ("PARAMETER", "BUFFER", "CONSTANT_TENSOR")


class Exported:
    """An exported program whose graph is functional: `graph_module`, its signature, its weights by placeholder name."""

    def __init__(self, program: ExportedProgram, graph_module: GraphModule):
        self.program = program
        self.graph_module = graph_module

    @property
    def parameters(self) -> frozenset[str]:
        """Qualified names of what training may change; buffers and constants are not among them."""
        specs = self.program.graph_signature.input_specs
        return frozenset(str(spec.target) for spec in specs if spec.kind.name == "PARAMETER")

    def weight(self, placeholder: str) -> tuple[str, torch.Tensor] | None:
        """(qualified name, tensor) of a placeholder that is a parameter, buffer or constant; None for an input."""
        for spec in self.program.graph_signature.input_specs:
            if getattr(spec.arg, "name", None) == placeholder and spec.kind.name in _CONSTANT_KINDS:
                target = str(spec.target)
                found = self.program.state_dict.get(target, self.program.constants.get(target))
                if not isinstance(found, torch.Tensor):
                    raise ModelError(f"{target}: is a {type(found).__name__}, not a tensor; keep it out of forward")
                return target, found
        return None


def export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool) -> Exported:
    """Export `model`; raises ModelError naming operator, source line and remedy where it cannot be captured."""
    _refuse_training(model)
    program = _export(model, args, kwargs, dynamic_batch)
    graph_module = _clean(program)
    if not _make_functional(graph_module):
        program = _decompose(program)
        graph_module = _clean(program)
    _refuse_writes(program, graph_module)
    graph_module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return Exported(program, graph_module)


def source_line(node: Node) -> str:
    """ "file.py:12 (y = x.nonzero())" of the user's line that made a node, or "" where it is not known."""
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    places = [number for number, line in enumerate(lines) if line.strip().startswith("File ")]
    for number in reversed(places):
        if _TORCH_FOLDER not in lines[number] and "<eval_with_key>" not in lines[number]:
            file, line = lines[number].split('"')[1], lines[number].split(", line ")[1].split(",")[0]
            code = lines[number + 1].strip() if number + 1 < len(lines) else ""
            return f"{Path(file).name}:{line} ({code[:80]})"
    return ""


def at(node: Node) -> str:
    """ " at file.py:12 (code)", or "" """
    place = source_line(node)
    return f" at {place}" if place else ""


def _refuse_training(model: torch.nn.Module) -> None:
    if isinstance(model, GraphModule) or type(model).__name__ == "_LazyGraphModule":
        return
    for name, module in model.named_modules():
        if module.training:
            where = f"its part {name!r} ({type(module).__name__})" if name else f"model {type(model).__name__}"
            raise ModelError(f"{where} is in training mode; call model.eval() before capture")


def _export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool) -> ExportedProgram:
    shapes: Any = None
    if dynamic_batch:
        batch, shapes = torch.export.Dim("batch", min=2), torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
                shapes[leaf] = {0: batch}
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _explain(model, error, dynamic_batch) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export prints pages beside the error that it raises; ours is one line."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _explain(model: torch.nn.Module, error: Exception, dynamic_batch: bool) -> ModelError:
    """One line out of an error of torch.export, which may be pages long."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _TORCH_FOLDER not in f.filename]
    user = [f for f in frames if not f.filename.endswith("ecotone/model/export.py")]
    place = f" at {Path(user[-1].filename).name}:{user[-1].lineno} ({(user[-1].line or '')[:80]})" if user else ""
    text = " ".join(str(error).split())
    name = type(model).__name__
    if "GuardOnDataDependent" in type(error).__name__ or "data-dependent" in text.lower():
        what = "what it does next depends on the values of a tensor"
        remedy = "replace the Python if, loop, .item() or index by torch.where, masking or a fixed size"
    elif dynamic_batch and ("onstraint" in text or "Dim" in text or "specializ" in text):
        text = re.sub(r'For more information, run with TORCH_LOGS="\+dynamic"\. ?-? ?', "", text)
        what = "its code does not work for every batch size: " + text[:160]
        remedy = "use x.shape[0] in place of a fixed number, or capture without dynamic_batch"
    elif isinstance(error, TypeError | ValueError) and user == []:
        what, remedy = text[:200], "check that the example inputs fit the model's forward"
    else:
        what = f"{type(error).__name__}: {text[:200]}"
        remedy = "check that the example inputs fit, and that forward uses only tensors and plain Python"
    return ModelError(f"model {name} cannot be captured{place}: {what}; {remedy}")


def _decompose(program: ExportedProgram) -> ExportedProgram:
    try:
        with torch.no_grad(), _quiet():
            decomposed: ExportedProgram = program.run_decompositions({})
            return decomposed
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the exported graph cannot be made functional: {text}; write it without in-place changes"
        ) from error


def _clean(program: ExportedProgram) -> GraphModule:
    """A copy of the graph with regions inlined, and identities, assertions and dropouts gone."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(program.graph_module.graph, {}))
    module = GraphModule(program.graph_module, graph)
    _inline_regions(module)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        name = _packet(node)
        if name in _ASSERTIONS:
            module.graph.erase_node(node)
        elif name in _IDENTITIES or (name in _DROPOUTS and not _argument(node, "train", 2)):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif name in _UNSET:
            node.target = _zeros_for(node)
        else:
            _refuse_operator(node, name)
    return module


def _inline_regions(module: GraphModule) -> None:
    """Copy the bodies of no_grad and disabled autocast regions into the graph; refuse other control flow."""
    found = True
    while found:
        found = False
        for node in list(module.graph.nodes):
            if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
                continue
            name = str(node.target)
            if "set_grad_enabled" in name:
                body, operands = node.args[1], node.args[2:]
            elif "autocast" in name and not node.args[2]:
                body, operands = node.args[4], node.args[5:]
            else:
                raise _region_error(module, node, name)
            assert isinstance(body, Node)
            _inline(module, node, getattr(module, str(body.target)), operands)
            found = True


def _region_error(module: GraphModule, call: Node, name: str) -> ModelError:
    bodies = [getattr(module, str(arg.target), None) for arg in call.args if isinstance(arg, Node) and arg.op == "get_attr"]
    inner = [node for body in bodies if isinstance(body, GraphModule) for node in body.graph.nodes]
    place = next(filter(None, map(at, (call, *inner))), "")
    remedy = "convert the whole model instead (model.bfloat16())" if "autocast" in name else "write it with torch.where"
    return ModelError(f"operator {name}{place} holds a graph of its own and cannot be cut; {remedy}")


def _inline(module: GraphModule, call: Node, body: GraphModule, operands: tuple[Any, ...]) -> None:
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    mapping = dict(zip(placeholders, operands, strict=True))
    for node in body.graph.nodes:
        if node.op == "get_attr":
            name = f"{call.name}_{node.target}"
            setattr(module, name, getattr(body, str(node.target)))
    with module.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                mapping[node] = module.graph.get_attr(f"{call.name}_{node.target}")
                mapping[node].meta = dict(node.meta)
        result = module.graph.graph_copy(body.graph, mapping)
    for user in list(call.users):
        value: Any = result[user.args[1]] if _packet(user) == "getitem" else result  # type: ignore[index]
        user.replace_all_uses_with(value)
        module.graph.erase_node(user)
    module.graph.erase_node(call)


def _packet(node: Node) -> str:
    """ "relu" of aten.relu.default; the function's name otherwise."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def _argument(node: Node, name: str, position: int) -> Any:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else None)


def _zeros_for(node: Node) -> Any:
    name = _UNSET[_packet(node)]
    if name == "zeros":
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
        return _aten.zeros.default
    return getattr(getattr(_aten, name), "default")  # noqa: B009


def _refuse_operator(node: Node, name: str) -> None:
    target = node.target
    training = (
        (name == "batch_norm" and _argument(node, "training", 5))
        or name in _DROPOUTS
        or (name == "scaled_dot_product_attention" and (_argument(node, "dropout_p", 4) or 0.0) > 0)
        or (name in _RECURRENT and _trains(node))
    )
    if training:
        raise ModelError(f"operator {target}{at(node)} runs in training mode; call model.eval() and pass training=False")
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    if torch.Tag.nondeterministic_seeded in tags and name not in _RANDOM_ONLY_IN_TRAINING:
        raise ModelError(f"operator {target}{at(node)} draws random numbers; make them an input of the model")
    if torch.Tag.data_dependent_output in tags:
        raise ModelError(f"operator {target}{at(node)} reads a tensor's value into Python; keep it a tensor")
    if node.meta.get("unbacked_bindings") or (torch.Tag.dynamic_output_shape in tags and not _is_plain_index(node)):
        hint = "use masking (torch.where) or topk with a fixed size"
        raise ModelError(f"operator {target}{at(node)} makes a result whose size depends on the data; {hint}")


def _is_plain_index(node: Node) -> bool:
    """Whether it is x[i, j] by numbers; a mask as index would make a size out of values."""
    if _packet(node) not in ("index", "_unsafe_index"):
        return False
    indices = [arg.meta.get("val") for arg in node.all_input_nodes[1:]]
    return all(value.dtype not in (torch.bool, torch.uint8) for value in indices if isinstance(value, torch.Tensor))


def _trains(node: Node) -> bool:
    """lstm.input(..., dropout, train, ...): only an actual dropout draws numbers."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return bool(values.get("train")) and bool(values.get("dropout"))


def _mutating(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _make_functional(module: GraphModule) -> bool:
    """Replace every in-place operator by its twin that returns; False where one has none that is sure to be right."""
    for node in list(module.graph.nodes):
        if not _mutating(node):
            continue
        order = {other: number for number, other in enumerate(module.graph.nodes)}
        twin = _twin(node, order)
        if twin is None:
            return False
        changed = node.args[0]
        assert isinstance(changed, Node)
        node.target = twin
        for user in [user for user in changed.users if order[user] > order[node]]:
            user.replace_input_with(changed, node)
    return True


def _twin(node: Node, order: dict[Node, int]) -> Any:
    """The returning twin of an in-place operator on memory that nothing else sees; None where that is not so."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name, overload = _packet(node), target._overloadname
    packet = getattr(_aten, name.removesuffix("_"), None)
    changed = node.args[0] if node.args else None
    if not name.endswith("_") or packet is None or overload not in packet.overloads() or not isinstance(changed, Node):
        return None
    written = [
        argument.name for argument in target._schema.arguments if argument.alias_info and argument.alias_info.is_write
    ]
    if len(written) != 1 or changed.op != "call_function" or (_shares_memory(changed) and not _mutating(changed)):
        return None
    if any(_shares_memory(user) and user is not node and order[user] < order[node] for user in changed.users):
        return None
    values = [arg.meta.get("val") for arg in node.all_input_nodes]
    if len({value.dtype for value in values if isinstance(value, torch.Tensor)}) != 1:
        return None
    twin = getattr(packet, overload)
    return None if twin._schema.is_mutable else twin


def _shares_memory(node: Node) -> bool:
    """Whether the node's result may be memory of an argument."""
    if node.op == "output":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return _packet(node) == "getitem"
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _refuse_writes(program: ExportedProgram, module: GraphModule) -> None:
    signature = program.graph_signature
    for what, table in (("buffer", signature.buffers_to_mutate), ("input", signature.user_inputs_to_mutate)):
        for output, target in table.items():
            found = [node for node in module.graph.nodes if node.name == output]
            place = at(found[0]) if found else ""
            remedy = "return the new value as an output and pass it in as an input"
            raise ModelError(f"the model writes to its {what} {target!r}{place}: a segment keeps no state; {remedy}")
    for node in module.graph.nodes:
        if _mutating(node):
            raise ModelError(f"operator {node.target}{at(node)} changes memory in place; use its form that returns")


def user_outputs(exported: Exported) -> Iterator[tuple[str, Any]]:
    """(name, fx node or constant) of each leaf that the model returns."""
    (output,) = [node for node in exported.graph_module.graph.nodes if node.op == "output"]
    for spec, value in zip(exported.program.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind.name == "USER_OUTPUT":
            yield getattr(spec.arg, "name", ""), value
