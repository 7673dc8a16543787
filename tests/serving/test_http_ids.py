"""Requests with an id over the real application, session and journal: the same answer again, also after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from ecotone.cluster import Cluster, Device, DeviceId
from ecotone.model import Captured, capture
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.runtime import Session, deploy, in_memory
from ecotone.serving.http import Service, application
from ecotone.serving.prepare import Preparation

pytestmark = pytest.mark.torch

HERE = DeviceId("here")
WORLD = Cluster(name="here", devices=(Device(name=HERE, memory_bytes=1 << 30),), links=(), source=HERE, sink=HERE)


@pytest.fixture(scope="module")
def captured() -> Captured:
    torch.manual_seed(0)
    return capture(torch.nn.Linear(3, 2).eval(), (torch.zeros(1, 3),), name="net")


@contextmanager
def served(captured: Captured, journal: Path) -> Iterator[tuple[TestClient, Session]]:
    length = captured.graph.num_blocks
    ends = [Transfer(source=HERE, target=HERE, position=p, codec=LOCAL) for p in (0, length)]
    plan = Plan(
        graph_hash=captured.graph.content_hash(),
        stages=(Stage(device=HERE, start=0, stop=length),),
        transfers=tuple(ends),
    )
    preparation = Preparation(captured)
    with in_memory(WORLD) as nodes, deploy(plan, captured, nodes, journal=journal) as session:
        service = Service(
            name="net", inputs=preparation.input_specs(), outputs=preparation.output_specs(), ready=lambda: session.is_ready,
            infer=lambda tensors, s: preparation.submit(session, tensors, s),
            infer_once=lambda tensors, s, name: preparation.submit(session, tensors, s, name),
            cancel=lambda future: None, status=dict,
        )  # fmt: skip
        yield TestClient(application(service)), session


def body(captured: Captured, name: str, *numbers: float) -> dict[str, object]:
    spec = Preparation(captured).input_specs()[0]
    data = {"name": spec.name, "datatype": "FP32", "shape": [1, 3], "data": list(numbers)}
    return {"id": name, "inputs": [data]}


def test_an_id_is_answered_once_computed_and_again_from_the_journal(captured: Captured, tmp_path: Path) -> None:
    with served(captured, tmp_path / "j") as (http, session):
        first = http.post("/v2/models/net/infer", json=body(captured, "one", 1, 2, 3))
        assert first.status_code == 200
        assert first.json()["id"] == "one"
        again = http.post("/v2/models/net/infer", json=body(captured, "one", 1, 2, 3))
        assert again.json()["outputs"] == first.json()["outputs"]
        assert len(session.report()) == 1
        other = http.post("/v2/models/net/infer", json=body(captured, "one", 3, 2, 1))
        assert other.status_code == 409
        assert "with other inputs" in other.json()["error"]
        assert http.post("/v2/models/net/infer", json=body(captured, "", 3, 2, 1)).status_code == 200
    with served(captured, tmp_path / "j") as (http, session):
        late = http.post("/v2/models/net/infer", json=body(captured, "one", 1, 2, 3))
        assert late.json()["outputs"] == first.json()["outputs"]
        assert session.report() == ()
        session.expire(keep=0, keep_s=0.0)
        session.submit(captured.example_inputs, request_id="two").result(30)  # behind the expiry in the journal's order
        gone = http.post("/v2/models/net/infer", json=body(captured, "one", 1, 2, 3))
        assert gone.status_code == 410
