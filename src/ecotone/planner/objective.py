"""What the user asks for: an objective, and requirements read from text such as "latency=50ms".

An objective is one quantity, or several in order (`Lexicographic`): the first is made least, then the next among the plans
that are as good in those before it, and so on; quantities are never mixed into one sum. Requirements are hard: a plan that
breaks one is no answer. Every quantity may be an objective, a requirement, or both. Accuracy is bounded even where nobody
asks: by DEFAULT_LOSS_POINTS (unless its loss is the objective), and DEFAULT_EXECUTOR_ERROR for an executor.

A score gives seconds that only a simulation gets right (a 95th percentile under load, a makespan). It is handed in, made
for a world (graph, cluster, profile): planning code never sees a simulator. What it must keep to: see P95.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ecotone.cluster import Cluster
from ecotone.cost import PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.profile import Profile
from ecotone.units import EcotoneError, UnitError, format_quantity, parse_quantity

__all__ = [
    "OBJECTIVES", "P95", "REQUIREMENTS", "TAIL", "AccuracyLoss", "Asked", "Bytes", "Energy", "Error", "Latency",
    "Lexicographic", "Money", "Objective", "PlannerError", "Requirement", "Score", "ScoreIn", "Server", "Single",
    "SureLoss", "Throughput", "exceeds", "first_of", "least", "missed", "parse_objective", "quantity", "shown",
]  # fmt: skip

DEFAULT_LOSS_POINTS = 1.0
DEFAULT_EXECUTOR_ERROR = 0.2
ALL_POINTS = 100.0  # nothing loses more
# Sums of floats in another order differ in their last digits; a budget is not broken by that.
SLACK = 1e-9
TAIL = 0.05  # of the requests may take longer than the 95th percentile

Score = Callable[[Plan], float]
"""Seconds of a plan by simulation; inf where too few requests end."""
ScoreIn = Callable[[Graph, Cluster, Profile], Score]
"""The score of plans of a graph on a cluster as profiled."""


class PlannerError(EcotoneError):
    """No plan keeps what was asked, or what was asked cannot be read."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Least mean seconds from input at the source to result at the sink, one request alone; devices may be revisited."""

    name: str = "latency"

    def value(self, cost: PlanCost) -> float:
        return cost.latency_s


@dataclass(frozen=True, slots=True)
class Throughput:
    """Least bottleneck, so most requests per second in a stream; each device computes at most one row of stages."""

    name: str = "throughput"

    def value(self, cost: PlanCost) -> float:
        return cost.bottleneck_s


@dataclass(frozen=True, slots=True)
class Energy:
    """Least modelled joules of a request over all devices that take part (equation 10)."""

    name: str = "energy"

    def value(self, cost: PlanCost) -> float:
        return cost.energy_joule


@dataclass(frozen=True, slots=True)
class Bytes:
    """Fewest bytes over all links."""

    name: str = "bytes"

    def value(self, cost: PlanCost) -> float:
        return cost.size_bytes


@dataclass(frozen=True, slots=True)
class Server:
    """Least seconds that servers are busy with a request (equation 12): what DynO calls onloading."""

    name: str = "server"

    def value(self, cost: PlanCost) -> float:
        return cost.server_s


@dataclass(frozen=True, slots=True)
class Money:
    """Least money for a request (equation 13)."""

    name: str = "money"

    def value(self, cost: PlanCost) -> float:
        return cost.money


@dataclass(frozen=True, slots=True)
class AccuracyLoss:
    """Fewest points of accuracy lost (equation 11): with a required latency that is Edgent's right-sizing."""

    name: str = "accuracy_loss"

    def value(self, cost: PlanCost) -> float:
        return cost.accuracy_loss_points


@dataclass(frozen=True, slots=True)
class SureLoss:
    """Fewest points that may be lost by the upper ends of the intervals (equation 11): what a guarantee has to count on."""

    name: str = "accuracy_loss_sure"

    def value(self, cost: PlanCost) -> float:
        return cost.sure_points


@dataclass(frozen=True, slots=True)
class Error:
    """Least relative error (equation 11)."""

    name: str = "error"

    def value(self, cost: PlanCost) -> float:
        return cost.relative_error


@dataclass(frozen=True, slots=True)
class P95:
    """Least 95th percentile of latency under load, by a score that is handed in.

    Requests come at `arrivals_s` (ascending; empty: one at a time). Of a score is asked, and tested for the simulator's:
    no request ends sooner than alone on idle machines; none overtakes another on a processor, coder or link; requests
    without a result count as infinitely late. `floors.py` derives from that what no plan can be below. `tail`: of a position
    behind which more than this share of the requests goes, more than 5 % of those scored do.
    """

    score_in: ScoreIn | None = None
    arrivals_s: tuple[float, ...] = ()
    tail: float = TAIL
    name: str = "p95"

    def value(self, cost: PlanCost) -> float:
        """The percentile of requests that come one at a time: less than under load, and exact without."""
        return alone_percentile_s(cost)


