"""The accuracy table inside a profile: made of all samples, redone alone, read by cost and planner."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from small_classifier import CLASSES, classifier, samples
from torch import nn

from ecotone.cluster import Cluster, Device, Link
from ecotone.cost import CostModel
from ecotone.model import Captured, capture
from ecotone.planner import Latency, solve
from ecotone.profile import CodecCost, Profile, SegmentTime
from ecotone.profiling import (
    AccuracyOptions,
    DeviceMeasurement,
    LabelError,
    MeasureOptions,
    measure,
    measure_accuracy,
)
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

OPTIONS = MeasureOptions(
    executors=("torch:fp32",), codecs=("fp32", "int8", "int2"), rounds=1, screening_rounds=1, isolate=False, max_samples=2
)


def timed(captured, device, *, cuts, samples, **more):  # type: ignore[no-untyped-def]
    """In place of profile_device: a millisecond a block, free codecs; nothing here is about times."""
    length = captured.graph.num_blocks
    spans = [(a, b) for a in cuts for b in cuts if a < b and (a == 0 or b == length)]
    seconds = [(a, b, 1e-3 * (b - a)) for a, b in spans]
    segments = [
        SegmentTime(device=device.name, executor="torch:fp32", start=a, stop=b, median_s=s, spread_s=0.0, memory_bytes=1)
        for a, b, s in seconds
    ]
    costs = dict.fromkeys(("encode_fixed_s", "encode_s_per_raw_byte", "decode_fixed_s", "decode_s_per_raw_byte"), 0.0)
    codecs = tuple(CodecCost(device=device.name, codec=name, **costs) for name in OPTIONS.codecs)
    return DeviceMeasurement(device=device.name, segments=tuple(segments), codecs=codecs)


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules[measure.__module__], "profile_device", timed)


@pytest.fixture(scope="module")
def captured() -> Captured:
    return classifier()


def pair(rate: float = 1e3) -> Cluster:
    devices = (Device(name="a", memory_bytes=10**9, slowdown=50.0), Device(name="b", memory_bytes=10**9))
    links = tuple(Link(source=s, target=t, latency_s=0.0, bandwidth_bytes_per_s=rate) for s, t in (("a", "b"), ("b", "a")))
    return Cluster(name="pair", devices=devices, links=links, source="a", sink="a", emulate=True)


def test_the_table_holds_all_samples_and_the_profile_reads_it(captured, tmp_path):
    given = samples(50)
    labels = [int(captured.reference(s)[0].argmax()) for s in given]
    path = tmp_path / "p.json"
    profile = measure(captured, pair(), samples=given, labels=labels, options=OPTIONS, path=path)
    assert Profile.from_json(path.read_bytes()) == profile
    table = profile.accuracy
    assert table.num_samples == 50
    assert table.reference_points == 100
    assert table == measure_accuracy(captured, given, labels, cuts=profile.cuts, codecs=OPTIONS.codecs)
    assert {p.num_samples for p in profile.payloads} == {50}
    model = CostModel(captured.graph, pair(), profile)
    for cell in table.cells:
        if cell.position >= 0:
            assert model.loss_points(cell.position, cell.codec) == cell.fitted_points
    lossy = max(table.cell(p, "int2").fitted_points for p in profile.cuts[:-1])
    assert lossy > 1
    for limit in (0.0, lossy):
        found = solve(captured.graph, pair(), profile, Latency(), (f"accuracy_loss={limit}", "device=b"))
        assert found.cost.loss_points == sum(t.loss_points for t in found.cost.transfers) <= limit + 1e-9
        if limit == 0.0:  # no codec that lost anything on the calibration set is admitted
            used = [t for t in found.plan.transfers if not t.is_local]
            assert all(table.cell(t.position, t.codec).fitted_points == 0 for t in used)


def test_only_what_changed_is_measured_again(captured, tmp_path, monkeypatch):
    given = samples(12)
    path = tmp_path / "p.json"
    first = measure(captured, pair(), samples=given, options=OPTIONS, path=path)
    module = sys.modules[measure.__module__]
    monkeypatch.setattr(module, "profile_device", lambda *a, **k: 1 / 0)
    assert measure(captured, pair(), samples=given, options=OPTIONS, path=path) == first
    labels = [int(captured.reference(s)[0].argmax()) for s in given]
    second = measure(captured, pair(), samples=given, labels=labels, options=OPTIONS, path=path)
    assert second.segments == first.segments
    assert (first.accuracy.is_labelled, second.accuracy.is_labelled) == (False, True)
    more = [*given, *samples(3, seed=8)]
    third = measure(captured, pair(), samples=more, options=OPTIONS, path=path)
    assert third.segments == first.segments
    assert third.accuracy.num_samples == 15
    assert measure(captured, pair(), options=OPTIONS, path=path) == third  # without samples: whatever the file has
    with pytest.raises(ZeroDivisionError):
        measure(captured, pair(), samples=samples(3, seed=8), options=OPTIONS, path=path)


def test_a_table_outlives_the_times_beside_it(captured, tmp_path):
    """Devices are measured anew (as real nodes are each time): without samples the table of the file stays."""
    path, given = tmp_path / "p.json", samples(12)
    first = measure(captured, pair(), samples=given, options=OPTIONS, path=path)
    slower = replace(pair(), devices=tuple(replace(d, slowdown=2 * d.slowdown) for d in pair().devices))
    second = measure(captured, slower, options=OPTIONS, path=path)
    assert second.segments != first.segments
    assert (second.accuracy, second.payloads) == (first.accuracy, first.payloads)
    other = classifier(seed=1)
    assert measure(other, slower, options=OPTIONS, path=path).accuracy is None


def test_a_limit_and_what_needs_no_table(captured, tmp_path):
    given = samples(10)
    asked = {"samples": given, "options": OPTIONS, "path": tmp_path / "p.json"}
    some = measure(captured, pair(), labels=[0] * 10, table=AccuracyOptions(limit=4), **asked)
    assert some.accuracy.num_samples == 4
    none = measure(captured, pair(), table=AccuracyOptions(limit=0), **(asked | {"path": tmp_path / "q.json"}))
    assert none.accuracy is None
    assert measure(captured, pair(), options=OPTIONS, path=tmp_path / "r.json").accuracy is None
    single = capture(nn.Sequential(nn.Flatten(), nn.Linear(128, 1)).eval(), (given[0][0],))
    assert measure(single, pair(), **(asked | {"path": tmp_path / "s.json"})).accuracy is None  # it decides nothing


def test_wrong_labels_are_refused_before_anything_is_timed(captured, monkeypatch):
    monkeypatch.setattr(sys.modules[measure.__module__], "profile_device", lambda *a, **k: 1 / 0)
    given = samples(10)
    for labels, expected in (([0] * 9, "labels: 9 for 10 samples"), ([CLASSES] * 10, "holds class 3")):
        with pytest.raises(LabelError, match=expected):
            measure(captured, pair(), samples=given, labels=labels, options=OPTIONS)
    with pytest.raises(LabelError, match="labels: 9 for 10 samples"):
        measure(captured, pair(), samples=given, labels=[0] * 9, options=OPTIONS, table=AccuracyOptions(limit=5))
    with pytest.raises(EcotoneError, match="labels: there are no samples"):
        measure(captured, pair(), labels=[0], options=OPTIONS)
    single = capture(nn.Sequential(nn.Flatten(), nn.Linear(128, 1)).eval(), (given[0][0],))
    with pytest.raises(LabelError, match="label of sample 0"):
        measure(single, pair(), samples=given, labels=[0] * 10, options=OPTIONS)


def test_timing_sees_the_first_samples_only(captured, monkeypatch, tmp_path):
    seen = []

    def noted(*arguments, samples, **more):  # type: ignore[no-untyped-def]
        seen.append(len(samples))
        return timed(*arguments, samples=samples, **more)

    monkeypatch.setattr(sys.modules[measure.__module__], "profile_device", noted)
    measure(captured, pair(), samples=samples(9), options=OPTIONS, path=tmp_path / "p.json")
    assert seen == [2]
