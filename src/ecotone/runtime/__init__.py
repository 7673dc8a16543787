"""World 2: the shells round ecotone.protocol, on processes, threads, a wire and tensors. The public verb is `deploy`."""

from ecotone.runtime.children import ChildError
from ecotone.runtime.errors import (
    Busy,
    Cancelled,
    DeadlinePassed,
    DeployError,
    NodeLost,
    NodeUnreachable,
    RequestError,
    SessionClosed,
)
from ecotone.runtime.launch import Nodes, attach, in_memory, launch
from ecotone.runtime.measure_cluster import discover, measure, measure_links
from ecotone.runtime.node import NodeSettings, run_node
from ecotone.runtime.recorder import RequestTrace, StageTrace, TransferTrace
from ecotone.runtime.session import Session, deploy
from ecotone.runtime.store import Store, StoreCorrupted, StoreError, StoreFull

__all__ = [
    "Busy",
    "Cancelled",
    "ChildError",
    "DeadlinePassed",
    "DeployError",
    "NodeLost",
    "NodeSettings",
    "NodeUnreachable",
    "Nodes",
    "RequestError",
    "RequestTrace",
    "Session",
    "SessionClosed",
    "StageTrace",
    "Store",
    "StoreCorrupted",
    "StoreError",
    "StoreFull",
    "TransferTrace",
    "attach",
    "deploy",
    "discover",
    "in_memory",
    "launch",
    "measure",
    "measure_links",
    "run_node",
]
