"""The real application, asked over its ASGI interface: answers, statuses, authentication, back-pressure.

The `infer` function here computes with torch in a thread; a session's has the same signature (see tests/cli).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from ecotone.runtime.errors import Busy, DeadlinePassed, NodeLost, RequestError, SessionClosed
from ecotone.serving.http import HEADER, Service, application
from ecotone.serving.oip import InputSpec

pytestmark = pytest.mark.torch

X = InputSpec(name="x", datatype="FP32", shape=(-1, 3))
Y = InputSpec(name="y", datatype="FP32", shape=(-1, 3))
GOOD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def client(infer: Callable[..., Future[Sequence[torch.Tensor]]], *, ready: bool = True, **more: object) -> TestClient:
    service = Service(
        name="net", inputs=(X,), outputs=(Y,), infer=infer, ready=lambda: ready, cancel=lambda f: f.cancel(),
        status=lambda: {"plan": "here"}, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return TestClient(application(service))


def doubling(pool: ThreadPoolExecutor) -> Callable[..., Future[Sequence[torch.Tensor]]]:
    return lambda tensors, timeout: pool.submit(lambda: (tensors[0] * 2,))


def failing(error: Exception) -> Callable[..., Future[Sequence[torch.Tensor]]]:
    def infer(tensors: Sequence[torch.Tensor], timeout: float | None) -> Future[Sequence[torch.Tensor]]:
        future: Future[Sequence[torch.Tensor]] = Future()
        future.set_exception(error)
        return future

    return infer


def test_json_and_binary_answers(pool: ThreadPoolExecutor) -> None:
    http = client(doubling(pool))
    answer = http.post("/v2/models/net/infer", json=GOOD)
    assert answer.status_code == 200
    assert answer.json()["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 3], "data": [2, 4, 6]}]
    header = json.dumps(GOOD | {"parameters": {"binary_data_output": True}}).encode()
    answer = http.post("/v2/models/net/versions/1/infer", content=header, headers={HEADER: str(len(header))})
    size = int(answer.headers[HEADER])
    np.testing.assert_array_equal(np.frombuffer(answer.content[size:], "<f4"), [2, 4, 6])


def test_metadata_health_and_counts(pool: ThreadPoolExecutor) -> None:
    http = client(doubling(pool))
    assert http.get("/v2/health/live").status_code == http.get("/v2/health/ready").status_code == 200
    assert http.get("/v2/models/net/ready").status_code == 200
    assert http.get("/v2").json()["name"] == "ecotone"
    assert http.get("/v2/models/net").json()["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert http.get("/status").json() == {"plan": "here"}
    http.post("/v2/models/net/infer", json=GOOD)
    http.post("/v2/models/net/infer", content=b"{")
    assert 'ecotone_requests_total{status="200"} 1' in http.get("/metrics").text
    assert 'ecotone_requests_total{status="400"} 1' in http.get("/metrics").text
    missing = http.get("/v2/models/other")
    assert missing.status_code == 404
    assert "'net'" in missing.json()["error"]


def test_not_ready_is_503(pool: ThreadPoolExecutor) -> None:
    http = client(doubling(pool), ready=False)
    assert http.get("/v2/health/live").status_code == 200
    for answer in (http.get("/v2/health/ready"), http.post("/v2/models/net/infer", json=GOOD)):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Busy("the queue of 8 requests is full"), 429),
        (DeadlinePassed("late"), 504),
        (NodeLost("edge is gone"), 503),
        (SessionClosed("leaving"), 503),
        (RequestError("segment"), 500),
    ],
)
def test_failures_have_their_status(error: Exception, status: int) -> None:
    answer = client(failing(error)).post("/v2/models/net/infer", json=GOOD)
    assert answer.status_code == status
    assert answer.json() == {"error": str(error)}
    assert ("retry-after" in answer.headers) == (status in (429, 503))


def test_token(pool: ThreadPoolExecutor) -> None:
    http = client(doubling(pool), token="s3cret")
    assert http.get("/v2/health/ready").status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "s3"},
        {"Authorization": "Bearer s3crét".encode()},
    ):
        for path in ("/v2/models/net", "/status", "/metrics"):
            assert http.get(path, headers=headers).status_code == 401
        assert http.post("/v2/models/net/infer", json=GOOD, headers=headers).status_code == 401
    assert http.post("/v2/models/net/infer", json=GOOD, headers={"Authorization": "Bearer s3cret"}).status_code == 200


@pytest.mark.parametrize("value", ["-1", "x", "9" * 20, "²"])
def test_a_wrong_header_length_is_400(pool: ThreadPoolExecutor, value: str) -> None:
    headers = {HEADER: value.encode("latin-1")}
    answer = client(doubling(pool)).post("/v2/models/net/infer", json=GOOD, headers=headers)
    assert answer.status_code == 400


def test_a_body_over_the_limit_is_413(pool: ThreadPoolExecutor) -> None:
    answer = client(doubling(pool), max_body_bytes=100).post("/v2/models/net/infer", content=b" " * 101)
    assert answer.status_code == 413


def test_requests_run_side_by_side(pool: ThreadPoolExecutor) -> None:
    """Three requests meet at a barrier inside infer: a server that took one at a time would never answer."""
    barrier = threading.Barrier(3, timeout=20)

    def infer(tensors: Sequence[torch.Tensor], timeout: float | None) -> Future[Sequence[torch.Tensor]]:
        return pool.submit(lambda: (barrier.wait(), (tensors[0],))[1])

    with client(infer) as http, ThreadPoolExecutor(3) as askers:
        answers = list(askers.map(lambda _: http.post("/v2/models/net/infer", json=GOOD).status_code, range(3)))
    assert answers == [200, 200, 200]
