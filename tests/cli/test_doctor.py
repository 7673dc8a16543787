"""What `ecotone doctor` says of the kernels for language models, with and without a compiler."""

from __future__ import annotations

import pytest

from ecotone.cli import doctor
from ecotone.llm.executors import native_library

pytestmark = pytest.mark.torch


def test_kernels_for_language_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(compiler: str, reason: str, probe: bool = True) -> tuple[str, str]:
        monkeypatch.setattr(native_library, "compiler", lambda: compiler)
        monkeypatch.setattr(native_library, "library", lambda: (None, reason))
        [finding] = doctor._kernels(probe)
        return finding.state, f"{finding.detail} -> {finding.remedy}"

    state, words = said("", "unused")
    assert state == "missing"
    assert words.endswith("-> install g++ or clang++")
    assert said("/usr/bin/c++", "its trial ended with -4") == (
        "broken", "its trial ended with -4 -> language models run by torch or OpenVINO here; nothing else to do",
    )  # fmt: skip
    assert said("/usr/bin/c++", "")[0] == said("/usr/bin/c++", "unused", probe=False)[0] == "ok"
