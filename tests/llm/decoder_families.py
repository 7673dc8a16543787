"""The random models of benchmarks/llm_families.py, for tests: whoever imports this is skipped without transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ecotone.llm.weights import Checkpoint

pytest.importorskip("transformers", reason="the extra `hub` is not installed")

from benchmarks.llm_families import BY_LENGTH, FAMILIES, LAYERS, VOCABULARY, make, reference

__all__ = ["BY_LENGTH", "FAMILIES", "LAYERS", "VOCABULARY", "Made", "make", "reference"]

Made = Callable[[str], tuple[torch.nn.Module, Checkpoint]]
