"""Fault scripts as TOML: what is written is read again, what is wrong is named with its place and what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.cluster import DeviceId
from ecotone.linktrace import load_trace
from ecotone.plan import Plan
from ecotone.planset import PlanSet
from ecotone.schema import SchemaError
from ecotone.simulator import faults as ft
from ecotone.simulator.draw import KINDS, draw_faults, draw_scene
from ecotone.simulator.scene import Scene, plan_of, trace_of
from ecotone.simulator.script import read_script, write_script
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ABC = ("a", "b", "c")
A, B = DeviceId("a"), DeviceId("b")


def one(text: str) -> tuple[ft.Fault, ...]:
    return read_script(f"[[fault]]\n{text}", ABC)


def test_every_verb_says_what_it_does() -> None:
    assert one('at = "1.2 s"\nkill = "b"\ndetect = "20 ms"') == (ft.KillNode(at_s=1.2, device=B, detect_s=0.02),)
    assert one('at = "0 s"\nstall = "b"\nfor = "500 ms"') == (
        ft.StallNode(at_s=0, device=B),
        ft.ResumeNode(at_s=0.5, device=B),
    )
    assert one('at = "1 s"\ncut = ["a", "b"]\none_way = true') == (ft.CutOneWay(at_s=1, source=A, target=B),)
    assert one('at = "1 s"\nheal = "all"') == (ft.HealAll(at_s=1),)
    assert one('at = "1 s"\nswitch = 2') == (ft.Switch(at_s=1, epoch=2),)
    assert one('at = "1 s"\nclock = "a"\nstep = "-5 s"') == (ft.BendClock(at_s=1, device=A, step_s=-5.0),)
    assert one('at = "1 s"\nprepare = "b"\ntakes = "2 s"') == (ft.SetPrepare(at_s=1, device=B, takes_s=2.0),)
    both = one('at = "1 s"\nlink = ["a", "b"]\nrate = "1 kbit/s"\nlatency = "20 ms"')
    assert [(f.link.source, f.link.target, f.link.bandwidth_bytes_per_s) for f in both if isinstance(f, ft.SetLink)] == [
        ("a", "b", 125.0),
        ("b", "a", 125.0),
    ]
    (trace,) = one('at = "1 s"\ntrace = ["a", "b"]\nfile = "lte_train"\none_way = true')
    assert trace == ft.FollowTrace(at_s=1, source=A, target=B, trace=load_trace("lte_train"))


def test_faults_come_in_order_of_time_with_their_ends() -> None:
    text = '[[fault]]\nat = "2 s"\nkill = "b"\n[[fault]]\nat = "1 s"\nslow = "c"\nfactor = 3\nfor = "3 s"'
    assert [type(f).__name__ for f in read_script(text, ABC)] == ["SlowDevice", "KillNode", "SlowDevice"]


def test_a_plan_is_read_from_the_file_that_is_named() -> None:
    plan = plan_of("b:2", "a", 3)

    def load(name: str) -> Plan | PlanSet:
        assert name == "new.json"
        return plan

    assert read_script('[[fault]]\nat = "1 s"\nreplan = "new.json"', ABC, load_plan=load) == (ft.Replan(at_s=1, plan=plan),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('at = "1 s"\nkill = "moon"', ("fault 1", "'moon'", "a, b, c")),
        ('at = "-1 s"\nkill = "b"', ("fault 1", "-1.0 s", "not negative")),
        ('kill = "b"', ("fault 1", "kill needs at")),
        ('at = 3\nkill = "b"', ("at is 3", '"1.5 s"')),
        ('at = "3"\nkill = "b"', ('"3"', "no unit")),
        ('at = "1 s"\nslow = "b"\nfactor = -2', ("factor is -2", "above zero")),
        ('at = "1 s"\nslow = "b"', ("needs factor",)),
        ('at = "1 s"\nbreak = "b"', ("verb", "kill, restart")),
        ('at = "1 s"\nkill = "b"\nstall = "b"', ("one verb", "kill and stall")),
        ('at = "1 s"\nkill = "b"\nhow = "hard"', ('"how"', "detect")),
        ('at = "1 s"\nkill = ["b"]', ("must be a name",)),
        ('at = "1 s"\ncut = ["a"]', ("two devices",)),
        ('at = "1 s"\ncut = ["a", "a"]', ("itself",)),
        ('at = "1 s"\ncut = ["a", "b"]\nfor = "-1 s"', ("for is -1.0",)),
        ('at = "1 s"\npartition = ["a", "b", "c"]', ("both sides",)),
        ('at = "1 s"\nframes = ["a", "b"]\ndrop = 1.5', ("shares from 0 to 1",)),
        ('at = "1 s"\nlink = ["a", "b"]\nrate = "40 Mb"\nlatency = "1 ms"', ("ambiguous",)),
        ('at = "1 s"\nlink = ["a", "b"]\nrate = "0 B/s"\nlatency = "1 ms"', ("above zero",)),
        ('at = "1 s"\nclock = "a"\ndrift = 9', ("drift",)),
        ('at = "1 s"\nfail_work = "a"\nkinds = ["think"]', ("think", "compute, encode, decode")),
        ('at = "1 s"\ntrace = ["a", "b"]\nfile = "none.csv"', ("none.csv",)),
        ("at = [[", ("not TOML",)),
    ],
)
def test_what_is_wrong_is_named(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SchemaError) as caught:
        one(text)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_all_violations_are_named_at_once() -> None:
    with pytest.raises(SchemaError) as caught:
        read_script('[[fault]]\nat = "1 s"\nkill = "x"\n[[fault]]\nat = "1 s"\nkill = "y"', ABC)
    assert "fault 1" in str(caught.value)
    assert "fault 2" in str(caught.value)


def test_a_trace_file_with_negative_rates_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("# duration_s = 2\ntime_s,bytes_per_s,latency_s,loss\n0,1e6,0.01,0\n1,-5,0.01,0\n")
    with pytest.raises(EcotoneError, match=r"rate -5.* not negative"):
        one(f'at = "1 s"\ntrace = ["a", "b"]\nfile = "{path}"')


def test_the_example_is_a_script() -> None:
    script = read_script((EXAMPLES / "faults.toml").read_text(), ("camera", "gateway", "server"))
    assert {type(f).__name__ for f in script} >= {"KillNode", "RestartNode", "StallNode", "SpoilLink", "FollowTrace"}


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_what_is_written_is_read_again(seed: int, count: int) -> None:
    script = draw_faults(np.random.default_rng(seed), ABC, True, 5.0, count)
    assert read_script(write_script(script, "a remark\nof two lines"), ABC, load=trace_of) == script


@settings(max_examples=100)
@given(st.integers(0, 10**6))
def test_a_scene_is_a_file(seed: int) -> None:
    scene = draw_scene(seed)
    assert Scene.from_toml(scene.to_toml("why")) == scene


def test_a_plan_cannot_be_written_as_text() -> None:
    with pytest.raises(EcotoneError, match="replan = FILE"):
        write_script((ft.Replan(at_s=1, plan=plan_of("b:2", "a", 0)),))


def test_every_kind_of_fault_is_drawn() -> None:
    drawn = {type(f).__name__ for seed in range(300) for f in draw_scene(seed).faults}
    wanted = {type(f).__name__ for draw in KINDS.values() for f in draw(np.random.default_rng(1), (A, B), 1.0, 2.0)}
    assert wanted <= drawn
    assert "Switch" in drawn
