"""The accuracy table against a walk through the same choices, sample by sample, that shares no code with it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_classifier import CLASSES, classifier, exits, samples
from torch import nn

from ecotone import codec
from ecotone.accuracy import NOWHERE, AccuracyTable, ExitPolicy
from ecotone.codec import CodecError, ImageSpec
from ecotone.model import Captured, capture
from ecotone.profiling import LabelError, measure_accuracy
from ecotone.profiling.crossings import exit_run
from ecotone.profiling.ladders import value_codec
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

CODECS = ("fp32", "int8", "int4+zstd", "int4", "int3", "int2", "int4c")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def captured() -> Captured:
    return classifier()


def labels_of(captured: Captured, given: list[tuple[torch.Tensor, ...]], right: float = 0.8) -> list[int]:
    """Labels on which the model is right about so often; one each."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for sample in given:
        made = int(captured.reference(sample)[0].argmax())
        found.append(made if torch.rand(1, generator=generator) < right else (made + 1) % CLASSES)
    return found


@cache
def module(captured: Captured, start: int, stop: int) -> nn.Module:
    return captured.segment(start, stop).module()


def sent(captured: Captured, cut: int, name: str, x: torch.Tensor) -> torch.Tensor:
    """The oracle's answer: the frontier at `cut` packed and read, the rest of the model behind it."""
    frontier = module(captured, 0, cut)(x) if cut else (x,)
    names = [captured.graph.tensors[t].name for t in captured.graph.frontier(cut)]
    back = codec.unpack(codec.pack(list(zip(names, frontier, strict=True)), name))
    length = captured.graph.num_blocks
    return (module(captured, cut, length)(*back) if cut < length else back)[0]


def test_every_cell_is_what_a_walk_finds(captured):
    given = samples(60)
    labels = labels_of(captured, given)
    table = measure_accuracy(captured, given, labels, codecs=CODECS)
    truth = np.array(labels)
    reference = np.array([int(captured.reference(s)[0].argmax()) for s in given])
    assert table.reference_points == pytest.approx(100 * (reference == truth).mean())
    assert table.is_labelled
    assert table.num_samples == 60
    length = captured.graph.num_blocks
    assert {(c.position, c.codec) for c in table.cells} == {
        (NOWHERE, "none"),
        *((p, q) for p in range(length + 1) for q in CODECS),
    }
    for cut in range(length + 1):
        for name in CODECS:
            made = np.array([int(sent(captured, cut, name, s[0]).argmax()) for s in given])
            cell = table.cell(cut, name)
            assert cell.num_decisions == 60
            assert cell.points == pytest.approx(100 * (made == truth).mean())
            assert cell.loss_points == pytest.approx(100 * ((reference == truth).mean() - (made == truth).mean()))
            assert cell.disagreement == pytest.approx((made != reference).mean())
            assert cell.low_points <= cell.loss_points <= cell.high_points
            assert cell.disagreement <= cell.disagreement_high
        ladder = [table.cell(cut, name).fitted_points for name in ("int2", "int3", "int4", "int8")]
        assert ladder == sorted(ladder, reverse=True)
        exact = table.cell(cut, "fp32")
        assert (exact.loss_points, exact.high_points, exact.disagreement_high) == (0, 0, 0)
    assert max(cell.loss_points for cell in table.cells) > 0


def test_without_labels_agreement_counts():
    captured, given = classifier(batch=3), samples(40, each=3)
    table = measure_accuracy(captured, given, cuts=(1,), codecs=("int2", "int8"))
    assert not table.is_labelled
    assert table.reference_points == 100
    differ = [
        (sent(captured, 1, "int2", s[0]).argmax(1) != captured.reference(s)[0].argmax(1)).numpy() for s in given
    ]  # three pictures in one request: three decisions, one range each
    cell = table.cell(1, "int2")
    assert cell.num_decisions == 120
    assert cell.num_samples == 40
    assert cell.loss_points == pytest.approx(100 * np.concatenate(differ).mean())
    assert cell.disagreement == pytest.approx(cell.loss_points / 100)
    assert 0 <= cell.low_points < cell.high_points
    assert cell.design_effect >= 1


def test_maps_have_a_decision_per_pixel_and_labels_may_be_missing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    captured = capture(net, (torch.rand(1, 3, 6, 6),))
    given = [(torch.rand(1, 3, 6, 6),) for _ in range(20)]
    labels = torch.cat([captured.reference(s)[0].argmax(1) for s in given])  # [20, 6, 6]
    labels[:, 0] = -100
    table = measure_accuracy(captured, given, labels, codecs=("int2",))
    assert table.reference_points == 100
    assert {cell.num_decisions for cell in table.cells} == {20 * 30}


