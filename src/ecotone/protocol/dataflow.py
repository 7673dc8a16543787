"""The static check before a plan may run: rates that fit, no deadlock, and a bound for every FIFO, in every setting.

Model of computation after VR-PRUNE (Boutellier et al.; see docs/dataflow.md). Actors joined by FIFO channels; each end of a
channel has a rate in tokens per firing, between a lower and an upper one. Equal: a static channel. Else *dynamic*: both ends
then use the same active rate (symmetric), set for a whole iteration by a `Setting`: an exit taken, a node lost. Dynamic
channels lie in *subgraphs*, each between one select and one merge, through which alone tokens enter and leave; a control
FIFO tells the merge which setting the select used. Failures are settings, so one check covers them.

`check` looks at each subgraph and setting with the others folded (sums, not products): select and merge alone, one iteration
at a time for the deadlock check, any number at once for the bounds. So both verdicts hold for any sequence of settings: an
iteration of any setting completes from the empty subgraph, and an execution less its iterations of other settings is an
execution. A dynamic channel with several rates above 0 is held to its capacity, or to its upper rate times the
iterations that can be in the subgraph. O(settings * channels * firings of an iteration).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ecotone.protocol.tokens import Flow, Problem, peaks, repetitions, run_iteration
from ecotone.units import EcotoneError, format_quantity

__all__ = [
    "Actor", "Bound", "Channel", "DataflowGraph", "DataflowReport", "Rate", "Setting", "Subgraph", "UnsoundPlan",
    "Violation", "check",
]  # fmt: skip


class UnsoundPlan(EcotoneError):
    """A plan whose dataflow is inconsistent, unbounded or can deadlock: it may not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens per firing: at least `lower`, at most `upper`."""

    lower: int = 1
    upper: int = 1

    @property
    def is_static(self) -> bool:
        return self.lower == self.upper


ONE = Rate()
ON_OFF = Rate(lower=0, upper=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """`place`: the device that it runs on, or a link "a>b"."""

    name: str
    kind: str  # "source", "select", "merge", "stage", "encode", "link", "decode", "sink"
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """A FIFO. `capacity` is enforced where it stands (None: only loops bound it); firing blocks for want of room.

    `slack`: tokens above the capacity, or above the initial ones of a loop without capacity, that may be there for a while
    (taken out for work, begun again): counted in the bound, not relied on against deadlock. `stale`: tokens of ended
    requests that may still be there, which no loop counts any more; the capacity does. `limit_bytes`: enforced as well.
    """

    name: str
    source: str
    target: str
    produce: Rate = ONE
    consume: Rate = ONE
    initial: int = 0
    capacity: int | None = None
    slack: int = 0
    stale: int = 0
    token_bytes: int = 0
    limit_bytes: int | None = None
    place: str = ""  # where its tokens lie

    @property
    def is_dynamic(self) -> bool:
        return not (self.produce.is_static and self.consume.is_static)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Active rates of the dynamic channels of a subgraph, by name."""

    name: str
    rates: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subgraph:
    """What lies between a select and a merge, with all settings that it can be in."""

    name: str
    select: str
    merge: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataflowGraph:
    """Actors and channels by unique names; tokens are frontiers, credit, or slots."""

    actors: tuple[Actor, ...]
    channels: tuple[Channel, ...]
    subgraphs: tuple[Subgraph, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """`kind`: "malformed", "rates", "deadlock" or "unbounded"; `loop` the actors or channels that it is about."""

    kind: str
    reason: str
    loop: tuple[str, ...] = ()
    setting: str = ""

    def __str__(self) -> str:
        inside = f" ({self.setting})" if self.setting else ""
        loop = f": loop {' -> '.join((*self.loop, self.loop[0]))}" if self.loop else ""
        return f"{self.kind}{inside}{loop}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """At most so many tokens (and bytes, where sizes are known) are ever in a channel; `setting`: which needs the most."""

    channel: str
    place: str
    tokens: int
    size_bytes: int
    setting: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataflowReport:
    """`bounds` in the order of the channels; empty where there are violations."""

    violations: tuple[Violation, ...]
    bounds: tuple[Bound, ...]
    num_actors: int
    num_settings: int

    @property
    def is_sound(self) -> bool:
        return not self.violations

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """Bytes of all channels of a place at their bounds: no schedule needs more."""
        total: dict[str, int] = {}
        for bound in self.bounds:
            total[bound.place] = total.get(bound.place, 0) + bound.size_bytes
        return total

    def bound(self, channel: str) -> Bound:
        return next(b for b in self.bounds if b.channel == channel)

    def __str__(self) -> str:
        if self.violations:
            return "\n".join(map(str, self.violations))
        width = max((len(b.channel) for b in self.bounds), default=0)
        rows = [
            f"{b.channel:<{width}}  {b.tokens:>6}  {format_quantity(b.size_bytes, 'bytes') if b.size_bytes else '':>10}"
            f"  {b.place}" + (f"  [{b.setting}]" if b.setting else "")
            for b in self.bounds
        ]
        head = f"sound in {self.num_settings} settings: {self.num_actors} actors, {len(self.bounds)} bounded channels"
        return "\n".join([head, f"{'channel':<{width}}  tokens       bytes  at", *rows])


def check(graph: DataflowGraph) -> DataflowReport:
    """Every violation, or the bound of every channel. Never raises."""
    num_settings = sum(len(s.settings) for s in graph.subgraphs) or 1
    violations = tuple(_malformed(graph))
    if violations:
        return DataflowReport(violations=violations, bounds=(), num_actors=len(graph.actors), num_settings=num_settings)
    inner = [_inside(graph, subgraph)[0] for subgraph in graph.subgraphs]
    checker = _Checker(graph, inner)
    checker.look(None, None)
    for i, subgraph in enumerate(graph.subgraphs):
        for setting in subgraph.settings:
            checker.look(i, setting)
    bounds = () if checker.violations else tuple(checker.bounds())
    return DataflowReport(
        violations=tuple(checker.violations), bounds=bounds, num_actors=len(graph.actors), num_settings=num_settings
    )


# ---- shape ---------------------------------------------------------------------------------------------------------------


def _malformed(graph: DataflowGraph) -> Iterator[Violation]:
    names = {a.name for a in graph.actors}
    if len(names) < len(graph.actors) or len({c.name for c in graph.channels}) < len(graph.channels):
        yield Violation(kind="malformed", reason="two actors or two channels have one name")
    for c in graph.channels:
        for reason in _channel_violations(c, names):
            yield Violation(kind="malformed", reason=f'channel "{c.name}" from {c.source} to {c.target} {reason}')
    owned: dict[str, str] = {}
    for subgraph in graph.subgraphs:
        if missing := [end for end in (subgraph.select, subgraph.merge) if end not in names]:
            reason = f'subgraph "{subgraph.name}" has no actor {missing[0]!r}: a select needs its merge'
            yield Violation(kind="malformed", reason=reason)
            continue
        inner, leaks = _inside(graph, subgraph)
        for path in leaks:
            reason = (
                f'subgraph "{subgraph.name}": {" -> ".join(path)} does not lead from its select to its merge; '
                f"end each branch of {subgraph.select} in {subgraph.merge}"
            )
            yield Violation(kind="malformed", reason=reason, loop=())
        for other in [s for s in graph.subgraphs if s is not subgraph and {s.select, s.merge} & inner]:
            reason = f'subgraph "{other.name}" lies inside "{subgraph.name}": join their settings into one subgraph'
            yield Violation(kind="malformed", reason=reason)
        mine = {c.name: c for c in graph.channels if _belongs(c, subgraph, inner)}
        owned |= dict.fromkeys(mine, subgraph.name)
        yield from _setting_violations(subgraph, {n: c for n, c in mine.items() if c.is_dynamic})
    for c in graph.channels:
        if c.is_dynamic and c.name not in owned:
            reason = f'channel "{c.name}" changes its rate, but no pair of select and merge delimits it'
            yield Violation(kind="malformed", reason=reason)


def _channel_violations(c: Channel, names: set[str]) -> Iterator[str]:
    for end in (c.source, c.target):
        if end not in names:
            yield f"names no actor: {end!r}"
    for rate in (c.produce, c.consume):
        if not 0 <= rate.lower <= rate.upper:
            yield f"has rate {rate.lower} to {rate.upper}; lower must be 0 or more, upper not below it"
    if c.is_dynamic and c.produce != c.consume:
        yield "changes its rate, and differently at its two ends; dynamic rates must be symmetric"
    if (
        c.initial < 0
        or c.slack < 0
        or c.stale < 0
        or c.token_bytes < 0
        or (c.capacity is not None and c.capacity < c.initial)
    ):
        yield f"begins with {c.initial} tokens at capacity {c.capacity}, slack {c.slack}: must be 0 or more, and fit"


def _setting_violations(subgraph: Subgraph, dynamic: Mapping[str, Channel]) -> Iterator[Violation]:
    if not subgraph.settings:
        yield Violation(kind="malformed", reason=f'subgraph "{subgraph.name}" has no setting')
    for setting in subgraph.settings:
        rates = dict(setting.rates)
        if set(rates) != set(dynamic) or len(rates) < len(setting.rates):
            odd = sorted(set(rates) ^ set(dynamic))
            reason = f'must set each dynamic channel of "{subgraph.name}" once; see {", ".join(odd) or "doubles"}'
            yield Violation(kind="malformed", setting=setting.name, reason=reason)
            continue
        for name, rate in rates.items():
            if not dynamic[name].produce.lower <= rate <= dynamic[name].produce.upper:
                yield Violation(kind="malformed", setting=setting.name, reason=f'rate {rate} of "{name}" is out of range')


def _belongs(c: Channel, subgraph: Subgraph, inner: set[str]) -> bool:
    ends = {subgraph.select, subgraph.merge}
    return c.source in inner or c.target in inner or (c.is_dynamic and c.source in ends and c.target in ends)


def _inside(graph: DataflowGraph, subgraph: Subgraph) -> tuple[set[str], list[tuple[str, ...]]]:
    """Actors strictly between select and merge, and paths that leave or enter elsewhere.

    Static channels of the select to the outside (it is an actor of the static part too) are no branches: a branch begins
    with a dynamic channel.
    """
    ends = {subgraph.select, subgraph.merge}
    forward = _reached(graph, subgraph.select, ends, is_forward=True)
    backward = _reached(graph, subgraph.merge, ends, is_forward=False)
    leaks = [path for name, path in forward.items() if name not in backward]
    entries = [path[::-1] for name, path in backward.items() if name not in forward]
    longest = [p for p in leaks if not any(len(q) > len(p) and q[: len(p)] == p for q in leaks)]
    first = [p for p in entries if not any(len(q) > len(p) and q[-len(p) :] == p for q in entries)]
    return set(forward) & set(backward), longest + first


def _reached(graph: DataflowGraph, start: str, ends: set[str], *, is_forward: bool) -> dict[str, tuple[str, ...]]:
    """Actors on the far side of the dynamic channels of `start`, each with a path from it."""
    around: dict[str, list[Channel]] = {}
    for c in graph.channels:
        around.setdefault(c.source if is_forward else c.target, []).append(c)
    found: dict[str, tuple[str, ...]] = {}
    todo: list[tuple[Channel, tuple[str, ...]]] = [(c, (start,)) for c in around.get(start, []) if c.is_dynamic]
    while todo:
        c, path = todo.pop()
        other = c.target if is_forward else c.source
        if other not in ends and other not in found:
            found[other] = (*path, other)
            todo += [(further, found[other]) for further in around.get(other, [])]
    return found


# ---- rates, deadlock, bounds ---------------------------------------------------------------------------------------------


class _Checker:
    """Looks at one subgraph and setting after the other and keeps what it saw."""

    def __init__(self, graph: DataflowGraph, inner: Sequence[set[str]]) -> None:
        self.graph, self.inner = graph, inner
        self.owner: dict[str, int] = {}
        for i, subgraph in enumerate(graph.subgraphs):
            self.owner |= {c.name: i for c in graph.channels if _belongs(c, subgraph, inner[i])}
        self.violations: list[Violation] = []
        self.peaks: dict[str, tuple[int, str]] = {}

    def look(self, opened: int | None, setting: Setting | None) -> None:
        """The static part, with subgraph `opened` in `setting` and all others folded; None: all folded."""
        name = setting.name if setting else ""
        channels = [c for c in self.graph.channels if self.owner.get(c.name, opened) == opened]
        rates = dict(setting.rates) if setting else {}
        actors = list(dict.fromkeys(n for n in self._actors(opened)))
        number = {actor: i for i, actor in enumerate(actors)}
        tight, loose = self._flows(channels, rates, number, opened)
        counts = repetitions(len(actors), tight)
        problem = counts if isinstance(counts, Problem) else run_iteration(len(actors), tight, counts)
        if isinstance(counts, Problem) or problem is not None:
            assert problem is not None
            kind = "rates" if isinstance(counts, Problem) else "deadlock"
            waits = [f"{actors[a]} waits for {what}" for a, what in zip(problem.loop, problem.waits, strict=False)]
            self._note(kind, "; ".join(waits) or problem.reason, tuple(actors[a] for a in problem.loop), name)
            return
        found = peaks(len(actors), loose, counts)
        for flow, peak in zip(loose, found, strict=True):
            if self.owner.get(flow.name) != opened:
                continue  # seen where all is folded
            if peak is None:
                ends = (actors[flow.source], actors[flow.target])
                reason = (
                    f'nothing bounds "{flow.name}" from {ends[0]} to {ends[1]}: give it a capacity or close a loop round it'
                )
                self._note("unbounded", reason, (), name)
            elif flow.name not in self.peaks or peak > self.peaks[flow.name][0]:
                self.peaks[flow.name] = (peak, name)

    def bounds(self) -> Iterator[Bound]:
        for c in self.graph.channels:
            tokens, setting = self._peak(c)
            tokens += c.stale if c.capacity is None else min(c.stale, c.capacity + c.slack - tokens)
            size_bytes = tokens * c.token_bytes
            if c.limit_bytes is not None:
                size_bytes = min(size_bytes, c.limit_bytes)
            yield Bound(channel=c.name, place=c.place, tokens=tokens, size_bytes=size_bytes, setting=setting)

    def _peak(self, c: Channel) -> tuple[int, str]:
        peak, setting = self.peaks[c.name]
        if not c.is_dynamic:
            return peak, setting if c.name in self.owner else ""
        subgraph = self.graph.subgraphs[self.owner[c.name]]
        used = {dict(s.rates)[c.name] for s in subgraph.settings} - {0}
        if len(used) < 2:
            return peak, setting
        if c.capacity is not None:
            return c.capacity + c.slack, "settings mixed"
        inside = self.peaks[_control(subgraph)][0]
        return max(peak, c.initial + inside * max(used)), "settings mixed"

    def _actors(self, opened: int | None) -> Iterable[str]:
        hidden = {n for i, names in enumerate(self.inner) if i != opened for n in names}
        return (a.name for a in self.graph.actors if a.name not in hidden)

    def _flows(
        self, channels: Sequence[Channel], rates: Mapping[str, int], number: Mapping[str, int], opened: int | None
    ) -> tuple[list[Flow], list[Flow]]:
        tight, loose = [], []
        for c in channels:
            ends = number[c.source], number[c.target]
            put, take = (rates[c.name],) * 2 if c.is_dynamic else (c.produce.upper, c.consume.upper)
            tight.append(Flow(c.name, *ends, put, take, c.initial, c.capacity))
            if c.capacity is None:
                loose.append(Flow(c.name, *ends, put, take, c.initial + c.slack, None))
            else:
                loose.append(Flow(c.name, *ends, put, take, c.initial, c.capacity + c.slack))
        for i, s in enumerate(self.graph.subgraphs):
            ends = number[s.select], number[s.merge]
            tight.append(Flow(_control(s), *ends, 1, 1, 0, None if i == opened else 1))
            loose.append(Flow(_control(s), *ends, 1, 1))
        return tight, loose

    def _note(self, kind: str, reason: str, loop: tuple[str, ...], setting: str) -> None:
        violation = Violation(kind=kind, reason=reason, loop=loop, setting=setting)
        known = {(v.kind, v.reason, v.loop) for v in self.violations}
        if (kind, reason, loop) not in known:
            self.violations.append(violation)


def _control(subgraph: Subgraph) -> str:
    return f'control of "{subgraph.name}"'
