"""Runs of requests: begun under an epoch (from the inputs, or from boundary tensors that an earlier one made), and ended.

A boundary is the tensors of an edge that leaves the stages which several plans of the set share on the source
(planset.shared_edge). The worker tells when it has them (Reached): twins that wait for them begin, and they are kept under a
name of their own until the request has its result, if `held_limit_bytes` allows. O(plans of the set) per run.
"""

from __future__ import annotations

from ecotone.plan import Plan
from ecotone.planset import shared_edge
from ecotone.protocol.deployments import Deployment, Deployments
from ecotone.protocol.effects import Alias, Bind, Held, Release, Rerouted
from ecotone.protocol.message import BodyId, Cancel, run_of
from ecotone.protocol.notices import Begin, Item, Post
from ecotone.protocol.requests import Kept, Request, kept_body
from ecotone.protocol.settings import CoordinatorSettings

__all__ = ["Runs"]


class Runs:
    """`held_bytes`: inputs and boundary tensors kept for requests."""

    def __init__(self, settings: CoordinatorSettings, sets: Deployments) -> None:
        self.settings, self.sets = settings, sets
        self.held_bytes = 0

    def is_live(self, request: Request) -> bool:
        """Whether a run of it can go on: every node of its plan answers."""
        return any(self.sets.usable(epoch) for epoch in request.runs.values())

    def next_plan(self, request: Request, now_s: float) -> int | None:
        """The epoch for another run: not tried, not running; away from nodes that failed, then from those it waits for."""
        live = {epoch for epoch in request.runs.values() if self.sets.usable(epoch)}
        can = [epoch for epoch in self.sets.usable_epochs(now_s) if epoch not in live | request.tried]
        busy = {node for epoch in live for node in self.sets[epoch].nodes}

        def shared(epoch: int) -> tuple[bool, bool, int]:
            nodes = self.sets[epoch].nodes
            return epoch in request.stuck_under, not request.avoid.isdisjoint(nodes), len(busy.intersection(nodes))

        return min(can, key=shared, default=None)  # the first of equals: the order of preference

    def start(
        self,
        number: int,
        request: Request,
        epoch: int,
        now_s: float,
        *,
        why: str = "",
        beside: int | None = None,
        is_awaited: bool = False,
    ) -> list[Item]:
        """Another run; `beside`: the run that computes the stages which both share, and which `is_awaited` then."""
        run = run_of(number, request.num_runs)
        request.num_runs += 1
        request.runs[run] = epoch
        request.begun_s[run] = now_s
        deployment = self.sets[epoch]
        deployment.running.add(run)
        items: list[Item] = [Rerouted(request=number, epoch=epoch, reason=why)] if why else []
        if beside is not None:
            other = self.sets[request.runs[beside]].plan
            edge = shared_edge(other, deployment.plan)
            if edge in self.sets.edges_to_keep(other.epoch):
                request.twins[run] = (beside, edge)
                return items
        return items + self._begin(number, request, run, deployment, is_awaited)

    def reached(self, number: int, request: Request, body: BodyId) -> list[Item]:
        """The tensors of an edge from which another plan could go on are here."""
        if body.request not in request.runs or request.result is not None:
            return []
        items: list[Item] = []
        for run, place in list(request.twins.items()):
            if place == (body.request, body.edge):
                del request.twins[run]
                twin = body._replace(epoch=request.runs[run], request=run)
                items += [Alias(source=body, target=twin), self._told(twin, request)]
        deployment = self.sets[body.epoch]
        known = self._kept_for(request, deployment.plan)
        if known is not None and known.body.edge >= body.edge:
            return items
        if self.held_bytes + deployment.boundary_bytes > self.settings.held_limit_bytes:
            return items
        kept = Kept(deployment.plan, kept_body(body, number), deployment.boundary_bytes)
        request.kept.append(kept)
        self.held_bytes += kept.size_bytes
        return [Alias(source=body, target=kept.body), *items]

    def end(self, number: int, request: Request, run: int) -> list[Item]:
        """This run is over without a result: cancel what is left of it. Twins that waited for it begin by themselves."""
        items = self._cancel(request, run)
        for twin, (source, _) in list(request.twins.items()):
            if source == run:
                del request.twins[twin]
                items += self._begin(number, request, twin, self.sets[request.runs[twin]])
        return items

    def end_all(self, request: Request, but: int | None = None) -> list[Item]:
        """Nothing of the request is needed any more, but the run that has its result."""
        items: list[Item] = []
        for run in [r for r in request.runs if r != but]:
            items += self._cancel(request, run)
        for kept in request.kept:
            items.append(Release(body=kept.body, held=Held.TENSORS))
            self.held_bytes -= kept.size_bytes
        request.kept = []
        return items

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _begin(
        self, number: int, request: Request, run: int, deployment: Deployment, is_awaited: bool = False
    ) -> list[Item]:
        epoch = deployment.plan.epoch
        kept = self._kept_for(request, deployment.plan)
        if kept is None:
            body = BodyId(self.settings.session, epoch, 0, run)
            return [Bind(request=number, body=body), self._told(body, request, is_awaited)]
        body = BodyId(self.settings.session, epoch, kept.body.edge, run)
        return [Alias(source=kept.body, target=body), self._told(body, request)]

    def _told(self, body: BodyId, request: Request, is_awaited: bool = False) -> Begin:
        return Begin(body, request.deadline_s, self.sets.edges_to_keep(body.epoch), is_awaited)

    def _kept_for(self, request: Request, plan: Plan) -> Kept | None:
        """The last kept boundary from which `plan` can go on."""
        found = [k for k in request.kept if shared_edge(k.plan, plan) >= k.body.edge]
        return max(found, key=lambda k: k.body.edge, default=None)

    def _cancel(self, request: Request, run: int) -> list[Item]:
        epoch = request.runs.pop(run)
        request.begun_s.pop(run, None)
        deployment = self.sets.get(epoch)
        if deployment is None:
            return []
        deployment.running.discard(run)
        if run in request.twins:
            del request.twins[run]
            return []  # it has not begun
        cancel = Cancel(session=self.settings.session, epoch=epoch, request=run)
        return [Post(node, cancel) for node in deployment.nodes]