def test_image_codecs_only_at_the_input_and_lossless_ones_by_measurement():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    net[1].weight.data -= net[1].weight.mean(1, keepdim=True)  # grey says nothing: what JPEG loses matters
    captured = capture(net, (torch.rand(1, 3, 8, 8),))
    given = [(torch.randint(0, 256, (1, 3, 8, 8)).float() / 255,) for _ in range(12)]
    right = ImageSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    table = measure_accuracy(captured, given, codecs=("png", "jpeg:10", "int8"), image=right)
    assert {cell.codec for cell in table.cells if cell.position > 0} == {"int8"}
    assert table.cell(0, "png").disagreement == 0
    assert table.cell(0, "png").high_points > 0  # on these samples it changed nothing; of others it is not sure
    assert table.cell(0, "jpeg:10").disagreement > 0


def test_batches_change_nothing_but_the_last_bits():
    given = samples(30)
    one = measure_accuracy(classifier(), given, codecs=("int3", "int2"))
    several = classifier(dynamic_batch=True)
    assert measure_accuracy(several, given, codecs=("int3", "int2")).cells == one.cells
    unlike = samples(20, each=2) + samples(10)
    table = measure_accuracy(several, unlike, codecs=("int2",))
    differ = sum(int((sent(several, 1, "int2", s[0]).argmax(1) != several.reference(s)[0].argmax(1)).sum()) for s in unlike)
    assert table.cell(1, "int2").disagreement == pytest.approx(differ / 50)


# ---- exits and variants -------------------------------------------------------------------------------------------------


def test_exit_policies_are_followed_with_and_without_a_crossing(captured):
    given, heads = samples(80), exits(captured)
    labels = labels_of(captured, given)
    policy = ExitPolicy(name="p", exits=("early", "late"), thresholds=(1.2, 0.6), shares=(0.0, 0.0), loss_points=0.0)
    table = measure_accuracy(captured, given, labels, codecs=("int2", "fp32"), policies=[policy], exits=heads)

    def walk(x: torch.Tensor, cut: int = NOWHERE, name: str = "") -> tuple[str, int]:
        values = (x,)
        for block in range(captured.graph.num_blocks):
            for head, threshold in zip(heads, policy.thresholds, strict=True):
                if head.position == block:
                    outputs = head.outputs(values)
                    if head.confidence(outputs) >= threshold:
                        return head.name, int(outputs[0].argmax())
            if block == cut:
                names = [captured.graph.tensors[t].name for t in captured.graph.frontier(block)]
                values = tuple(codec.unpack(codec.pack(list(zip(names, values, strict=True)), name)))
            values = module(captured, block, block + 1)(*values)
        return "", int(values[0].argmax())

    left = [walk(s[0])[0] for s in given]
    found = table.policy("p")
    assert found.shares == pytest.approx((left.count("early") / 80, left.count("late") / 80))
    assert 0 < found.shares[0] < 1
    assert 0 < found.shares[1] < 1
    reference = np.mean([int(captured.reference(s)[0].argmax()) == y for s, y in zip(given, labels, strict=True)])
    for cut, name in [(NOWHERE, "none"), *((c, q) for c in range(3) for q in ("int2", "fp32"))]:
        right = np.mean([walk(s[0], cut, name)[1] == y for s, y in zip(given, labels, strict=True)])
        assert table.cell(cut, name, "p").loss_points == pytest.approx(100 * (reference - right))
    assert found.loss_points == table.cell(NOWHERE, "none", "p").loss_points
    assert table.crossing_points(1, "int2", found) == pytest.approx(
        max(0.0, table.cell(1, "int2", "p").fitted_points - max(0.0, found.loss_points))
    )


def test_an_exit_of_a_captured_model_can_be_run(captured):
    """Whatever has a segment from the frontier to the outputs and a rule, as exits of a captured model do."""

    class Rule:
        def of_request(self, outputs: Sequence[torch.Tensor]) -> float:
            return outputs[0].softmax(1).amax().item()

    frontier = module(captured, 0, 1)(samples(1)[0][0])
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(frontier[0].numel(), CLASSES)).eval()
    segment = capture(head, (frontier[0],)).segment(0, 1)
    found = exit_run(SimpleNamespace(name="e", position=1, segment=segment, rule=Rule()))
    assert torch.equal(found.outputs(frontier)[0], head(frontier[0]))
    assert found.confidence(found.outputs(frontier)) == pytest.approx(head(frontier[0]).softmax(1).max().item())
    assert segment.content_hash() in found.content
    policy = ExitPolicy(name="p", exits=("e",), thresholds=(0.0,), shares=(0.0,), loss_points=0.0)
    table = measure_accuracy(captured, samples(20), codecs=("int8",), policies=[policy], exits=[found])
    assert table.policy("p").shares == (1.0,)


