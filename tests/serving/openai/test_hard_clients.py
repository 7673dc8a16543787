"""What the official client never does: half requests, bytes that are no HTTP, bodies without end, readers that never read.

Bytes on a real socket. Each server has a small limit of its own, so that waiting for it is short; no time is asserted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_model import FakeModel
from serving_thread import client, connect, post, receive_all, serving

from ecotone.serving.openai.connections import SPARE_FILES
from ecotone.serving.openai.options import Options
from ecotone.serving.openai.run import Server
from ecotone.units import EcotoneError

pytestmark = pytest.mark.loopback

CHAT = "/v1/chat/completions"
CROWD = 2000


def chat(text: str, **more: Any) -> bytes:
    return json.dumps({"model": "bytes", "messages": [{"role": "user", "content": text}]} | more).encode()


@pytest.fixture(scope="module")
def model() -> Iterator[FakeModel]:
    made = FakeModel(context=1 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(model: FakeModel) -> Iterator[Server]:
    with serving(model, Options(max_body_bytes=20_000, head_s=0.5, body_s=0.5, write_s=0.5)) as running:
        yield running


def answer(server: Server, data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of what `data` gets; the server must close the connection or have said all."""
    with connect(server) as sock:
        sock.sendall(data)
        response = receive_all(sock)
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


CLOSE = "Connection: close"
CHUNKED = post(CHAT, b"", CLOSE).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (post(CHAT, b"{", CLOSE), 400, "invalid_json"),
        (post(CHAT, b"[1]", CLOSE), 400, "invalid_json"),
        (post(CHAT, b'{"model": "bytes", "temperature": NaN}', CLOSE), 400, "invalid_json"),
        (post(CHAT, b"[" * 10_000, CLOSE), 400, "invalid_json"),
        (post(CHAT, b'{"model": "\\ud800"}', CLOSE), 400, "invalid_json"),
        (post(CHAT, chat("x", n=10**400), CLOSE), 400, "integer_above_max_value"),
        (post(CHAT, b"\xff\xfe", CLOSE), 400, "invalid_json"),
        (post(CHAT, b"", CLOSE), 400, "invalid_json"),
        (post(CHAT, chat("x"), CLOSE).replace(b"application/json", b"text/plain"), 415, "unsupported_media_type"),
        (post(CHAT, chat("x"), "Content-Encoding: gzip", CLOSE), 415, "unsupported_encoding"),
        (post(CHAT, b" " * 30_000, CLOSE), 413, "request_too_large"),
        (CHUNKED + b"6000\r\n" + b" " * 0x6000 + b"\r\n0\r\n\r\n", 413, "request_too_large"),
        (post(CHAT, b"{", length=100), 408, "request_timeout"),
        (post("/v1/chat", b"{}", CLOSE), 404, "unknown_url"),
        (b"GET " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405, "method_not_allowed"),
        (b"POST /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405, "method_not_allowed"),
        (b"hello\r\n\r\n", 400, "invalid_http"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000, 400, "invalid_http"),
        (b"POST /v1/completions HT", 408, "request_timeout"),
        (b"", 408, "request_timeout"),
    ],
)  # fmt: skip
def test_what_is_no_request_gets_its_status(server: Server, data: bytes, status: int, code: str) -> None:
    found, error = answer(server, data)
    assert (found, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}


def test_the_head_may_not_trickle(server: Server) -> None:
    with connect(server) as sock:
        sock.settimeout(0.1)
        closed = b""
        for byte in b"GET /v1/models HTTP/1.1\r\n" + b"X-More: " * 1000:  # a byte each tenth of a second, as slow clients do
            try:
                sock.sendall(bytes([byte]))
                closed = sock.recv(100)
                break
            except TimeoutError:
                continue
    assert closed.startswith(b"HTTP/1.1 408")


def test_a_connection_is_used_again_after_errors(server: Server) -> None:
    with httpx.Client(base_url=server.address) as http:
        for body in (b"{", chat("x", temperature=9), chat("say y")):
            response = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert response.json()["choices"][0]["message"]["content"] == "y"
        assert response.headers["x-request-id"].startswith("req_")


