"""A whole measurement of a small model: what it holds, how it stretches, when it is used again."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from ecotone import codec, schema
from ecotone.cluster import Cluster, Device, Link
from ecotone.codec import ImageSpec
from ecotone.model import capture
from ecotone.profile import LinkFit, Profile
from ecotone.profiling import (
    DeviceMeasurement,
    MeasureOptions,
    candidate_cuts,
    measure,
    payloads,
    profile_codecs,
    profile_device,
    profile_key,
)
from ecotone.profiling.decisions import disagreement
from ecotone.profiling.work import relative_error
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

OPTIONS = MeasureOptions(
    executors=("torch:fp32", "torch:bf16"), codecs=("fp32", "int8", "int2"), rounds=2, screening_rounds=2, isolate=False
)


def device(name: str, slowdown: float = 1.0, **more) -> Device:  # type: ignore[no-untyped-def]
    return Device(name=name, memory_bytes=10**9, slowdown=slowdown, **more)


def cluster(*devices: Device) -> Cluster:
    ends = [d.name for d in devices]
    links = tuple(Link(source=a, target=b, latency_s=0.01, bandwidth_bytes_per_s=1e6) for a in ends for b in ends if a != b)
    return Cluster(name="test", devices=devices, links=links, source=ends[0], sink=ends[0], emulate=True)


@pytest.fixture(scope="module")
def captured():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 5))
    return capture(model.eval(), (torch.randn(1, 3, 16, 16),))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))


def test_stated_cuts_are_measured_and_no_others(captured, tmp_path):
    """As for another order of the blocks, of which only what a plan needs is measured."""
    length = captured.graph.num_blocks
    options = replace(OPTIONS, cuts=(2, 1, length + 7), executors=("torch:fp32",), codecs=("fp32",))
    one = cluster(device("only"))
    profile = measure(captured, one, options=options, path=tmp_path / "p.json")
    assert profile.cuts == options.cuts_of(captured.graph) == tuple(sorted({0, 1, 2, length}))
    assert {(s.start, s.stop) for s in profile.segments} <= {(0, length), (0, 1), (1, length), (0, 2), (2, length)}
    assert {p.position for p in profile.payloads} == {0, 1, 2, length}
    assert profile.key != profile_key(captured.graph, one, OPTIONS)


def test_profile_holds_every_prefix_and_suffix(captured, tmp_path):
    seen: list[tuple[int, int, str]] = []
    two = cluster(device("slow", 8.0), device("fast"))
    profile = measure(captured, two, options=OPTIONS, path=tmp_path / "p.json", progress=lambda *step: seen.append(step))
    length = captured.graph.num_blocks
    assert profile.cuts == candidate_cuts(captured.graph, OPTIONS.max_cuts)
    assert len({(s.device, s.executor, s.start, s.stop) for s in profile.segments}) == len(profile.segments)
    kept = {s.executor for s in profile.segments if s.start > 0}
    assert kept
    spans = {(0, length), *((0, c) for c in profile.cuts[1:-1]), *((c, length) for c in profile.cuts[1:-1])}
    for name in ("slow", "fast"):
        for executor in kept:
            assert {(s.start, s.stop) for s in profile.segments if (s.device, s.executor) == (name, executor)} == spans
    fast = {(s.executor, s.start, s.stop): s for s in profile.segments if s.device == "fast"}
    slow = {(s.executor, s.start, s.stop): s for s in profile.segments if s.device == "slow"}
    assert all(slow[key].median_s == pytest.approx(8 * fast[key].median_s) for key in fast)
    assert {(c.device, c.codec) for c in profile.codecs} == {(d, c) for d in ("slow", "fast") for c in OPTIONS.codecs}
    assert {(p.position, p.codec) for p in profile.payloads} == {(c, q) for c in profile.cuts for q in OPTIONS.codecs}
    assert seen
    assert all(0 < done <= total for done, total, _ in seen)


def test_file_is_used_again_until_something_changes(captured, tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    two = cluster(device("a", 2.0), device("b"))
    first = measure(captured, two, options=OPTIONS, path=path)
    assert Profile.from_json(path.read_bytes()) == first

    def again(*arguments, **more):  # type: ignore[no-untyped-def]
        raise AssertionError("measured again")

    monkeypatch.setattr(sys.modules[measure.__module__], "profile_device", again)
    assert measure(captured, two, options=OPTIONS, path=path) == first
    link = LinkFit(source="a", target="b", latency_s=0.02, bandwidth_bytes_per_s=5e5)
    assert measure(captured, two.scaled_links(0.1), options=OPTIONS, path=path, links=[link]).links == (link,)
    changed = [
        {"cluster": cluster(device("a", 3.0), device("b"))},
        {"options": replace(OPTIONS, rounds=3)},
        {"samples": [(torch.zeros(1, 3, 16, 16),)]},
        {"image": ImageSpec(mean=(0.5,), std=(0.5,))},
    ]
    for change in changed:
        given = {"cluster": two, "options": OPTIONS} | change
        with pytest.raises(AssertionError, match="measured again"):
            measure(captured, given.pop("cluster"), path=path, **given)
    path.write_text(path.read_text()[:-100])
    with pytest.raises(AssertionError, match="measured again"):
        measure(captured, two, options=OPTIONS, path=path)


def test_what_nodes_measured_is_taken(captured, tmp_path, monkeypatch):
    cuts = (0, 2, captured.graph.num_blocks)
    sent = {name: profile_device(captured, device(name), cuts=cuts, options=OPTIONS).to_json() for name in ("left", "right")}
    measured = [DeviceMeasurement.from_json(text) for text in sent.values()]

    def here(*arguments, **more):  # type: ignore[no-untyped-def]
        raise AssertionError("measured here")

    monkeypatch.setattr(sys.modules[measure.__module__], "profile_device", here)
    profile = measure(
        captured, cluster(device("left"), device("right")), options=OPTIONS, measured=measured, path=tmp_path / "p.json"
    )
    assert profile.segments == measured[0].segments + measured[1].segments


def test_one_process_for_a_device(captured):
    options = replace(OPTIONS, isolate=True, executors=("torch:fp32", "nothing:fp32"))
    found = profile_device(captured, device("a", 3.0), cuts=(0, 2, captured.graph.num_blocks), options=options)
    assert {(s.start, s.stop) for s in found.segments} == {
        (0, 2),
        (2, captured.graph.num_blocks),
        (0, captured.graph.num_blocks),
    }
    assert all(s.relative_error == 0 for s in found.segments)  # eager in one layout or the other: the same float32 sums
    assert [f.executor for f in found.failures] == ["nothing:fp32"]
    assert "not known" in found.failures[0].reason
    assert found.slowdown == 3.0
    assert found.for_device(device("a", 3.0)) == found


def test_device_on_which_nothing_runs(captured):
    options = replace(OPTIONS, executors=("nothing:fp32",))
    with pytest.raises(EcotoneError, match="device a: no executor runs this model"):
        profile_device(captured, device("a"), cuts=(0, captured.graph.num_blocks), options=options)


def test_options_name_every_violation():
    with pytest.raises(schema.SchemaError) as caught:
        MeasureOptions(rounds=0, max_error=-1.0)
    assert len(caught.value.violations) == 2


def test_key_ignores_links_and_sees_devices(captured):
    one = cluster(device("a", 2.0), device("b"))
    assert profile_key(captured.graph, one) == profile_key(captured.graph, one.scaled_links(0.5))
    assert profile_key(captured.graph, one) != profile_key(captured.graph, cluster(device("a", 2.5), device("b")))


def test_payloads_are_what_the_codec_writes(captured):
    samples = [(torch.randn(1, 3, 16, 16),) for _ in range(3)]
    length = captured.graph.num_blocks
    found = {(p.position, p.codec): p for p in payloads(captured, samples, (0, 1, length), OPTIONS.codecs)}
    for cut in (0, 1, length):
        exact, coarse = found[cut, "fp32"], found[cut, "int2"]
        assert exact.relative_error == 0 == exact.disagreement
        assert exact.size_bytes > captured.graph.frontier_bytes(cut)
        assert coarse.relative_error > found[cut, "int8"].relative_error > 0
        assert coarse.num_samples == 3
    assert found[1, "int8"].size_bytes < found[1, "fp32"].size_bytes / 3


def test_pictures_are_coded_as_their_pixels_became_inputs(captured, tmp_path):
    """With the right ImageSpec lossless image codecs cost the answer nothing, and JPEG what its own error makes of it."""
    pixels = torch.randint(0, 256, (3, 1, 3, 16, 16)).float()
    spec = ImageSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (spec.mean, spec.std))
    samples = [((p / 255 - mean) / std,) for p in pixels]
    options = replace(OPTIONS, codecs=("pixels", "png", "jpeg:50", "fp32"))
    profile = measure(captured, cluster(device("a")), samples=samples, options=options, image=spec, path=tmp_path / "p.json")
    right = {p.codec: p.relative_error for p in profile.payloads if p.position == 0}
    without = {
        p.codec: p.relative_error for p in payloads(captured, samples, (0, captured.graph.num_blocks), options.codecs)
    }
    assert right["png"] < 1e-5
    assert right["pixels"] < 1e-5
    assert without["png"] > 1e-4
    coded = [codec.unpack(codec.pack([("x", s[0])], "jpeg:50", image=spec)) for s in samples]
    answers = [captured.reference(x) for x in coded]
    assert right["jpeg:50"] == pytest.approx(relative_error(answers, [captured.reference(s) for s in samples]), rel=1e-4)


def test_image_codecs_are_timed_on_the_picture_given():
    small, large = (torch.rand(1, 3, side, side) for side in (8, 256))
    (quick,), (slow,) = (profile_codecs("a", ["png"], picture=x, rounds=2) for x in (small, large))
    assert 0 < quick.encode_fixed_s < slow.encode_fixed_s


def test_codec_costs_grow_with_size():
    (cost,) = profile_codecs("a", ["int4+zstd"], sizes_bytes=(1 << 14, 1 << 20), rounds=15)
    assert cost.encode_s_per_raw_byte > 0
    assert cost.decode_s_per_raw_byte > 0


def test_disagreement_counts_decisions():
    wanted = [(torch.tensor([[1.0, 2.0], [2.0, 1.0]]),)]
    assert disagreement([(torch.tensor([[2.0, 1.0], [2.0, 1.0]]),)], wanted) == 0.5
    tiles = torch.zeros(1, 3, 2, 2)
    tiles[0, 1] = 1.0
    flipped = tiles.clone()
    flipped[0, 2, 0, 0] = 2.0  # one tile of four changes its class
    assert disagreement([(flipped,)], [(tiles,)]) == 0.25


def test_relative_error_is_l2_over_all():
    wanted = [(torch.tensor([3.0, 4.0]),), (torch.tensor([0.0, 0.0]),)]
    made = [(torch.tensor([3.0, 4.0]),), (torch.tensor([0.0, 1.0]),)]
    assert relative_error(made, wanted) == pytest.approx(1 / 5)
    assert relative_error(wanted, wanted) == 0
