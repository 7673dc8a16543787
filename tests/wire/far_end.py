"""A node in a process of its own for test_zenoh: echoes bodies and frames until its standard input ends, then leaves.

`python -m tests.wire.far_end NAME MODE ENDPOINT`: connects to ENDPOINT and prints "up NAME". MODE echo sends back what
comes; MODE hold takes bodies over a Channel and never releases them.
"""

from __future__ import annotations

import sys
import threading

from ecotone.protocol.settings import LinkSettings
from ecotone.wire.channel import Channel
from ecotone.wire.wire import NodeId, PeerUp, Priority, Received, WireEvent
from ecotone.wire.zenoh import ZenohSettings, ZenohWire


def main() -> None:
    name, mode, endpoint = NodeId(sys.argv[1]), sys.argv[2], sys.argv[3]
    wire = ZenohWire(ZenohSettings(node=name, connect=(endpoint,), lease_s=1.0, connect_timeout_s=20.0))
    if mode == "hold":
        links = LinkSettings(window_bytes=4 << 20)
        channel = Channel(wire, name, on_body=lambda peer, body, content: None, settings=links)
        channel.start()
    else:
        seen = threading.Event()

        def handle(event: WireEvent) -> None:
            if isinstance(event, Received):
                wire.send(event.peer, event.frame, Priority.DATA)
            elif isinstance(event, PeerUp):
                seen.set()

        wire.start(handle)
        seen.wait(20)
    print(f"up {name}", flush=True)
    sys.stdin.read()
    wire.close()


if __name__ == "__main__":
    main()
