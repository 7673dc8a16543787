"""A node process that a launcher speaks to over its pipes: one JSON line in per command, one out per event.

First line in: {"settings": {...}}, answered {"listening": [...]}. Then {"link": {"peer", "bytes_per_s", "latency_s"}},
answered {"linked": peer}, as often as wished; {"stop": true} or the end of input: drain and end. Anything that fails is
answered {"failed": reason}. Only a launcher on this machine can write here: these lines are not part of the wire.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ecotone import schema
from ecotone.cluster import Device, Link
from ecotone.executors.memory import keep_freed_memory
from ecotone.protocol.settings import WorkerSettings
from ecotone.runtime.node import NodeProcess, NodeSettings, ServiceMaker, stop_on_signals
from ecotone.units import EcotoneError

__all__ = ["main"]


def main(services: Sequence[ServiceMaker] = ()) -> int:
    """Run until told to stop; 0 after a drained end, 2 where the settings cannot work."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like an answer
    keep_freed_memory()
    stop = stop_on_signals()
    _say(answers, {"loaded": os.getpid()})
    try:
        process = NodeProcess(_settings(json.loads(sys.stdin.readline() or "{}")), services)
        _say(answers, {"listening": list(process.start())})
    except EcotoneError as error:
        _say(answers, {"failed": str(error)})
        return 2
    threading.Thread(target=_obey, args=(process, answers, stop), name="pipe", daemon=True).start()
    stop.wait()
    process.leave()
    return 0


def _obey(process: NodeProcess, answers: IO[str], stop: threading.Event) -> None:
    try:
        for line in sys.stdin:
            command = json.loads(line)
            if "stop" in command:
                break
            if "link" in command:
                link = command["link"]
                process.set_link(link["peer"], link["bytes_per_s"], link["latency_s"])
                _say(answers, {"linked": link["peer"]})
    except (OSError, ValueError, KeyError) as error:
        _say(answers, {"failed": f"a command of the launcher: {error}"})
    finally:
        stop.set()


def _settings(document: dict[str, Any]) -> NodeSettings:
    found = dict(document.get("settings") or {})
    try:
        return NodeSettings(
            device=schema.read(Device, found["device"], "node settings"),
            links=schema.read(tuple[Link, ...], found["links"], "node settings"),
            folder=Path(found["folder"]), cluster=str(found["cluster"]), listen=tuple(found["listen"]),
            connect=tuple(found["connect"]), emulate=bool(found["emulate"]), cap_bytes=int(found["cap_bytes"]),
            insist=bool(found.get("insist", True)),
            worker=schema.read(WorkerSettings, found.get("worker", {}), "node settings"),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise EcotoneError(
            f"node settings: {type(error).__name__} {error}; start nodes with ecotone.runtime.launch"
        ) from None


def _say(answers: IO[str], event: dict[str, Any]) -> None:
    try:
        answers.write(json.dumps(event) + "\n")
        answers.flush()
    except (OSError, ValueError):
        pass  # the launcher is gone: the end of input will stop this node


if __name__ == "__main__":
    sys.exit(main())
