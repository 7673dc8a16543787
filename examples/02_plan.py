"""Measure a network on this computer, then ask where to cut it between a slow camera and a server, for several link rates.

    python examples/02_plan.py

Nothing is sent: the cluster is a value, and the planner answers from the profile.
"""

import torch

from ecotone.cli.demo_model import example_inputs, frames, tilenet
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.model import capture
from ecotone.planner import Latency, solve
from ecotone.profiling import MeasureOptions, measure

CAMERA, SERVER = DeviceId("camera"), DeviceId("server")


def cluster(megabit_per_s: float) -> Cluster:
    """A camera 12 times slower than this computer, which plays the server."""
    devices = (
        Device(name=CAMERA, memory_bytes=10**9, slowdown=12.0, executors=("torch:fp32",)),
        Device(name=SERVER, memory_bytes=10**9, executors=("torch:fp32",)),
    )
    links = tuple(
        Link(source=a, target=b, latency_s=0.005, bandwidth_bytes_per_s=megabit_per_s * 1e6 / 8)
        for a, b in ((CAMERA, SERVER), (SERVER, CAMERA))
    )
    return Cluster(name="two", devices=devices, links=links, source=CAMERA, sink=CAMERA, emulate=True)


def main() -> None:
    torch.set_num_threads(1)
    captured = capture(tilenet(), example_inputs(), name="TileNet")
    options = MeasureOptions(codecs=("fp32", "int8", "int4+zstd", "jpeg:90"), max_cuts=4, rounds=3, isolate=False)
    samples = [(frame[None],) for frame in frames(4)[0]]
    profile = measure(captured, cluster(20.0), samples=samples, options=options)
    for rate in (200.0, 20.0, 5.0, 1.0, 0.1):
        solution = solve(captured.graph, cluster(rate), profile, Latency(), ("accuracy_loss=5",))
        print(
            f"{rate:6g} Mbit/s: {solution.cost.latency_s * 1e3:6.1f} ms, {solution.cost.size_bytes:7.0f} B  {solution.plan}"
        )


if __name__ == "__main__":
    main()
