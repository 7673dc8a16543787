"""The search problem: what is made least, and the budgets that couple the stages of a plan, as columns of numbers.

A network is a chain with an objective out of additive.py and budgets. Every budget is a column that only grows along a path
and must end at or below 1 (amounts are divided by their limit): *totals* have one column for the whole path; *held* budgets
one per place, for what is added on the device itself (memory, load, being used). Memory takes the weights that no other
segment can share, so it is exact without tied weights and from below with them; for a class of devices it counts all of them
together, from below. What is counted from below is checked exactly on the finished plan (`judge` of a search).

Two beginnings of a path are compared by their columns. Where the finished plan is judged by more than that (energy: idle
watts of whoever takes part), further columns without a limit are kept for the comparison; where that does not suffice
(a score, tied weights) none is dropped for another: `dominance` is False.

Choices that no column tells apart from a better one are left out: without a budget on stages only the best executor of each
segment remains (X = 1, `executor_of`), without one on crossings only the best codec (K = 1, `codec_of`; under a score codecs
stay, as they load coders and links in different ways, while a slower executor only loads its processor more).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import BoolArray, FloatArray
from ecotone.planner.additive import ADDITIVE, Amount, amount, exact_energy, finite, idle_watts
from ecotone.planner.chain import Chain, Path
from ecotone.planner.choices import fastest
from ecotone.planner.objective import SLACK, Asked

__all__ = ["Held", "Network", "Total", "bare", "fits", "make", "usage", "value_of"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Total:
    """Shares of a limit that stages, crossings and exits' transfers use up; `limit` 1, or inf: only for comparing."""

    name: str
    limit: float
    amount: Amount
    scale: float  # what one column unit is, in the quantity's own unit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """Shares of a limit per place. Tables broadcast to (X, D, P, P), (P, K, D, D) and (P, K, D); None: nothing.

    `sender`, `receiver`: what a crossing adds at its two ends; `leaver`, `taker`: what an exit's transfer adds where it
    starts and on the sink; `arrive`: what is added when a path comes to a place.
    """

    name: str
    stage: FloatArray | None = None
    sender: FloatArray | None = None
    receiver: FloatArray | None = None
    leaver: FloatArray | None = None
    taker: FloatArray | None = None
    arrive: FloatArray | None = None  # (D,)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Network:
    """`stage` (X, D, P, P), `crossing` (P, K, D, D), `leaving` (P, K, D): what the objective adds, inf where impossible."""

    chain: Chain
    stage: FloatArray
    crossing: FloatArray
    leaving: FloatArray | None  # None: no exits
    fixed: float
    totals: tuple[Total, ...] = ()
    held: tuple[Held, ...] = ()
    peak: FloatArray | None = None  # (D, P, P): joins held[0] as a maximum of its place, not a sum
    watched: NDArray[np.intp] | None = None  # places of which it matters whether a path has used them
    run: Held | None = None  # as `held`, but of the device that computes now: begins anew with every device
    dominance: bool = True
    executor_of: NDArray[np.int16] | None = None  # (D, P, P) where X was reduced to 1
    codec_of: NDArray[np.intp] | None = None  # (P, D, D) where K was reduced to 1

    @property
    def num_columns(self) -> int:
        return len(self.held) * self.chain.num_devices + len(self.totals)

    @property
    def limits(self) -> FloatArray:
        """(columns,) 1, or inf for those that only compare."""
        held = np.ones(len(self.held) * self.chain.num_devices)
        return np.concatenate([held, [t.limit for t in self.totals]])

    def executor(self, option: int, stage: tuple[int, int, int]) -> int:
        """The executor that an option stands for."""
        return option if self.executor_of is None else int(self.executor_of[stage])

    def codec(self, option: int, at: int, source: int, target: int) -> int:
        """The codec that an option stands for; -1: local."""
        return option if self.codec_of is None or option < 0 else int(self.codec_of[at, source, target])


def _share(table: FloatArray, limit: float) -> FloatArray:
    """`table / limit`; where the limit is 0 anything above 0 breaks it."""
    if limit > 0:
        return table / limit
    return np.where(table > 0, 2.0, 0.0)


def make(chain: Chain, asked: Asked, objective: str, *, once: bool = False, pinch_s: float = math.inf) -> Network:
    """The network of a chain under `asked`, with an objective out of additive.ADDITIVE.

    `once`: each device computes one row of stages at most. `pinch_s`: the most that one request may keep any processor,
    coder or link. Budgets that cannot bind are left out.
    """
    limited = chain.limited(asked.bottleneck_s)
    if math.isfinite(pinch_s):
        limited = limited.limited(pinch_s)
    held, peak = _held(limited, asked, once=once, pinch_s=pinch_s)
    totals = _totals(limited, asked, objective)
    watched = None
    if math.isfinite(asked.energy_joule) or objective == "energy":
        watched = np.nonzero(idle_watts(limited) > 0)[0]
        if len(watched):
            totals += [_compared(limited, "joules", exact_energy(limited)), _compared(limited, "seconds", None)]
        else:
            watched = None
    tied = bool(held and held[0].name == "memory" and (limited.own_weights < limited.weights).any())
    scored = objective == "p95" or math.isfinite(asked.p95_s)
    shared_links = math.isfinite(asked.bottleneck_s) and not once  # a link that is used twice has no column
    return _reduced(
        replace(
            _tables(limited, objective), totals=tuple(totals), held=tuple(held), peak=peak, watched=watched,
            run=_run(limited, asked.bottleneck_s) if once and math.isfinite(asked.bottleneck_s) else None,
            dominance=not (scored or tied or shared_links),
        )
    )  # fmt: skip


def bare(chain: Chain, objective: str) -> Network:
    """The network of an objective without any budget: only the best executor and codec everywhere."""
    return _reduced(_tables(chain, objective))


def _tables(chain: Chain, objective: str) -> Network:
    """What the objective adds, inf where something is impossible."""
    if objective == "latency":  # the tables as they are: they may be large
        leaving = chain.leaving.seconds if chain.leaving is not None else None
        return Network(chain=chain, stage=chain.seconds, crossing=chain.transfer, leaving=leaving, fixed=0.0)
    goal = amount(chain, objective)
    stage = np.where(np.isfinite(chain.seconds), goal.stage, math.inf)
    crossing = np.where(np.isfinite(chain.transfer), goal.crossing, math.inf)
    leaving = None
    if chain.leaving is not None:
        leaving = np.where(np.isfinite(chain.leaving.seconds), goal.leaving, math.inf)
    return Network(chain=chain, stage=stage, crossing=crossing, leaving=leaving, fixed=goal.fixed)


def _compared(chain: Chain, name: str, found: Amount | None) -> Total:
    return Total(name=name, limit=math.inf, amount=found or amount(chain, "latency"), scale=1.0)


def _totals(chain: Chain, asked: Asked, objective: str) -> list[Total]:
    found = []
    for name in ADDITIVE:
        limit = asked.limit(name)
        if not math.isfinite(limit) or name == objective:
            continue
        table = amount(chain, name)
        if name in ("accuracy_loss", "accuracy_loss_sure") and not (table.crossing.any() or table.leaving.any()):
            continue
        limit -= table.fixed
        shares = Amount(
            stage=_share(table.stage, limit), crossing=_share(table.crossing, limit), leaving=_share(table.leaving, limit)
        )  # fmt: skip
        found.append(Total(name=name, limit=1.0, amount=shares, scale=limit))
    return found


def _held(chain: Chain, asked: Asked, *, once: bool, pinch_s: float) -> tuple[list[Held], FloatArray | None]:
    found, peak = [], None
    many, alone = chain.is_class, ~chain.is_class
    room = chain.capacity * np.array([len(group) for group in chain.members])
    binding = chain.all_weights + np.where(alone, chain.working.max(), 0.0) > room
    if (not once or chain.exits) and binding.any():  # exits part what one device computes into several stages
        found.append(Held(name="memory", stage=(chain.own_weights[None] / room[:, None, None])[None]))
        peak = np.where(alone[:, None, None], chain.working[None] / chain.capacity[:, None, None], 0.0)
    if math.isfinite(asked.bottleneck_s):
        found += _loads(chain, asked.bottleneck_s, alone)
    if math.isfinite(pinch_s):
        found += _pinches(chain, pinch_s, alone)
    if once:
        counts = np.array([len(group) for group in chain.members])
        found.append(Held(name="once", arrive=np.where(many, 1.0 / counts, 1.0)))
    return found, peak


def _loads(chain: Chain, limit_s: float, alone: BoolArray) -> list[Held]:
    """Equation 7 per device: compute, encode and decode; and what leaves it for the sink over one link."""
    out = chain.leaving
    encode, decode = finite(chain.encode) / limit_s * alone, finite(chain.decode) / limit_s * alone
    load = Held(
        name="load", stage=finite(chain.seconds) / limit_s * alone[:, None, None], sender=encode[:, :, :, None],
        receiver=decode[:, :, None, :], leaver=out.encode / limit_s * alone if out else None,
        taker=out.decode / limit_s if out else None,
    )  # fmt: skip
    send = np.zeros_like(chain.send)
    send[..., chain.sink] = finite(chain.send)[..., chain.sink] / limit_s * alone
    towards = Held(name="link to the sink", sender=send, leaver=out.send / limit_s * alone if out else None)
    return [load, towards] if out or chain.source != chain.sink else [load]


def _run(chain: Chain, limit_s: float) -> Held | None:
    """Equation 7 for the devices of a class, each used once: decode, compute and encode of one after another."""
    many, out = chain.is_class, chain.leaving
    if not many.any():
        return None
    encode, decode = finite(chain.encode) / limit_s * many, finite(chain.decode) / limit_s * many
    return Held(
        name="load of one of a class", stage=finite(chain.seconds) / limit_s * many[:, None, None],
        sender=encode[:, :, :, None], receiver=decode[:, :, None, :], leaver=out.encode / limit_s * many if out else None,
    )  # fmt: skip


def _pinches(chain: Chain, limit_s: float, alone: BoolArray) -> list[Held]:
    """The processor of a device, and its coder, each by itself (floors.py, equation 2)."""
    encode, decode = finite(chain.encode) / limit_s * alone, finite(chain.decode) / limit_s * alone
    return [
        Held(name="processor", stage=finite(chain.seconds) / limit_s * alone[:, None, None]),
        Held(name="coder", sender=encode[:, :, :, None], receiver=decode[:, :, None, :]),
    ]


def _reduced(network: Network) -> Network:
    """Only the best executor, codec and exit's codec where no column depends on it."""
    held = [*network.held, *([network.run] if network.run else [])]
    stages = [t.amount.stage for t in network.totals] + [h.stage for h in held if h.stage is not None]
    if len(network.stage) > 1 and all(len(table) == 1 for table in stages):
        best, which = fastest(network.stage)
        network = replace(network, stage=best[None], executor_of=which)
    crossings = [t.amount.crossing for t in network.totals]
    crossings += [t for h in held for t in (h.sender, h.receiver) if t is not None]
    if network.dominance and network.crossing.shape[1] > 1 and all(table.shape[1] == 1 for table in crossings):
        option = network.crossing.argmin(axis=1)
        network = replace(network, crossing=network.crossing.min(axis=1)[:, None], codec_of=option)
    return network