Single = Latency | Throughput | Energy | Bytes | Server | Money | AccuracyLoss | SureLoss | Error | P95
OBJECTIVES: tuple[Single, ...] = (
    Latency(), P95(), Throughput(), Energy(), Bytes(), Server(), Money(), AccuracyLoss(),
    SureLoss(), Error(),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lexicographic:
    """Several objectives in order; `tolerance[i]`: the share by which the plan may be worse than the best in objective i."""

    objectives: tuple[Single, ...]
    tolerance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        names = [o.name for o in self.objectives]
        if len(names) < 2 or len(set(names)) < len(names):
            raise PlannerError(f"objectives {', '.join(names) or 'none'}: give two or more, each once")
        if any(not 0 <= t < math.inf for t in self.tolerance) or len(self.tolerance) not in (0, len(names)):
            raise PlannerError(f"tolerances {self.tolerance}: give one per objective, each at least 0")

    @property
    def name(self) -> str:
        shares = self.tolerance or (0.0,) * len(self.objectives)
        pairs = zip(self.objectives, shares, strict=True)
        return ",".join(f"{o.name}~{t * 100:g}%" if t else o.name for o, t in pairs)

    def value(self, cost: PlanCost) -> float:
        """The first quantity: what is made least before all others."""
        return self.objectives[0].value(cost)

    @property
    def levels(self) -> tuple[tuple[Single, float], ...]:
        """The objectives with their tolerances."""
        return tuple(zip(self.objectives, self.tolerance or (0.0,) * len(self.objectives), strict=True))


Objective = Single | Lexicographic


def least(name: str, p95: P95 | None = None) -> Single:
    """The objective that makes a quantity least; raises PlannerError naming those there are."""
    found = next((o for o in OBJECTIVES if o.name == name), None)
    if found is None:
        others = ", ".join(o.name for o in OBJECTIVES if o.name not in ("latency", "throughput"))
        raise PlannerError(f"objective {name!r} is not known; latency and throughput are, and {others}")
    return p95 if p95 is not None and name == "p95" else found


def first_of(objective: str) -> str:
    """The first of several objectives: "server~5%,latency" -> server."""
    return objective.partition(",")[0].partition("~")[0]


def parse_objective(text: str, p95: P95 | None = None) -> Objective:
    """Read "latency", or several in order: "server,latency", "server~5%,latency". Raises PlannerError.

    `p95`: what to take where the text says p95.
    """
    singles, shares = [], []
    for item in (part.strip() for part in text.split(",")):
        name, tilde, share = (part.strip() for part in item.partition("~"))
        singles.append(least(name, p95))
        value = _number(share.removesuffix("%")) / 100 if tilde else 0.0
        if tilde and not (share.endswith("%") and value >= 0):
            raise PlannerError(f'objective "{item}": write a tolerance as a share of the best, for example {name}~5%')
        shares.append(value)
    return singles[0] if len(singles) == 1 and not shares[0] else Lexicographic(tuple(singles), tuple(shares))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quantity:
    name: str
    example: str
    unit: str = ""
    of: Callable[[PlanCost], float] | None = None  # None: not of a cost alone


def _largest_memory(cost: PlanCost) -> float:
    return float(max((d.memory_bytes for d in cost.devices), default=0))


_QUANTITIES = {
    q.name: q
    for q in (
        _Quantity(name="latency", example="latency=50ms", unit="s", of=Latency().value),
        _Quantity(name="p95", example="p95=80ms", unit="s"),
        _Quantity(name="energy", example="energy=2J", unit="joule", of=Energy().value),
        _Quantity(name="bytes", example="bytes=100kB", unit="bytes", of=Bytes().value),
        _Quantity(name="memory", example="memory=2GB", unit="bytes", of=_largest_memory),
        _Quantity(name="server", example="server=20ms", unit="s", of=Server().value),
        _Quantity(name="money", example="money=0.0001", of=Money().value),
        _Quantity(name="accuracy_loss", example="accuracy_loss=0.5 (points)", of=AccuracyLoss().value),
        _Quantity(
            name="accuracy_loss_sure", example="accuracy_loss_sure=0.5 (upper end of its interval)", of=SureLoss().value
        ),
        _Quantity(name="error", example="error=0.05", of=Error().value),
        _Quantity(name="stages", example="stages=3", of=lambda cost: float(len(cost.stages))),
        _Quantity(name="throughput", example="throughput=20/s", of=Throughput().value),
    )
}  # fmt: skip
_LISTS = {
    "codec": "codec=int8,fp32", "executor": "executor=torch:fp32", "device": "device=camera,server",
    "exit": "exit=none (or the names of exit policies)",
}  # fmt: skip
NO_EXIT = "none"
REQUIREMENTS = (*_QUANTITIES, *_LISTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One hard requirement: `limit` (SI; points for accuracy_loss, 1/s for throughput) or the `allowed` names.

    `by`: how a p95 is found; text alone cannot say.
    """

    name: str
    limit: float = math.inf
    allowed: tuple[str, ...] = ()
    by: P95 | None = None

    @staticmethod
    def parse(text: str, p95: P95 | None = None) -> Requirement:
        """Read "name=value"; raises PlannerError naming what is known."""
        name, _, value = (part.strip() for part in text.partition("="))
        if name not in _QUANTITIES and name not in _LISTS:
            known = "; ".join([*(q.example for q in _QUANTITIES.values()), *_LISTS.values()])
            raise PlannerError(f'requirement "{text}": {name or "nothing"!r} is not known; known are {known}')
        if name in _LISTS:
            allowed = tuple(sorted({item.strip() for item in value.split(",") if item.strip()}))
            if allowed:
                return Requirement(name=name, allowed=allowed)
        elif _QUANTITIES[name].unit:
            try:
                limit = parse_quantity(value, _QUANTITIES[name].unit, f'requirement "{text}"')
            except UnitError as error:
                raise PlannerError(str(error)) from None
            if limit >= 0:
                return Requirement(name=name, limit=limit, by=p95 if name == "p95" else None)
        else:
            limit = _number(value.removesuffix("/s") if name == "throughput" else value)
            if limit >= (1 if name == "stages" else 0):
                return Requirement(name=name, limit=limit)
        example = _QUANTITIES[name].example if name in _QUANTITIES else _LISTS[name]
        raise PlannerError(f'requirement "{text}": "{value}" is no value for {name}; write for example {example}')

    def __str__(self) -> str:
        if self.allowed:
            return f"{self.name}={','.join(self.allowed)}"
        return f"{self.name}={shown(self.name, self.limit, is_rate=True)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """All requirements of one call as limits (inf: none) and allowed names (empty: all), the strictest of each."""

    latency_s: float = math.inf
    bottleneck_s: float = math.inf
    energy_joule: float = math.inf
    size_bytes: float = math.inf
    memory_bytes: float = math.inf
    loss_points: float = DEFAULT_LOSS_POINTS
    sure_points: float = math.inf
    error: float = math.inf
    stages: float = math.inf
    server_s: float = math.inf
    money: float = math.inf
    p95_s: float = math.inf
    p95: P95 | None = None
    codecs: tuple[str, ...] = ()
    executors: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    exits: tuple[str, ...] = ()

    @staticmethod
    def of(require: Iterable[Requirement | str], objective: Objective | None = None) -> Asked:
        """Gather requirements; raises PlannerError for one that cannot be read or two lists that exclude each other."""
        found = [Requirement.parse(item) if isinstance(item, str) else item for item in require]
        limits = {n: min((r.limit for r in found if r.name == n), default=math.inf) for n in _QUANTITIES}
        rate = max((r.limit for r in found if r.name == "throughput"), default=0.0)
        names = {n: _common(n, [r.allowed for r in found if r.name == n]) for n in _LISTS}
        said = {r.name for r in found}
        singles = objective.objectives if isinstance(objective, Lexicographic) else (objective,)
        free = "error" in said or any(isinstance(o, AccuracyLoss) for o in singles)
        p95 = next((r.by for r in found if r.name == "p95" and r.by), None)
        p95 = p95 or next((o for o in singles if isinstance(o, P95)), None)
        if "p95" in said and (p95 is None or p95.score_in is None):
            raise PlannerError("requirement p95: needs a simulation; ask ecotone.solve, or give Requirement(by=P95(...))")
        return Asked(
            latency_s=limits["latency"], energy_joule=limits["energy"], size_bytes=limits["bytes"], error=limits["error"],
            memory_bytes=limits["memory"], stages=limits["stages"], server_s=limits["server"], money=limits["money"],
            bottleneck_s=1.0 / rate if rate > 0 else math.inf, p95_s=limits["p95"], p95=p95,
            loss_points=limits["accuracy_loss"] if "accuracy_loss" in said or free else DEFAULT_LOSS_POINTS,
            sure_points=limits["accuracy_loss_sure"] if limits["accuracy_loss_sure"] < ALL_POINTS else math.inf,
            codecs=names["codec"], executors=names["executor"], devices=names["device"], exits=names["exit"],
        )  # fmt: skip

    @property
    def executor_error(self) -> float:
        """The largest error that one stage's executor may have."""
        return self.error if math.isfinite(self.error) else DEFAULT_EXECUTOR_ERROR

    def limit(self, name: str) -> float:
        """The limit on a quantity, inf where there is none; of throughput the bottleneck's."""
        value: float = getattr(self, _FIELDS[name])
        return value

    def with_limit(self, name: str, limit: float) -> Asked:
        """The same where `limit` also holds."""
        change: dict[str, Any] = {_FIELDS[name]: min(self.limit(name), limit)}
        return replace(self, **change)

    def without_limit(self, name: str) -> Asked:
        """The same without a limit on that quantity."""
        change: dict[str, Any] = {_FIELDS[name]: math.inf}
        return replace(self, **change)

    @property
    def limited(self) -> tuple[str, ...]:
        """The quantities that have a limit."""
        return tuple(name for name in _FIELDS if math.isfinite(self.limit(name)))

    def violations(self, cost: PlanCost) -> tuple[str, ...]:
        """Every requirement that `cost` breaks, and by how much (p95 is not of a cost: see solve.broken)."""
        rows = ((q.name, q.of(cost), self.limit(q.name)) for q in _QUANTITIES.values() if q.of is not None)
        return tuple(missed(name, value, limit) for name, value, limit in rows if exceeds(value, limit))


_FIELDS = {
    "latency": "latency_s", "p95": "p95_s", "energy": "energy_joule", "bytes": "size_bytes", "memory": "memory_bytes",
    "server": "server_s", "money": "money", "accuracy_loss": "loss_points",
    "accuracy_loss_sure": "sure_points", "error": "error", "stages": "stages",
    "throughput": "bottleneck_s",
}  # fmt: skip


def exceeds(value: float, limit: float) -> bool:
    """Above the limit by more than rounding."""
    return value > limit + abs(limit) * SLACK + 1e-15


def quantity(name: str, cost: PlanCost) -> float:
    """A quantity of a cost by name (see Requirement); raises PlannerError for one that is not of a cost."""
    found = _QUANTITIES.get(name)
    if found is None or found.of is None:
        raise PlannerError(f"{name}: is not a quantity of a plan's cost")
    return found.of(cost)


def missed(name: str, value: float, limit: float) -> str:
    """One line: which requirement fails, with what was reached beside what was asked. Throughput takes bottlenecks."""
    if name == "throughput":
        value, limit = 1.0 / value if value else math.inf, 1.0 / limit
    by = abs(value / limit - 1) * 100 if limit and math.isfinite(value) else math.inf
    side = "below" if name == "throughput" else "above"
    amount = f" ({by:.3g} % {side} it)" if math.isfinite(by) else ""
    asked, best = (shown(name, v, is_rate=True) for v in (limit, value))
    return f"{name}={asked} fails: the best is {best}{amount}"


def shown(name: str, value: float, *, is_rate: bool = False) -> str:
    """A quantity for people; throughput as a rate, from the bottleneck's seconds unless it `is_rate` already."""
    if name == "throughput":
        return f"{value if is_rate else 1.0 / value if value else math.inf:.4g}/s"
    unit = _QUANTITIES[name].unit if name in _QUANTITIES else ""
    return format_quantity(value, unit) if unit else f"{value:.4g}"


def alone_percentile_s(cost: PlanCost) -> float:
    """The 95th percentile of latency of requests that come one at a time, from the shares that leave at each exit."""
    elapsed, ends = 0.0, []
    exits = iter([t for t in cost.exit_transfers if t.share > 0])
    for stage, transfer in zip(cost.stages, cost.transfers, strict=False):
        elapsed += transfer.total_s + stage.compute_s
        if stage.leaves > 0:
            ends.append((elapsed + next(exits).total_s, stage.leaves))
    rest = 1.0 - sum(share for _, share in ends)
    ends.append((elapsed + cost.transfers[-1].total_s, rest))
    left = 1.0
    for seconds, share in sorted(ends):
        left -= share
        if left <= TAIL + SLACK:
            return seconds
    return max(ends)[0]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return -math.inf
    return value if math.isfinite(value) else -math.inf


def _common(name: str, lists: list[tuple[str, ...]]) -> tuple[str, ...]:
    if not lists:
        return ()
    common = set(lists[0]).intersection(*lists[1:])
    if not common:
        raise PlannerError(f"requirements on {name} exclude each other: {' and '.join(','.join(i) for i in lists)}")
    return tuple(sorted(common))
