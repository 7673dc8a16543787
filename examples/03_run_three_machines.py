"""Run a network over three machines, then move the cut while it runs. The machines are processes of this computer.

    python examples/03_run_three_machines.py

A plan is a value: here it is written by hand, in 02_plan.py the planner makes it.
"""

import time

from ecotone.cli.demo_model import ASSETS, LABELS, example_inputs, frames, tilenet
from ecotone.cluster import Cluster
from ecotone.model import Captured, capture
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.runtime import deploy, launch


def plan(captured: Captured, *cuts: int) -> Plan:
    """camera up to the first cut, gateway up to the second, server to the end; 4 bits on the way, float32 back."""
    names, edges = ("camera", "gateway", "server"), (0, *cuts, captured.graph.num_blocks)
    stages = tuple(Stage(device=n, start=a, stop=b) for n, a, b in zip(names, edges, edges[1:], strict=False))
    ways = tuple(
        Transfer(source=a, target=b, position=p, codec="int4+zstd") for a, b, p in zip(names, names[1:], cuts, strict=False)
    )
    first = Transfer(source="camera", target="camera", position=0, codec=LOCAL)
    back = Transfer(source="server", target="camera", position=edges[-1], codec="fp32")
    return Plan(graph_hash=captured.graph.content_hash(), stages=stages, transfers=(first, *ways, back))


def main() -> None:
    captured = capture(tilenet(), example_inputs(), name="TileNet")
    pixels, labels = frames(4)
    cluster = Cluster.load(ASSETS / "demo.toml")
    with launch(cluster) as nodes, deploy(plan(captured, 5, 11), captured, nodes) as session:
        for cuts in ((5, 11), (2, 5)):
            session.replan(plan(captured, *cuts))
            for number, (frame, truth) in enumerate(zip(pixels, labels, strict=True)):
                began = time.perf_counter()
                named = session(frame[None])[0].argmax(0)
                took, right = time.perf_counter() - began, int((named == truth).sum())
                first = ", ".join(LABELS[i] for i in named.flatten()[:3])
                print(f"cuts {cuts}, frame {number}: {first}, ...: {right} of {truth.numel()} right, {took * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
