"""An array or a picture is handed to the model in the way it was captured: by position or by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ecotone.model import capture
from ecotone.serving.prepare import Preparation
from ecotone.serving.sources import Item

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("by_name", [False, True])
def test_an_array_is_passed_as_captured(by_name: bool) -> None:
    example: dict[str, Any] = {"input": torch.zeros(1, 4)}
    args, kwargs = ((), example) if by_name else (tuple(example.values()), None)
    captured = capture(torch.nn.Linear(4, 2).eval(), args, kwargs, name="line")
    values = np.arange(4, dtype=np.float32)[None]
    (tensor,) = Preparation(captured).flat(Item("a.npy", "array", values))
    assert tensor.tolist() == values.tolist()
