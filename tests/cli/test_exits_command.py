"""Exits from the command line: train a file, run with it, see who left where; bad input on one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Ended

from ecotone.cluster import DeviceId
from ecotone.model import capture, load_model
from ecotone.model.exit_file import read_exits
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner.exiting import leaving_early
from ecotone.profiling.calibration import calibrate
from ecotone.profiling.exit_outcomes import Outcomes

pytestmark = [pytest.mark.torch, pytest.mark.loopback]

LEARNT = '''
"""Six layers that tell which of four corners a point is near; some points are near none."""
import torch

torch.manual_seed(0)
layers = [layer for _ in range(5) for layer in (torch.nn.Linear(24, 24), torch.nn.ReLU())]
made = torch.nn.Sequential(torch.nn.Linear(2, 24), torch.nn.ReLU(), *layers, torch.nn.Linear(24, 4))
optimiser = torch.optim.AdamW(made.parameters(), 5e-3)
for step in range(150):
    x = torch.rand(128, 2) * 2 - 1
    y = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
    torch.nn.functional.cross_entropy(made(x), y).backward()
    optimiser.step()
    optimiser.zero_grad()
made.eval()


def net():
    return made, (torch.zeros(1, 2),)
'''


@pytest.fixture
def points(folder: Path) -> Path:
    """A folder with the model, 120 points as files, and their labels."""
    (folder / "corners.py").write_text(LEARNT)
    random = np.random.default_rng(3)
    (folder / "points").mkdir()
    labels = {}
    for number in range(120):
        x = random.uniform(-1, 1, (1, 2)).astype(np.float32)
        np.save(folder / "points" / f"p{number:03}.npy", x)
        labels[f"p{number:03}.npy"] = int(x[0, 0] > 0) * 2 + int(x[0, 1] > 0)
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


def test_exits_are_trained_from_files_and_a_run_says_who_left_where(points: Path, ecotone: Callable[..., Ended]) -> None:
    train = ("exits", "corners.py:net", "--samples", "points", "--labels", "labels.json", "--out", "c.exits.safetensors")
    done = ecotone(*train, "--at", "2,4", "--epochs", "30", "--budget", "30", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert [place["position"] for place in document["exits"]] == [2, 4]
    assert document["samples"] == 24  # the last fifth, which nothing learnt from
    assert min(place["right"] for place in document["exits"]) > 0.5
    loaded = load_model("corners.py:net")
    captured = read_exits(points / "c.exits.safetensors").attach(capture(loaded.module, loaded.args, name=loaded.name))
    data = read_exits(points / "c.exits.safetensors").data
    outcomes = Outcomes.from_tensors([head.name for head in captured.exits], data)
    assert outcomes is not None
    policy = max(calibrate(outcomes, captured.graph, budgets=(30.0,)), key=lambda p: len(p.exits))
    near, far, graph, last = DeviceId("near"), DeviceId("far"), captured.graph, captured.graph.num_blocks
    plain = Plan(
        graph_hash=graph.content_hash(), stages=(Stage(device=near, start=0, stop=3), Stage(device=far, start=3, stop=last)),
        transfers=(
            Transfer(source=near, target=near, position=0, codec=LOCAL), Transfer(source=near, target=far, position=3),
            Transfer(source=far, target=near, position=last),
        ),
    )  # fmt: skip
    (points / "plan.json").write_text(leaving_early(plain, graph, policy).to_json())
    with_exits = ("--cluster", "pair.toml", "--exits", "c.exits.safetensors", "--plan", "plan.json")
    ran = ecotone("run", "corners.py:net", "points", *with_exits)
    assert ran.code == 0, ran.err
    line = next(line for line in ran.out.splitlines() if line.startswith("left early:"))
    numbers = [int(word) for word in line.replace(";", " ").split() if word.isdigit()]
    assert sum(numbers) == 120
    assert numbers[-1] < 120
    rows = ecotone("run", "corners.py:net", "points", *with_exits, "--json")
    left = [json.loads(row).get("exit", "") for row in rows.out.splitlines()]
    assert {name: left.count(name) for name in set(left) - {""}} == {
        name: count for name, count in zip(policy.exits, numbers, strict=False) if count
    }


def test_without_labels_the_model_teaches_its_exits(points: Path, ecotone: Callable[..., Ended]) -> None:
    done = ecotone(
        "exits", "corners.py:net", "--samples", "points", "--out", "x.safetensors", "--count", "1", "--epochs", "20"
    )
    assert done.code == 0, done.err
    assert "FLOP saved" in done.out
    assert "(by definition)" in done.out


ROWS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--at", "99"), ("no single-tensor frontier", "nearest are")),
    (("--at", "two"), ("'two'", "2,6,8")),
    (("--budget", "much"), ("'much'", "0.5")),
    (("--budget", "-1"), ("-1", "from 0 to 100")),
    (("--labels", "none.json"), ("none.json",)),
    (("--labels", "few.json"), ("few.json", "no label for sample p001.npy and 118 others")),
    (("--labels", "odd.json"), ("odd.json", "'west'", "class number")),
    (("--labels", "shape.json"), ("labels [1, 2]", "decides [1] times")),
    (("--labels", "high.json"), ("labels from 9 to 9", "classes 0 to 3")),
    (("--samples", "nowhere"), ("nowhere", "no such file")),
    (("--samples", "one"), ("holds 1 inputs", "10 at least")),
    (("--budget", "0", "--epochs", "1", "--at", "5"), ("save compute", "nearest is")),
]


@pytest.mark.parametrize(("more", "words"), ROWS, ids=[" ".join(row[0]) for row in ROWS])
def test_bad_input_is_one_line(
    points: Path, ecotone: Callable[..., Ended], more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    names = [f"p{i:03}.npy" for i in range(120)]
    (points / "few.json").write_text('{"p000.npy": 1}')
    (points / "odd.json").write_text(json.dumps(dict.fromkeys(names, "west")))
    (points / "shape.json").write_text(json.dumps({name: [1, 2] for name in names}))
    (points / "high.json").write_text(json.dumps(dict.fromkeys(names, 9)))
    (points / "one").mkdir()
    np.save(points / "one" / "a.npy", np.zeros((1, 2), np.float32))
    samples = () if "--samples" in more else ("--samples", "points")
    done = ecotone("exits", "corners.py:net", *samples, "--out", "bad.safetensors", *more)
    assert done.code == 2
    message = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(message) == 1
    assert all(word in message[0] for word in words), message[0]
    assert "Traceback" not in done.err


def test_a_file_of_another_model_is_refused_and_own_needs_a_model_that_brings_one(
    points: Path, ecotone: Callable[..., Ended]
) -> None:
    torch.manual_seed(1)
    made = ecotone(
        "exits", "corners.py:net", "--samples", "points", "--out", "c.safetensors", "--count", "1", "--epochs", "5"
    )
    assert made.code == 0, made.err
    for exits, words in (
        ("c.safetensors", "is for a model with weights"),
        ("own", "brings no exits"),
        ("none", "no such file"),
    ):
        done = ecotone("plan", "net.py:net", "--exits", exits)
        assert done.code == 2
        assert words in done.err
        assert len([line for line in done.err.splitlines() if line.startswith("error:")]) == 1
