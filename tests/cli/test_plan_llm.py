"""`ecotone plan` of a language model, on a profile that is written here: nothing is measured, nobody is reached."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from commands import CLUSTER, Ended

import ecotone as package
from ecotone.cli import language
from ecotone.cli.language import load_llm, reached
from ecotone.cli.language_plans import Replanner, asked_of, plan_llm
from ecotone.cluster import DeviceId
from ecotone.llm.service import ExecutorTimes
from ecotone.llm.timing import Load, ShardTime
from ecotone.llmplan import LlmPlan
from ecotone.llmprofile import Curve, ExecutorFacts, LayerPart, LlmProfile, PartTime
from ecotone.planner.generation import choose_plan
from ecotone.units import EcotoneError

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


class Far:
    """Stands for a service that measures `far`: a layer takes 10 ms, however many tokens."""

    asked: tuple[str, ...] = ()

    def profile_at(
        self, node: str, config: object, executors: tuple[str, ...], deadline_s: float
    ) -> tuple[ExecutorTimes, ...]:
        self.asked += (node,)
        times = tuple(
            ShardTime(executor="native:int8", part=part, load=load, step_s=0.01, weight_bytes=10_000_000)
            for part in ("embedding", "0", "head")
            for load in (Load(rows=1, count=1, context=128), Load(rows=1, count=128, context=0))
        )
        return (ExecutorTimes(executor="native:int8", times=times), ExecutorTimes(executor="torch:int8", reason="not here"))


def test_a_machine_that_comes_is_measured_and_used_where_that_pays(tmp_path: Path, profile_file: Path) -> None:
    """near holds all in 200 MB and takes 40 ms a layer; far, unknown at first, takes 10 ms."""
    (tmp_path / "home.toml").write_text(HOME.replace('"40 MB"', '"200 MB"'))
    work = load_llm(str(MODEL), tmp_path / "home.toml", quiet=True)
    whole = LlmProfile.from_json(profile_file.read_text())
    near = replace(whole, times=tuple(time for time in whole.times if time.device == "near"))
    asked, service = asked_of(work, "tpot", 256, 1, ("int8",)), Far()
    replan = Replanner(work, service, near, asked)  # type: ignore[arg-type]
    alone = replan_alone(work, near, asked)
    assert alone.devices == ("near",)
    assert replan(alone, frozenset({DeviceId("near")})) == alone
    assert not service.asked
    both = frozenset({DeviceId("near"), DeviceId("far")})
    moved = replan(alone, both)
    assert "far" in moved.devices
    assert replan(moved, both) == moved
    assert service.asked == ("far",)  # once
    assert replan(moved, frozenset({DeviceId("near")})).devices == ("near",)


def replan_alone(work: language.LlmWork, profile: LlmProfile, asked: object) -> LlmPlan:
    from_near = replace(work.cluster, devices=work.cluster.devices[:1], links=(), sink=work.cluster.source)
    return choose_plan(profile, from_near, asked).plan  # type: ignore[arg-type]


def test_a_machine_that_is_down_is_named_and_done_without(
    tmp_path: Path, profile_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = HOME.replace("emulate = true\n", "").replace('"40 MB"', '"200 MB"').replace("slowdown = 4\n", "")
    (tmp_path / "home.toml").write_text(real.replace('name = "far"', 'name = "far"\naddress = "127.0.0.1:9"'))
    monkeypatch.setattr(language, "_PATIENCE_S", 0.2)
    work = load_llm(str(MODEL), tmp_path / "home.toml", quiet=True)
    with reached(work) as service:
        planned = plan_llm(work, service, asked_of(work, "tpot", 256, 1, ("int8",)), None, profile_file)
    assert "far does not answer" in capsys.readouterr().err
    assert planned.plan.devices == ("near",)
    (tmp_path / "plan.json").write_text(replace(planned.plan, model_hash="other").to_json())
    with pytest.raises(EcotoneError, match="another model"):
        plan_llm(work, service, planned.asked, tmp_path / "plan.json", None)
