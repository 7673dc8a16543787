"""The commands a user types, for real: node processes, HTTP, signals, join codes."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CLUSTER, Ended

from ecotone.model import capture, load_model

pytestmark = [pytest.mark.loopback, pytest.mark.timeout(280)]

REAL = CLUSTER.replace("emulate = true\n", "").replace("slowdown = 4\n", "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(folder: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`ecotone ARGUMENTS` as a process; told to stop at the end, and killed if it does not."""
    command = [sys.executable, "-m", "ecotone", *arguments]
    variables = {**os.environ, "COLUMNS": "300", "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()


def line_with(process: subprocess.Popen[str], word: str) -> str:
    """The first line of output that holds `word`; fails with what the process said where it ends before."""
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return line
    assert process.stderr is not None
    raise AssertionError(f"ended without {word!r}: {process.stderr.read()[-2000:]}")


def reference(folder: Path, x: np.ndarray) -> np.ndarray:
    """What the model gives in one process."""
    loaded = load_model(f"{folder}/net.py:net")
    captured = capture(loaded.module, loaded.args, name="net")
    return captured.reference((torch.from_numpy(x),))[0].detach().numpy()


def two_device_plan(folder: Path) -> Path:
    """A plan that cuts net.py:net after its first block, float32 on the wire."""
    loaded = load_model(f"{folder}/net.py:net")
    graph = capture(loaded.module, loaded.args, name="net").graph
    bounds = [("near", 0, 1), ("far", 1, graph.num_blocks)]
    stages = [{"device": d, "start": a, "stop": b, "executor": "torch:fp32"} for d, a, b in bounds]
    hops = [("near", "near", 0, "none"), ("near", "far", 1, "fp32"), ("far", "near", graph.num_blocks, "fp32")]
    transfers = [{"source": s, "target": t, "position": p, "codec": c} for s, t, p, c in hops]
    document = {"schema": "ecotone.plan", "version": 1, "graph_hash": graph.content_hash(), "epoch": 0}
    path = folder / "cut.json"
    path.write_text(json.dumps(document | {"stages": stages, "transfers": transfers}))
    return path


def test_plan_then_run_gives_the_models_answers(ecotone: Callable[..., Ended], folder: Path) -> None:
    """The whole path on an emulated pair: profile and plan, then the answers of a run equal one process, bit for bit."""
    x = np.random.default_rng(0).random((5, 1, 3, 32, 32), np.float32)
    (folder / "in").mkdir()
    for i, item in enumerate(x):
        np.save(folder / "in" / f"{i}.npy", item)
    planned = ecotone("plan", "net.py:net", "--cluster", "pair.toml", "--out", "plan.json", "--json")
    assert planned.code == 0, planned.err
    assert json.loads(planned.out)["plan"] == {
        k: v for k, v in json.loads((folder / "plan.json").read_text()).items() if k not in ("schema", "version")
    }
    plan = two_device_plan(folder)
    ended = ecotone("run", "net.py:net", "in", "--cluster", "pair.toml", "--plan", plan, "--out", "answers.npz")
    assert ended.code == 0, ended.err
    with np.load(folder / "answers.npz") as answers:
        assert answers["items"].tolist() == [f"{i}.npy" for i in range(5)]
        name = next(key for key in answers.files if key not in ("items", "latency_s"))
        for i in range(5):
            np.testing.assert_array_equal(answers[name][i], reference(folder, x[i]))
    lines = ecotone("run", "net.py:net", "in", "--cluster", "pair.toml", "--plan", plan, "--json", "--limit", "2")
    assert [json.loads(line)["item"] for line in lines.out.splitlines()] == ["0.npy", "1.npy"]


def test_simulate_uses_the_same_profile(ecotone: Callable[..., Ended], folder: Path) -> None:
    plan = two_device_plan(folder)
    base = ("simulate", "net.py:net", "--cluster", "pair.toml", "--plan", plan, "--json")
    fast = json.loads(ecotone(*base, "--requests", "20").out)
    slow = json.loads(ecotone(*base, "--requests", "20", "--links", "0.001", "--trace", "t.json").out)
    assert fast["requests"] == slow["requests"] == 20
    assert fast["failed"] == 0
    # 8x16x16 float32 are 8192 bytes; at 12.5 kB/s their sending alone takes 0.66 s
    assert slow["p50_s"] > fast["p50_s"] + 0.6
    assert json.loads((folder / "t.json").read_text())["schema"] == "ecotone.trace"


def test_serve_answers_over_http_and_stops_in_order(folder: Path) -> None:
    plan, x = two_device_plan(folder), np.random.default_rng(1).random((1, 3, 32, 32), np.float32)
    arguments = ("serve", "net.py:net", "--cluster", "pair.toml", "--plan", str(plan), "--listen", "127.0.0.1:0")
    with started(folder, *arguments, ECOTONE_TOKEN="t0ken") as server:
        url = line_with(server, "serving").split()[-1]

        def ask(path: str, body: bytes | None = None, token: str = "t0ken") -> tuple[int, bytes]:
            request = urllib.request.Request(path, data=body, headers={"Authorization": f"Bearer {token}"})
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()

        described = json.loads(ask(url)[1])
        spec = described["inputs"][0]
        body = {"inputs": [{**spec, "data": x.ravel().tolist()}]}
        status, content = ask(f"{url}/infer", json.dumps(body).encode())
        assert status == 200, content
        got = np.array(json.loads(content)["outputs"][0]["data"], np.float32)
        np.testing.assert_array_equal(got, reference(folder, x).ravel())
        assert ask(f"{url}/infer", json.dumps(body).encode(), token="wrong")[0] == 401
        assert ask(f"{url}/infer", b"{")[0] == 400
        assert ask(url.replace("/v2/models/net", "/v2/health/ready"))[0] == 200
        assert "near" in json.loads(ask(url.replace("/v2/models/net", "/status"))[1])["plan"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_a_killed_server_that_comes_back_answers_every_id_once(folder: Path) -> None:
    """kill -9 of `serve --survive --adapt --journal` under load, then the same command again: clients only repeat."""
    x = np.random.default_rng(2).random((1, 3, 32, 32), np.float32)
    port = free_port()
    url = f"http://127.0.0.1:{port}/v2/models/net"
    arguments = ("serve", "net.py:net", "--cluster", "pair.toml", "--survive", "auto", "--adapt")
    arguments += ("--journal", "requests.journal", "--listen", f"127.0.0.1:{port}")
    answers: dict[str, list[float]] = {}
    finished = threading.Event()

    def ask(name: str) -> list[float]:
        spec = {"name": "input_1", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": x.ravel().tolist()}
        body = json.dumps({"id": name, "inputs": [spec]}).encode()
        while True:
            try:
                with urllib.request.urlopen(urllib.request.Request(f"{url}/infer", data=body), timeout=60) as answer:
                    return list(json.loads(answer.read())["outputs"][0]["data"])
            except urllib.error.HTTPError as error:
                raise AssertionError(f"{name}: {error.code} {error.read()!r}") from None
            except (OSError, http.client.HTTPException, ValueError):  # no server, or it died before the whole answer
                assert not finished.wait(0.1), "no server any more"

    def load(worker: int) -> None:
        number = 0
        while not finished.is_set() and number < 2000:
            number += 1
            answers[f"{worker}-{number}"] = ask(f"{worker}-{number}")

    with concurrent.futures.ThreadPoolExecutor(3) as workers:
        try:
            with started(folder, *arguments) as server:
                line_with(server, "serving")
                loads = [workers.submit(load, worker) for worker in range(3)]
                until(lambda: len(answers) >= 20, loads)
                server.kill()
            before = dict(answers)
            with started(folder, *arguments) as server:
                line_with(server, "serving")
                until(lambda: len(answers) >= len(before) + 20, loads)
                assert {name: ask(name) for name in before} == before
                finished.set()
                for each in loads:
                    each.result(60)
        finally:
            finished.set()
    np.testing.assert_allclose(list(answers.values()), [reference(folder, x).ravel()] * len(answers), rtol=0.05, atol=0.02)


def until(condition: Callable[[], bool], loads: list[concurrent.futures.Future[None]]) -> None:
    """Wait for the condition, two minutes at most, or for a load that fails."""
    end = time.monotonic() + 120
    while not condition():
        for each in loads:
            if each.done():
                each.result()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_founder_invites_and_a_joined_node_computes(ecotone: Callable[..., Ended], folder: Path) -> None:
    """Two machines, two homes: found, join by code, then status and a run over mutual TLS; a used code is refused."""
    port, far_home, near_home = free_port(), str(folder / "far-home"), str(folder / "near-home")
    founding = ("up", "--name", "far", "--network", "den", "--invite", "1", "--listen", f"127.0.0.1:{port}")
    with started(folder, *founding, ECOTONE_HOME=far_home) as founder:
        code = line_with(founder, "--join").split()[-1]
        joining = ("up", "--name", "near", "--join", code, "--listen", f"127.0.0.1:{free_port()}")
        with started(folder, *joining, ECOTONE_HOME=near_home) as joined:
            assert "members of" in line_with(joined, "is up")
        with started(folder, *joining, ECOTONE_HOME=str(folder / "third")) as late:
            assert late.wait(60) == 2
            assert late.stderr is not None
            assert "used" in late.stderr.read()
        (folder / "den.toml").write_text(
            REAL.replace('"pair"', '"den"').replace('name = "far"', f'name = "far"\naddress = "127.0.0.1:{port}"')
        )
        monitor = {"ECOTONE_HOME": near_home}
        with started(folder, "status", "--cluster", "den.toml", "--json", **monitor) as status:
            out, err = status.communicate(timeout=90)
            assert status.returncode == 0, err
        assert [row["state"] for row in json.loads(out)] == ["here", "up"]
        np.save(folder / "x.npy", np.ones((1, 3, 32, 32), np.float32))
        run = ("run", "net.py:net", "x.npy", "--cluster", "den.toml", "--plan", str(two_device_plan(folder)), "--json")
        with started(folder, *run, **monitor) as running:
            out, err = running.communicate(timeout=120)
            assert running.returncode == 0, err
        got = next(iter(json.loads(out)["outputs"].values()))["data"]
        np.testing.assert_array_equal(
            np.array(got, np.float32), reference(folder, np.ones((1, 3, 32, 32), np.float32)).ravel()
        )
        with started(folder, *run, ECOTONE_HOME=str(folder / "stranger")) as stranger:
            _, err = stranger.communicate(timeout=120)
            assert stranger.returncode == 2
            assert "Traceback" not in err
