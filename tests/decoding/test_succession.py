"""Who takes a lost device's place: its standby, else who has most room; and nobody who lives is moved."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.decoding.succession import succeed
from ecotone.llmplan import EXACT, LOCAL, LlmPlan, LlmStage, Span, Standby, llm_plan_violations
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure
NAMES = tuple(DeviceId(n) for n in ("pc", "a", "b", "c", "d"))


def cluster(memory: dict[str, int], without: tuple[tuple[str, str], ...] = (), **executors: tuple[str, ...]) -> Cluster:
    devices = tuple(
        Device(name=n, memory_bytes=memory.get(n, 1000), threads=1, executors=executors.get(n, ())) for n in NAMES
    )
    links = tuple(
        Link(source=s, target=t, bandwidth_bytes_per_s=1e6, latency_s=0.0)
        for s in NAMES for t in NAMES if s != t and (s, t) not in without
    )  # fmt: skip
    return Cluster(name="t", devices=devices, links=links, source=NAMES[0], sink=NAMES[0])


def plan(*devices: str, standbys: tuple[tuple[str, int], ...] = (), kv_bytes: int = 100) -> LlmPlan:
    count = len(devices)
    stages = tuple(
        LlmStage(
            device=DeviceId(name), span=Span(start=i, stop=i + 1, embedding=i == 0, head=i == count - 1), executor="x:fp32",
            kv_bytes=kv_bytes, codec=LOCAL if i + 1 == count or devices[i + 1] == name else EXACT,
        )
        for i, name in enumerate(devices)
    )  # fmt: skip
    made = tuple(Standby(device=DeviceId(d), stage=s) for d, s in standbys)
    return LlmPlan(model_hash="m", num_layers=count, driver=NAMES[0], stages=stages, context=8, standbys=made)


def devices(of: LlmPlan) -> list[str]:
    return [stage.device for stage in of.stages]


def alive(*names: str) -> frozenset[DeviceId]:
    return frozenset(DeviceId(n) for n in names)


def test_the_device_with_most_room_takes_the_lost_stage() -> None:
    found = succeed(plan("a", "b"), cluster({"a": 500, "c": 400, "d": 300, "pc": 200}), alive("pc", "a", "c", "d"), [50, 50])
    assert devices(found) == ["a", "c"]
    assert found.epoch == 1
    # a has 1000 but 150 are taken; where c is not there, a has most
    assert devices(succeed(plan("a", "b"), cluster({}), alive("a"), [50, 50])) == ["a", "a"]


def test_room_is_counted_with_what_was_given_already() -> None:
    found = succeed(plan("a", "b", "c"), cluster({"d": 1000, "pc": 900, "a": 200}), alive("pc", "a", "d"), [50, 800, 50])
    assert devices(found) == ["a", "d", "pc"]


def test_a_standby_comes_first_and_others_stay() -> None:
    before = plan("a", "b", "c", standbys=(("a", 1), ("d", 2), ("b", 2)))
    found = succeed(before, cluster({"pc": 10**6}), alive("pc", "a", "c", "d"), [10, 10, 10])
    assert devices(found) == ["a", "a", "c"]
    assert [(s.device, s.stage) for s in found.standbys] == [("d", 2)]


def test_codecs_follow_the_new_neighbours() -> None:
    found = succeed(plan("a", "b", "a"), cluster({"a": 5000}), alive("pc", "a"), [1, 1, 1])
    assert [s.codec for s in found.stages] == [LOCAL, LOCAL, LOCAL]
    before = plan("a", "a", "b")
    before = dataclasses.replace(
        before, stages=(*before.stages[:1], dataclasses.replace(before.stages[1], codec="int8"), before.stages[2])
    )
    found = succeed(before, cluster({"d": 5000}), alive("pc", "b", "d"), [1, 1, 1])
    assert [s.codec for s in found.stages] == [LOCAL, "int8", LOCAL]


def test_who_cannot_be_reached_or_may_not_is_passed_over() -> None:
    of = cluster({"c": 9000, "d": 8000}, without=(("c", "pc"),), d=("y:fp32",))
    assert devices(succeed(plan("a", "b"), of, alive("pc", "a", "c", "d"), [1, 1])) == ["a", "pc"]


def test_a_device_that_its_neighbour_cannot_send_to_is_passed_over() -> None:
    of = cluster({"c": 9000, "d": 8000}, without=(("a", "c"),))
    assert devices(succeed(plan("a", "b"), of, alive("pc", "a", "c", "d"), [1, 1])) == ["a", "d"]
    ready = plan("a", "b", standbys=(("c", 1),))
    assert devices(succeed(ready, of, alive("pc", "a", "c", "d"), [1, 1])) == ["a", "d"]


def test_no_place_says_what_is_missing() -> None:
    small = cluster(dict.fromkeys(NAMES, 120))
    with pytest.raises(EcotoneError, match=r"b is lost; layers \[1, 2\) \+ head needs 150 B, .* has .* left; add a machine"):
        succeed(plan("a", "b"), small, alive("pc", "a"), [10, 50])
    with pytest.raises(EcotoneError, match="no device that is left may hold"):
        succeed(plan("a", "b"), cluster({}, pc=("y:fp32",), a=("y:fp32",)), alive("pc", "a"), [10, 50])


@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), st.sets(st.sampled_from(NAMES[1:])),
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 3)), max_size=3), st.integers(100, 1000),
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=3),
)  # fmt: skip
def test_what_succeeds_is_a_plan_that_can_run(
    names: list[DeviceId], lost: set[DeviceId], standbys: list[tuple[DeviceId, int]], memory: int,
    cut: list[tuple[DeviceId, DeviceId]],
) -> None:  # fmt: skip
    kept = tuple((d, s) for d, s in dict.fromkeys(standbys) if s < len(names) and names[s] != d)
    before, of = plan(*names, standbys=kept), cluster(dict.fromkeys(NAMES, memory), without=tuple(cut))
    weights = [50] * len(names)
    if llm_plan_violations(before, of, weights):
        return
    try:
        found = succeed(before, of, frozenset(NAMES) - lost, weights)
    except EcotoneError:
        return
    assert not llm_plan_violations(found, of, weights)
    assert not {s.device for s in (*found.stages, *found.standbys)} & lost
    for old, new in zip(before.stages, found.stages, strict=True):
        assert old.device in lost or new.device == old.device
        assert (old.span, old.executor) == (new.span, new.executor)
