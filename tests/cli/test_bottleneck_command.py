"""`ecotone bottleneck` and `--bottleneck`: from samples to a codec, from there into plans and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import Ended

from ecotone.cli import workflow
from ecotone.cli.bottleneck import best_cut
from ecotone.cluster import DeviceId
from ecotone.codec import read_learned
from ecotone.model import capture, load_model
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.profile import CodecCost, Profile, SegmentTime
from ecotone.profiling import default_path, profile_key
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

MODEL = ("net.py:net", "--cluster", "pair.toml")
TRAIN = ("--stride", "1", "--latents", "3", "--hidden", "0", "--epochs", "2", "--final-epochs", "0")


@pytest.fixture
def samples(folder: Path) -> Path:
    """A folder with inputs beside the model."""
    (folder / "samples").mkdir()
    for number in range(6):
        np.save(folder / "samples" / f"{number}.npy", np.random.default_rng(number).random((1, 3, 32, 32), np.float32))
    return folder / "samples"


@pytest.fixture
def made(ecotone: Callable[..., Ended], folder: Path, samples: Path) -> Path:
    """A codec for cut 1, trained by the command."""
    ended = ecotone("bottleneck", *MODEL, "--cut", "1", "--samples", "samples", "--out", "net.codec", *TRAIN)
    assert ended.code == 0, ended.err
    assert "learned:net-1@" in ended.out
    assert "int8+zstd" in ended.out
    return folder / "net.codec"


def crossing(made: Path) -> Path:
    """A plan file: near, then far behind cut 1, in the learned codec."""
    loaded = load_model("net.py:net")
    graph, name = capture(loaded.module, loaded.args).graph, read_learned(made.read_bytes()).id
    near, far, last = DeviceId("near"), DeviceId("far"), graph.num_blocks
    chosen = Plan(
        graph_hash=graph.content_hash(),
        stages=(Stage(device=near, start=0, stop=1), Stage(device=far, start=1, stop=last)),
        transfers=(
            Transfer(source=near, target=near, position=0, codec=LOCAL),
            Transfer(source=near, target=far, position=1, codec=name),
            Transfer(source=far, target=near, position=last),
        ),
    )
    Path("plan.json").write_text(chosen.to_json())
    return Path("plan.json")


@pytest.mark.loopback
def test_a_run_with_it(ecotone: Callable[..., Ended], made: Path) -> None:
    arguments = ("run", "net.py:net", "samples", "--cluster", "pair.toml", "--plan", str(crossing(made)), "--json")
    ended = ecotone(*arguments, "--bottleneck", made)
    assert ended.code == 0, ended.err
    assert len(ended.out.splitlines()) == 6
    refused = ecotone(*arguments)
    assert refused.code == 2
    assert "--bottleneck" in refused.err


def test_a_profile_measures_it_beside_the_others(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def seen(*_: object, **given: Any) -> SimpleNamespace:
        asked.update(given)
        return SimpleNamespace(accuracy=None)

    monkeypatch.setattr(workflow, "measure", seen)
    work = workflow.load_work("net.py:net", Path("pair.toml"), bottlenecks=[made], quiet=True)
    workflow.make_profile(work, None)
    trained = read_learned(made.read_bytes())
    assert [codec.id for codec in asked["bottlenecks"]] == [trained.id]
    assert {"int8+zstd", "jpeg:90", trained.id} <= set(asked["options"].codecs)
    assert asked["path"] != default_path(profile_key(work.captured.graph, work.cluster))


def test_the_cut_is_where_a_plan_would_gain_most(folder: Path) -> None:
    """The device takes long behind cut 1, the server nothing, the link carries 100 kB/s, the input is larger."""
    near_s = (0.01, 1.0, 1.0)
    text = Path("pair.toml").read_text().replace("100 Mbit/s", "0.8 Mbit/s")
    Path("slow.toml").write_text(text)
    work = workflow.load_work("net.py:net", Path("slow.toml"), quiet=True)
    spans = [(a, b) for a in range(3) for b in range(a + 1, 4)]
    profile = Profile(
        graph_hash=work.captured.graph.content_hash(), cluster_name="pair", num_blocks=3, cuts=(0, 1, 2, 3),
        segments=tuple(
            SegmentTime(
                device=DeviceId(d), executor="torch:fp32", start=a, stop=b, spread_s=0.0, memory_bytes=0,
                median_s=sum(near_s[a:b]) if d == "near" else 1e-4,
            )
            for d in ("near", "far") for a, b in spans
        ),
        codecs=tuple(
            CodecCost(
                device=DeviceId(d), codec="int8+zstd", encode_fixed_s=1e-5, encode_s_per_raw_byte=0.0, decode_fixed_s=1e-5,
                decode_s_per_raw_byte=0.0,
            )
            for d in ("near", "far")
        ),
    )  # fmt: skip
    assert best_cut(work, profile) == 1
    alone = replace(profile, segments=tuple(replace(s, median_s=1e-4) for s in profile.segments))
    with pytest.raises(EcotoneError, match="--cut auto"):
        best_cut(work, alone)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plan", *MODEL, "--bottleneck", "none.codec"), "none.codec"),
        (("plan", *MODEL, "--bottleneck", "net.py"), "no learned codec"),
        (("bottleneck", *MODEL, "--cut", "9", "--samples", "samples", "--out", "x"), "must lie inside"),
        (("bottleneck", *MODEL, "--cut", "one", "--samples", "samples", "--out", "x"), "'one'"),
        (("bottleneck", *MODEL, "--cut", "1", "--samples", "nowhere", "--out", "x"), "nowhere"),
        (("bottleneck", *MODEL, "--cut", "1", "--samples", "samples", "--out", "x", "--coding", "gif"), "gif"),
        (
            ("bottleneck", *MODEL, "--cut", "1", "--samples", "samples", "--out", "x", "--latents", "99", "--stride", "1"),
            "latents must be in [1, 8]",
        ),
        (("bottleneck", *MODEL, "--cut", "1", "--samples", "samples", "--out", "x", "--epochs", "0"), "epochs"),
        (("bottleneck", *MODEL, "--cut", "1", "--samples", "samples", "--out", "samples"), "is a directory"),
        (("bottleneck", "net.py:net", "--samples", "samples", "--out", "x"), "--cut auto: one machine"),
    ],
)
def test_bad_input(ecotone: Callable[..., Ended], samples: Path, arguments: tuple[str, ...], says: str) -> None:
    refused(ecotone(*arguments), says)


def test_a_codec_of_another_model_is_refused(ecotone: Callable[..., Ended], made: Path) -> None:
    Path("other.py").write_text(Path("net.py").read_text().replace("manual_seed(0)", "manual_seed(1)"))
    refused(ecotone("plan", "other.py:net", "--cluster", "pair.toml", "--bottleneck", made), "another model")


def refused(ended: Ended, says: str) -> None:
    """It ended in one line, with nothing written."""
    assert ended.code == 2
    last = ended.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in ended.err
    assert not Path("x").exists()
