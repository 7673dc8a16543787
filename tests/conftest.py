"""Shared settings of the test run: one torch thread per test process, and a hypothesis profile that repeats itself.

In parallel (`pytest -n 2 --dist loadgroup`) a file stays in one process, for what it makes once; tests of the laboratory run
one after another, since they share the machine's namespaces and its processors.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ecotone", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("ecotone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            in_lab = item.get_closest_marker("lab") is not None
            item.add_marker(pytest.mark.xdist_group("lab" if in_lab else str(item.path)))
