"""Results written and read back by the formats' own readers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ecotone.serving.results import Answer, json_line, save, summary
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch


def answer(seed: int, shape: tuple[int, ...] = (1, 3)) -> Answer:
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Answer(item=f"{seed}.png", outputs={"logits": array}, latency_s=0.25)


def test_npz_stacks_equal_shapes_and_keeps_unequal_ones(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", [answer(0), answer(1)])
    with np.load(tmp_path / "a.npz") as file:
        assert file["items"].tolist() == ["0.png", "1.png"]
        np.testing.assert_array_equal(file["logits"][1], answer(1).outputs["logits"])
    save(tmp_path / "b.npz", [answer(0), answer(1, (2, 3))])
    with np.load(tmp_path / "b.npz") as file:
        assert file["logits/1"].shape == (2, 3)


def test_json_lines(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", [answer(0), answer(1, (1, 3, 100, 100))], ("cat", "dog", "frog"))
    small, large = (json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines())
    np.testing.assert_allclose(small["outputs"]["logits"]["data"], answer(0).outputs["logits"].ravel())
    assert "data" not in large["outputs"]["logits"]
    assert large["outputs"]["logits"]["shape"] == [1, 3, 100, 100]
    odd = Answer(item="x", outputs={"y": np.array([[np.nan, np.inf, 1.0]])}, latency_s=0.0)
    assert json.loads(json_line(odd))["outputs"]["y"]["data"] == [None, None, 1.0]


def test_summaries_by_hand() -> None:
    def say(array: list[object], labels: tuple[str, ...] = ()) -> str:
        return summary(Answer(item="x", outputs={"y": np.array(array, dtype=np.float32)}, latency_s=0.0), labels)

    # softmax of (0, ln 3) is (1/4, 3/4)
    assert say([[0.0, float(np.log(3))]], ("cat", "dog")) == "dog (75%)"
    assert say([[0.0, float(np.log(3))]]) == "class 1 (75%)"
    assert say([[[[9, 0], [9, 9]], [[0, 9], [0, 0]]]], ("cat", "dog")) == "3 cat, 1 dog"
    assert say([[[1.0]]]) == "y (1, 1, 1) in [1, 1]"


def test_unknown_suffix_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(EcotoneError, match=r"suffix \.csv is not known"):
        save(tmp_path / "a.csv", [answer(0)])
    assert not list(tmp_path.iterdir())
