"""A camera asks a server; frames that an early exit is sure of are answered on the camera and never cross the link.

    python examples/07_leave_early.py

Both plans are resident: one without exits, one that leaves by a calibrated policy. They take turns on the same frames.
"""

import statistics
import time

from ecotone.cli.demo_model import EXITS, example_inputs, frames, tilenet
from ecotone.cluster import Cluster, Device, Link
from ecotone.model import capture
from ecotone.model.exit_file import read_exits
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner.exiting import leaving_early
from ecotone.planset import PlanSet, Standby
from ecotone.profiling.calibration import calibrate, judge
from ecotone.profiling.exit_outcomes import Outcomes
from ecotone.runtime import deploy, launch

CUT, NUM_FRAMES, BUDGET = 8, 16, 2.0


def cluster() -> Cluster:
    devices = (Device(name="camera", memory_bytes=1 << 30, slowdown=2.0), Device(name="server", memory_bytes=1 << 30))
    links = tuple(
        Link(source=a, target=b, latency_s=0.01, bandwidth_bytes_per_s=1e6)
        for a, b in (("camera", "server"), ("server", "camera"))
    )
    return Cluster(name="camera", emulate=True, devices=devices, links=links, source="camera", sink="camera")


def main() -> None:
    file = read_exits(EXITS)
    captured = file.attach(capture(tilenet(), example_inputs(), name="TileNet"))
    graph, last = captured.graph, captured.graph.num_blocks
    seen = Outcomes.from_tensors([head.name for head in captured.exits], file.data)
    policies = calibrate(seen, graph, budgets=(BUDGET,))
    policy = max(policies, key=lambda p: judge(seen, graph, p.exits, p.thresholds).saved)
    print(f"policy {policy.name} points: {judge(seen, graph, policy.exits, policy.thresholds).saved:.0%} of the FLOP saved")

    stages = (Stage(device="camera", start=0, stop=CUT), Stage(device="server", start=CUT, stop=last))
    transfers = (
        Transfer(source="camera", target="camera", position=0, codec=LOCAL),
        Transfer(source="camera", target="server", position=CUT, codec="int8"),
        Transfer(source="server", target="camera", position=last, codec="fp32"),
    )
    whole = Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)
    plans = {"without exits": whole, "with exits": leaving_early(whole, graph, policy)}
    pixels, labels = frames(NUM_FRAMES)
    both = PlanSet(primary=whole, standbys=(Standby(plan=plans["with exits"]),))
    with launch(cluster()) as nodes, deploy(both, captured, nodes) as session:
        for name, plan in plans.items():
            session.prefer(plan)
            session(pixels[:1])  # the first finds everything warm
            right, seconds, left = 0, [], dict.fromkeys((*policy.exits, "the end"), 0)
            for frame, truth in zip(pixels, labels, strict=True):
                start = time.perf_counter()
                future = session.submit((frame[None],))
                right += int((future.result()[0].argmax(0) == truth).sum())
                seconds.append(time.perf_counter() - start)
                left[future.exit or "the end"] += 1
            counts = ", ".join(f"{count} at {where}" for where, count in left.items())
            mean_ms = 1e3 * statistics.mean(seconds)
            print(f"{name}: {mean_ms:.0f} ms a frame, {right / labels.numel():.1%} of tiles right, frames left {counts}")


if __name__ == "__main__":
    main()
