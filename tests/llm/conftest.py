"""Models of every family, made once per session; a cache folder of the session's own, so that kernels compile once."""

from __future__ import annotations

import pytest
import torch
from decoder_families import Made, make

from ecotone.llm.weights import Checkpoint


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(transformers' model, our checkpoint of the same directory) by family name."""
    known: dict[str, tuple[torch.nn.Module, Checkpoint]] = {}

    def get(name: str) -> tuple[torch.nn.Module, Checkpoint]:
        if name not in known:
            folder = tmp_path_factory.mktemp("model")
            model = make(name, folder)
            known[name] = model, Checkpoint.open(folder)
        return known[name]

    return get


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECOTONE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
