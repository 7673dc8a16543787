"""Bad input, one row each: exit code 2, one line that names the cause and the remedy, no traceback, no file left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import CLUSTER, Ended

from ecotone.model import capture, load_model

pytestmark = pytest.mark.torch

PAIR = ("--cluster", "pair.toml")
REAL = CLUSTER.replace("emulate = true\n", "").replace("slowdown = 4\n", "")
FILES = {
    "noise.toml": b"\x00\xffnoise",
    "ambiguous.toml": CLUSTER.replace("100 Mbit/s", "100 Mb").encode(),
    "typo.toml": CLUSTER.replace("memory", "memry", 1).encode(),
    "unreachable.toml": REAL.replace('name = "far"', 'name = "far"\naddress = "127.0.0.1:1"').encode(),
    "noise.json": b"{noise",
    "future.json": json.dumps({"schema": "ecotone.plan", "version": 99}).encode(),
    "noise.png": b"\x89PNG\r\n\x1a\nnoise",
    "cut.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "words.txt": b"hello\n",
    "tool.exe": b"MZ",
    "empty.token": b"\n",
    "noise.pt2": b"noise",
}
# (arguments, words that the message must hold)
ROWS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("plan", "net.py:net", "--cluster", "none.toml"), ("none.toml", "give the path")),
    (("plan", "net.py:net", "--cluster", "noise.toml"), ("noise.toml", "not TOML")),
    (("plan", "net.py:net", "--cluster", "ambiguous.toml"), ("100 Mb", "ambiguous", "40 Mbit/s")),
    (("plan", "net.py:net", "--cluster", "typo.toml"), ("memry is not known", "memory_bytes is missing")),
    (("plan", "net.py:net", *PAIR, "--objective", "speed"), ("'speed'", "latency and throughput")),
    (("plan", "net.py:net", *PAIR, "--require", "beauty=7"), ("beauty", "latency")),
    (("plan", "net.py:net", *PAIR, "--require", "latency=50"), ("50", "ms")),
    (("plan", "net.py:net", *PAIR, "--require", "latency=1us"), ("latency",)),
    (("plan", "net.py:net", *PAIR, "--require", "device=moon"), ("moon", "near")),
    (("plan", "net.py:net", *PAIR, "--executor", "torch:fp7"), ("torch:fp7", "torch:fp32")),
    (("plan", "net.py:net", *PAIR, "--samples", "none"), ("none", "no such file")),
    (("plan", "none.py:net", *PAIR), ("none.py", "no such file")),
    (("plan", "net.py:nets", *PAIR), ("nets", "net")),
    (("plan", "net.py", *PAIR), ("net.py:",)),
    (("plan", "net.py:nothing", *PAIR), ("int", "torch.nn.Module")),
    (("plan", "net.py:broken", *PAIR), ("eels",)),
    (("plan", "net.py:shapeless", *PAIR), ("--input-shape",)),
    (("plan", "net.py:shapeless", *PAIR, "--input-shape", "3by3"), ("3by3", "3x224x224")),
    (("plan", "net.py:stubborn", *PAIR), ("net.py", "torch.where")),
    (("plan", "noise.pt2", *PAIR), ("noise.pt2",)),
    (("plan", "nowhere.at.all:net", *PAIR), ("nowhere.at.all",)),
    (("plan", "./no-such-directory", *PAIR), ("no-such-directory",)),
    (("plan", "net.py:net", "--cluster", "unreachable.toml"), ("127.0.0.1:1", "ecotone up")),
    (("run", "net.py:net", "none.png", *PAIR), ("none.png", "no such file")),
    (("run", "net.py:net", "tool.exe", *PAIR), (".exe", "not known")),
    (("run", "net.py:net", "words.txt", *PAIR, "--plan", "good.json"), ("words.txt", "tokenizer")),
    (("run", "net.py:net", "noise.png", *PAIR, "--plan", "good.json"), ("noise.png", "readable image")),
    (("run", "net.py:net", "cut.jpg", *PAIR, "--plan", "good.json"), ("cut.jpg", "readable image")),
    (
        ("run", "net.py:net", "wrong.npy", *PAIR, "--plan", "good.json", "--out", "a.npz"),
        ("wrong.npy", "[7, 7]", "[1, 3, 32, 32]"),
    ),
    (("run", "net.py:net", "wrong.npy", *PAIR, "--out", "a.csv"), (".csv", ".npz")),
    (("run", "net.py:net", "wrong.npy", *PAIR, "--take", "best"), ("best", "newest")),
    (("run", "net.py:net", "right.npy", *PAIR, "--plan", "none.json"), ("none.json", "give the path")),
    (("run", "net.py:net", "right.npy", *PAIR, "--plan", "noise.json"), ("noise.json", "not JSON")),
    (("run", "net.py:net", "right.npy", *PAIR, "--plan", "future.json"), ("future.json", "version is 99")),
    (("run", "net.py:net", "right.npy", *PAIR, "--plan", "strange.json"), ("another model", "plan again")),
    (("run", "net.py:net", "right.npy", *PAIR, "--plan", "moon.json"), ("moon", "devices are near, far")),
    (("serve", "net.py:net", *PAIR, "--listen", "here"), ("HOST:PORT",)),
    (("serve", "net.py:net", *PAIR, "--listen", "0.0.0.0:8000"), ("one address",)),
    (("serve", "net.py:net", *PAIR, "--listen", "192.0.2.7:8000"), ("token",)),
    (("serve", "net.py:net", *PAIR, "--token-file", "empty.token"), ("empty.token", "write the token")),
    (("serve", "net.py:net", *PAIR, "--token-file", "none.token"), ("none.token",)),
    (("simulate", "net.py:net", *PAIR, "--arrivals", "often"), ("often", "poisson:20/s")),
    (("simulate", "net.py:net", *PAIR, "--links", "0"), ("above zero",)),
    (("up", "--join", "eco1-garbage"), ("join code", "copy")),
    (("up", "--join", "eco1-garbage", "--invite", "1"), ("exclude each other",)),
    (("up", "--invite", "1"), ("--network home",)),
    (("up", "--network", "strangers"), ("strangers", "--join")),
    (("up", "--name", "moon", "--cluster", "pair.toml"), ("no device 'moon'", "near, far")),
    (("up", "--store", "8"), ("--store", "4 GB")),
    (("up", "--listen", "192.0.2.7:7447"), ("loopback", "--join")),
    (("status",), ("--cluster",)),
    (("status", "--cluster", "pair.toml"), ("emulated",)),
    (("status", "--cluster", "pair.toml", "--deadline", "soon"), ("--deadline",)),
    (("demo", "--cluster", "unreachable.toml"), ("emulate = true",)),
]


def good_plan(folder: Path, **changes: str) -> str:
    """A plan of net.py:net, all of it on the near device."""
    loaded = load_model(f"{folder}/net.py:net")
    graph = capture(loaded.module, loaded.args, name="net").graph
    stage = {"device": "near", "start": 0, "stop": graph.num_blocks, "executor": "torch:fp32"}
    ends = [{"source": "near", "target": "near", "position": p, "codec": "none"} for p in (0, graph.num_blocks)]
    document = {
        "schema": "ecotone.plan",
        "version": 1,
        "graph_hash": graph.content_hash(),
        "stages": [stage],
        "transfers": ends,
    }
    text = json.dumps(document | {"epoch": 0})
    for old, new in changes.items():
        text = text.replace(graph.content_hash() if old == "hash" else old, new)
    return text


@pytest.fixture
def files(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    np.save(folder / "wrong.npy", np.zeros((7, 7), np.float32))
    np.save(folder / "right.npy", np.zeros((1, 3, 32, 32), np.float32))
    return folder


@pytest.mark.parametrize(("arguments", "words"), ROWS, ids=[" ".join(a)[:70] for a, _ in ROWS])
def test_bad_input(ecotone: Callable[..., Ended], files: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    for name, changes in {"good.json": {}, "strange.json": {"hash": "0" * 64}, "moon.json": {'"near"': '"moon"'}}.items():
        if name in arguments:
            (files / name).write_text(good_plan(files, **changes))
    before = {p.name for p in files.iterdir()}
    ended = ecotone(*arguments)
    message = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.code == 2, ended.err
    assert len(message) == 1, ended.err
    assert ended.err.rstrip().endswith(message[0])
    assert "Traceback" not in ended.err + ended.out
    for word in words:
        assert word in message[0], message[0]
    new = {p.name for p in files.iterdir()} - before - {"cache", "home", "__pycache__"}
    assert not new, new


@pytest.mark.parametrize(
    "arguments", [("plan",), ("frobnicate",), ("plan", "net.py:net", "--no-such-flag"), ("run", "net.py:net")]
)
def test_wrong_usage_is_explained(ecotone: Callable[..., Ended], folder: Path, arguments: tuple[str, ...]) -> None:
    ended = ecotone(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert "Usage" in ended.err or "--help" in ended.err
