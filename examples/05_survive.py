"""Kill a machine while requests run over it: none is lost, none is answered twice. All machines are processes here.

    python examples/05_survive.py

The plan set is written by hand: camera and server share the work, and the camera keeps the rest of the network in reserve
(local fallback, T1). `ecotone plan --survive` chooses such sets by expected cost.
"""

import os
import signal

from ecotone.cli.demo_model import ASSETS, example_inputs, frames, tilenet
from ecotone.cluster import Cluster
from ecotone.model import Captured, capture
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planset import PlanSet, Standby
from ecotone.protocol import effects
from ecotone.runtime import deploy, launch

CUT = 5


def plan(captured: Captured, rest: str) -> Plan:
    """camera up to CUT, `rest` to the end. Both plans share the head, so its tensors serve either."""
    last = captured.graph.num_blocks

    def way(source: str, target: str, position: int, codec: str) -> Transfer:
        return Transfer(source=source, target=target, position=position, codec=LOCAL if source == target else codec)

    return Plan(
        graph_hash=captured.graph.content_hash(),
        stages=(Stage(device="camera", start=0, stop=CUT), Stage(device=rest, start=CUT, stop=last)),
        transfers=(
            way("camera", "camera", 0, "fp32"),
            way("camera", rest, CUT, "int4+zstd"),
            way(rest, "camera", last, "fp32"),
        ),
    )


def main() -> None:
    captured = capture(tilenet(), example_inputs(), name="TileNet")
    pixels, _ = frames(12)
    cluster = Cluster.load(ASSETS / "demo.toml")
    fallback = Standby(plan=plan(captured, "camera"), label="local fallback")
    plans = PlanSet(primary=plan(captured, "server"), standbys=(fallback,))
    with launch(cluster) as nodes, deploy(plans, captured, nodes) as session:
        moved: list[int] = []
        session.listen(lambda told: moved.append(told.request) if isinstance(told, effects.Rerouted) else None)
        server_epoch = session.plan.epoch
        futures = []
        for number, frame in enumerate(pixels):
            futures.append(session.submit((frame[None],)))
            if number == 5:
                futures[2].result()
                os.kill(nodes.pids["server"], signal.SIGKILL)
                print("server killed, with requests under way")
        answers = [future.result() for future in futures]
        there = sum(future.epoch == server_epoch for future in futures)
        alone = len(answers) - there
        print(f"{len(answers)} of {len(pixels)} frames answered: {there} by the server, {alone} by the camera alone")
        print(f"run again at the camera, from the tensors at the cut: {len(set(moved))}")


if __name__ == "__main__":
    main()
