"""`ecotone plan` of a language model, on a profile that is written here: nothing is measured, nobody is reached."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from commands import CLUSTER, Ended

import ecotone as package
from ecotone.cli.language import load_llm
from ecotone.llmplan import LlmPlan
from ecotone.llmprofile import Curve, ExecutorFacts, LayerPart, LlmProfile, PartTime

pytestmark = pytest.mark.torch

MODEL = Path(package.__file__).parent / "assets" / "tiny-llm"
HOME = CLUSTER.replace('executors = ["torch:fp32"]\n', "").replace('"1 GB"', '"40 MB"')


@pytest.fixture
def profile_file(tmp_path: Path) -> Path:
    """far is four times as fast as near; a layer takes 10 MB."""
    (tmp_path / "home.toml").write_text(HOME)
    work = load_llm(str(MODEL), tmp_path / "home.toml", quiet=True)
    times = tuple(
        PartTime(
            device=device, executor="native:int8", part=part, weight_bytes=10_000_000,
            prefill=Curve(fixed_s=slow * 1e-3, token_s=slow * 1e-4), decode=Curve(fixed_s=slow * 1e-2),
        )
        for device, slow in (("near", 4.0), ("far", 1.0))
        for part in ("embedding", "0", "head")
    )  # fmt: skip
    profile = LlmProfile(
        model_hash=work.ref.fingerprint, width=work.source.config.width, max_positions=1024, kinds=(LayerPart(part="0"),),
        layers=("0",) * work.source.config.num_layers, times=times, codec_losses={},
        executors=(ExecutorFacts(executor="native:int8", kv_bytes_per_token=768, loss=0.001),),
    )  # fmt: skip
    (tmp_path / "other.json").write_text(replace(profile, model_hash="other").to_json())
    file = tmp_path / "profile.json"
    file.write_text(profile.to_json())
    return file


def test_a_plan_is_shown_compared_saved_and_refused(
    ecotone: Callable[..., Ended], profile_file: Path, tmp_path: Path
) -> None:
    asked = ("plan", MODEL, "--cluster", tmp_path / "home.toml", "--profile", profile_file, "--precision", "int8")
    small = (*asked, "--context", "256", "--prompt", "64", "--answer", "32")
    shown = ecotone(*small, "--compare", "--out", tmp_path / "plan.json")
    assert shown.code == 0, shown.err
    for words in (
        "near -> far",
        "first token",
        "memory of far",
        "proven             best",
        "edgeshard_latency",
        "one_device",
    ):
        assert words in shown.out, words
    plan = LlmPlan.from_json((tmp_path / "plan.json").read_text())
    assert plan.num_layers == 4
    assert set(plan.devices) == {"near", "far"}  # 60 MB on two devices of 40
    made = json.loads(ecotone(*small, "--json", "--objective", "throughput", "--requests", "2").out)
    assert made["asked"]["objective"] == "throughput"
    assert made["value"] == pytest.approx(made["bound"])
    for more, words in (
        (("--require", "tpot=1us"), ("time per token fails", "nearest")),
        (("--require", "beauty=1"), ("beauty", "tpot=80ms")),
        (("--require", "ttft=2"), ("no unit",)),
        (("--prompt", "900"), ("900", "256")),
        (("--objective", "energy"), ("energy", "throughput")),
        (("--profile", str(tmp_path / "other.json")), ("other.json", "another model")),
        (("--slots", "1000"), ("fits nowhere: needs", "sequences at a time")),
    ):
        ended = ecotone(*small, *more)
        assert ended.code == 2, more
        assert all(word in ended.err for word in words), (more, ended.err)
        assert "Traceback" not in ended.err
