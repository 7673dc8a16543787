"""World 2: the shells round ecotone.protocol, on processes, threads, a wire and tensors. The public verb is `deploy`."""

from ecotone.runtime.children import ChildError
from ecotone.runtime.deployment import deploy
from ecotone.runtime.errors import (
    Busy,
    Cancelled,
    DeadlinePassed,
    DeployError,
    NodeLost,
    NodeUnreachable,
    RequestError,
    RequestIdTaken,
    SessionClosed,
    UnknownRequest,
    Unrecorded,
)
from ecotone.runtime.fan_in import FanIn, Fused
from ecotone.runtime.future import Future
from ecotone.runtime.launch import Nodes, attach, in_memory, launch
from ecotone.runtime.measure_cluster import discover, measure, measure_links
from ecotone.runtime.node import NodeSettings, run_node
from ecotone.runtime.recorder import RequestTrace, RunTrace, StageTrace, TransferTrace
from ecotone.runtime.session import Session
from ecotone.runtime.shadow import Shadow
from ecotone.runtime.store import Store, StoreCorrupted, StoreError, StoreFull
from ecotone.runtime.switching import Switchover

__all__ = [
    "Busy",
    "Cancelled",
    "ChildError",
    "DeadlinePassed",
    "DeployError",
    "FanIn",
    "Fused",
    "Future",
    "NodeLost",
    "NodeSettings",
    "NodeUnreachable",
    "Nodes",
    "RequestError",
    "RequestIdTaken",
    "RequestTrace",
    "RunTrace",
    "Session",
    "SessionClosed",
    "Shadow",
    "StageTrace",
    "Store",
    "StoreCorrupted",
    "StoreError",
    "StoreFull",
    "Switchover",
    "TransferTrace",
    "UnknownRequest",
    "Unrecorded",
    "attach",
    "deploy",
    "discover",
    "in_memory",
    "launch",
    "measure",
    "measure_links",
    "run_node",
]
