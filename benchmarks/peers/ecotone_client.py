"""A driver of our own over one or two machines, for ecotone_peer.py: `python -m benchmarks.peers.ecotone_client JSON`.

JSON: {"folder", "executor", "context", "threads", "store", "nodes": [[name, address], ...], "apart": whether the driver
holds no layers itself}. Then lines in and out as in petals_client.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
from pathlib import Path
from typing import Any

from benchmarks.llm_world import even_plan, greedy
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.decoding.answer import Piece
from ecotone.decoding.words import Ending
from ecotone.executors.memory import keep_freed_memory
from ecotone.llm.deploy import deploy_llm, join
from ecotone.llm.generator import Generator
from ecotone.llm.weights import Checkpoint
from ecotone.runtime.launch import attach
from ecotone.units import EcotoneError

MEMORY_BYTES = 8 << 30
DRIVER = DeviceId("driver")


def cluster_of(about: dict[str, Any]) -> tuple[Cluster, list[str]]:
    """The machines, and the devices of the stages in order."""
    devices = [Device(name=DRIVER, memory_bytes=MEMORY_BYTES, threads=about["threads"])]
    for name, address in about["nodes"]:
        devices.append(Device(name=DeviceId(name), memory_bytes=MEMORY_BYTES, threads=about["threads"], address=address))
    links = [
        Link(source=a.name, target=b.name, bandwidth_bytes_per_s=1.25e9, latency_s=1e-4)
        for a in devices
        for b in devices
        if a is not b
    ]
    cluster = Cluster(name="local", devices=tuple(devices), links=tuple(links), source=DRIVER, sink=DRIVER, emulate=False)
    names = [str(device.name) for device in devices]
    return cluster, names[1:] if about["apart"] and about["nodes"] else names


def answer(generator: Generator, request: dict[str, Any]) -> None:
    """Generate, a line per token."""
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    generator.submit(request["prompt"], greedy(request["count"]), pieces.put)
    while True:
        piece = pieces.get()
        for token in piece.tokens:
            say(f"token {token}")
        if piece.ending is not None:
            finished = piece.ending in (Ending.LENGTH, Ending.STOP)
            say("done" if finished else f"error {piece.ending}: {piece.reason}")
            return


def say(text: str) -> None:
    """One line to whoever started this."""
    os.write(_OUT, f"{text}\n".encode())


def main() -> None:
    """Serve requests until standard input ends."""
    about = json.loads(sys.argv[1])
    keep_freed_memory()
    source = Checkpoint.open(Path(about["folder"]))
    cluster, stages = cluster_of(about)
    plan = even_plan(
        source.config.num_layers, stages, about["executor"], driver=DRIVER, context=about["context"], kv_bytes=1 << 27
    )
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(attach(cluster))
        service = stack.enter_context(join(nodes, Path(about["store"])))
        generator = stack.enter_context(deploy_llm(service, cluster, plan, source))
        say("ready")
        for line in sys.stdin:
            try:
                answer(generator, json.loads(line))
            except EcotoneError as error:
                say(f"error {error}")


if __name__ == "__main__":
    _OUT = os.dup(1)
    os.dup2(2, 1)
    main()
