"""`ecotone plan --workload` and `simulate --workload`: what they print and write, and what is refused in one line.

The profile is stated and nothing is launched: nodes are not what is tried here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import NET, Ended

from ecotone.cli import together
from ecotone.cli.workflow import load_work, read_plan_set
from ecotone.cluster import Cluster, DeviceId
from ecotone.planner import Assignment
from ecotone.profile import Profile, SegmentTime
from ecotone.units import EcotoneError
from ecotone.workload import Workload

pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
USERS = """
schema = "ecotone.workload"
version = 1
name = "trio"
[[user]]
name = "one"
source = "cam0"
rate = "8 /s"
least_rate = "1 /s"
[[user]]
name = "two"
source = "cam1"
rate = "8 /s"
weight = 2
deadline = "2 s"
[[user]]
name = "three"
source = "cam2"
rate = "40 /s"
"""
DEVICE = '[[device]]\nname = "{}"\nmemory = "1 GB"\nexecutors = ["torch:fp32"]\n'
LINK = '[[link]]\nsource = "{}"\ntarget = "far"\nlatency = "1 ms"\nbandwidth = "100 Mbit/s"\n'
CAMERAS = ("cam0", "cam1", "cam2")
COMMAND = ("net.py:net", "--cluster", "trio.toml", "--workload", "users.toml")


def files(folder: Path) -> None:
    """trio.toml: three cameras and a server; users.toml."""
    head = 'schema = "ecotone.cluster"\nversion = 1\nname = "trio"\nsource = "cam0"\n'
    devices, links = "".join(map(DEVICE.format, (*CAMERAS, "far"))), "".join(map(LINK.format, CAMERAS))
    (folder / "trio.toml").write_text(head + devices + links)
    (folder / "users.toml").write_text(USERS)


@pytest.fixture(scope="module")
def stated(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Cameras take 1 s for the whole model, the server 60 ms."""
    folder = tmp_path_factory.mktemp("stated")
    files(folder)
    (folder / "net.py").write_text(NET)
    graph = load_work(f"{folder}/net.py:net", folder / "trio.toml", quiet=True).captured.graph
    whole = graph.num_blocks
    segments = tuple(
        SegmentTime(
            device=DeviceId(d), executor="torch:fp32", start=a, stop=b, spread_s=0, memory_bytes=0,
            median_s=(0.06 if d == "far" else 1.0) * (b - a) / whole,
        )
        for d in (*CAMERAS, "far")
        for a in range(whole)
        for b in range(a + 1, whole + 1)
    )  # fmt: skip
    return Profile(
        graph_hash=graph.content_hash(), cluster_name="trio", num_blocks=whole, cuts=tuple(range(whole + 1)),
        segments=segments,
    )  # fmt: skip


@pytest.fixture
def trio(folder: Path, stated: Profile, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files, current; nobody is reached and nothing is measured."""
    files(folder)
    monkeypatch.setattr(together, "open_nodes", lambda work: contextlib.nullcontext())
    monkeypatch.setattr(together, "make_profile", lambda work, nodes, **options: stated)
    return folder


def test_a_joint_plan_is_printed_written_simulated_and_run_by_each_user(ecotone: Callable[..., Ended], trio: Path) -> None:
    planned = ecotone("plan", *COMMAND, "--out", "joint.json")
    assert planned.code == 0, planned.err
    found = Assignment.from_json((trio / "joint.json").read_text())
    slower = next(u for u in found.users if u.name == "one")
    assert {u.name for u in found.users} == {"one", "two"}
    assert 1.0 <= slower.rate_per_s < 8.0  # 16 a second at 60 ms would be 96 % of the server
    assert f"{slower.rate_per_s:.3g} /s, not 8" in planned.out
    assert "refused three: processor far would be at" in planned.out
    assert "two: cam1 -> (fp32) far[0:" in planned.out
    assert all(0.06 < u.alone_s < u.mean_s < u.p95_s for u in found.users)
    assert "proven best" in planned.out
    ran = ecotone("simulate", *COMMAND, "--plan", "joint.json", "--duration", "40s", "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert list(report["refused"]) == ["three"]
    for user in found.users:
        told = report["users"][user.name]
        assert told["failed"] == 0
        assert told["requests"] == pytest.approx(36 * user.rate_per_s, rel=0.35)
        assert 0.06 < told["mean_s"] < 10 * user.mean_s
    assert report["utilisation"]["far"] == pytest.approx(found.utilisation["processor far"], rel=0.25)
    work = load_work("net.py:net", trio / "trio.toml", quiet=True)
    assert read_plan_set(trio / "joint.json", work).primary == found.plans["one"]  # whose device is the cluster's source
    (trio / "trio.toml").write_text((trio / "trio.toml").read_text().replace('source = "cam0"\n', 'source = "cam2"\n', 1))
    with pytest.raises(EcotoneError, match="no plan for a user at cam2, source of the cluster; for one at cam0, two at"):
        read_plan_set(trio / "joint.json", load_work("net.py:net", trio / "trio.toml", quiet=True))


@pytest.mark.parametrize(
    ("arguments", "old", "new", "words"),
    [
        (("plan", *COMMAND, "--survive", "auto", "--bounds"), "", "", "--survive, --bounds: does not go with --workload"),
        (("simulate", "net.py:net", "--duration", "3s"), "", "", "--duration: needs --workload"),
        (("simulate", *COMMAND, "--duration", "3"), "", "", "has no unit"),
        (("plan", *COMMAND), '"cam1"', '"cam9"', "user two: no device 'cam9' in cluster trio"),
        (("plan", *COMMAND), '"cam1"', '"cam0"', "one, two share the source cam0"),
        (("plan", *COMMAND), 'deadline = "2 s"', 'deadline = "2"', "has no unit"),
        (("plan", *COMMAND), 'deadline = "2 s"', 'require = ["speed=9"]', "user two: "),
        (("plan", *COMMAND), 'deadline = "2 s"', 'require = ["latency=1ms"]', "user two: "),
        (("plan", *COMMAND), 'deadline = "2 s"', 'model = "gone.py:net"', "gone.py"),
        (("simulate", *COMMAND, "--plan", "users.toml"), "", "", "plan users.toml"),
    ],
)
def test_bad_input_ends_in_one_line(
    ecotone: Callable[..., Ended], trio: Path, arguments: tuple[str, ...], old: str, new: str, words: str
) -> None:
    (trio / "users.toml").write_text(USERS.replace(old, new, 1) if old else USERS)
    ended = ecotone(*arguments)
    assert ended.code == 2
    assert words in ended.err
    assert "Traceback" not in ended.err


def test_the_examples_are_read() -> None:
    workload, cluster = Workload.load(EXAMPLES / "users.toml"), Cluster.load(EXAMPLES / "gate.toml")
    workload.check(cluster)
    assert [u.name for u in workload.users] == ["counting", "barrier", "weather"]
    assert cluster.shared[0].carries("north", "server")
    assert not cluster.shared[0].carries("roof", "server")
