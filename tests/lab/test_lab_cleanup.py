"""Whatever ends a laboratory, nothing of it stays: no process, namespace, interface, group or folder; others stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_worlds import cluster, needs_machines, wait_until

from ecotone.lab import Laboratory
from ecotone.lab.laboratory import remove_lab
from ecotone.lab.state import LabState, load_state
from ecotone.lab.sweep import leftovers, sweep
from ecotone.units import EcotoneError

pytestmark = [pytest.mark.lab, needs_machines]

PAIR = cluster(("here", "there", 1e7, 0.0), name="pair")  # no latency: a bridge will do


@pytest.fixture(autouse=True)
def labs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of laboratories of our own."""
    folder = tmp_path_factory.mktemp("labs")
    monkeypatch.setenv("ECOTONE_LABS", str(folder))
    yield folder
    for left in folder.iterdir():
        if left.is_dir():
            remove_lab(left.name)


def sleep_in(laboratory: Laboratory, device: str) -> subprocess.Popen[bytes]:
    """A command that is inside the machine when this returns."""
    command = laboratory.command_in(device, ["sh", "-c", "echo in; exec sleep 600"])
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    return process


def exists(state: LabState) -> tuple[str, ...]:
    return tuple(what for what in leftovers(state) if not what.startswith("folder"))


def test_two_at_once_and_one_supervisor_killed(labs: Path) -> None:
    """Kill -9 of the supervisor takes its processes along; `down` removes the rest, and nothing of the other laboratory."""
    with Laboratory(PAIR, name="one") as one, Laboratory(PAIR, name="two", here=False) as two:
        assert {one.state.fabric, two.state.fabric} <= {"bridge", "relay"}
        assert one.state.subnet != two.state.subnet
        with pytest.raises(EcotoneError, match='"one" is up already'):
            Laboratory(PAIR, name="one").up()
        state, other = one.state, two.state
        sleeper, sleeper_too = sleep_in(two, "here"), sleep_in(one, "there")
        assert state.supervisor is not None
        os.kill(state.supervisor.pid, signal.SIGKILL)
        wait_until(lambda: not state.is_up)
        node = state.machine("there").process
        assert node is not None
        wait_until(lambda: not node.is_alive)
        assert any("namespace" in what for what in exists(state))
        with pytest.raises(EcotoneError, match="has lost its supervisor"):
            Laboratory.found("one")
        one.down()
        assert leftovers(state) == ()
        assert sleeper_too.wait(10) == -signal.SIGKILL
        assert [m["state"] for m in two.status()["machines"]] == ["for commands", "up"]
        assert sleeper.poll() is None
    assert leftovers(other) == ()
    assert sleeper.wait(10) == -signal.SIGKILL
    assert [path.name for path in labs.iterdir()] == [".lock"]


HOLDER = """
import sys, time
from ecotone.cluster import Cluster
from ecotone.lab import Laboratory
laboratory = Laboratory(Cluster.from_json(open(sys.argv[1]).read()), name="held").up()
print("up", flush=True)
time.sleep(600)
"""


def test_the_end_of_its_parent_ends_it(labs: Path, tmp_path: Path) -> None:
    (tmp_path / "pair.json").write_text(PAIR.to_json())
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "pair.json")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        state = load_state(labs / "held")
        assert state.is_up
    finally:
        holder.kill()
        holder.wait()
    wait_until(lambda: leftovers(state) == ())


def test_sweeping_what_was_never_made_removes_nothing(labs: Path) -> None:
    """A state is written before anything exists: sweeping then must find nothing to do."""
    planned = LabState(
        name="ghost", identity="00ab00", fabric="bridge", cluster=PAIR, machines=(), here=True, hub="ecotone-00ab00",
        folder=str(labs / "ghost"), cache=str(labs / "ghost-cache"),
    )  # fmt: skip
    before = os.listdir("/sys/class/net"), os.listdir("/run/netns") if Path("/run/netns").exists() else []
    sweep(planned)
    assert before == (os.listdir("/sys/class/net"), os.listdir("/run/netns") if Path("/run/netns").exists() else [])


def test_a_laboratory_that_cannot_be_built_is_not_begun(labs: Path) -> None:
    many = cluster(*(("hub", f"leaf{number}", 1e7, 0.0) for number in range(200)), name="crowd")
    with pytest.raises(EcotoneError, match="201 devices; a laboratory has at most 200"):
        Laboratory(many, name="crowd").up()
    assert list(labs.iterdir()) == []
