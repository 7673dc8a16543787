"""The policy that knows the trace: what a perfect predictor of the links could get from the same resident plans.

Before each request it plays every plan on the trace from now on (profiled seconds, transfers at the rates that will hold)
and takes the one that ends first. Greedy, so with requests that queue up it is not a bound in theory; ending each request as
early as possible is all that a plan chooser can do for the next one. Its clock must be that of the trace.
"""

from __future__ import annotations

from collections.abc import Mapping

from ecotone.cluster import Cluster, DeviceId
from ecotone.cost import CostModel, PlanCost, TransferCost
from ecotone.graph import Graph
from ecotone.linktrace import LinkTrace
from ecotone.profile import Profile
from ecotone.protocol.controller import Decision, Keep, Planned, Seen, Switch, Tick
from ecotone.simulator.channel import sent_at

__all__ = ["Oracle", "played_s"]

Traces = Mapping[tuple[DeviceId, DeviceId], LinkTrace]


def played_s(cost: PlanCost, traces: Traces, start_s: float) -> float:
    """When a request that begins at `start_s` of the traces ends, in the mean; links without one are as in `cost`."""
    now_s, mean_s, exits = start_s, 0.0, iter(cost.exit_transfers)
    for stage, transfer in zip(cost.stages, cost.transfers, strict=False):
        now_s = _crossed_s(transfer, traces, now_s) + stage.compute_s
        if stage.exit:
            mean_s += stage.leaves * _crossed_s(next(exits), traces, now_s)
    return mean_s + cost.transfers[-1].share * _crossed_s(cost.transfers[-1], traces, now_s)


def _crossed_s(transfer: TransferCost, traces: Traces, now_s: float) -> float:
    """When what is to cross from `now_s` on is at the other side."""
    trace = traces.get((transfer.source, transfer.target))
    now_s += transfer.encode_s
    if trace is None or transfer.source == transfer.target:
        now_s += transfer.send_s + transfer.latency_s
    else:
        now_s = sent_at(trace, transfer.size_bytes, now_s)
        now_s += trace.at(now_s).latency_s
    return now_s + transfer.decode_s


class Oracle:
    """Chooses by `traces` of directed links; `now_s` of handle must be the traces' time."""

    name = "oracle"

    def __init__(self, graph: Graph, cluster: Cluster, profile: Profile, traces: Traces) -> None:
        self._model, self._traces = CostModel(graph, cluster, profile), dict(traces)
        self._costs: dict[int, PlanCost] = {}
        self.asked = 0

    def handle(self, event: Seen, now_s: float) -> tuple[Decision, ...]:
        """A decision at each tick."""
        if isinstance(event, Planned):
            self._costs = {plan.epoch: self._model.predict(plan) for plan in event.plans.plans}
            self.asked = event.plans.primary.epoch
        if not isinstance(event, Tick) or not self._costs:
            return ()
        best = min(self._costs, key=lambda epoch: (played_s(self._costs[epoch], self._traces, now_s), epoch))
        if best == self.asked:
            return (Keep(reason="it ends first"),)
        self.asked = best
        return (Switch(epoch=best, reason="it ends first on the trace"),)

    def explanation(self) -> tuple[str, ...]:
        return (f"plan {self.asked}: ends first on the trace",)
