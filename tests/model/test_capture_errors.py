"""What cannot be captured is refused in one line: the operator or cause, the source line, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ecotone.model import ModelError, capture

pytestmark = pytest.mark.torch

X = torch.arange(8.0).reshape(2, 4) - 3


def branch(self: Model, x: torch.Tensor) -> Any:
    if x.sum() > 0:
        return x
    return self.lin(x)


def item(self: Model, x: torch.Tensor) -> Any:
    return self.lin(x) * x.sum().item()


def mask_index(self: Model, x: torch.Tensor) -> Any:
    return self.lin(x), x[x > 0]


def nonzero(self: Model, x: torch.Tensor) -> Any:
    return self.lin(x)[:, 0].nonzero()


def random_numbers(self: Model, x: torch.Tensor) -> Any:
    return self.lin(x + torch.randn_like(x))


def forced_dropout(self: Model, x: torch.Tensor) -> Any:
    return nn.functional.dropout(self.lin(x), 0.5, training=True)


def training_norm(self: Model, x: torch.Tensor) -> Any:
    return nn.functional.batch_norm(self.lin(x), torch.zeros(4), torch.ones(4), training=True)


def writes_buffer(self: Model, x: torch.Tensor) -> Any:
    self.count.add_(1)
    return self.lin(x) + self.count


def writes_input(self: Model, x: torch.Tensor) -> Any:
    x.add_(1)
    return self.lin(x)


def control_flow(self: Model, x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


def to_numpy(self: Model, x: torch.Tensor) -> Any:
    return torch.from_numpy(x.numpy() + 1)


def own_exception(self: Model, x: torch.Tensor) -> Any:
    raise KeyError("nothing here")


def autocast(self: Model, x: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.lin(x)


def complex_output(self: Model, x: torch.Tensor) -> Any:
    return torch.fft.fft(self.lin(x))


def nothing(self: Model, x: torch.Tensor) -> Any:
    return x


class Model(nn.Module):
    def __init__(self, body: Callable[[Model, torch.Tensor], Any]):
        super().__init__()
        self.lin, self.body = nn.Linear(4, 4), body
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


CASES: list[tuple[Callable[[Model, torch.Tensor], Any], str, str]] = [
    (branch, "depends on the values of a tensor", "torch.where"),
    (item, "aten.item.default", "keep it a tensor"),
    (mask_index, "aten.index.Tensor", "masking (torch.where)"),
    (nonzero, "aten.nonzero.default", "size depends on the data"),
    (random_numbers, "aten.randn_like.default", "make them an input"),
    (forced_dropout, "aten.dropout.default", "model.eval()"),
    (training_norm, "aten.batch_norm.default", "training=False"),
    (writes_buffer, "writes to its buffer 'count'", "pass it in as an input"),
    (writes_input, "writes to its input 'x'", "return the new value"),
    (control_flow, "operator cond", "torch.where"),
    (to_numpy, "numpy", "plain Python"),
    (own_exception, "KeyError: 'nothing here'", "check that the example inputs fit"),
    (autocast, "autocast", "bfloat16()"),
    (complex_output, "dtype complex64", "convert it"),
    (nothing, "computes nothing", "nothing to place"),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("body", "cause", "remedy"), CASES, ids=[case[0].__name__ for case in CASES])
def test_refusals_name_cause_place_and_remedy(
    body: Callable[[Model, torch.Tensor], Any], cause: str, remedy: str, dynamic: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        capture(Model(body).eval(), (X.clone(),), dynamic_batch=dynamic)
    text = str(caught.value)
    assert cause in text
    assert remedy in text
    assert "\n" not in text
    assert len(text) < 500
    if body is not nothing:
        assert "test_capture_errors.py:" in text
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: capture(nn.Linear(4, 4), X), "Linear is in training mode; call model.eval()"),
        (lambda: capture(_partly_training(), X), "its part '1' (Dropout) is in training mode"),
        (lambda: capture(nn.Linear(3, 3).eval(), X), "test_capture_errors|Linear cannot be captured"),
        (lambda: capture(nn.Linear(4, 4).eval(), ()), "hold no tensor; give at least one"),
        (lambda: capture(nn.Linear(4, 4).eval(), (X.to(torch.complex64),)), "dtype complex64; use one of"),
        (lambda: capture(nn.Bilinear(4, 4, 2).eval(), (X, X[:1].repeat(3, 1)), dynamic_batch=True), "batches 2 and 3"),
        (lambda: capture(_fixed_batch(), X, dynamic_batch=True), "does not work for every batch size"),
        (lambda: capture(_returns_size(), X, dynamic_batch=True), "is a size, not a tensor"),
        (lambda: capture(nn.Linear(4, 4).eval(), X).segment(1, 0), "segment [1, 0) of Linear: it has blocks 0 to 1"),
        (lambda: capture(nn.Linear(4, 4).eval(), X).segment(0, 9), "it has blocks 0 to 1"),
        (lambda: capture(nn.Linear(4, 4).eval(), X).unflatten_outputs(()), "0 tensors for a frontier of 1"),
    ],
)
def test_wrong_calls_are_refused(call: Callable[[], Any], expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        call()
    assert any(part in str(caught.value) for part in expected.split("|"))
    assert "\n" not in str(caught.value)


def _partly_training() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    model[1].train()
    return model


def _fixed_batch() -> nn.Module:
    return Model(lambda self, x: self.lin(x.reshape(2, 2, 2).reshape(2, 4))).eval()


def _returns_size() -> nn.Module:
    return Model(lambda self, x: (self.lin(x), x.shape[0])).eval()


class Keyed(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, negate: bool = False) -> torch.Tensor:
        y = x * scale
        return -y if negate else y


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((X,), {"scale": X}, "call it as captured: (float32[2, 4], scale=float32[2, 4], negate=True)"),
        ((X, X), {}, "got (float32[2, 4], float32[2, 4])"),
        ((X,), {"scale": X[:1], "negate": True}, "input scale: is (1, 4) float32, must be (2, 4) float32"),
        ((X.double(),), {"scale": X, "negate": True}, "input x: is (2, 4) float64"),
        ((X,), {"scale": X, "negate": False}, "False in place of the captured True"),
        ((3,), {"scale": X, "negate": True}, "input x: is int"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(args: tuple[Any, ...], kwargs: dict[str, Any], expected: str) -> None:
    captured = capture(Keyed().eval(), (X,), {"scale": X, "negate": True})
    assert len(captured.flatten_inputs((X,), {"negate": True, "scale": X})) == 2  # the order of names does not matter
    with pytest.raises(ModelError) as caught:
        captured.flatten_inputs(args, kwargs)
    assert expected in str(caught.value)


def gradient_regions(self: Model, x: torch.Tensor) -> Any:
    with torch.no_grad():
        y = self.lin(x)
    with torch.enable_grad():
        y = torch.tanh(y)
    with torch.autocast("cpu", enabled=False):
        return self.lin(y) + self.count


def doubled(self: Model, x: torch.Tensor) -> Any:
    return {"y": self.lin(x), "none": None, "text": "t", "again": [self.lin(x)], "number": 3}


@pytest.mark.parametrize("body", [gradient_regions, doubled])
def test_regions_and_odd_outputs_are_captured(body: Callable[[Model, torch.Tensor], Any]) -> None:
    torch.manual_seed(0)
    model = Model(body).eval()
    captured = capture(model, X)
    with torch.no_grad():
        wanted = model(X)
    found = captured.unflatten_outputs(captured.reference((X,)))
    if isinstance(wanted, dict):
        assert [found[k] for k in ("none", "text", "number")] == [None, "t", 3]
        found, wanted = found["y"], wanted["y"]
    assert torch.equal(found, wanted)
