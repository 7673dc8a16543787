"""The static checker against exhaustive exploration of small graphs, broken graphs by name, and bounds in running worlds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.protocol.dataflow import Actor, Channel, DataflowGraph, Rate, Setting, Subgraph, check
from ecotone.protocol.tokens import Flow, Problem, repetitions

pytestmark = pytest.mark.pure

State = tuple[tuple[int, ...], tuple[int, ...]]  # tokens by channel; settings that select used and merge did not yet


# ---- the oracle: every firing order ----------------------------------------------------------------------------


def rate_of(c: Channel, setting: Setting | None) -> tuple[int, int]:
    if not c.is_dynamic:
        return c.produce.upper, c.consume.upper
    if setting is None:  # an inner actor: it fires where its channels are on
        return c.produce.upper, c.consume.upper
    return (dict(setting.rates)[c.name],) * 2


def successors(graph: DataflowGraph, state: State) -> Iterator[State]:
    """All states after one firing; a select may choose any setting, its merge takes the oldest choice."""
    tokens, control = state
    choices = graph.subgraphs[0].settings if graph.subgraphs else ()
    for actor in graph.actors:
        modes: list[tuple[Setting | None, tuple[int, ...]]] = [(None, control)]
        if graph.subgraphs and actor.name == graph.subgraphs[0].select:
            modes = [(s, (*control, i)) for i, s in enumerate(choices)]
        elif graph.subgraphs and actor.name == graph.subgraphs[0].merge:
            modes = [(choices[control[0]], control[1:])] if control else []
        for setting, after in modes:
            new = list(tokens)
            is_able = any(actor.name in (c.source, c.target) and any(rate_of(c, setting)) for c in graph.channels)
            for i, c in enumerate(graph.channels):
                if c.target == actor.name:
                    new[i] -= rate_of(c, setting)[1]
                    is_able &= new[i] >= 0
            for i, c in enumerate(graph.channels):
                if c.source == actor.name:
                    new[i] += rate_of(c, setting)[0]
                    is_able &= c.capacity is None or new[i] <= c.capacity or not rate_of(c, setting)[0]
            if is_able:
                yield tuple(new), after


def explore(graph: DataflowGraph) -> tuple[tuple[int, ...], set[State]]:
    """Peak of every channel and all dead states, over all reachable states."""
    start: State = (tuple(c.initial for c in graph.channels), ())
    seen, todo, dead = {start}, [start], set()
    while todo:
        state = todo.pop()
        found = list(successors(graph, state))
        if not found:
            dead.add(state)
        for other in found:
            if other not in seen:
                seen.add(other)
                todo.append(other)
        assert len(seen) < 200_000, "too large to explore"
    return tuple(max(s[0][i] for s in seen) for i in range(len(graph.channels))), dead


# ---- random graphs ------------------------------------------------------------------------------------------------


@st.composite
def static_graphs(draw: st.DrawFn) -> DataflowGraph:
    """Connected, at most 5 actors, rates 1 to 3, capacities at most 4; half of them with rates that fit."""
    count = draw(st.integers(1, 5))
    fits = draw(st.booleans())
    counts = [draw(st.integers(1, 3)) for _ in range(count)]
    pairs = [(draw(st.integers(0, i - 1)), i) for i in range(1, count)]
    ends = st.integers(0, count - 1)
    pairs = [p if draw(st.booleans()) else p[::-1] for p in pairs] + draw(st.lists(st.tuples(ends, ends), max_size=3))
    channels = []
    for i, (source, target) in enumerate(pairs):
        put, take = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        if fits:
            divisor = math.gcd(counts[source], counts[target])
            put, take = counts[target] // divisor, counts[source] // divisor
        capacity = draw(st.integers(1, 4))
        channels.append(
            Channel(
                name=f"c{i}",
                source=str(source),
                target=str(target),
                produce=Rate(lower=put, upper=put),
                consume=Rate(lower=take, upper=take),
                initial=draw(st.integers(0, capacity)),
                capacity=capacity,
            )
        )
    return DataflowGraph(actors=tuple(Actor(name=str(i), kind="stage") for i in range(count)), channels=tuple(channels))


def topology_rank(graph: DataflowGraph) -> int:
    matrix = np.zeros((len(graph.channels), len(graph.actors)))
    for i, c in enumerate(graph.channels):
        matrix[i, int(c.source)] += c.produce.upper
        matrix[i, int(c.target)] -= c.consume.upper
    return int(np.linalg.matrix_rank(matrix)) if graph.channels else 0


@settings(max_examples=1500, deadline=None)
@given(static_graphs())
def test_verdict_and_peaks_are_those_of_every_firing_order(graph: DataflowGraph) -> None:
    """Consistent: rank of the topology matrix is actors - 1 (Lee and Messerschmitt 1987). Dead states: none, or just one,
    as the order of firings does not matter. An inconsistent graph in finite FIFOs always ends in one."""
    report = check(graph)
    kinds = {v.kind for v in report.violations}
    if not graph.channels:
        assert report.is_sound
        return
    found, dead = explore(graph)
    assert len(dead) <= 1
    if topology_rank(graph) == len(graph.actors):
        assert kinds == {"rates"}
        assert dead
    elif dead:
        assert kinds == {"deadlock"}
        stuck = report.violations[0].loop
        assert all(
            any({a, b} == {c.source, c.target} for c in graph.channels)
            for a, b in zip(stuck, stuck[1:] + stuck[:1], strict=True)
        )
    else:
        assert report.is_sound
        assert tuple(b.tokens for b in report.bounds) == found


@settings(max_examples=300)
@given(static_graphs())
def test_repetitions_balance_every_channel_and_have_no_common_divisor(graph: DataflowGraph) -> None:
    flows = [Flow(c.name, int(c.source), int(c.target), c.produce.upper, c.consume.upper) for c in graph.channels]
    counts = repetitions(len(graph.actors), flows)
    if isinstance(counts, Problem):
        assert counts.loop
        return
    assert all(counts[f.source] * f.produce == counts[f.target] * f.consume for f in flows)
    assert not flows or (min(counts) > 0 and math.gcd(*counts) == 1)


ON_OFF = Rate(lower=0, upper=1)


@st.composite
def switching_graphs(draw: st.DrawFn) -> DataflowGraph:
    """source -> select -> branches -> merge -> sink under a window, one FIFO past it all and one with several rates; a
    setting is a set of branches."""
    actors = [Actor(name=n, kind=n) for n in ("source", "select", "merge", "sink")]
    room = st.none() | st.integers(1, 3)
    window = draw(st.integers(1, 3))
    channels = [
        Channel(name="in", source="source", target="select", capacity=draw(room)),
        Channel(name="out", source="merge", target="sink", capacity=draw(room)),
        Channel(name="past", source="source", target="sink", capacity=draw(room)),
        Channel(name="window", source="sink", target="source", initial=window),
    ]
    branches = []
    for i in range(draw(st.integers(2, 3))):
        chain = ["select", *(f"b{i}.{j}" for j in range(draw(st.integers(1, 2)))), "merge"]
        actors += [Actor(name=n, kind="stage") for n in chain[1:-1]]
        mine = [
            Channel(name=f"{a}>{b}", source=a, target=b, produce=ON_OFF, consume=ON_OFF, capacity=draw(room))
            for a, b in pairwise(chain)
        ]
        if len(chain) == 4 and draw(st.booleans()):  # slots, perhaps none: a deadlock in this branch's settings
            slots = draw(st.integers(0, 2))
            mine.append(replace(mine[1], name=f"slots {i}", source=chain[2], target=chain[1], initial=slots, capacity=None))
        channels += mine
        branches.append([c.name for c in mine])
    if draw(st.booleans()):
        several = Rate(lower=0, upper=2)
        capacity = draw(st.none() | st.integers(2, 4))
        channels.append(
            Channel(name="several", source="select", target="merge", produce=several, consume=several, capacity=capacity)
        )
    modes = []
    for n in range(draw(st.integers(1, 3))):
        on = draw(st.sets(st.integers(0, len(branches) - 1), min_size=1))
        rates = [(name, int(i in on)) for i, names in enumerate(branches) for name in names]
        rates += [("several", draw(st.integers(0, 2)))] if channels[-1].name == "several" else []
        modes.append(Setting(name=f"mode {n}", rates=tuple(rates)))
    subgraph = Subgraph(name="s", select="select", merge="merge", settings=tuple(modes))
    return DataflowGraph(actors=tuple(actors), channels=tuple(channels), subgraphs=(subgraph,))


@settings(max_examples=400, deadline=None)
@given(switching_graphs())
def test_bounds_and_liveness_hold_for_any_sequence_of_settings(graph: DataflowGraph) -> None:
    report = check(graph)
    found, dead = explore(graph)
    assert report.is_sound == (not dead), report
    if report.is_sound:
        for bound, peak in zip(report.bounds, found, strict=True):
            assert peak <= bound.tokens, bound.channel


# ---- broken graphs, by name ----------------------------------------------------------------------------


def graph_of(*channels: Channel, subgraphs: tuple[Subgraph, ...] = ()) -> DataflowGraph:
    names = dict.fromkeys(n for c in channels for n in (c.source, c.target))
    return DataflowGraph(actors=tuple(Actor(name=n, kind="stage") for n in names), channels=channels, subgraphs=subgraphs)


def test_a_ring_without_room_is_a_deadlock_that_names_the_ring() -> None:
    # a -> b -> c -> b' ... as one FIFO of one token that is full: everybody waits for the next one's room.
    ring = [
        Channel(name=f"{x}{y}", source=x, target=y, initial=1, capacity=1) for x, y in (("a", "b"), ("b", "c"), ("c", "a"))
    ]
    report = check(graph_of(*ring))
    (found,) = report.violations
    assert found.kind == "deadlock"
    assert set(found.loop) == {"a", "b", "c"}
    assert 'room in "ab" (1 of 1 used)' in str(found)
    assert check(graph_of(*ring[:2], replace(ring[2], capacity=2))).is_sound


def test_a_loop_without_tokens_is_a_deadlock_that_names_the_loop() -> None:
    report = check(
        graph_of(
            Channel(name="in", source="x", target="a", capacity=4),
            Channel(name="ab", source="a", target="b", capacity=4),
            Channel(name="ba", source="b", target="a", capacity=4),
        )
    )
    (found,) = report.violations
    assert found.kind == "deadlock"
    assert set(found.loop) == {"a", "b"}
    assert 'b waits for a token of "ab"' in str(found)


def test_rates_that_do_not_fit_name_the_loop() -> None:
    two = Rate(lower=2, upper=2)
    report = check(
        graph_of(
            Channel(name="ab", source="a", target="b", produce=two, capacity=8),
            Channel(name="bc", source="b", target="c", capacity=8),
            Channel(name="ac", source="a", target="c", capacity=8),
        )
    )
    (found,) = report.violations
    assert found.kind == "rates"
    assert set(found.loop) == {"a", "b", "c"}


def test_a_channel_that_nothing_bounds_is_named() -> None:
    report = check(graph_of(Channel(name="ab", source="a", target="b")))
    assert [v.kind for v in report.violations] == ["unbounded"]
    assert '"ab"' in str(report.violations[0])


def early_exit(*, merge: str = "merge", exit_to: str = "merge") -> DataflowGraph:
    """A head, then either an exit or the tail: two settings."""
    channels = [
        Channel(name="frames", source="head", target="select", capacity=2),
        Channel(name="to exit", source="select", target="exit", produce=ON_OFF, consume=ON_OFF),
        Channel(name="to tail", source="select", target="tail", produce=ON_OFF, consume=ON_OFF),
        Channel(name="from exit", source="exit", target=exit_to, produce=ON_OFF, consume=ON_OFF),
        Channel(name="from tail", source="tail", target="merge", produce=ON_OFF, consume=ON_OFF),
        Channel(name="window", source="merge", target="head", initial=3),
    ]
    rates = {"exit": ("to exit", "from exit"), "tail": ("to tail", "from tail")}
    modes = tuple(
        Setting(name=f"{way} taken", rates=tuple((c, int(name == way)) for name, both in rates.items() for c in both))
        for way in rates
    )
    subgraph = Subgraph(name="exits", select="select", merge=merge, settings=modes)
    return graph_of(*channels, subgraphs=(subgraph,))


def test_an_early_exit_is_sound_and_bounded_by_the_window() -> None:
    report = check(early_exit())
    assert report.is_sound, report
    assert report.num_settings == 2
    assert {b.channel: b.tokens for b in report.bounds} == {
        "frames": 2, "to exit": 3, "to tail": 3, "from exit": 3, "from tail": 3, "window": 3,
    }  # fmt: skip


def test_a_select_without_a_merge_is_named() -> None:
    assert "a select needs its merge" in str(check(early_exit(merge="nobody")))
    found = str(check(early_exit(exit_to="display")))
    assert "select -> exit -> display does not lead from its select to its merge" in found
    loose = early_exit()
    assert "no pair of select and merge delimits it" in str(check(replace(loose, subgraphs=())))


def test_rates_that_change_at_one_end_only_are_refused() -> None:
    graph = early_exit()
    odd = replace(graph.channels[1], consume=Rate(lower=1, upper=1))
    assert "must be symmetric" in str(check(replace(graph, channels=(graph.channels[0], odd, *graph.channels[2:]))))


def test_a_setting_must_set_each_dynamic_channel_within_its_rates() -> None:
    graph = early_exit()
    (subgraph,) = graph.subgraphs
    first = subgraph.settings[0]
    for rates, words in ((first.rates[:-1], "from tail"), ((("to exit", 2), *first.rates[1:]), "out of range")):
        broken = replace(subgraph, settings=(replace(first, rates=rates), *subgraph.settings[1:]))
        assert words in str(check(replace(graph, subgraphs=(broken,))))


def test_a_setting_that_feeds_a_branch_and_does_not_take_from_it_is_inconsistent() -> None:
    graph = early_exit()
    (subgraph,) = graph.subgraphs
    rates = (("to exit", 1), ("from exit", 0), ("to tail", 1), ("from tail", 1))
    broken = replace(subgraph, settings=(replace(subgraph.settings[0], rates=rates),))
    report = check(replace(graph, subgraphs=(broken,)))
    assert {v.kind for v in report.violations} == {"unbounded"}, report
    assert '"to exit"' in str(report)
