"""A source answered while the server runs: in memory, through a real session and the real application."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from ecotone.cluster import Cluster, Device, DeviceId
from ecotone.model import capture
from ecotone.plan import Plan, Stage, Transfer
from ecotone.runtime import deploy, in_memory
from ecotone.serving.http import Service, application
from ecotone.serving.live import Live
from ecotone.serving.prepare import Preparation, PrepareError
from ecotone.serving.sources import Item, Source

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def preparation() -> Preparation:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    return Preparation(capture(net, (torch.rand(1, 3, 2, 2),), name="net"), labels=("cat", "dog", "frog"))


def everything_here(preparation: Preparation) -> tuple[Cluster, Plan]:
    name, graph = DeviceId("here"), preparation.captured.graph
    cluster = Cluster(name="c", devices=(Device(name=name, memory_bytes=10**9),), links=(), source=name, sink=name)
    ends = tuple(Transfer(source=name, target=name, position=p, codec="none") for p in (0, graph.num_blocks))
    stage = Stage(device=name, start=0, stop=graph.num_blocks)
    return cluster, Plan(graph_hash=graph.content_hash(), stages=(stage,), transfers=ends)


def test_answers_of_a_source_are_read_over_http(preparation: Preparation) -> None:
    listening, pictures = threading.Event(), np.random.default_rng(0).integers(0, 256, (4, 2, 2, 3), dtype=np.uint8)

    def frames() -> Iterator[Item]:
        assert listening.wait(20)
        yield from (Item(f"frame {i}", "image", picture) for i, picture in enumerate(pictures))

    cluster, plan = everything_here(preparation)
    with in_memory(cluster) as nodes, deploy(plan, preparation.captured, nodes) as session:
        live = Live(preparation, session, Source(items=frames(), length=None, live=True))
        service = Service(
            name="net", inputs=preparation.input_specs(), outputs=preparation.output_specs(), ready=lambda: session.is_ready,
            infer=lambda t, d: preparation.submit(session, t, d), cancel=lambda f: None, status=dict, token="t",
        )  # fmt: skip
        http = TestClient(application(service, live.routes("t")), headers={"Authorization": "Bearer t"})
        assert http.get("/latest").status_code == 503
        assert http.get("/latest", headers={"Authorization": "Bearer no"}).status_code == 401
        live.start()
        try:
            threading.Timer(0.2, listening.set).start()
            lines = [json.loads(line) for line in http.get("/results").text.splitlines()]
        finally:
            listening.set()
            live.close()
        assert {line["item"] for line in lines} <= {f"frame {i}" for i in range(4)}
        for line in lines:
            picture = pictures[int(line["item"].split()[1])]
            x = torch.from_numpy(picture).permute(2, 0, 1).float().div(255)[None]
            want = preparation.captured.reference((x,))[0]
            np.testing.assert_allclose(line["outputs"][next(iter(line["outputs"]))]["data"], want.ravel().tolist())
        assert http.get("/latest").json()["item"].startswith("frame")
        spec = preparation.input_specs()[0]
        body = {"inputs": [{"name": spec.name, "datatype": "FP32", "shape": [1, 3, 2, 2], "data": [0.5] * 12}]}
        answer = http.post("/v2/models/net/infer", json=body).json()
        want = preparation.captured.reference((torch.full((1, 3, 2, 2), 0.5),))[0]
        np.testing.assert_allclose(answer["outputs"][0]["data"], want.ravel().tolist())


def test_items_that_do_not_fit_are_named(preparation: Preparation) -> None:
    for item, says in [
        (
            Item("a.npy", "array", np.zeros((5, 5), np.float32)),
            r"a\.npy: array \[5, 5\] float32, the model takes \[1, 3, 2, 2\]",
        ),
        (Item("b.npy", "array", np.zeros((3, 2, 2), np.int64)), "int64"),
        (Item("c.txt:1", "text", "hello"), "no tokenizer"),
    ]:
        with pytest.raises(PrepareError, match=says):
            preparation.prepare(item)


def test_pictures_are_resized_and_scaled(preparation: Preparation) -> None:
    """A plain picture of any size becomes the same plain input: pixel / 255."""
    picture = np.full((9, 7, 3), (51, 102, 204), np.uint8)
    (x,) = preparation.flat(Item("p", "image", picture))
    assert x.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(x[0, :, 0, 0], np.array([51, 102, 204]) / 255, rtol=1e-6)