def test_who_never_reads_is_cut_off_and_the_request_cancelled(server: Server, model: FakeModel) -> None:
    before = len(model.cancelled)
    with connect(server, receive_buffer=4096) as sock:
        sock.sendall(post(CHAT, chat("hold " + "x" * 8000, stream=True)))  # 8000 events: more than all buffers, less than
        assert model.wait_cancelled(before + 1)  # what may wait in the server; so it is the time that ends it
        assert b"[DONE]" not in receive_all(sock)


def test_the_engine_never_waits_for_a_reader(model: FakeModel) -> None:
    """The answer outgrows its bound while the client reads nothing: only an engine that goes on can come so far."""
    before = len(model.cancelled)
    with serving(model, Options(write_s=1000.0)) as patient, connect(patient, receive_buffer=1 << 16) as sock:
        sock.sendall(post(CHAT, chat("count", stream=True), CLOSE))
        assert model.wait_cancelled(before + 1)
        told = receive_all(sock)
    assert b'"code":"slow_reader"' in told
    assert b'"finish_reason":"stop"' not in told
    assert b"[DONE]" not in told


def test_who_leaves_within_a_request_or_right_after_is_forgotten(server: Server, model: FakeModel) -> None:
    before = len(model.cancelled)
    connect(server).close()
    with connect(server) as sock:
        sock.sendall(post(CHAT, b"{", length=100))
    with connect(server) as sock:
        sock.sendall(post(CHAT, chat("hold")))
        assert model.wait_active()
    assert model.wait_cancelled(before + 1)
    with connect(server) as sock:  # by a reset, which no farewell precedes
        sock.sendall(post(CHAT, chat("hold", stream=True)))
        assert sock.recv(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    assert model.wait_cancelled(before + 2)


def test_keys_limits_and_health(model: FakeModel, caplog: pytest.LogCaptureFixture) -> None:
    keys = ("first-secret", "second-secret")
    options = Options(keys=keys, max_active_per_key=1, max_requests_per_minute=3)
    assert "secret" not in repr(options)
    with serving(model, options) as server, client(server, api_key=keys[0]) as api:
        with pytest.raises(openai.AuthenticationError) as caught:
            client(server, api_key="third-secret").models.list()
        assert caught.value.code == "invalid_api_key"
        with httpx.Client(base_url=server.address) as http:
            assert [http.get(path).status_code for path in ("/health", "/health/live", "/metrics", "/status")] == [
                200,
                200,
                401,
                401,
            ]
        stream = api.chat.completions.create(model="bytes", messages=[{"role": "user", "content": "hold"}], stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as limited:
            api.completions.create(model="bytes", prompt="x")
        assert limited.value.code == "concurrency_limit"
        assert limited.value.response.headers["retry-after"] == "1"
        with client(server, api_key=keys[1]) as other:  # a key's limit is its own
            for _ in range(3):
                assert other.completions.create(model="bytes", prompt="x").choices[0].text == "x"
            with pytest.raises(openai.RateLimitError) as limited:
                other.completions.create(model="bytes", prompt="x")
            assert limited.value.code == "rate_limit_exceeded"
        stream.close()
    assert "secret" not in caplog.text


def test_a_port_that_is_taken_is_said(server: Server, model: FakeModel) -> None:
    taken = int(server.address.rpartition(":")[2])
    with pytest.raises(EcotoneError, match=f"127.0.0.1:{taken} cannot be listened on"):
        asyncio.run(Server(model, None, "127.0.0.1", taken, Options()).run())


def test_not_ready_is_said(model: FakeModel) -> None:
    with serving(model) as server, client(server) as api:
        model.ready = False
        try:
            with pytest.raises(openai.InternalServerError, match="not ready") as caught:
                api.completions.create(model="bytes", prompt="x")
            assert caught.value.status_code == 503
            assert httpx.get(f"{server.address}/health/ready").status_code == 503
        finally:
            model.ready = True


def test_metrics_say_what_happened(model: FakeModel) -> None:
    with serving(model) as server, client(server) as api:
        api.chat.completions.create(model="bytes", messages=[{"role": "user", "content": "say hey"}])
        with pytest.raises(openai.RateLimitError):
            api.completions.create(model="bytes", prompt="fail busy")
        text = httpx.get(f"{server.address}/metrics").text
        document = httpx.get(f"{server.address}/status").json()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    name = 'model_name="bytes"'
    assert lines[f'ecotone_http_requests_total{{{name},path="/v1/chat/completions",status="200"}}'] == "1.0"
    assert lines[f'ecotone_http_requests_total{{{name},path="/v1/completions",status="429"}}'] == "1.0"
    assert lines[f'ecotone_request_success_total{{finished_reason="stop",{name}}}'] == "1.0"
    assert lines[f"ecotone_generation_tokens_total{{{name}}}"] == "3.0"
    assert lines[f"ecotone_time_to_first_token_seconds_count{{{name}}}"] == "1.0"
    assert lines[f"ecotone_time_per_output_token_seconds_count{{{name}}}"] == "1.0"
    assert lines[f"ecotone_kv_cache_usage_perc{{{name}}}"] == "0.25"
    assert lines[f"ecotone_prefix_cache_hits_total{{{name}}}"] == "4.0"
    # one frame in flight of a loop of 0.5 s through two stages of 0.2 s: each works 0.4 of the time
    assert float(lines[f"ecotone_pipeline_bubble_share{{{name}}}"]) == pytest.approx(0.6)
    assert document["engine"]["plan"] == "all here"
    assert document["engine"]["mode"] == "running"


def test_a_stop_lets_answers_end_and_then_ends_them(model: FakeModel) -> None:
    with serving(model, Options(drain_s=0.2)) as server:
        sock = connect(server)
        sock.sendall(post(CHAT, chat("hold", stream=True)))
        assert sock.recv(10)
        before = len(model.cancelled)
    told = receive_all(sock)
    sock.close()
    assert b'"code":"shutting_down"' in told
    assert b"[DONE]" not in told
    assert model.wait_cancelled(before + 1)


@pytest.mark.skipif(not os.path.exists("/usr/bin/openssl"), reason="makes a certificate with openssl")
def test_tls_and_files_that_are_none(model: FakeModel, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-keyout", key, "-out", cert, "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(model, Options(tls_cert=cert, tls_key=key)) as server:
        context = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=server.address, verify=context) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "bytes"
    with pytest.raises(EcotoneError, match="do not load"):
        Options(tls_cert=key, tls_key=cert).check("127.0.0.1")
    with pytest.raises(EcotoneError, match="needs API keys"):
        Options().check("192.0.2.1")


def test_a_crowd_of_connections_starves_nobody(model: FakeModel) -> None:
    """As many idle connections as may be, then more: those that rest make room, and a request is always answered."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = min(CROWD, (hard - 4 * SPARE_FILES) // 2)
    with serving(model, Options(max_connections=most)) as server, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(connect(server)) for _ in range(most)]
        for sock in crowd[::2]:
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")  # and never the rest
        with client(server) as api:
            for _ in range(20):
                assert api.completions.create(model="bytes", prompt="ab").choices[0].text == "ba"
        crowd += [stack.enter_context(connect(server)) for _ in range(most // 4)]
        with client(server) as api:
            assert api.completions.create(model="bytes", prompt="ab").choices[0].text == "ba"


def test_where_no_connection_rests_the_next_is_told_so(model: FakeModel) -> None:
    with serving(model, Options(max_connections=2)) as server, connect(server) as first, connect(server) as second:
        for sock in (first, second):
            sock.sendall(post(CHAT, chat("hold", stream=True)))
            assert sock.recv(10)
        with connect(server) as third:
            assert receive_all(third).startswith(b"HTTP/1.1 503")
