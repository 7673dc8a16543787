"""What users do to one another on shared devices, links, wires and radio channels: utilisation, waiting, latency.

Legend: u, v users; r a resource (processor or coder of a device, link); lambda requests per second; a visit of u to r has
probability p (cost.py's shares), s seconds of service; rho = lambda p s; n requests under way of a closed user; e seconds
that the request in service still needs when another comes: s / 2, for closed users nearing s as r fills up.

 (1) rho_r    = sum over visits of rho;   stable where every rho_r < 1 (open users; closed ones slow down instead) and, at a
     fair node, each open user's rho is below its room beside closed ones (sharing.py, 6), whose demand is n p s / T alone
 (2) W_ur     = (X_r - k_u rho_u e_u) / (1 + k_u rho_u)  open,   X_r - (q_u s + rho_u e_u) / n_u  closed     first come,
     X_r      = (sum over open of rho e / (1 + k rho) + sum over closed of (q s + rho e)) /         first served
                (1 - sum over open of rho / (1 + k rho)),      q = lambda p W, closed requests that wait
     Without closed users and with k = 0 this is Pollaczek and Khinchine's M/G/1 with the first two moments of the mix; the
     closed ones wait as in Schweitzer's approximate mean value analysis. k = 1 for users whose requests never wait for
     their own: periodic ones, or those that come from a server of the same user that is at least as slow; else 0.
 (3) in turn:  processors and coders serve sessions by weight (protocol/fairness.py), which leaves sum rho W as it is; it is
     shared out by   sum rho e + d^2 s' / (2 (1 - d)),   s' = s / max(1 - rho of others, share of weight),  d = rho s' / s
     (own queue at the speed that others leave; closed: q s')
 (4) links that share a wire or a radio channel serve at the rate b' that sharing.py gives, in place of b
 (5) T_u      = latency alone + sum over visits of  p (W_ur + B / b' - B / b)                                mean latency
 (6) lambda_u = n_u / T_u  for closed users (Little);   2 to 6 by fixed point
 (7) quantile of T_u: waits independent, each 0 with probability 1 - rho_r, else exponential (in the part of the load that
     comes at random); slowing down exponential; their sum as a gamma law of the same two moments above the latency alone

Left out: blocking by bounded queues, headers of frames, the phases of periodic users. The simulator is the truth; measured
errors stand in docs/users.md. A step is O(visits + links of wires), for radio see sharing.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv

from ecotone.cluster import Cluster
from ecotone.media import RadioCell, Tuning
from ecotone.plan import LOCAL
from ecotone.plancost import PlanCost
from ecotone.sharing import air_rates, room_beside, undrained, wire_share

__all__ = ["Contention", "Flow", "Resource", "Standing", "UserLoad", "visits_of"]

FloatArray = NDArray[np.float64]
_ROUNDS, _CLOSE = 400, 1e-7
_FULL = 1.0 - 1e-9


@dataclass(frozen=True, slots=True, order=True)
class Resource:
    """Something that serves one request at a time: `kind` is processor, coder, link, or wire (which divides itself)."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A user under a plan: what the plan costs alone, and how requests come (so many per second, or under way)."""

    name: str
    cost: PlanCost
    rate_per_s: float = 0.0
    in_flight: int = 0
    is_periodic: bool = False
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UserLoad:
    """What comes of a user; latencies are inf where something that it needs is overloaded.

    `wait_s`: of a request on average, by what it waits for or is slowed down by.
    """

    name: str
    rate_per_s: float
    alone_s: float
    mean_s: float
    p95_s: float
    wait_s: dict[Resource, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """All users and resources. `promised`: the part of the utilisation that open users bring, whatever happens; of a node
    where closed users have their share, the most that an open one uses of its room, where that is more.

    `overloaded`: what would have to do more than it can, fullest first; closed users slow down instead.
    """

    users: tuple[UserLoad, ...]
    utilisation: dict[Resource, float]
    promised: dict[Resource, float]

    @property
    def overloaded(self) -> tuple[Resource, ...]:
        over = [r for r, share in self.promised.items() if share >= _FULL]
        return tuple(sorted(over, key=lambda r: -self.promised[r]))

    def user(self, name: str) -> UserLoad:
        return next(u for u in self.users if u.name == name)


def visits_of(cost: PlanCost) -> list[tuple[Resource, float, float, float]]:
    """(resource, seconds, share, bytes) of every visit of a request, in order; bytes of those over links."""
    found: list[tuple[Resource, float, float, float]] = []
    for number, transfer in enumerate(cost.edges):
        if transfer.codec != LOCAL:
            link = Resource("link", f"{transfer.source}>{transfer.target}")
            found.append((Resource("coder", transfer.source), transfer.encode_s, transfer.share, 0.0))
            found.append((link, transfer.send_s, transfer.share, transfer.size_bytes))
            found.append((Resource("coder", transfer.target), transfer.decode_s, transfer.share, 0.0))
        if number < len(cost.stages):
            stage = cost.stages[number]
            found.append((Resource("processor", stage.device), stage.compute_s, stage.share, 0.0))
    return [visit for visit in found if visit[1] > 0 and visit[2] > 0]


class Contention:
    """A cluster's shared media; `standing` evaluates users over it. `tunings` by device: default_tunings where missing."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._uplinks = {pair: (cell, s) for cell in cluster.radios for pair, s in zip(cell.links, cell.sender, strict=True)}

    def standing(self, flows: Sequence[Flow], tunings: Mapping[str, Tuning] | None = None) -> Standing:
        """Equations 1 to 7 for these users together."""
        return _Evaluation(self, flows, tunings or {}).standing()

    def uplink(self, source: str, target: str) -> tuple[RadioCell, float, float] | None:
        """The cell of a radio uplink with the sender's gain and greatest power; None for any other link."""
        found = self._uplinks.get((source, target))
        if found is None:
            return None
        cell, sender = found
        return cell, sender.distance_m**-cell.path_loss_exponent, sender.max_watt


@dataclass(slots=True)
class _Link:
    """A link that is part of a medium: its number, own rate, and wires or (cell, channel, watts heard)."""

    number: int
    own: float
    wires: list[int] = field(default_factory=list)
    cell: RadioCell | None = None
    channel: int = 0
    heard_watt: float = 0.0
    rate: float = 0.0


class _Evaluation:
    """One set of flows: tables first, then the fixed point."""

    def __init__(self, world: Contention, flows: Sequence[Flow], tunings: Mapping[str, Tuning]) -> None:
        self.world, self.flows = world, flows
        self.numbers: dict[Resource, int] = {}
        rows: list[tuple[int, int, float, float, float, bool]] = []
        for index, flow in enumerate(flows):
            slowest = 0.0
            for resource, seconds, share, size in visits_of(flow.cost):
                number = self.numbers.setdefault(resource, len(self.numbers))
                rows.append((index, number, seconds, share, size, slowest >= seconds))
                slowest = max(slowest, seconds)
        columns = np.array(rows, dtype=np.float64).reshape(-1, 6).T
        self.user, self.at = columns[0].astype(np.intp), columns[1].astype(np.intp)
        self.seconds, self.share, self.size = columns[2], columns[3], columns[4]
        self.alone = np.array([f.cost.latency_s for f in flows])
        self.closed = np.array([float(f.in_flight) for f in flows])
        spared = np.array([1.0 / f.in_flight if f.in_flight else float(f.is_periodic) for f in flows])
        is_spaced = columns[5].astype(np.bool_) & (self.closed[self.user] == 0)
        self.spared = np.maximum(spared[self.user], is_spaced)
        self.rate = np.array([f.in_flight / f.cost.latency_s if f.in_flight else f.rate_per_s for f in flows])
        self.weight = np.array([f.weight for f in flows])
        self.slowed, self.wait, self.mean = self.seconds.copy(), np.zeros(len(rows)), self.alone.copy()
        self.pair = np.unique(self.user * len(self.numbers) + self.at, return_inverse=True)[1].reshape(-1)
        self.fair = np.array([r.kind in ("processor", "coder") for r in self.numbers], dtype=np.bool_)
        self.pressed = self._pressed()
        self.links = self._links(tunings)

    def _pressed(self) -> FloatArray:
        """For each visit of an open user to a fair node that closed users visit too: the share of its room that it takes."""
        found = np.zeros(len(self.user))
        work = np.bincount(self.pair, self.share * self.seconds)
        closed = self.closed[self.user] > 0
        for number in np.unique(self.at[closed & self.fair[self.at]]).tolist():
            here, first = np.unique(self.pair[self.at == number], return_index=True)
            user = self.user[self.at == number][first]
            demand = work[here] * np.where(self.closed[user] > 0, self.closed[user] / self.alone[user], self.rate[user])
            taken = np.where(self.closed[user] > 0, 0.0, demand / room_beside(self.weight[user], np.minimum(demand, 1.0)))
            for pair, value in zip(here.tolist(), taken.tolist(), strict=True):
                found[self.pair == pair] = value
        return found

    def _links(self, tunings: Mapping[str, Tuning]) -> list[_Link]:
        found = []
        for resource, number in self.numbers.items():
            if resource.kind != "link":
                continue
            source, _, target = resource.name.partition(">")
            visits = self.at == number
            link = _Link(number, float((self.size[visits] / self.seconds[visits]).max()))
            link.wires = [i for i, wire in enumerate(self.world.cluster.shared) if wire.carries(source, target)]
            uplink = self.world.uplink(source, target)
            if uplink is not None:
                link.cell, gain, watt = uplink
                order = [s.device for s in link.cell.sender].index(source)
                tuning = tunings.get(source, Tuning(channel=order % link.cell.num_channels, watt=watt))
                link.channel, link.heard_watt = tuning.channel, tuning.watt * gain
                link.own = link.cell.alone_bytes_per_s(source, tuning.watt)
            if link.wires or link.cell:
                link.rate = link.own
                found.append(link)
        return found

    # ---- equations ---------------------------------------------------------------------------------------------------

    def _sum(self, values: FloatArray) -> FloatArray:
        total: FloatArray = np.bincount(self.at, values, len(self.numbers)).astype(np.float64)
        return total

    def _queue(self) -> None:
        """Equation 2 for every visit, from the requests of closed users that waited in the last round."""
        rho = self.rate[self.user] * self.share * self.slowed
        full = np.minimum(self._sum(rho), 1.0)[self.at]
        is_closed = self.closed[self.user] > 0
        rest = self.slowed / 2 * np.where(is_closed, 1 + full**8, 1.0)
        waiting = np.where(is_closed, np.minimum(self.rate[self.user] * self.share * self.wait, self.closed[self.user]), 0.0)
        ahead = np.where(is_closed, waiting * self.slowed + rho * rest, 0.0)
        ease = 1 + np.where(is_closed, 0.0, self.spared * rho)
        open_rho = np.where(is_closed, 0.0, rho)
        room = 1 - self._sum(open_rho / ease)
        above = self._sum(ahead + open_rho * rest / ease)
        backlog = (above / np.maximum(room, 1e-9))[self.at]
        wait = np.where(is_closed, backlog - self.spared * ahead, (backlog - self.spared * rho * rest) / ease)
        self.wait = self._in_turn(np.maximum(wait, 0.0), rho, rest)
        self.wait[self._is_over()] = math.inf

    def _in_turn(self, wait: FloatArray, rho: FloatArray, rest: FloatArray) -> FloatArray:
        """Equation 3: the same work waiting, but each session of a node in its turn."""
        if not self.fair.any():
            return wait
        pair, count = self.pair, int(self.pair.max()) + 1
        own = np.bincount(pair, rho, count)  # by user and resource
        at = np.zeros(count, dtype=np.intp)
        at[pair] = self.at
        of = np.zeros(count, dtype=np.intp)
        of[pair] = self.user
        busy = np.maximum(own, 1e-12)
        seconds = np.bincount(pair, rho * self.slowed, count) / busy
        waited = np.bincount(pair, rho * wait, count) / busy
        weight = self.weight[of]
        least = weight / np.bincount(at, weight, len(self.numbers))[at]
        left = np.maximum(1 - (np.bincount(at, own, len(self.numbers))[at] - own), least)
        slower = seconds / left
        lasting = np.minimum(own / left, 0.99)
        queue = np.where(
            self.closed[of] > 0,
            np.minimum(own / seconds * waited, self.closed[of]) * slower,
            lasting**2 * slower / 2 / (1 - lasting),
        )
        raw = self._sum(rho * rest)[at] + queue
        work, shared = (np.bincount(at, own * w, len(self.numbers)) for w in (waited, raw))
        scale = work / np.maximum(shared, 1e-300)
        return np.where(self.fair[self.at], (raw * scale[at])[pair], wait)

    def _is_over(self) -> NDArray[np.bool_]:
        """Visits to what open users alone overload."""
        is_open = self.closed[self.user] == 0
        rho = self.rate[self.user] * self.share * self.slowed
        over: NDArray[np.bool_] = (self._sum(np.where(is_open, rho, 0.0))[self.at] >= _FULL) | (self.pressed >= _FULL)
        return over

    def _media(self) -> None:
        """Equation 4: the rate of every link of a medium, and seconds at that rate."""
        load = self._sum(self.rate[self.user] * self.share * self.size)  # bytes per second by link
        per_s = self._sum(self.rate[self.user] * self.share)
        for number, wire in enumerate(self.world.cluster.shared):
            on_it = [link for link in self.links if number in link.wires and load[link.number] > 0]
            numbers, most = [link.number for link in on_it], wire.bandwidth_bytes_per_s
            if not on_it:
                continue
            total, each_s = float(load[numbers].sum()), float(per_s[numbers].mean())
            busy = min(float(np.mean([load[k.number] / k.rate for k in on_it])), 1.0)
            for link in on_it:
                others = (total - float(load[link.number])) / most
                rate = wire_share(link.own, most, others, len(on_it), each_s, total / each_s / len(on_it), busy)
                link.rate = rate if number == link.wires[0] else min(link.rate, rate)
        for senders in self._channels(load):
            self._air(senders, load, per_s)
        for link in self.links:
            own = self.at == link.number
            self.slowed[own] = self.size[own] / link.rate

    def _channels(self, load: FloatArray) -> list[list[_Link]]:
        """Senders with anything to send, by cell and channel; those with others on theirs."""
        found: dict[tuple[str, int], list[_Link]] = {}
        for link in self.links:
            if link.cell is not None and load[link.number] > 0:
                found.setdefault((link.cell.name, link.channel), []).append(link)
        return [senders for senders in found.values() if len(senders) > 1]

    def _air(self, senders: list[_Link], load: FloatArray, per_s: FloatArray) -> None:
        """The senders of one channel, from the shares of time of the last round."""
        cell, numbers = senders[0].cell, [k.number for k in senders]
        assert cell is not None
        heard, rate = np.array([k.heard_watt for k in senders]), np.array([k.rate for k in senders])
        busy, count = np.minimum(load[numbers] / rate, 1.0), per_s[numbers]
        rate = np.sqrt(rate * air_rates(cell, heard, count, load[numbers] / count, busy))
        for link, value in zip(senders, rate.tolist(), strict=True):
            link.rate = value

    def _stuck(self) -> None:
        """Links of radio cells that do not recover from a backlog get the rates that they have in one."""
        load, per_s = self._sum(self.rate[self.user] * self.share * self.size), self._sum(self.rate[self.user] * self.share)
        for senders in self._channels(load):
            cell, numbers = senders[0].cell, [k.number for k in senders]
            assert cell is not None
            heard, count = np.array([k.heard_watt for k in senders]), per_s[numbers]
            is_stuck, rates = undrained(cell, heard, count, load[numbers] / count)
            for link, stuck, rate in zip(senders, is_stuck, rates.tolist(), strict=True):
                own = self.at == link.number
                if stuck and not self.closed[self.user[own]].all():
                    self.slowed[own] = self.size[own] / rate
                    self.wait[own] = np.where(self.closed[self.user[own]] > 0, self.wait[own], math.inf)

    # ---- the fixed point ---------------------------------------------------------------------------------------------

    def standing(self) -> Standing:
        """Rates of closed users and media until they agree with the latencies that follow from them."""
        for _ in range(_ROUNDS if self.links or self.closed.any() else 1):
            before = np.concatenate([self.rate, self.slowed])
            if self.links:
                self._media()
            self._queue()
            self._latencies()
            goal = np.where(self.closed > 0, self.closed / self.mean, self.rate)
            self.rate = np.where(self.closed > 0, np.sqrt(self.rate * np.maximum(goal, 1e-6)), self.rate)
            change = np.abs(np.concatenate([self.rate, self.slowed]) / np.maximum(before, 1e-300) - 1)
            if change.max(initial=0.0) < _CLOSE:
                break
        self._stuck()
        self._latencies()
        promised = self._utilisation(self.rate * (self.closed == 0))
        for resource, number in self.numbers.items():
            most = float(self.pressed[self.at == number].max())
            promised[resource] = max(promised[resource], most)
        users = tuple(self._user(i) for i in range(len(self.flows)))
        return Standing(users=users, utilisation=self._utilisation(self.rate), promised=promised)

    def _latencies(self) -> None:
        """Equation 5."""
        extra = self.share * (self.wait + self.slowed - self.seconds)
        self.mean = self.alone + np.bincount(self.user, extra, len(self.flows))

    def _random_share(self) -> FloatArray:
        """Of each resource's load, the part that comes at random, not in the rhythm of closed and periodic users."""
        rho = self.rate[self.user] * self.share * self.slowed
        regular = np.array([f.is_periodic or f.in_flight > 0 for f in self.flows])
        return self._sum(np.where(regular[self.user], 0.0, rho)) / np.maximum(self._sum(rho), 1e-300)

    def _utilisation(self, rate: FloatArray) -> dict[Resource, float]:
        rho = self._sum(rate[self.user] * self.share * self.slowed)
        found = {resource: float(rho[number]) for resource, number in self.numbers.items()}
        load = self._sum(rate[self.user] * self.share * self.size)
        for number, wire in enumerate(self.world.cluster.shared):
            carried = sum(load[link.number] for link in self.links if number in link.wires)
            found[Resource("wire", wire.name)] = float(carried / wire.bandwidth_bytes_per_s)
        return found

    def _user(self, index: int) -> UserLoad:
        own = self.user == index
        rho = self._sum(self.rate[self.user] * self.share * self.slowed)[self.at[own]]
        wait, share, slower = self.wait[own], self.share[own], self.slowed[own] - self.seconds[own]
        waits: dict[Resource, float] = {}
        names = list(self.numbers)
        for number, seconds in zip(self.at[own], share * (wait + slower), strict=True):
            waits[names[number]] = waits.get(names[number], 0.0) + float(seconds)
        mean = float(self.mean[index])
        p95 = math.inf
        if math.isfinite(mean):
            busy = np.clip(rho, 1e-9, 1.0)
            chance = self._random_share()[self.at[own]]
            variance = float((share * (chance * wait * (2 * wait / busy - wait) + slower**2)).sum())
            p95 = float(self.alone[index]) + _gamma_quantile(mean - float(self.alone[index]), variance, 0.95)
        flow = self.flows[index]
        return UserLoad(
            name=flow.name, rate_per_s=float(self.rate[index]), alone_s=flow.cost.latency_s, mean_s=mean, p95_s=p95,
            wait_s={r: s for r, s in waits.items() if s > 0},
        )  # fmt: skip


def _gamma_quantile(mean: float, variance: float, share: float) -> float:
    """Of the gamma law with these moments; its mean where there is no variance."""
    if mean <= 0 or variance <= 0:
        return max(mean, 0.0)
    shape = mean * mean / variance
    return float(gammaincinv(shape, share)) * variance / mean
