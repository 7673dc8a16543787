"""An asker in a process of its own: attach to nodes that run, deploy, say "ready"; for each line: send, print what came.

    python second_asker.py SOURCE ADDRESS WEIGHT REQUESTS IN_FLIGHT SLOWDOWN

Prints one JSON line for each that it reads: seconds of each request, those of the server's work on it, when each ended,
and whether every answer was right.
"""

from __future__ import annotations

import collections
import json
import sys
import time
from typing import Any

import torch
from small_nets import lines, plan, shared_server

from ecotone.runtime import Session, attach, deploy


def ask(session: Session, x: torch.Tensor, expected: torch.Tensor, requests: int, in_flight: int) -> dict[str, Any]:
    """Keep so many requests under way."""
    waiting: collections.deque[tuple[float, object]] = collections.deque()
    took, ends, right, begun = [], [], True, time.time()

    def take() -> None:
        nonlocal right
        start, future = waiting.popleft()
        answer = future.result(60)  # type: ignore[attr-defined]
        took.append(time.perf_counter() - start)
        ends.append(time.time())
        right = right and torch.equal(answer, expected)

    for _ in range(requests):
        while len(waiting) >= in_flight:
            take()
        waiting.append((time.perf_counter(), session.submit((x,))))
    while waiting:
        take()
    work = {t.request: sum(s.compute_s for s in t.stages) for t in session.report()}
    worked = [work[request] for request in sorted(work)[-requests:]]
    return {"seconds": took, "worked": worked, "begun": begun, "ends": ends, "right": right}


def main() -> None:
    source, address, weight, requests, in_flight, slowdown = sys.argv[1:]
    torch.set_num_threads(1)
    captured, x = lines()
    expected = captured.unflatten_outputs(captured.reference((x,)))
    machines = shared_server(source, address=address, slowdown=float(slowdown))
    chosen = plan(captured.graph, ("server", captured.graph.num_blocks), source=source)
    with (
        attach(machines, connect=(address,), deadline_s=60.0) as nodes,
        deploy(chosen, captured, nodes, max_in_flight=int(in_flight), weight=float(weight)) as session,
    ):
        session(x)
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps(ask(session, x, expected, int(requests), int(in_flight))), flush=True)


if __name__ == "__main__":
    main()
