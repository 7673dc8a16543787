"""Every executor against the segment's own eager float32 module; what they cannot do is said in one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ecotone import executors
from ecotone.executors import ExecutorError, onnxruntime, openvino
from ecotone.model import capture

pytestmark = pytest.mark.torch

# Rounding to 8 bits of mantissa is 2**-9 per operation; int8 per tensor about 1/256 of the range. Both add up over layers.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.15}
ON_CPU = [name for name in executors.IDS if not name.startswith("torch-compile:")]


def error(made, wanted):  # type: ignore[no-untyped-def]
    """Relative L2 distance, the largest over the tensors; an oracle of its own, not the profiler's."""
    return max(float((a - b).norm().detach() / b.norm().detach()) for a, b in zip(made, wanted, strict=True))


def need(name: str, accelerator: str = "cpu") -> executors.Executor:
    executor = executors.by_id(name)
    if reason := executor.available(accelerator):
        pytest.skip(reason)
    return executor


@pytest.mark.parametrize("name", executors.IDS)
def test_convolutions_within_tolerance(name, convolutions):
    segment, inputs = convolutions
    compiled = need(name).compile(segment, inputs, "cpu", 1)
    fresh = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    for tensors in (inputs, (fresh,)):
        made, wanted = compiled(tensors), segment.module()(*tensors)
        assert error(made, wanted) <= TOLERANCE[name.partition(":")[2]]
        assert [(t.dtype, t.shape, t.is_contiguous()) for t in made] == [(t.dtype, t.shape, True) for t in wanted]


@pytest.mark.parametrize("name", ON_CPU)
def test_encoder_within_tolerance(name, encoder):
    segment, inputs = encoder
    made = need(name).compile(segment, inputs, "cpu", 1)(inputs)
    wanted = segment.module()(*inputs)
    assert error(made, wanted) <= TOLERANCE[name.partition(":")[2]]


@pytest.mark.parametrize("name", ["torch:bf16", "openvino:bf16", "openvino:int8", "onnxruntime:int8"])
def test_lower_precision_is_really_lower(name, convolutions):
    segment, inputs = convolutions
    made = need(name).compile(segment, inputs, "cpu", 1)(inputs)
    if name == "openvino:bf16" and "BF16" not in openvino._openvino().Core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
        pytest.skip("this processor computes bfloat16 in float32")
    assert error(made, segment.module()(*inputs)) > 1e-4


@pytest.mark.parametrize("name", ["torch:fp32", "openvino:fp32", "onnxruntime:fp32"])
def test_results_are_fresh_memory(name, convolutions):
    segment, inputs = convolutions
    compiled = need(name).compile(segment, inputs, "cpu", 1)
    first = compiled(inputs)
    kept = [t.clone() for t in first]
    compiled(tuple(-t for t in inputs))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


class Skip(nn.Module):
    """The first input is used at the very end only: every frontier relays it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, late: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x + late


@pytest.mark.parametrize("name", ["torch:fp32", "torch:bf16", "openvino:bf16", "onnxruntime:fp32"])
def test_relayed_tensors_stay_exact(name):
    late, x = torch.randn(2, 8), torch.randn(2, 8)
    captured = capture(Skip().eval(), (late, x))
    middle = captured.segment(1, 2)
    inputs = tuple(captured.segment(0, 1).module()(late, x))
    made = need(name).compile(middle, inputs, "cpu", 1)(inputs)
    relayed = [i for i, spec in enumerate(middle.outputs) if spec.name in {s.name for s in middle.inputs}]
    assert relayed, "the model must relay a tensor here, or this test shows nothing"
    assert any(torch.equal(made[i], late) for i in relayed)
    assert error(made, middle.module()(*inputs)) < TOLERANCE[name.partition(":")[2]]


@pytest.mark.parametrize("name", ["torch:fp32", "openvino:fp32", "onnxruntime:fp32"])
def test_another_batch_is_prepared_anew(name):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    captured = capture(model, (torch.randn(2, 6),), dynamic_batch=True)
    segment = captured.segment(0, captured.graph.num_blocks)
    compiled = need(name).compile(segment, (torch.randn(2, 6),), "cpu", 1)
    for batch in (2, 5, 1, 5):
        x = torch.randn(batch, 6)
        assert error(compiled((x,)), (model(x),)) < 1e-5


def test_wrong_number_of_tensors(convolutions):
    segment, inputs = convolutions
    compiled = executors.by_id("torch:fp32").compile(segment, inputs, "cpu", 1)
    with pytest.raises(ExecutorError, match="takes 1 tensors, got 2"):
        compiled((*inputs, *inputs))


def test_int8_refuses_constant_examples(convolutions):
    segment, _ = convolutions
    with pytest.raises(ExecutorError, match="pass real inputs"):
        need("onnxruntime:int8").compile(segment, (torch.zeros(1, 3, 32, 32),), "cpu", 1)


def test_caller_keeps_its_threads(convolutions):
    segment, inputs = convolutions
    torch.set_num_threads(2)
    executors.by_id("torch:fp32").compile(segment, inputs, "cpu", 1)(inputs)
    assert torch.get_num_threads() == 2


def test_unknown_id_names_the_known():
    with pytest.raises(ExecutorError, match=r"'tvm:fp32' is not known; known are .*openvino:bf16"):
        executors.by_id("tvm:fp32")


@pytest.mark.parametrize(("module", "name"), [(openvino, "openvino:int8"), (onnxruntime, "onnxruntime:fp32")])
def test_missing_package_names_the_extra(module, name, monkeypatch, convolutions):
    segment, inputs = convolutions
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda package: None)
    executor = executors.by_id(name)
    assert 'pip install "ecotone[fast]"' in executor.available("cpu")
    assert name in executors.unavailable()
    assert name not in [e.id for e in executors.catalogue()]
    with pytest.raises(ExecutorError, match="ecotone"):
        executor.compile(segment, inputs, "cpu", 1)


@pytest.mark.parametrize("accelerator", ["cuda:99", "npu"])
def test_accelerator_that_is_not_there(accelerator):
    assert not executors.catalogue(accelerator)
    assert all(executors.unavailable(accelerator).values())


@pytest.mark.parametrize("accelerator", ["cuda", "mps"])
@pytest.mark.parametrize("name", ["torch:fp32", "torch:bf16", "torch-compile:fp32"])
def test_on_a_gpu(name, accelerator, convolutions):
    segment, inputs = convolutions
    executor = need(name, accelerator)
    compiled = executor.compile(segment, inputs, accelerator, 1)
    for tensors in (inputs, tuple(-t for t in inputs), tuple(t.pin_memory() for t in inputs)):
        made = compiled(tensors)
        assert all(t.device.type == "cpu" for t in made)
        assert error(made, segment.module()(*tensors)) < max(2e-3, TOLERANCE[name.partition(":")[2]])


def test_eager_float32_is_the_captured_graph_to_the_bit() -> None:
    """Convolutions included, and however often it is prepared: the layout is a rule, not the outcome of a timing."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, stride=2)]
    captured = capture(torch.nn.Sequential(*layers).eval(), (torch.rand(1, 3, 40, 40),), name="convolutions")
    segment = captured.segment(0, captured.graph.num_blocks)
    x = torch.rand(1, 3, 40, 40)
    for _ in range(3):
        compiled = executors.by_id("torch:fp32").compile(segment, captured.example_inputs, "cpu", 1)
        assert torch.equal(compiled([x])[0], captured.reference((x,))[0])
