"""Who asks for what, how often, and how much it counts: the users that share a cluster. Data only, TOML or JSON.

A user is one stream of requests from one device: open (so many per second, whatever happens) or closed (so many under way
at once). Plans for all of them together: planner/assignment.py; a simulation of all: simulator/users.py.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ecotone import schema
from ecotone.cluster import Cluster, DeviceId
from ecotone.units import EcotoneError

__all__ = ["Aim", "User", "Workload"]

SCHEMA, VERSION = "ecotone.workload", 1
_SAME = DeviceId("")

Aim = Literal["mean", "worst", "fair"]
"""What a joint plan makes small: the weighted mean of latencies, the worst of them over what the user would have alone, or
(proportional fairness) the weighted mean of their logarithms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """One stream of requests: inputs arise at `source`, results are wanted at `sink` ("": the source).

    Open: `rate_per_s` requests per second, `arrivals` poisson or periodic. Closed: `in_flight` at once. `model` names one
    of the models given beside the workload ("": the only one). `weight` counts in the aim, in shares of nodes and, where not
    all fit, in who is let in; a user with `least_rate_per_s` would rather be slowed down to that than refused.
    `deadline_s`: a request that takes longer fails. `require`: limits of this user's plan, as `ecotone plan --require`.
    """

    name: str
    source: DeviceId
    sink: DeviceId = _SAME
    model: str = ""
    rate_per_s: float = 0.0
    arrivals: Literal["poisson", "periodic"] = "poisson"
    in_flight: int = 0
    weight: float = 1.0
    least_rate_per_s: float = 0.0
    deadline_s: float | None = None
    require: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        schema.check(f"user {self.name}", self._violations())

    def _violations(self) -> Iterator[str]:
        if not self.name:
            yield "has no name"
        rates = (self.rate_per_s, self.least_rate_per_s)
        if not all(math.isfinite(v) and v >= 0 for v in rates) or self.in_flight < 0:
            yield "rates and in_flight must not be negative"
        elif (self.rate_per_s > 0) == (self.in_flight > 0):
            yield 'needs either rate = "5 /s" (an open stream) or in_flight = 1 (the next when one ends)'
        elif self.least_rate_per_s > self.rate_per_s:
            yield f"least_rate {self.least_rate_per_s:g} /s is above its rate {self.rate_per_s:g} /s"
        if not (math.isfinite(self.weight) and self.weight > 0):
            yield f"weight {self.weight} must be above zero"
        if self.deadline_s is not None and not (math.isfinite(self.deadline_s) and self.deadline_s > 0):
            yield f"deadline {self.deadline_s} must be above zero"

    @property
    def ends(self) -> tuple[DeviceId, DeviceId]:
        """Source and sink."""
        return self.source, self.sink or self.source

    @property
    def is_closed(self) -> bool:
        return self.in_flight > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    user: tuple[User, ...]
    name: str = "workload"
    aim: Aim = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """All users, in order, and what their joint plan should make small."""

    name: str
    users: tuple[User, ...]
    aim: Aim = "mean"

    def __post_init__(self) -> None:
        schema.check(f"workload {self.name}", self._violations())

    def _violations(self) -> Iterator[str]:
        if not self.users:
            yield 'has no user; add [[user]] with name, source and rate = "5 /s"'
        names, sources = [u.name for u in self.users], [u.source for u in self.users]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"user {name} is given twice"
        for source in sorted({s for s in sources if sources.count(s) > 1}):
            who = ", ".join(u.name for u in self.users if u.source == source)
            yield f"{who} share the source {source}: one asker runs on a device; give each its own [[device]]"

    def user(self, name: str) -> User:
        """The user called `name`; raises EcotoneError if there is none."""
        for user in self.users:
            if user.name == name:
                return user
        raise EcotoneError(f"workload {self.name}: no user {name!r}; users are {', '.join(u.name for u in self.users)}")

    def check(self, cluster: Cluster, models: tuple[str, ...] = ()) -> None:
        """Raises SchemaError naming every user whose devices are not in `cluster`, or whose model is not among `models`."""
        devices, violations = [d.name for d in cluster.devices], []
        for user in self.users:
            missing = [name for name in dict.fromkeys(user.ends) if name not in devices]
            violations += [f"user {user.name}: no device {name!r} in cluster {cluster.name}" for name in missing]
            if models and user.model not in models and (user.model or len(models) > 1):
                known = ", ".join(models)
                violations.append(f"user {user.name}: model {user.model!r} is not given; models are {known}")
        schema.check(f"workload {self.name}", violations)

    def cluster_for(self, name: str, cluster: Cluster) -> Cluster:
        """The cluster as this user sees it: with its source and sink."""
        source, sink = self.user(name).ends
        return replace(cluster, source=source, sink=sink)

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "workload") -> Workload:
        """Read a workload; raises SchemaError naming every violation."""
        return schema.load_json(Workload, text, SCHEMA, VERSION, where)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Workload:
        """Read a TOML workload file; raises EcotoneError (unreadable) or SchemaError naming every violation.

        Format: `schema = "ecotone.workload"`, `version = 1`, `name`, `aim`, and a `[[user]]` for each User.
        """
        where = f"workload file {path}"
        try:
            document = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise EcotoneError(f"{where}: {error.strerror or error}; give the path of a TOML file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise EcotoneError(f"{where}: not TOML: {error}") from None
        if document.pop("schema", None) != SCHEMA or document.pop("version", None) != VERSION:
            raise schema.SchemaError(where, [f'must begin with schema = "{SCHEMA}" and version = {VERSION}'])
        file = schema.read(_File, document, where)
        try:
            return Workload(name=file.name, users=file.user, aim=file.aim)
        except schema.SchemaError as error:
            raise schema.SchemaError(where, error.violations) from None
