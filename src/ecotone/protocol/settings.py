"""Bounds and patience of the machines: links, worker, coordinator. Sizes in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MIB", "CoordinatorSettings", "LinkSettings", "WorkerSettings", "chunk_bytes_for"]

MIB = 1 << 20


def chunk_bytes_for(bandwidth_bytes_per_s: float, hold_s: float = 0.05) -> int:
    """Chunk that occupies the link at most `hold_s`: to 1 MiB, and not below 8 KiB, or 1 KiB where that takes a second."""
    least = min(max(bandwidth_bytes_per_s, 1024), 8192)
    return int(min(max(bandwidth_bytes_per_s * hold_s, least), MIB))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """Of one directed link. `window_bytes`: memory that the receiver lends each channel."""

    chunk_bytes: int = MIB
    window_bytes: int = 16 * MIB
    max_body_bytes: int = 1 << 30
    ack_every_chunks: int = 4
    ack_delay_s: float = 0.005
    lease_s: float = 1.0  # nothing heard for 1.5 leases, and the time that a frame needs, with bytes outstanding: down
    bytes_per_s: float = 0.0  # believed rate until one is measured, for patience on thin links; 0: none


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Bounds of a worker. `queue_limit`: decoded inputs per stage, and outputs per stage not yet handed to the link.

    `max_sessions`, `max_load`: what askers may take here together, see fairness.py; 0: no limit.
    """

    queue_limit: int = 2
    park_limit_bytes: int = 64 * MIB
    session_timeout_s: float = 30.0  # the asker silent for so long: its session is dropped, and deployed again if it returns
    reach_timeout_s: float = 1.0  # the next node lost for so long: the asker is told that the run cannot go on
    report_s: float = 0.25  # at most so often a node tells the asker what it measured; 0: never
    max_sessions: int = 0
    max_load: float = 0.0  # sum of the declared shares of the processor


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """Bounds of the asker: accepted requests waiting, requests in the pipeline, order of results, patience.

    `held_limit_bytes`: inputs and boundary tensors kept for accepted requests; above it a request is refused as BUSY.
    `record`: a request is accepted only once the shell wrote it to its journal.
    `weight`: this session's share where nodes serve several.
    `suspect_after_s`: a run that takes so much longer than the slowest of late (or its prediction) is doubted: its nodes are
    pinged, and one that stays silent for `pong_timeout_s` counts as lost until it is heard again.
    """

    session: int
    queue_limit: int = 64
    max_in_flight: int = 8
    ordered: bool = True
    deploy_timeout_s: float = 120.0
    node_timeout_s: float = 5.0  # no plan can run for so long: requests without a deadline end with node-lost
    held_limit_bytes: int = 1 << 30
    record: bool = False
    suspect_after_s: float = 0.05
    pong_timeout_s: float = 0.1
    weight: float = 1.0
