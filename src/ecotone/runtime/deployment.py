"""`deploy`: from a plan or a plan set to an open session, on nodes that run or are started for it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ecotone import codec
from ecotone.cluster import Cluster
from ecotone.model import Captured
from ecotone.plan import Plan
from ecotone.planset import PlanSet
from ecotone.protocol.message import NodeId
from ecotone.protocol.settings import CoordinatorSettings, WorkerSettings
from ecotone.runtime.launch import Nodes, attach, launch
from ecotone.runtime.models import Models
from ecotone.runtime.session import Session
from ecotone.runtime.stages import Piece

__all__ = ["deploy"]


def deploy(
    plan: Plan | PlanSet,
    captured: Captured,
    nodes: Nodes | Cluster,
    *,
    queue_limit: int = 64,
    max_in_flight: int = 8,
    samples: Sequence[Sequence[torch.Tensor]] = (),
    image: codec.ImageSpec | None = None,
    ordered: bool = False,
    pieces: Sequence[Piece] = (),
    timeout_s: float = 120.0,
    node_timeout_s: float = 5.0,
    variants: Sequence[Captured] = (),
    expected_s: Mapping[int, float] | None = None,
    held_limit_bytes: int = 1 << 30,
    suspect_after_s: float = 0.05,
    worker: WorkerSettings | None = None,
    journal: Path | None = None,
    weight: float = 1.0,
    loads: Sequence[Mapping[NodeId, float]] = (),
    bottlenecks: Sequence[codec.LearnedCodec] = (),
) -> Session:
    """Put `plan` in force on `nodes` and return the open session. A Cluster is launched (emulated) or attached to.

    A PlanSet is resident as a whole: when nodes of its first plan are lost, requests run under the next whose nodes answer.
    Its plans may be of `captured` or of one of the `variants`; `expected_s`: predicted latencies by position in the set.
    `queue_limit` requests wait at most, with `held_limit_bytes` of inputs (more: Busy), `max_in_flight` are under way.
    `samples` (flat inputs) calibrate int8 executors; `pieces` are sent for profiling (see measure_cluster). `image` says how
    pixels became the input, for images sent as such. `node_timeout_s`: where no plan can run for so long, requests without a
    deadline end. `suspect_after_s`: a request so much later than usual is doubted and its nodes are asked whether they live.
    `journal`: requests with an id survive this process (see Session.submit); those that a former process left unfinished are
    run again. `weight`: this session's share of nodes that serve several; `loads`: by position in the set, the shares of
    their processors that requests at the intended rate take (contention.py): a node with limits refuses what does not fit.
    `bottlenecks`: the learned codecs in which the plans cross; nodes get them beside their stages. Raises DeployError,
    NodeUnreachable, JournalError or WireError in bounded time.
    """
    plans = plan if isinstance(plan, PlanSet) else PlanSet(primary=plan)
    owned = isinstance(nodes, Cluster)
    if isinstance(nodes, Cluster):
        first = frozenset((plans.primary.source, *plans.primary.devices, plans.primary.sink))
        nodes = launch(nodes, deadline_s=timeout_s) if nodes.emulate else attach(nodes, needed=first)
    session = None
    try:
        settings = CoordinatorSettings(
            session=secrets.randbits(63), queue_limit=queue_limit, max_in_flight=max_in_flight, ordered=ordered,
            deploy_timeout_s=timeout_s, node_timeout_s=node_timeout_s, held_limit_bytes=held_limit_bytes,
            suspect_after_s=suspect_after_s, record=journal is not None, weight=weight,
        )  # fmt: skip
        models = Models(captured, variants, [tuple(sample) for sample in samples], pieces, bottlenecks)
        session = Session(nodes, models, settings, image=image, worker=worker, journal=journal, owns_nodes=owned)
        session.replan(plans, expected_s=expected_s, loads=loads)
        session.resume()
    except BaseException:
        if session is not None:
            session.close(drain=False)
        elif owned:
            nodes.close()
        raise
    return session
