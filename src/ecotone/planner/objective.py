"""What the user asks for: an objective, and requirements read from text such as "latency=50ms".

Objectives are never mixed: latency is the sum along the path of one request, throughput is one over the busiest device
or link. Requirements are hard: a plan that breaks one is no answer. Accuracy is bounded even where nobody asks: by
DEFAULT_LOSS_POINTS of changed decisions, and DEFAULT_EXECUTOR_ERROR for an executor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ecotone.cost import PlanCost
from ecotone.units import EcotoneError, UnitError, format_quantity, parse_quantity

__all__ = ["Asked", "Latency", "Objective", "PlannerError", "Requirement", "Throughput"]

DEFAULT_LOSS_POINTS = 1.0
DEFAULT_EXECUTOR_ERROR = 0.2
# Sums of floats in another order differ in their last digits; a budget is not broken by that.
SLACK = 1e-9

_QUANTITIES = {"latency": "s", "energy": "joule", "bytes": "bytes", "memory": "bytes"}
_NUMBERS = ("throughput", "accuracy_loss", "accuracy_loss_sure", "error", "stages")
_LISTS = ("codec", "executor", "device")
_EXAMPLES = {
    "latency": "latency=50ms", "energy": "energy=2J", "bytes": "bytes=100kB", "memory": "memory=2GB",
    "throughput": "throughput=20/s", "accuracy_loss": "accuracy_loss=0.5 (points)",
    "accuracy_loss_sure": "accuracy_loss_sure=0.5 (upper end of the interval)", "error": "error=0.05",
    "stages": "stages=3", "codec": "codec=int8,fp32", "executor": "executor=torch:fp32", "device": "device=camera,server",
}  # fmt: skip


class PlannerError(EcotoneError):
    """No plan keeps what was asked, or what was asked cannot be read."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Least seconds from input at the source to result at the sink, one request alone; devices may be revisited."""

    name: str = "latency"

    def value(self, cost: PlanCost) -> float:
        return cost.latency_s


@dataclass(frozen=True, slots=True)
class Throughput:
    """Least bottleneck, so most requests per second in a stream; each device computes at most one stage."""

    name: str = "throughput"

    def value(self, cost: PlanCost) -> float:
        return cost.bottleneck_s


Objective = Latency | Throughput


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One hard requirement: `limit` (SI; points for accuracy_loss, 1/s for throughput) or the `allowed` names."""

    name: str
    limit: float = math.inf
    allowed: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> Requirement:
        """Read "name=value"; raises PlannerError naming what is known."""
        name, _, value = (part.strip() for part in text.partition("="))
        if name not in _EXAMPLES:
            known = "; ".join(_EXAMPLES.values())
            raise PlannerError(f'requirement "{text}": {name or "nothing"!r} is not known; known are {known}')
        if name in _LISTS:
            allowed = tuple(sorted({item.strip() for item in value.split(",") if item.strip()}))
            if allowed:
                return Requirement(name=name, allowed=allowed)
        elif name in _QUANTITIES:
            try:
                limit = parse_quantity(value, _QUANTITIES[name], f'requirement "{text}"')
            except UnitError as error:
                raise PlannerError(str(error)) from None
            if limit >= 0:
                return Requirement(name=name, limit=limit)
        else:
            limit = _number(value.removesuffix("/s") if name == "throughput" else value)
            if limit >= (1 if name == "stages" else 0):
                return Requirement(name=name, limit=limit)
        raise PlannerError(f'requirement "{text}": "{value}" is no value for {name}; write for example {_EXAMPLES[name]}')

    def __str__(self) -> str:
        if self.allowed:
            return f"{self.name}={','.join(self.allowed)}"
        return f"{self.name}={_shown(self.name, self.limit)}"


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
    stage_error: float = math.inf
    stages: float = math.inf
    codecs: tuple[str, ...] = ()
    executors: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    @staticmethod
    def of(require: Iterable[Requirement | str]) -> Asked:
        """Gather requirements; raises PlannerError for one that cannot be read or two lists that exclude each other."""
        found = [Requirement.parse(item) if isinstance(item, str) else item for item in require]
        least = {n: min((r.limit for r in found if r.name == n), default=math.inf) for n in _EXAMPLES}
        rate = max((r.limit for r in found if r.name == "throughput"), default=0.0)
        names = {n: _common(n, [r.allowed for r in found if r.name == n]) for n in _LISTS}
        said = {r.name for r in found}
        unsaid = math.inf if "error" in said else DEFAULT_LOSS_POINTS
        return Asked(
            latency_s=least["latency"], energy_joule=least["energy"], size_bytes=least["bytes"], error=least["error"],
            memory_bytes=least["memory"], stages=least["stages"], bottleneck_s=1.0 / rate if rate > 0 else math.inf,
            loss_points=least["accuracy_loss"] if "accuracy_loss" in said else unsaid,
            sure_points=least["accuracy_loss_sure"],
            codecs=names["codec"], executors=names["executor"], devices=names["device"],
        )  # fmt: skip

    @property
    def executor_error(self) -> float:
        """The largest error that one stage's executor may have."""
        return min(self.error if math.isfinite(self.error) else DEFAULT_EXECUTOR_ERROR, self.stage_error)

    def violations(self, cost: PlanCost) -> tuple[str, ...]:
        """Every requirement that `cost` breaks, and by how much."""
        memory = max((d.memory_bytes for d in cost.devices), default=0)
        rows = (
            ("latency", cost.latency_s, self.latency_s), ("energy", cost.energy_joule, self.energy_joule),
            ("bytes", cost.size_bytes, self.size_bytes), ("memory", memory, self.memory_bytes),
            ("accuracy_loss", cost.accuracy_loss_points, self.loss_points),
            ("accuracy_loss_sure", cost.sure_points, self.sure_points), ("error", cost.relative_error, self.error),
            ("stages", len(cost.stages), self.stages), ("throughput", cost.bottleneck_s, self.bottleneck_s),
        )  # fmt: skip
        return tuple(missed(name, value, limit) for name, value, limit in rows if value > limit * (1 + SLACK) + 1e-15)


def missed(name: str, value: float, limit: float) -> str:
    """One line: which requirement fails, with what was reached beside what was asked. Throughput takes bottlenecks."""
    if name == "throughput":
        value, limit = 1.0 / value if value else math.inf, 1.0 / limit
    by = abs(value / limit - 1) * 100 if limit and math.isfinite(value) else math.inf
    side = "below" if name == "throughput" else "above"
    amount = f" ({by:.3g} % {side} it)" if math.isfinite(by) else ""
    return f"{name}={_shown(name, limit)} fails: the best is {_shown(name, value)}{amount}"


def _shown(name: str, value: float) -> str:
    if name in _QUANTITIES:
        return format_quantity(value, _QUANTITIES[name])
    return f"{value:.4g}" + ("/s" if name == "throughput" else "")


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
