"""The demo's measuring, on nodes that are threads of this process, with a profile whose numbers are made up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ecotone.cli.demo_model import ASSETS, example_inputs, frames, tile_accuracy, tilenet
from ecotone.cli.demo_run import choose, run_all, summed_up
from ecotone.cli.demo_words import one_cut
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.cost import predict
from ecotone.model import Captured, capture
from ecotone.profile import CodecCost, Payload, Profile, SegmentTime
from ecotone.runtime import deploy, in_memory

pytestmark = pytest.mark.loopback

CAMERA, SERVER = DeviceId("camera"), DeviceId("server")


def cluster() -> Cluster:
    devices = tuple(Device(name=name, memory_bytes=10**9, executors=("torch:fp32",)) for name in (CAMERA, SERVER))
    links = tuple(
        Link(source=a, target=b, latency_s=0.001, bandwidth_bytes_per_s=1e8) for a, b in ((CAMERA, SERVER), (SERVER, CAMERA))
    )
    return Cluster(name="two", devices=devices, links=links, source=CAMERA, sink=CAMERA, emulate=True)


def profile(captured: Captured) -> Profile:
    """The camera ten times slower than the server; cuts at the two narrow maps; JPEG and int4 measured."""
    graph = captured.graph
    cuts, last = (0, 5, 11, graph.num_blocks), graph.num_blocks
    spans = [(a, b) for a in cuts for b in cuts if a < b and (a == 0 or b == last)]
    segments = tuple(
        SegmentTime(
            device=device, executor="torch:fp32", start=a, stop=b, median_s=slow * graph.segment_flop(a, b) / 1e11,
            spread_s=0.0, memory_bytes=1,
        )
        for device, slow in ((CAMERA, 10.0), (SERVER, 1.0))
        for a, b in spans
    )  # fmt: skip
    free = {"encode_fixed_s": 0.0, "encode_s_per_raw_byte": 0.0, "decode_fixed_s": 0.0, "decode_s_per_raw_byte": 0.0}
    codecs = tuple(CodecCost(device=d, codec=c, **free) for d in (CAMERA, SERVER) for c in ("fp32", "int4", "jpeg:90"))
    payloads = (
        *(Payload(position=p, codec="fp32", size_bytes=graph.frontier_bytes(p)) for p in cuts),
        *(Payload(position=p, codec="int4", size_bytes=graph.frontier_bytes(p) / 8) for p in cuts[1:3]),
        Payload(position=0, codec="jpeg:90", size_bytes=22_000, disagreement=0.5),
    )
    return Profile(
        graph_hash=graph.content_hash(), cluster_name="two", num_blocks=last, cuts=cuts, segments=segments, codecs=codecs,
        payloads=payloads,
    )  # fmt: skip


def test_contenders_run_and_what_is_said_of_them_is_what_happened() -> None:
    torch.set_num_threads(1)
    net, (pixels, labels) = tilenet(), frames(3)
    captured, state = capture(net, example_inputs(), name="TileNet"), cluster()
    stated, seen = profile(captured), []
    entries = choose(captured.graph, state, stated, ("accuracy_loss=1",))
    assert [entry.kind for entry in entries] == ["device", "jpeg", "fixed", "ecotone"]
    assert entries[1].plan.transfers[0].codec == "jpeg:90"  # a baseline is there even where the accuracy asked rules it out
    assert all(entry.cost == predict(entry.plan, captured.graph, state, stated) for entry in entries)
    with in_memory(state) as nodes, deploy(entries[0].plan, captured, nodes) as session:
        tallies = run_all(session, entries, pixels, labels, lambda done, total, _: seen.append((done, total)))
    device, jpeg, fixed, ours = summed_up(captured.graph, entries, tallies)
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert device.accuracy == pytest.approx(tile_accuracy(net, pixels, labels), abs=1e-9)
    assert device.bytes_per_frame == 0
    assert 15_000 < jpeg.bytes_per_frame < 30_000
    assert jpeg.links[0].size_bytes < jpeg.links[0].raw_bytes / 20
    assert device.num_frames == 6  # three frames in each of two rounds
    for contender in (device, jpeg, fixed, ours):
        measured = sum(part.measured_s for part in (*contender.stages, *contender.links))
        assert 0 < measured <= contender.latency_p95_s * 1.5
        assert contender.latency_median_s <= contender.latency_p95_s
        assert contender.throughput_per_s > 0
    assert sum(stage.flop_share for stage in ours.stages) == pytest.approx(1)
    same = ours.same_as == fixed.name if entries[2].plan.identity() == entries[3].plan.identity() else not ours.same_as
    assert same


def test_a_plan_that_was_kept_takes_part_and_equal_plans_are_measured_once() -> None:
    torch.set_num_threads(1)
    captured, state = capture(tilenet(), example_inputs(), name="TileNet"), cluster()
    stale = one_cut(captured.graph, state, SERVER, 5, "int4", ("torch:fp32", "torch:fp32"))
    entries = choose(captured.graph, state, profile(captured), ("accuracy_loss=1",), stale)
    assert [entry.kind for entry in entries] == ["device", "jpeg", "fixed", "stale", "ecotone"]
    twice = (entries[3], entries[3])
    with in_memory(state) as nodes, deploy(stale, captured, nodes) as session:
        tallies = run_all(session, twice, *frames(2), lambda *_: None)
    assert len(tallies) == 1
    first, second = summed_up(captured.graph, twice, tallies)
    assert first.latency_median_s == second.latency_median_s


def _wait_for(condition: object, what: str, deadline_s: float = 90.0) -> None:
    assert callable(condition)
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_an_interrupted_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ECOTONE_CACHE": str(tmp_path / "cache")}
    # A shell starts what runs in its background with SIGINT ignored, and Python leaves it so: as at a terminal, then.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heed}; from ecotone.cli.main import main; main()"
    command = [sys.executable, "-c", program, "demo", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as demo:
        try:
            family = psutil.Process(demo.pid)
            _wait_for(lambda: len(family.children(recursive=True)) >= 2, "the nodes never started")
            children = family.children(recursive=True)
            demo.send_signal(signal.SIGINT)
            errors = demo.communicate(timeout=60)[1]
        finally:
            demo.kill()
    assert demo.returncode == 130, errors
    assert "Traceback" not in errors
    _wait_for(lambda: not any(child.is_running() for child in children), f"still there: {children}", 20.0)
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_emulated_is_refused(tmp_path: Path) -> None:
    real = (ASSETS / "demo.toml").read_text().replace("emulate = true", "emulate = false")
    file = tmp_path / "real.toml"
    file.write_text("\n".join(line for line in real.splitlines() if not line.startswith("slowdown")))
    command = [sys.executable, "-c", "from ecotone.cli.main import main; main()", "demo", "--cluster", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "set emulate = true" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
