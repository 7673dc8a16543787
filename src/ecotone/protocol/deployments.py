"""The plan sets of a session: what is being deployed, in force or draining, on which nodes, and what can run now. Pure.

Theory of operation. A set is several plans with an epoch each, deployed together: Deploy to every node of each -> Want
(content, sent as background bodies) or Ready. Once its *primary* is ready everywhere the set is in force, whatever became of
the standbys; one that is ready later joins, one that fails is left out. Where nothing else can run and the primary lacks
nodes that are away, a ready standby is enough. The old set then drains, and each of its epochs is retired when no run is
left: make before break. A failed primary leaves the old set in force. A pause (memory does not hold both) is the other
order: drain, retire, deploy; where that fails no set is in force until the next is asked for.

An epoch is *usable* while all its nodes are ready, none is down (lost by its link, or silent when pinged) and none told
that it lost the next one (it says Ready again when that is over). New requests go to the first usable epoch in the order of
preference that is not *in doubt*. All here is O(plans of a set) per change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ecotone.cluster import DeviceId
from ecotone.plan import Plan
from ecotone.planset import shared_edge
from ecotone.protocol.effects import CancelTimer, DeployEnded, OpenBlob, SetTimer
from ecotone.protocol.events import DeployRequested, Resident
from ecotone.protocol.message import BLOB_EDGE, Blob, BodyId, Deploy, NodeId, Retire, StagePart, Want
from ecotone.protocol.notices import Item, Post, Transmit
from ecotone.protocol.settings import CoordinatorSettings

__all__ = ["Deployment", "Deployments"]

_LATENCIES = 32
_FIRST_DOUBT, _LAST_DOUBT = 0.2, 64.0  # of node_timeout_s, and how often that at most


@dataclass(slots=True)
class Deployment:
    """One epoch. `running`: numbers of its runs that may still end, or whose result waits for its turn."""

    plan: Plan
    plan_json: str
    parts: tuple[StagePart, ...]
    nodes: tuple[NodeId, ...]
    not_ready: set[NodeId]
    is_active: bool = False
    expected_s: float = 0.0
    told_s: float = 0.0  # what a controller expects as things are now
    boundary_bytes: int = 0
    loads: dict[NodeId, float] = field(default_factory=dict)  # declared shares of processors
    down: set[NodeId] = field(default_factory=set)
    gaps: dict[NodeId, str] = field(default_factory=dict)  # nodes that lost the next one, and what they said
    running: set[int] = field(default_factory=set)
    is_told: bool = False  # the asker knows that it is ready
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))
    doubt_s: float = 0.0  # for how long it was doubted last
    doubted_until_s: float = 0.0
    num_lost: int = 0  # times that one of its nodes went since the last result

    @property
    def is_usable(self) -> bool:
        return not self.not_ready and not self.down and not self.gaps

    @property
    def last_edges(self) -> range:
        """The edges that a result can come over."""
        return range(len(self.plan.stages), len(self.plan.transfers) + len(self.plan.exit_transfers))


class Deployments:
    """`order`: epochs of the set in force, preferred first; `pending`: of the one being deployed, its primary first."""

    def __init__(self, name: NodeId, settings: CoordinatorSettings) -> None:
        self.name, self.settings = name, settings
        self.order: list[int] = []
        self.pending: list[int] = []
        self.down: set[NodeId] = set()
        self.told: set[NodeId] = set()  # nodes that know of the session
        self._all: dict[int, Deployment] = {}  # ascending
        self._draining: set[int] = set()
        self._held: DeployRequested | None = None  # waits for the old set to drain
        self._newest = -1
        self._wish: int | None = None  # preferred epoch of the pending set
        self._shared: dict[int, tuple[int, ...]] = {}
        self._seen = {name}  # nodes that were connected at any time
        self._grace_s = 0.0  # until then the primary of the first set is waited for

    def __getitem__(self, epoch: int) -> Deployment:
        return self._all[epoch]

    def get(self, epoch: int) -> Deployment | None:
        return self._all.get(epoch)

    def has(self, epoch: int, node: NodeId) -> bool:
        """Whether the node takes part in this epoch."""
        return epoch in self._all and node in self._all[epoch].nodes

    def usable(self, epoch: int) -> bool:
        """Whether a request could run under this epoch now."""
        deployment = self._all.get(epoch)
        return deployment is not None and deployment.is_usable

    def usable_epochs(self, now_s: float) -> list[int]:
        """Epochs of the set that could run, preferred first; those in doubt (see `doubt`) last."""
        found = [epoch for epoch in self.order if self._all[epoch].is_usable]
        return sorted(found, key=lambda epoch: self._all[epoch].doubted_until_s > now_s)

    def target(self, now_s: float) -> int | None:
        """The epoch that new requests go to."""
        return next(iter(self.usable_epochs(now_s)), None)

    def doubt(self, epoch: int, now_s: float) -> None:
        """Requests failed or were overtaken under this epoch: use others for a while, twice as long each time."""
        deployment = self._all.get(epoch)
        if deployment is not None and deployment.doubted_until_s <= now_s:
            first_s = self.settings.node_timeout_s * _FIRST_DOUBT
            deployment.doubt_s = min(max(2 * deployment.doubt_s, first_s), _LAST_DOUBT * first_s)
            deployment.doubted_until_s = now_s + deployment.doubt_s

    def trust(self, epoch: int) -> None:
        """A result came under this epoch, or it was asked for."""
        deployment = self._all.get(epoch)
        if deployment is not None:
            deployment.doubt_s = deployment.doubted_until_s = 0.0
            deployment.num_lost = 0

    @property
    def is_held(self) -> bool:
        """The next set waits until the one in force is drained."""
        return self._held is not None

    @property
    def is_changing(self) -> bool:
        return self._held is not None or bool(self.pending)

    @property
    def missing(self) -> str:
        """For want of what no plan of the set can run."""
        plans = [self._all[epoch] for epoch in self.order]
        nodes = ", ".join(sorted({node for d in plans for node in (*d.down, *d.not_ready)}))
        told = sorted({reason for d in plans for reason in d.gaps.values()})
        reasons = [f"{nodes} cannot be reached or is not ready"] if nodes or not told else []
        return f"{'; '.join((*reasons, *told))}, and no plan goes without"

    def twins_of(self, target: int) -> list[int]:
        """Usable epochs under which a request runs beside `target`."""
        return [epoch for epoch in self.order if epoch != target and self._all[epoch].is_active and self.usable(epoch)]

    def over(self, peer: NodeId) -> list[Deployment]:
        """Deployments that need this node."""
        return [d for d in self._all.values() if peer in d.nodes]

    def edges_to_keep(self, epoch: int) -> tuple[int, ...]:
        """Edges of this plan from which another plan of the set could go on."""
        found = self._shared.get(epoch)
        if found is None:
            plan = self._all[epoch].plan
            shared = {shared_edge(plan, self._all[other].plan) for other in self.order if other != epoch}
            found = self._shared[epoch] = tuple(sorted(e for e in shared if 0 < e < len(plan.stages)))
        return found

    # ---- deploying --------------------------------------------------------------------------------------------------

    def deploy(self, event: DeployRequested, now_s: float) -> list[Item]:
        """Bring a set into force beside the present one; ends with DeployEnded of its primary's epoch."""
        residents = _residents(event)
        error = self._violation(residents)
        if error:
            return [DeployEnded(epoch=event.plan.epoch, error=error)]
        items = self.abandon("superseded by a newer plan")
        self._newest, self._wish = residents[-1].plan.epoch, None
        if event.pause and self.order:
            self._held = event
            return items + self._check_held()
        return items + self._begin(residents, now_s)

    def _check_held(self) -> list[Item]:
        """The old set is not retired for one that cannot come into force."""
        assert self._held is not None
        away = self.down.intersection(_nodes(self._held.plan))
        return self.abandon(f"{', '.join(sorted(away))} cannot be reached; the old plan stays") if away else []

    def abandon(self, reason: str) -> list[Item]:
        """Give up what is being deployed."""
        held, self._held = self._held, None
        items: list[Item] = [] if held is None else [DeployEnded(epoch=held.plan.epoch, error=reason)]
        return items + (self._fail_set(reason) if self.pending else [])

    def resume(self, now_s: float) -> list[Item]:
        """The old set is drained: retire it and deploy the one that waits for its memory."""
        items = self._check_held()
        held, self._held = self._held, None
        if held is None:
            return items
        self._draining.update(self.order)
        self.order = []
        return self.retire_drained(even_running=True) + self._begin(_residents(held), now_s)

    def _violation(self, residents: list[Resident]) -> str:
        newest = self._newest
        for resident in residents:
            plan = resident.plan
            if plan.epoch <= newest:
                return f"epoch {plan.epoch} is not above {newest}, the newest so far"
            if plan.source != DeviceId(self.name):
                return f"the plan's source is {plan.source}, the asker is {self.name}"
            newest = plan.epoch
        return ""

    def _begin(self, residents: list[Resident], now_s: float) -> list[Item]:
        items: list[Item] = []
        for resident in residents:
            plan = resident.plan
            nodes = _nodes(plan)
            deployment = self._all[plan.epoch] = Deployment(
                plan=plan,
                plan_json=plan.to_json(),
                parts=resident.parts,
                nodes=nodes,
                not_ready=set(nodes),
                is_active=resident.is_active,
                expected_s=resident.expected_s,
                boundary_bytes=resident.boundary_bytes,
                loads=dict(resident.loads),
                down=self.down.intersection(nodes),
            )
            self.pending.append(plan.epoch)
            self.told.update(nodes)
            items.append(SetTimer(timer=("deploy", plan.epoch), at_s=now_s + self.settings.deploy_timeout_s))
            items += [self._deploy_to(node, deployment) for node in nodes]
        for node in sorted(n for n in self._all[self.pending[0]].nodes if self._is_away(n)):
            items.append(SetTimer(timer=("node", node), at_s=now_s + self.settings.node_timeout_s))
        if len(self.pending) > 1 and not self.usable_epochs(now_s):
            self._grace_s = now_s + self.settings.suspect_after_s + self.settings.pong_timeout_s
            items.append(SetTimer(timer=("standby", self.pending[0]), at_s=self._grace_s))
        return items

    def _deploy_to(self, node: NodeId, deployment: Deployment) -> Post:
        plan = deployment.plan
        parts = tuple(p for p in deployment.parts if plan.stages[p.stage].device == DeviceId(node))
        text, session = deployment.plan_json, self.settings.session
        load, weight = deployment.loads.get(node, 0.0), self.settings.weight
        deploy = Deploy(session=session, epoch=plan.epoch, plan_json=text, parts=parts, weight=weight, load=load)
        return Post(node, deploy)

    def ready(self, peer: NodeId, epoch: int) -> list[Item]:
        """`peer` has loaded its part of the epoch."""
        deployment = self._all[epoch]
        deployment.not_ready.discard(peer)
        deployment.gaps.pop(peer, None)
        if deployment.not_ready:
            return []
        if self.pending and epoch == self.pending[0]:
            return self._come_into_force()
        return self._tell_ready(epoch) if epoch in self.order else []

    def without_primary(self, now_s: float, is_wanted: bool) -> list[Item]:
        """Nothing can run, and the primary of the pending set lacks nodes: a ready standby does meanwhile.

        At once where these are away; where they load, or do not hear us, only after a while, and if requests wait.
        """
        if now_s < self._grace_s or not self.pending or self.usable_epochs(now_s):
            return []
        primary = self._all[self.pending[0]]
        if not any(self._all[epoch].is_usable for epoch in self.pending):
            return []
        if not all(self._is_away(node) for node in primary.not_ready):
            late_s = self._grace_s + self.settings.node_timeout_s * _FIRST_DOUBT
            if now_s < late_s and is_wanted:
                return [SetTimer(timer=("standby", self.pending[0]), at_s=late_s)]
            if not is_wanted:
                return []
        return self._come_into_force()

    def _is_away(self, peer: NodeId) -> bool:
        return peer in self.down or peer not in self._seen

    def seen(self, peer: NodeId) -> None:
        """The wire reaches this node, or did."""
        self._seen.add(peer)

    def _come_into_force(self) -> list[Item]:
        self._draining.update(self.order)
        self.order, self.pending, self._shared = self.pending, [], {}
        primary, standbys = self.order[0], self.order[1:]
        items = self._tell_ready(primary)
        if self._wish in self.order:
            self.prefer(self._wish)
        for epoch in standbys:
            if not self._all[epoch].not_ready:
                items += self._tell_ready(epoch)
        return items

    def _tell_ready(self, epoch: int) -> list[Item]:
        if self._all[epoch].is_told:
            return []
        self._all[epoch].is_told = True
        return [CancelTimer(timer=("deploy", epoch)), CancelTimer(timer=("standby", epoch)), DeployEnded(epoch=epoch)]

    def failed(self, peer: NodeId, epoch: int, reason: str) -> list[Item]:
        """`peer` cannot take part: a pending primary ends its set while another is in force; else its plan is left out."""
        deployment = self._all.get(epoch)
        if deployment is None:
            return []
        deployment.not_ready.add(peer)
        if self.pending and epoch == self.pending[0]:
            alone = self.order or len(self.pending) == 1
            return self._fail_set(reason) if alone else self._go_on_without(epoch, reason)
        if epoch in self.pending:
            self.pending.remove(epoch)
        elif epoch in self.order and len(self.order) > 1:
            self.order.remove(epoch)
        else:
            return []
        self._shared = {}
        self._draining.add(epoch)
        return [CancelTimer(timer=("deploy", epoch)), DeployEnded(epoch=epoch, error=reason)]

    def _fail_set(self, reason: str) -> list[Item]:
        failed, self.pending = self.pending, []
        items: list[Item] = [CancelTimer(timer=("deploy", epoch)) for epoch in failed]
        items.append(CancelTimer(timer=("standby", failed[0])))
        items.append(DeployEnded(epoch=failed[0], error=reason))
        self._draining.update(failed)
        return items + self.retire_drained()

    def _go_on_without(self, epoch: int, reason: str) -> list[Item]:
        """Nothing else is in force (an asker that came back): the next of the set takes the place of its primary."""
        self.pending.remove(epoch)
        self._draining.add(epoch)
        ended = [CancelTimer(timer=("deploy", epoch)), CancelTimer(timer=("standby", epoch))]
        items: list[Item] = [*ended, DeployEnded(epoch=epoch, error=reason)]
        return items if self._all[self.pending[0]].not_ready else items + self._come_into_force()

    def late(self, epoch: int) -> list[Item]:
        """The time for deploying this epoch is over."""
        deployment = self._all.get(epoch)
        if deployment is None or not deployment.not_ready or deployment.is_told:
            return []
        silent = ", ".join(sorted(deployment.not_ready))
        reason = f"{silent} not ready after {self.settings.deploy_timeout_s:g} s"
        if self.pending and epoch == self.pending[0]:
            return self._fail_set(reason)
        return [DeployEnded(epoch=epoch, error=f"{reason}; it joins when it is")]

    def unreachable(self, peer: NodeId) -> list[Item]:
        """`peer` was down for `node_timeout_s`: the set that needs it for its primary is given up."""
        if not self.pending or peer not in self._all[self.pending[0]].nodes or not self._is_away(peer):
            return []
        return self._fail_set(f"{peer} cannot be reached for {self.settings.node_timeout_s:g} s")

    def send_blobs(self, peer: NodeId, want: Want) -> list[Item]:
        """Content that a node lacks, as background bodies."""
        parts = self._all[want.epoch].parts
        known: dict[str, Blob] = {blob.sha256: blob for part in parts for blob in (part.program, *part.weights)}
        items: list[Item] = []
        for range_ in want.blobs:
            blob = known.get(range_.sha256)
            if blob is None or not 0 <= range_.offset < blob.size_bytes or peer == self.name:
                reason = f"{peer} asks for content {range_.sha256:.12}, which is not to be had"
                return self.failed(peer, want.epoch, reason)
            body = BodyId(want.session, want.epoch, BLOB_EDGE, range_.number)
            items.append(OpenBlob(body=body, blob=blob, offset=range_.offset))
            items.append(Transmit(peer, body, blob.size_bytes - range_.offset, background=True))
        return items

    # ---- change -----------------------------------------------------------------------------------------------------

    def prefer(self, epoch: int) -> None:
        """Put an epoch of the set first; one of the set being deployed as soon as that is in force."""
        if epoch in self.order:
            self.trust(epoch)
            self.order.remove(epoch)
            self.order.insert(0, epoch)
        elif epoch in self.pending:
            self._wish = epoch

    def expect(self, epoch: int, expected_s: float) -> None:
        """What a run should take as things are now, from who knows better than the runs of late."""
        if epoch in self._all and expected_s > 0:
            self._all[epoch].told_s = expected_s

    def set_down(self, peer: NodeId, is_down: bool, now_s: float) -> list[Item]:
        """`peer` does not answer, or does again."""
        items: list[Item] = []
        if is_down:
            self.down.add(peer)
            if self.pending and peer in self._all[self.pending[0]].nodes:
                items.append(SetTimer(timer=("node", peer), at_s=now_s + self.settings.node_timeout_s))
        else:
            self.down.discard(peer)
            items.append(CancelTimer(timer=("node", peer)))
        for deployment in self.over(peer):
            if not is_down:
                deployment.down.discard(peer)
            elif peer not in deployment.down:
                deployment.down.add(peer)
                deployment.num_lost += 1
                if deployment.num_lost > 1:  # nodes come and go, and nothing came of it
                    self.doubt(deployment.plan.epoch, now_s)
        return items

    def restarted(self, peer: NodeId) -> list[Item]:
        """`peer` lost its memory: it gets its part of each plan again, but of those that drain."""
        items: list[Item] = []
        for epoch, deployment in self._all.items():
            if peer in deployment.nodes:
                deployment.not_ready.add(peer)
                if epoch not in self._draining:
                    items.append(self._deploy_to(peer, deployment))
        return items

    def lapsed(self, peer: NodeId, epoch: int) -> list[Item]:
        """`peer` was ready for this epoch and has dropped it, since it did not hear of us for long: it gets it again."""
        deployment = self._all[epoch]
        deployment.not_ready.add(peer)
        return [] if epoch in self._draining else [self._deploy_to(peer, deployment)]

    def retire_drained(self, even_running: bool = False) -> list[Item]:
        """Epochs that left the set and have no runs go."""
        items: list[Item] = []
        for epoch in sorted(self._draining):
            if even_running or not self._all[epoch].running:
                items += self._retire(epoch)
        return items

    def _retire(self, epoch: int) -> Iterator[Item]:
        self._draining.discard(epoch)
        self._shared.pop(epoch, None)
        retire = Retire(session=self.settings.session, epoch=epoch)
        return iter([Post(node, retire) for node in self._all.pop(epoch).nodes])

    def timers(self) -> list[Item]:
        """CancelTimer of every timer that may be set, at the end of the session."""
        names = ("deploy", "standby")
        deploying: list[Item] = [CancelTimer(timer=(name, epoch)) for epoch in self._all for name in names]
        return deploying + [CancelTimer(timer=("node", node)) for node in sorted(self.down)]


def _nodes(plan: Plan) -> tuple[NodeId, ...]:
    return tuple(dict.fromkeys(NodeId(d) for d in (plan.source, *plan.devices, plan.sink)))


def _residents(event: DeployRequested) -> list[Resident]:
    primary = Resident(
        plan=event.plan, parts=event.parts, expected_s=event.expected_s, boundary_bytes=event.boundary_bytes,
        loads=event.loads,
    )  # fmt: skip
    return [primary, *event.standbys]
