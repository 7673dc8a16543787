"""The links of a running laboratory as numbers: as the file states them, as verbs changed them, as traces move them.

Pure bookkeeping on a clock that is given: who carries changes out is the supervisor. A trace holds for one direction; a
verb that sets a link takes its trace away. Cuts are kept apart from traces, so a healed link is where its trace is by then.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ecotone.cluster import Cluster
from ecotone.lab.commands import LabError
from ecotone.lab.network import LinkNow, stopped
from ecotone.linktrace import LinkTrace

__all__ = ["Links", "next_step_s"]


class Links:
    """All directed links of `cluster`. Methods return the links that they changed; times are seconds of any steady clock."""

    def __init__(self, cluster: Cluster, traces: Mapping[str, LinkTrace]):
        self._cluster = cluster
        self.now = {(str(k.source), str(k.target)): LinkNow.of(k) for k in cluster.links}
        self._traces: dict[tuple[str, str], tuple[LinkTrace, float]] = {}
        self._wanted = {(str(k.source), str(k.target)): traces[k.trace] for k in cluster.links if k.trace}

    def start(self, time_s: float) -> list[LinkNow]:
        """Begin the traces of the cluster file."""
        for pair, trace in self._wanted.items():
            self._traces[pair] = (trace, time_s)
            self.now[pair] = replace(self.now[pair], trace=trace.name)
        return self.follow(time_s)

    def follow(self, time_s: float) -> list[LinkNow]:
        """Bring traced links to `time_s`."""
        changed = []
        for pair, (trace, start_s) in self._traces.items():
            point, before = trace.at(max(0.0, time_s - start_s)), self.now[pair]
            rate = point.bytes_per_s or before.bytes_per_s
            after = replace(
                before, bytes_per_s=rate, latency_s=point.latency_s, loss=point.loss, is_out=point.bytes_per_s <= 0,
            )  # fmt: skip
            if after != before:
                changed.append(after)
        return self._keep(changed)

    def next_change_s(self, time_s: float) -> float:
        """When `follow` is due again; infinite without traces."""
        return min((next_step_s(trace, start_s, time_s) for trace, start_s in self._traces.values()), default=math.inf)

    def trace(
        self, pairs: Iterable[tuple[str, str]], trace: LinkTrace | None, start_s: float, now_s: float
    ) -> list[LinkNow]:
        """Have links follow `trace` as if it had begun at `start_s`; None: stay as they are now."""
        for pair in pairs:
            self._traces.pop(pair, None)
            link = replace(self.now[pair], trace=trace.name if trace else "", is_out=False)
            self.now[pair] = link
            if trace is not None:
                self._traces[pair] = (trace, start_s)
        self.follow(now_s)
        return list(self.now.values())

    def trace_time_s(self, pair: tuple[str, str], time_s: float) -> float | None:
        """Where in its trace a link is, seconds since it began; None without a trace."""
        found = self._traces.get(pair)
        return None if found is None else time_s - found[1]

    def change(self, pairs: Iterable[tuple[str, str]], values: Mapping[str, float]) -> list[LinkNow]:
        """Set what `values` gives of bytes_per_s, latency_s, jitter_s, loss; raises LabError for what no link can be."""
        check_values(values)
        changed = []
        for pair in pairs:
            self._traces.pop(pair, None)
            before = replace(self.now[pair], trace="", is_out=False)
            after = replace(
                before,
                bytes_per_s=values.get("bytes_per_s", before.bytes_per_s),
                latency_s=values.get("latency_s", before.latency_s),
                jitter_s=values.get("jitter_s", before.jitter_s),
                loss=values.get("loss", before.loss),
            )
            changed.append(stopped(after))
        return self._keep([replace(k, bytes_per_s=k.bytes_per_s or self._stated(k)) for k in changed])

    def cut(self, pairs: Iterable[tuple[str, str]]) -> list[LinkNow]:
        """Let nothing through."""
        return self._keep([replace(self.now[pair], is_cut=True) for pair in pairs])

    def heal(self, pairs: Iterable[tuple[str, str]] | None = None) -> list[LinkNow]:
        """End cuts, of all links where none is named."""
        return self._keep([replace(self.now[pair], is_cut=False) for pair in (pairs if pairs is not None else self.now)])

    def pairs(self, source: str, target: str, *, one_way: bool = False) -> list[tuple[str, str]]:
        """The directed links meant by two names, or by one (all that touch it); raises LabError where there is none."""
        for name in (source, target):
            if name and name not in [device.name for device in self._cluster.devices]:
                known = ", ".join(device.name for device in self._cluster.devices)
                raise LabError(f'no device "{name}"; devices are {known}')
        if not target:
            found = [pair for pair in self.now if source == pair[0] or (source == pair[1] and not one_way)]
        else:
            wanted = [(source, target)] + ([] if one_way else [(target, source)])
            found = [pair for pair in wanted if pair in self.now]
        if not found:
            known = ", ".join(f"{a}>{b}" for a, b in self.now)
            raise LabError(f"no link {source}>{target or '*'} in cluster {self._cluster.name}; links are {known}")
        return found

    def _stated(self, link: LinkNow) -> float:
        """The rate that the cluster file gives, for a link that was set to none."""
        return next(
            k.bandwidth_bytes_per_s for k in self._cluster.links if (k.source, k.target) == (link.source, link.target)
        )

    def _keep(self, changed: list[LinkNow]) -> list[LinkNow]:
        for link in changed:
            self.now[link.source, link.target] = link
        return changed


def next_step_s(trace: LinkTrace, start_s: float, now_s: float) -> float:
    """When the step of `trace` after `now_s` begins, on the clock of both."""
    passed = max(0.0, now_s - start_s)
    rounds, inside = divmod(passed, trace.duration_s)
    index = bisect.bisect_right(trace.points, inside, key=lambda point: point.time_s)
    following = trace.points[index].time_s if index < len(trace.points) else trace.duration_s
    return start_s + rounds * trace.duration_s + following


def check_values(values: Mapping[str, float]) -> None:
    """Raise LabError for a rate, latency, jitter or loss that no link can have; a rate of 0 is an outage."""
    for name, value in values.items():
        if name not in ("bytes_per_s", "latency_s", "jitter_s", "loss"):
            raise LabError(f"a link has no {name}; give rate, latency, jitter or loss")
        if not (math.isfinite(value) and value >= 0) or (name == "loss" and value >= 1):
            limit = "in [0, 1)" if name == "loss" else "finite and not negative"
            raise LabError(f"{name} of a link is {value}; it must be {limit}")
