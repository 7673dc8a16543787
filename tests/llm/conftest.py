"""Models of every family, made once per process; one cache folder of the whole run, so that kernels compile once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from ecotone.llm.weights import Checkpoint

if TYPE_CHECKING:
    from decoder_families import Made


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(transformers' model, our checkpoint of the same directory) by family name."""
    from decoder_families import make  # here, since it skips the tests that import it where transformers is not installed

    known: dict[str, tuple[torch.nn.Module, Checkpoint]] = {}

    def get(name: str) -> tuple[torch.nn.Module, Checkpoint]:
        if name not in known:
            folder = tmp_path_factory.mktemp("model")
            model = make(name, folder)
            known[name] = model, Checkpoint.open(folder)
        return known[name]

    return get


@pytest.fixture(scope="package", autouse=True)
def cache_of_the_run(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of the processes together
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECOTONE_CACHE", str(root / "llm-cache"))
        yield


@pytest.fixture(autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
