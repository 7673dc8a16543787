"""Two endpoints see two parts of the same scene; their answers are fused frame by frame, and one of them is killed.

    python examples/06_fan_in.py

A dead endpoint costs accuracy, not a stall (fan-in, T3): each frame is fused once, from the endpoints that came in time.
"""

import contextlib
import os
import signal

import torch

from ecotone.cli.demo_model import example_inputs, frames, tilenet
from ecotone.cluster import Cluster, Device, Link
from ecotone.model import capture
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.runtime import FanIn, Fused, deploy, launch

EYES, NUM_FRAMES, GREY = ("left", "right"), 16, 0.5


def cluster(eye: str) -> Cluster:
    """The hub, where the fan-in runs, and one endpoint."""
    devices = (Device(name="hub", memory_bytes=1 << 30), Device(name=eye, memory_bytes=1 << 30, slowdown=2.0))
    links = tuple(
        Link(source=a, target=b, latency_s=0.002, bandwidth_bytes_per_s=10e6) for a, b in (("hub", eye), (eye, "hub"))
    )
    return Cluster(name=f"{eye}-eye", emulate=True, devices=devices, links=links, source="hub", sink="hub")


def main() -> None:
    captured = capture(tilenet(), example_inputs(), name="TileNet")
    cut, last = 5, captured.graph.num_blocks
    pixels, labels = frames(NUM_FRAMES)
    seen = [pixels.clone() for _ in EYES]
    seen[0][..., 160:] = seen[1][..., :64] = GREY  # what this eye does not see
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(launch(cluster(eye))) for eye in EYES]
        sessions = []
        for eye, each in zip(EYES, nodes, strict=True):
            plan = Plan(
                graph_hash=captured.graph.content_hash(),
                stages=(Stage(device=eye, start=0, stop=cut), Stage(device="hub", start=cut, stop=last)),
                transfers=(
                    Transfer(source="hub", target=eye, position=0, codec="pixels"),
                    Transfer(source=eye, target="hub", position=cut, codec="int4+zstd"),
                    Transfer(source="hub", target="hub", position=last, codec=LOCAL),
                ),
            )
            sessions.append(stack.enter_context(deploy(plan, captured, each)))
        fan_in = stack.enter_context(FanIn(sessions, lambda logits: sum(x for x in logits if x is not None)))
        fused: list[Fused] = []
        for number in range(NUM_FRAMES):
            if number == NUM_FRAMES // 2:
                os.kill(nodes[1].pids["right"], signal.SIGKILL)
                print("the right eye is killed")
            fused.append(fan_in(*(view[number][None] for view in seen)))
    for name, missing in (("both eyes", ()), ("left eye alone", (1,))):
        numbers = [i for i, each in enumerate(fused) if each.missing == missing]
        right = torch.cat([fused[i].output for i in numbers]).argmax(1) == labels[numbers]
        print(f"{name}: {len(numbers)} frames, {right.float().mean():.0%} of tiles right")


if __name__ == "__main__":
    main()
