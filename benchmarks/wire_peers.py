"""The far ends of benchmarks.wire, each a process of its own: `python -m benchmarks.wire_peers KIND PORT CORE`.

KIND is ours (Channel over Zenoh), tcp (uvloop streams, 4 bytes of length before each message) or grpc (two-way stream of
bytes). Every one echoes small messages and, of large ones, answers once after the last of a run: the first 8 bytes of a
message are 0 then. A peer prints "ready" and ends when its standard input does. CORE -1 leaves it unpinned.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import uvloop

from ecotone.protocol.message import BodyId, Cancel, LetterBody, NodeId
from ecotone.protocol.settings import LinkSettings
from ecotone.wire.channel import Body, Channel
from ecotone.wire.zenoh import ZenohSettings, ZenohWire

SMALL_BYTES, LARGE_BYTES = 1024, 1_000_000
LEFT = struct.Struct("<Q")
ECHO, STREAM = 0, 1  # edges: what the far end does with a body
METHOD = "/bench.Wire/Stream"


def ours(port: int) -> None:
    """Echo bodies of edge ECHO and all letters; answer edge STREAM after its last body. Letters come back as they are."""
    small_buffers = int(os.environ.get("BENCH_SOCKET_BUFFER", "0")) or None
    chunk_bytes = int(os.environ.get("BENCH_CHUNK_BYTES", str(1 << 20)))
    replies = iter(range(1 << 62))

    def on_body(peer: NodeId, body: BodyId, content: Body) -> None:
        if body.edge == ECHO or LEFT.unpack_from(content)[0] == 0:
            answer = bytearray(content) if body.edge == ECHO else bytearray(8)
            channel.send_body(peer, BodyId(body.session + 1, 1, body.edge, next(replies)), answer, timeout_s=0)
        channel.release(peer, body)

    def on_letter(peer: NodeId, letter: LetterBody) -> None:
        if isinstance(letter, Cancel):
            channel.send_letter(peer, letter)

    settings = ZenohSettings(
        node=NodeId("far"), cluster="bench", listen=(f"127.0.0.1:{port}",), socket_buffer_bytes=small_buffers
    )
    links = LinkSettings(chunk_bytes=chunk_bytes, window_bytes=4 << 20)
    channel = Channel(ZenohWire(settings), NodeId("far"), on_body=on_body, on_letter=on_letter, settings=links)
    channel.start()
    _until_told()
    channel.close()


def tcp(port: int) -> None:
    """Echo every message."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readexactly(4)
                writer.write(head + await reader.readexactly(int.from_bytes(head, "little")))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", port)
        async with server:
            await asyncio.to_thread(_until_told)

    uvloop.run(main())


def grpc_stream(port: int) -> None:
    """Answer after the last message of a run."""

    def stream(messages: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        for message in messages:
            if LEFT.unpack_from(message)[0] == 0:
                yield bytes(8)

    handler = grpc.method_handlers_generic_handler("bench.Wire", {"Stream": grpc.stream_stream_rpc_method_handler(stream)})
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    _until_told()
    server.stop(0)


def _until_told() -> None:
    print("ready", flush=True)
    sys.stdin.read()


def main() -> None:
    """Run the peer that the command line names."""
    kind, port, core = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if core >= 0:
        os.sched_setaffinity(0, {core})
    threading.current_thread().name = kind
    {"ours": ours, "tcp": tcp, "grpc": grpc_stream}[kind](port)


if __name__ == "__main__":
    main()