def usage(network: Network, path: Path) -> FloatArray:
    """(columns,) of a whole path in options (see Network), working sets added as maxima."""
    chain, count = network.chain, network.chain.num_devices
    held, total = np.zeros((len(network.held), count)), np.zeros(len(network.totals))
    peak = np.zeros(count)
    exits = {e.position for e in chain.exits}
    ends, at = [chain.source, *(d for d, _, _ in path.stages), chain.sink], [0, *(b for _, _, b in path.stages)]
    for i, codec in enumerate(path.codecs):
        p, d, e, last = at[i], ends[i], ends[i + 1], i == len(path.codecs) - 1
        for b, one in enumerate(network.held):
            if codec >= 0 and one.sender is not None:
                held[b, d] += _entry(one.sender, p, codec, d, e)
            if codec >= 0 and one.receiver is not None:
                held[b, e] += _entry(one.receiver, p, codec, d, e)
            if one.arrive is not None and not last and (codec >= 0 or i == 0):
                held[b, e] += one.arrive[e]
        if codec >= 0:
            total += [_entry(t.amount.crossing, p, codec, d, e) for t in network.totals]
    for (d, a, b), x, k in zip(path.stages, path.executors, path.leaves, strict=True):
        for n, one in enumerate(network.held):
            if one.stage is not None:
                held[n, d] += _entry(one.stage, x, d, a, b)
            if b in exits and one.leaver is not None:
                held[n, d] += _entry(one.leaver, b, k, d)
            if b in exits and one.taker is not None:
                held[n, chain.sink] += _entry(one.taker, b, k, d)
        total += [_entry(t.amount.stage, x, d, a, b) for t in network.totals]
        if b in exits:
            total += [_entry(t.amount.leaving, b, k, d) for t in network.totals]
        if network.peak is not None:
            peak[d] = max(peak[d], network.peak[d, a, b])
    if network.peak is not None:
        held[0] += peak
    return np.concatenate([held.ravel(), total])


def value_of(network: Network, path: Path) -> float:
    """What the objective's tables give for a whole path in options."""
    chain = network.chain
    ends, at = [chain.source, *(d for d, _, _ in path.stages), chain.sink], [0, *(b for _, _, b in path.stages)]
    total = network.fixed
    for i, codec in enumerate(path.codecs):
        total += float(network.crossing[at[i], codec, ends[i], ends[i + 1]]) if codec >= 0 else 0.0
    exits = {e.position for e in chain.exits}
    for (d, a, b), x, k in zip(path.stages, path.executors, path.leaves, strict=True):
        total += float(network.stage[x, d, a, b])
        total += float(network.leaving[b, k, d]) if network.leaving is not None and b in exits else 0.0
    return total


def _entry(table: FloatArray, *index: int) -> float:
    """An entry of a table that is broadcast along axes of length 1."""
    return float(table[tuple(i if n > 1 else 0 for i, n in zip(index, table.shape, strict=True))])


def fits(network: Network, columns: FloatArray) -> bool:
    """True where no budget is broken."""
    return bool((columns <= network.limits * (1.0 + SLACK)).all())
