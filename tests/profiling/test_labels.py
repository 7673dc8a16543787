"""Labels that do not fit are refused on one line that says which sample and what was expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ecotone.profiling.labels import IGNORED, ChanceTest, LabelError, Labels

pytestmark = pytest.mark.torch

MAPS = torch.zeros(1, 10, 7, 7)
CLASSES = torch.zeros(1, 5)
TOKENS = torch.zeros(1, 8, 4)


def of(given, outputs, index=0, names=()):  # type: ignore[no-untyped-def]
    return Labels(given, given, names).of(index, outputs)


@pytest.mark.parametrize(
    ("outputs", "label", "shape"),
    [
        ((CLASSES,), 3, (1,)),
        ((CLASSES,), [3], (1,)),
        ((torch.zeros(2, 5),), np.array([3, 1]), (2,)),
        ((MAPS,), torch.zeros(7, 7, dtype=torch.uint8), (1, 7, 7)),
        ((MAPS,), torch.zeros(1, 7, 7, dtype=torch.int64), (1, 7, 7)),
        ((TOKENS,), [0] * 8, (1, 8)),
    ],
)
def test_labels_take_the_shape_of_the_decisions(outputs, label, shape):
    number, found = of([label], outputs)
    assert (number, tuple(found.shape), found.dtype) == (0, shape, torch.int64)


def test_the_output_that_a_label_fits_is_found():
    outputs = (torch.zeros(1, 3, dtype=torch.int64), MAPS, CLASSES)
    assert of([2], outputs)[0] == 1  # of those that decide: the map, then the classes
    assert of([torch.zeros(7, 7, dtype=torch.int64)], outputs)[0] == 0


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (torch.zeros(7, 6, dtype=torch.int64), r"label of sample 1 .b\.png.: has shape .7, 6., the model decides .1, 7, 7."),
        (torch.full((7, 7), 10), r"label of sample 1 .b\.png.: holds class 10, the model has classes 0 to 9"),
        (torch.full((7, 7), -1), "holds class -1"),
        (torch.zeros(7, 7), "is float32; give whole class numbers"),
        (torch.zeros(7, 7, dtype=torch.bool), "is bool"),
        ("cat", "is|holds no numbers"),
        ([[1, 2], [3]], "holds no numbers of one shape"),
    ],
)
def test_wrong_labels_name_the_sample(label, expected):
    with pytest.raises(LabelError, match=expected) as caught:
        of([torch.zeros(7, 7, dtype=torch.int64), label], (MAPS,), 1, ("a.png", "b.png"))
    assert "\n" not in str(caught.value)


def test_wrong_numbers_of_labels():
    with pytest.raises(LabelError, match="labels: 3 for 2 samples"):
        Labels([1, 2, 3], [0, 0])
    with pytest.raises(LabelError, match="labels: are dict"):
        Labels({"a": 1}, [0])  # type: ignore[arg-type]


def chance_of(labels: torch.Tensor, decisions: torch.Tensor, classes: int) -> ChanceTest:
    test = ChanceTest()
    outputs = torch.nn.functional.one_hot(decisions, classes).float()
    half = len(labels) // 2
    test.add(labels[:half], outputs[:half])
    test.add(labels[half:], outputs[half:])
    return test


def test_labels_of_other_samples_are_refused_with_the_figures():
    generator = torch.Generator().manual_seed(0)
    decisions = torch.randint(0, 10, (500,), generator=generator)
    right = torch.where(torch.rand(500, generator=generator) < 0.6, decisions, (decisions + 1) % 10)
    chance_of(right, decisions, 10).check()
    shuffled = right[torch.randperm(500, generator=generator)]
    with pytest.raises(LabelError, match=r"labels look wrong: the unsplit model is right in \d+ of 500 decisions"):
        chance_of(shuffled, decisions, 10).check()


def test_renumbered_classes_are_recognised():
    decisions = torch.arange(300) % 10
    with pytest.raises(LabelError, match="with its classes renumbered it would be right in 100 %"):
        chance_of((decisions + 3) % 10, decisions, 10).check()


def test_chance_knows_unlike_frequencies():
    """Nine in ten are class 0 in labels and decisions: shuffled labels are right in 82 %, and that is chance."""
    generator = torch.Generator().manual_seed(1)
    decisions = (torch.rand(2000, generator=generator) < 0.1).long()
    shuffled = decisions[torch.randperm(2000, generator=generator)]
    test = chance_of(shuffled, decisions, 10)
    assert test.chance == pytest.approx(0.82, abs=0.03)
    with pytest.raises(LabelError, match="labels look wrong"):
        test.check()
    chance_of(decisions, decisions, 10).check()


def test_good_labels_are_never_refused_for_being_alike_or_few():
    chance_of(torch.zeros(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64), 10).check()
    chance_of(torch.tensor([1, 2]), torch.tensor([2, 1]), 10).check()


def test_how_often_random_labels_pass():
    """The test is at 1 %: of 200 sets of labels drawn at random about two pass, ten or more once in 20,000 times."""
    generator = torch.Generator().manual_seed(2)
    passed = 0
    for _ in range(200):
        labels, decisions = torch.randint(0, 5, (2, 200), generator=generator)
        try:
            chance_of(labels, decisions, 5).check()
            passed += 1
        except LabelError:
            pass
    assert passed <= 9


def test_decisions_without_label_do_not_count():
    test = ChanceTest()
    output = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3]), 5).float()
    test.add(torch.tensor([0, IGNORED, 2, 0]), output)
    assert (test.num_decisions, test.num_right) == (3, 2)
    empty = ChanceTest()
    empty.add(torch.full((4,), IGNORED), output)
    with pytest.raises(LabelError, match="every decision is marked as without label"):
        empty.check()
