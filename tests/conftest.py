"""Shared settings of the test run: one torch thread per test process, and a hypothesis profile that repeats itself.

In parallel (`pytest -n 2`) a file stays in one process, for what it makes once; tests of the laboratory run
one after another, since they share the machine's namespaces and its processors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ecotone", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("ecotone")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "lab" if "lab" in Path(path).stem.split("_") or "/lab/" in path else path

    return ByFile(config, log)