def test_variants_are_held_against_the_same_reference(captured):
    given, other = samples(50), classifier(seed=4)
    table = measure_accuracy(captured, given, codecs=("int2",), variants=[other])
    name = other.graph.content_hash()
    differ = np.mean([int(other.reference(s)[0].argmax()) != int(captured.reference(s)[0].argmax()) for s in given])
    assert table.cell(NOWHERE, "none", variant=name).disagreement == pytest.approx(differ)
    assert 0 < differ < 1
    made = np.mean([int(sent(other, 1, "int2", s[0]).argmax()) != int(captured.reference(s)[0].argmax()) for s in given])
    assert table.cell(1, "int2", variant=name).disagreement == pytest.approx(made)


# ---- reused, streamed, refused ------------------------------------------------------------------------------------------


def test_a_table_is_reused_until_something_changes(captured, tmp_path, monkeypatch):
    given = samples(20)
    labels = labels_of(captured, given)
    path = tmp_path / "table.json"
    table = measure_accuracy(captured, given, labels, codecs=CODECS, path=path)
    assert AccuracyTable.from_json(table.to_json()) == table

    def again(*arguments: object, **more: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(sys.modules[measure_accuracy.__module__], "measured", again)
    assert measure_accuracy(captured, given, torch.tensor(labels), codecs=CODECS, path=path) == table
    other_label = [*labels[:-1], (labels[-1] + 1) % CLASSES]
    changes: list[dict] = [
        {"samples": [*given[:-1], samples(1, seed=2)[0]]}, {"labels": other_label}, {"labels": None}, {"codecs": CODECS[1:]},
        {"cuts": (1,)}, {"confidence": 0.9}, {"variants": [classifier(seed=1)]},
        {"captured": classifier(seed=2), "labels": None}, {"image": ImageSpec(mean=(0.5,), std=(0.5,))},
    ]  # fmt: skip
    for change in changes:
        asked = {"captured": captured, "samples": given, "labels": labels, "codecs": CODECS, "path": path} | change
        with pytest.raises(AssertionError, match="measured again"):
            measure_accuracy(**asked)
    path.write_text(path.read_text()[:-50])
    with pytest.raises(AssertionError, match="measured again"):
        measure_accuracy(captured, given, labels, codecs=CODECS, path=path)


def test_exits_of_unknown_content_are_measured_each_time(captured, monkeypatch):
    policy = ExitPolicy(name="p", exits=("early",), thresholds=(0.5,), shares=(0.0,), loss_points=0.0)
    given = samples(10)
    asked = {"codecs": ("int8",), "policies": [policy]}
    known, unknown = exits(captured)[:1], [replace(exits(captured)[0], content="")]
    for heads in (known, unknown):
        measure_accuracy(captured, given, exits=heads, **asked)
    monkeypatch.setattr(sys.modules[measure_accuracy.__module__], "measured", lambda *a: 1 / 0)
    measure_accuracy(captured, given, exits=known, **asked)
    with pytest.raises(ZeroDivisionError):
        measure_accuracy(captured, given, exits=unknown, **asked)


class Streamed:
    """Samples made anew whenever they are gone through; counts how many are alive at once."""

    def __init__(self, count: int) -> None:
        self.count, self.alive, self.most = count, 0, 0

    def __len__(self) -> int:
        return self.count

    def __contains__(self, sample: object) -> bool:
        return False

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for index in range(self.count):
            yield self._one(index)

    def _one(self, index: int) -> tuple[torch.Tensor, ...]:
        x = samples(1, seed=index)[0][0].clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(x, self._gone)
        return (x,)

    def _gone(self) -> None:
        self.alive -= 1


def test_samples_are_streamed(captured):
    stream = Streamed(64)
    table = measure_accuracy(captured, stream, codecs=("int2",))
    assert stream.most <= 4
    assert table == measure_accuracy(captured, [samples(1, seed=i)[0] for i in range(64)], codecs=("int2",))


def test_progress_reaches_its_end(captured):
    seen: list[tuple[int, int, str]] = []
    given = samples(7)
    measure_accuracy(captured, given, labels_of(captured, given), codecs=("int8",), progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen if "accuracy" in step[2]] == list(range(1, 8))
    assert all(step[1] == 7 for step in seen)


def test_bad_requests_are_refused_on_one_line(captured):
    given, heads = samples(30), exits(captured)
    policy = ExitPolicy(name="p", exits=("early",), thresholds=(0.5,), shares=(0.0,), loss_points=0.0)
    cases: list[tuple[dict, type[Exception], str]] = [
        ({"samples": []}, EcotoneError, "there is no sample"),
        ({"samples": (s for s in given)}, EcotoneError, "samples: are generator; give a list"),
        (
            {"samples": [*given[:4], (torch.zeros(1, 2, 9, 8),)]},
            EcotoneError,
            r"sample 4: input x: is \(1, 2, 9, 8\) float32, must be \(1, 2, 8, 8\) float32",
        ),
        ({"samples": [(given[0][0].double(),)], "names": ["a.png"]}, EcotoneError, r"sample 0 \(a\.png\): .*float64"),
        ({"samples": [(given[0][0], given[0][0])]}, EcotoneError, "sample 0: .*2 tensors, it takes 1"),
        ({"samples": [("text",)]}, EcotoneError, "sample 0: .*is str"),
        ({"labels": [0] * 29}, LabelError, "labels: 29 for 30 samples"),
        ({"labels": [0.5] * 30}, LabelError, "label of sample 0: is float64"),
        ({"labels": [0] * 29 + [3]}, LabelError, "label of sample 29: holds class 3, the model has classes 0 to 2"),
        ({"labels": [[0, 1]] * 30}, LabelError, r"label of sample 0: has shape \(2,\), the model decides \(1,\)"),
        ({"labels": [0] * 29 + [9], "names": [f"{i}.png" for i in range(30)]}, LabelError, r"sample 29 \(29\.png\)"),
        ({"codecs": ("int9",)}, CodecError, "int9"),
        ({"cuts": (17,)}, EcotoneError, "cut 17: classifier has positions 0 to 3"),
        ({"confidence": 95}, EcotoneError, "confidence 95 must lie in"),
        ({"policies": [policy]}, EcotoneError, "exit policy p: exit 'early' cannot be run; exits given are none"),
        ({"policies": [policy, policy], "exits": heads}, EcotoneError, "two have one name"),
        ({"exits": [replace(heads[0], position=3)]}, EcotoneError, "exit early at 3: no frontier inside"),
        ({"variants": [classifier(batch=2)]}, EcotoneError, "takes other inputs than classifier"),
    ]
    for change, kind, expected in cases:
        with pytest.raises(kind, match=expected) as caught:
            measure_accuracy(captured, **({"samples": given, "codecs": ("int8",)} | change))
        assert "\n" not in str(caught.value)
    other = capture(nn.Sequential(nn.Flatten(), nn.Linear(128, 4)).eval(), (given[0][0],))
    with pytest.raises(EcotoneError, match="do not decide what the reference decides"):
        measure_accuracy(captured, [samples(1, each=1)[0]], codecs=("int8",), variants=[_two_outputs(given[0][0])])
    assert measure_accuracy(captured, given, codecs=("int8",), variants=[other]).cell(NOWHERE, "none") is not None
    nothing = capture(nn.Sequential(nn.Flatten(), nn.Linear(128, 1)).eval(), (given[0][0],))
    with pytest.raises(EcotoneError, match="no output of the model has classes"):
        measure_accuracy(nothing, given, codecs=("int8",))


class _Two(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean((2, 3)), x.amax((2, 3))


def _two_outputs(x: torch.Tensor) -> Captured:
    return capture(_Two().eval(), (x,))


def test_labels_of_other_samples_are_noticed(captured):
    given = samples(120)
    labels = labels_of(captured, given)
    with pytest.raises(LabelError, match=r"labels look wrong: the unsplit model is right in \d+ of 120 decisions"):
        measure_accuracy(captured, given, labels[60:] + labels[:60], codecs=("int8",))


def test_lossless_coders_share_the_cell_of_their_values(captured):
    table = measure_accuracy(captured, samples(20), codecs=CODECS)
    for cell in table.cells:
        if cell.position >= 0:
            twin = table.cell(cell.position, value_codec(cell.codec))
            assert replace(cell, codec="") == replace(twin, codec="")
