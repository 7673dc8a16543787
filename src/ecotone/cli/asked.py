"""What the command line asks of a plan, as values: objectives, requirements, and how requests come (for a p95)."""

from __future__ import annotations

from collections.abc import Sequence

from ecotone.cluster import Cluster
from ecotone.planner import Objective, PlannerError, Requirement
from ecotone.planner import parse_objective as read_objective
from ecotone.simulator import Arrivals, ClosedLoop, Periodic, Poisson
from ecotone.simulator.score import percentile
from ecotone.units import EcotoneError

__all__ = ["check_asked", "check_movable", "parse_arrivals", "parse_objective", "parse_require"]

MOVABLE = ("latency", "throughput")


def parse_objective(text: str, arrivals: str = "") -> Objective:
    """ "latency", "server,latency", ...; a p95 is simulated under `arrivals` (one at a time where nothing is said)."""
    return read_objective(text, percentile(parse_arrivals(arrivals or "closed:1")))


def parse_require(require: Sequence[str], arrivals: str = "") -> tuple[Requirement, ...]:
    """Requirements from text; a p95 is simulated under `arrivals`."""
    p95 = percentile(parse_arrivals(arrivals or "closed:1"))
    return tuple(Requirement.parse(text, p95) for text in require)


def parse_arrivals(text: str) -> Arrivals:
    """ "closed:4", "periodic:20/s" or "poisson:20/s"; raises EcotoneError for anything else."""
    kind, _, value = text.partition(":")
    number = value.removesuffix("/s")
    try:
        amount = float(number)
    except ValueError:
        amount = -1.0
    if kind == "closed" and amount >= 1 and amount == int(amount) and number == value:
        return ClosedLoop(in_flight=int(amount))
    if kind in ("periodic", "poisson") and 0 < amount < 1e9 and number != value:
        return Periodic(period_s=1 / amount) if kind == "periodic" else Poisson(rate_per_s=amount)
    raise EcotoneError(f'--arrivals "{text}" is not understood; write closed:4, periodic:20/s or poisson:20/s')


def check_asked(objective: str, require: Sequence[str], cluster: Cluster, arrivals: str = "") -> None:
    """Refuse what cannot be understood before anything is measured; raises EcotoneError naming it."""
    parse_objective(objective, arrivals)
    parse_require(require, arrivals)
    for text in require:
        name, _, value = text.partition("=")
        if name.strip() == "device":
            for device in value.split(","):
                cluster.device(device.strip())


def check_movable(objective: str) -> None:
    """Refuse to move the cut at run time under an objective that the controller does not see."""
    if objective not in MOVABLE:
        raise PlannerError(f"--adapt moves the cut by latency or throughput, not by {objective}; leave --adapt out")
