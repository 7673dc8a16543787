"""Every example runs as a reader would run it, in a process of its own, and says what it promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ecotone.cli.demo_model import (
    ASSETS,
    EXITS,
    TileNet,
    example_inputs,
    frames,
    read_frame,
    tile_accuracy,
    tilenet,
)
from ecotone.codec import read_learned
from ecotone.llm.text import TextModel
from ecotone.llm.weights import Checkpoint
from ecotone.model import capture
from ecotone.model.exit_file import read_exits
from ecotone.profiling import check_bottleneck

pytestmark = pytest.mark.torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str, folder: Path, fails: bool = False) -> str:
    """The standard output of an example (its errors where it `fails`), run in `folder` with its caches there too."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ECOTONE_CACHE": str(folder / "cache")}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode != 0) == fails, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


def test_no_example_is_left_out() -> None:
    tested = set(re.findall(r'"([a-z0-9_]+\.py)"', Path(__file__).read_text()))
    scripts = {path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert scripts <= tested


def test_capture_and_cut(tmp_path: Path) -> None:
    words = run("01_capture_and_cut.py", folder=tmp_path)
    assert "the same bits as the whole" in words
    assert re.search(r"^  5 +middle\S* +34% +1 +50,176$", words, re.MULTILINE)


def test_plan(tmp_path: Path) -> None:
    lines = run("02_plan.py", folder=tmp_path).splitlines()
    latency = [float(re.findall(r"([\d.]+) ms", line)[0]) for line in lines]
    sent = [float(re.findall(r"(\d+) B", line)[0]) for line in lines]
    assert len(lines) == 5
    assert latency == sorted(latency)  # a slower link never helps
    assert sent[-1] < sent[0]


@pytest.mark.loopback
def test_run_three_machines(tmp_path: Path) -> None:
    lines = run("03_run_three_machines.py", folder=tmp_path).splitlines()
    right = [int(re.findall(r"(\d+) of 49 right", line)[0]) for line in lines]
    assert len(lines) == 8
    assert min(right) > 25


def test_survive(tmp_path: Path) -> None:
    killed, answered, moved = run("05_survive.py", folder=tmp_path).splitlines()
    total, of, there, alone = map(int, re.findall(r"\d+", answered))
    assert killed.startswith("server killed")
    assert total == of == 12  # nothing lost
    assert there + alone == 12
    assert there >= 3  # the kill came after the third answer
    assert int(re.findall(r"(\d+)$", moved)[0]) >= 1


@pytest.mark.loopback
def test_leave_early(tmp_path: Path) -> None:
    policy, without, early = run("07_leave_early.py", folder=tmp_path).splitlines()
    assert int(re.findall(r"(\d+)% of the FLOP saved", policy)[0]) > 30
    assert "16 at the end" in without
    left = sum(map(int, re.findall(r"(\d+) at e\d", early)))
    assert 8 <= left <= 16
    right = [float(re.findall(r"([\d.]+)% of tiles right", line)[0]) for line in (without, early)]
    assert right[1] > right[0] - 4  # 2 points on calibration data; these are 784 tiles


def test_exits_are_trained_by_the_script_that_made_the_shipped_ones(tmp_path: Path) -> None:
    words = run("train_tile_exits.py", "--epochs", "1", "--out", "made.exits.safetensors", folder=tmp_path)
    assert "training on the shipped frames" in words
    assert "all on held-out photographs" in words
    captured = capture(tilenet(), example_inputs(), name="TileNet")
    made, shipped = (read_exits(path).attach(captured) for path in (tmp_path / "made.exits.safetensors", EXITS))
    assert [e.position for e in made.graph.exits] == [e.position for e in shipped.graph.exits] == [2, 6, 8]
    work, wanted = ([e.flop for e in each.graph.exits] for each in (made, shipped))
    assert work == pytest.approx(wanted, rel=0.01)  # but for the casts that heads have since models in half precision


def test_the_shipped_exits_are_good_early_and_better_late() -> None:
    captured = read_exits(EXITS).attach(capture(tilenet(), example_inputs(), name="TileNet"))
    pixels, labels = frames()
    right = [
        tile_accuracy(lambda x, m=captured.until_exit(head.name): m.reference((x,))[0], pixels, labels)
        for head in captured.exits
    ]
    assert right == sorted(right)
    assert right[0] > 0.72
    assert right[-1] > tile_accuracy(tilenet(), pixels, labels) - 0.02


def test_codecs(tmp_path: Path) -> None:
    rows = [line.split() for line in run("04_codecs.py", "2", folder=tmp_path).splitlines()[2:]]
    size = {row[0]: int(row[1].replace(",", "")) for row in rows}
    assert size["int4"] < size["int8"] < size["fp16"] < size["fp32"]
    assert size["int4+zstd"] < size["int4"]
    assert all(float(row[3].rstrip("%")) > 55 for row in rows)


def test_training_takes_steps_and_writes_weights_that_load(tmp_path: Path) -> None:
    words = run("train_tiles.py", "--steps", "2", "--out", "made.safetensors", folder=tmp_path)
    assert "training on the shipped frames" in words
    assert "step 2 of 2" in words
    again = run("train_tiles.py", "--steps", "1", "--start", "made.safetensors", "--out", "on.safetensors", folder=tmp_path)
    assert "step 1 of 1" in again
    stored = load_file(tmp_path / "made.safetensors")
    assert {name: tuple(v.shape) for name, v in stored.items()} == {
        n: tuple(v.shape) for n, v in TileNet().state_dict().items()
    }
    assert any(not torch.equal(v, load_file(tmp_path / "on.safetensors")[name]) for name, v in stored.items())


def test_a_bottleneck_is_trained_and_written(tmp_path: Path) -> None:
    options = ("--cut", "11", "--frames", "6", "--epochs", "2", "--final-epochs", "1", "--out", "made.safetensors")
    words = run("train_bottleneck.py", *options, folder=tmp_path)
    made = read_learned((tmp_path / "made.safetensors").read_bytes())
    assert made.spec.position == 11
    assert f"{made.id}: " in words
    check_bottleneck(capture(tilenet(), example_inputs()), made)


def test_shipped_bottlenecks_are_of_the_shipped_network() -> None:
    captured = capture(tilenet(), example_inputs(), name="tilenet")
    found = [read_learned(path.read_bytes()) for path in sorted(ASSETS.glob("*.bottleneck.safetensors"))]
    assert found
    for made in found:
        check_bottleneck(captured, made)


def test_training_says_when_its_data_are_missing(tmp_path: Path) -> None:
    words = run("train_tiles.py", "--data", "nowhere.parquet", folder=tmp_path, fails=True)
    assert words.strip() == "nowhere.parquet is missing; give --data a parquet file of CIFAR-10, or leave it out"


def test_frames_can_be_made_again_from_themselves(tmp_path: Path) -> None:
    run("make_frames.py", "--out", "frames", "--count", "2", folder=tmp_path)
    made = json.loads((tmp_path / "frames" / "labels.json").read_text())
    shipped = json.loads((ASSETS / "frames" / "labels.json").read_text())
    assert made == {name: shipped[name] for name in ("frame-00.webp", "frame-01.webp")}
    for name in made:
        assert torch.equal(read_frame(tmp_path / "frames" / name), read_frame(ASSETS / "frames" / name))


def test_the_shipped_network_is_as_good_as_its_readme_says() -> None:
    stated = re.search(r"names ([\d.]+) % of the 1,960 tiles", (ASSETS / "README.md").read_text())
    assert stated is not None
    accuracy = tile_accuracy(tilenet(), *frames())
    assert accuracy == pytest.approx(float(stated[1]) / 100, abs=0.002)
    assert accuracy > 0.8


def test_what_ships_is_small() -> None:
    assert (ASSETS / "tilenet.safetensors").stat().st_size < 3_000_000
    assert EXITS.stat().st_size < 400_000
    assert sum(path.stat().st_size for path in (ASSETS / "frames").iterdir()) < 3_000_000


@pytest.mark.loopback
def test_fan_in_loses_an_eye_and_no_frame(tmp_path: Path) -> None:
    """Each eye alone sees 5 of 7 columns, both see all: fused is better. (A loaded machine may miss the left one too.)"""
    words = run("06_fan_in.py", folder=tmp_path)
    both = re.search(r"both eyes: (\d+) frames, (\d+)% of tiles right", words)
    alone = re.search(r"left eye alone: (\d+) frames, (\d+)% of tiles right", words)
    assert both is not None
    assert alone is not None
    assert 12 < int(both[1]) + int(alone[1]) <= 16
    assert int(both[2]) > int(alone[2]) > 40


def test_a_small_language_model_and_its_drafter_are_trained_and_load(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `hub` is not installed")
    lines = [
        f"{name}:\nI have {n} {thing}, said {name}.\n\n" for n in range(300) for name in "AB" for thing in ("cats", "dogs")
    ]
    (tmp_path / "text.txt").write_text("".join(lines))
    small = ("--data", "text.txt", "--width", "96", "--layers", "1", "--vocabulary", "300", "--steps", "2")
    for more in ((), ("--out", "drafter", "--teacher", "tiny-llm")):
        words = run("train_tiny_llm.py", *small, *more, folder=tmp_path)
        assert re.search(r"held-out loss \d\.\d{3} nats per token", words)
    model, drafter = (Checkpoint.open(tmp_path / name) for name in ("tiny-llm", "drafter"))
    assert model.config.num_kv_heads == 1
    assert drafter.config.vocabulary == model.config.vocabulary == 300
    text = TextModel.open(tmp_path / "drafter")
    assert text.render([{"role": "user", "content": "cats?"}]) == "USER:\ncats?<|end|>\n\nASSISTANT:\n"
    assert text.stop_token in model.config.stop_tokens
