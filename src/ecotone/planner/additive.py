"""Quantities that add up along a path, as tables: what every stage, crossing and exit's transfer adds to each of them.

One mechanism for all: any of them may be what a search makes least, and any a budget that it keeps (network.py). Equations
of cost.py: latency (6), bytes, server seconds (12), money (13), points lost and relative error (11), stages; energy (10)
*from below*, as what surely flows: idle watts of devices other than source and sink are left out, since they depend on which
devices take part; and the 95th percentile from below, by floors.py. `exact_energy` is what has to be compared besides, so
that of two beginnings of a path the one with more energy can be told for sure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ecotone.cost import FloatArray
from ecotone.planner.chain import Chain
from ecotone.planner.floors import reached_by_the_tail

__all__ = ["ADDITIVE", "Amount", "amount", "exact_energy", "finite", "idle_watts"]

ADDITIVE = (
    "latency", "p95", "energy", "bytes", "server", "money", "accuracy_loss", "accuracy_loss_sure", "error", "stages",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Amount:
    """Finite tables that broadcast to (X, D, P, P), (P, K, D, D) and (P, K, D); `fixed`: what every path has."""

    stage: FloatArray
    crossing: FloatArray
    leaving: FloatArray
    fixed: float = 0.0


def amount(chain: Chain, name: str) -> Amount:
    """The tables of one of ADDITIVE."""
    return _TABLES[name](chain)


def finite(table: FloatArray) -> FloatArray:
    """The table with 0 where something is impossible: what adds up must not be spoilt by what is never chosen."""
    found: FloatArray = np.where(np.isfinite(table), table, 0.0)
    return found


def _latency(chain: Chain) -> Amount:
    leaving = finite(chain.leaving.seconds) if chain.leaving else np.zeros((1, 1, 1))
    return Amount(stage=finite(chain.seconds), crossing=finite(chain.transfer), leaving=leaving)


def _p95(chain: Chain) -> Amount:
    """floors.py, equation 1: a piece counts whole where more than the tail gets so far, else not at all."""
    whole = reached_by_the_tail(chain.share, chain.tail)
    return Amount(
        stage=finite(chain.seconds) * whole[:, None], crossing=finite(chain.transfer) * whole[:, None, None, None],
        leaving=np.zeros((1, 1, 1)),
    )  # fmt: skip


def _bytes(chain: Chain) -> Amount:
    leaving = chain.leaving.size if chain.leaving else np.zeros((1, 1, 1))
    return Amount(stage=np.zeros((1, 1, 1, 1)), crossing=finite(chain.size)[:, :, None, None], leaving=leaving)


def _per_busy_second(chain: Chain, weight: FloatArray) -> Amount:
    """`weight` (D,) times the seconds that each device is busy."""
    encode, decode = finite(chain.encode) * weight, finite(chain.decode) * weight
    leaving = np.zeros((1, 1, 1))
    if chain.leaving is not None:
        leaving = chain.leaving.encode * weight + chain.leaving.decode * weight[chain.sink]
    return Amount(
        stage=finite(chain.seconds) * weight[:, None, None], crossing=encode[:, :, :, None] + decode[:, :, None, :],
        leaving=leaving,
    )  # fmt: skip


def _server(chain: Chain) -> Amount:
    return _per_busy_second(chain, np.array([float(chain.model.is_server(d.name)) for d in chain.devices]))


def _money(chain: Chain) -> Amount:
    busy = _per_busy_second(chain, np.array([d.price_money_per_s for d in chain.devices]))
    count = chain.num_devices
    price = np.zeros((count, count))
    for d, sources in enumerate(chain.members):
        for e, targets in enumerate(chain.members):
            link = chain.model.cluster.link(sources[0], targets[0] if d != e else targets[-1])
            price[d, e] = link.price_money_per_byte if link else 0.0
    if not price.any():
        return busy
    crossing = busy.crossing + finite(chain.size)[:, :, None, None] * price
    leaving = busy.leaving + (chain.leaving.size * price[:, chain.sink] if chain.leaving else 0.0)
    return Amount(stage=busy.stage, crossing=crossing, leaving=leaving)


def _loss(chain: Chain) -> Amount:
    leaving = chain.leaving.loss if chain.leaving else np.zeros((1, 1, 1))
    crossing = finite(chain.loss)[:, :, None, None]
    return Amount(stage=np.zeros((1, 1, 1, 1)), crossing=crossing, leaving=leaving, fixed=chain.fixed_loss)


def _sure_loss(chain: Chain) -> Amount:
    """The sum alone: that nothing loses more than 100 points tells no two plans apart that are below."""
    leaving = chain.leaving.sure_loss if chain.leaving else np.zeros((1, 1, 1))
    crossing = finite(chain.sure_loss)[:, :, None, None]
    return Amount(stage=np.zeros((1, 1, 1, 1)), crossing=crossing, leaving=leaving, fixed=chain.fixed_sure_loss)


def _error(chain: Chain) -> Amount:
    leaving = chain.leaving.error if chain.leaving else np.zeros((1, 1, 1))
    return Amount(stage=chain.error, crossing=finite(chain.codec_error)[:, :, None, None], leaving=leaving)


def _stages(chain: Chain) -> Amount:
    zero = np.zeros((1, 1, 1, 1))
    return Amount(stage=zero + 1.0, crossing=zero, leaving=np.zeros((1, 1, 1)))


def _energy(chain: Chain) -> Amount:
    return _joules(chain, exact=False)


def exact_energy(chain: Chain) -> Amount:
    """Joules but for the idle watts of devices that take part and are neither source nor sink, times the whole latency."""
    return _joules(chain, exact=True)


def idle_watts(chain: Chain) -> FloatArray:
    """(D,) watts that a place adds to all of the latency once it takes part; 0 for source and sink, which always do."""
    ends = {chain.source, chain.sink}
    return np.array([0.0 if i in ends else d.power.idle_watt for i, d in enumerate(chain.devices)])


def _joules(chain: Chain, *, exact: bool) -> Amount:
    """Busy watts while a device works, idle watts of source and sink all the time; a device that works does not idle."""
    power, ends = [d.power for d in chain.devices], {chain.source, chain.sink}
    busy, send = np.array([p.busy_watt for p in power]), np.array([p.send_joule_per_byte for p in power])
    waiting = sum(power[i].idle_watt for i in ends)
    own = np.array([p.idle_watt if i in ends or exact else 0.0 for i, p in enumerate(power)])
    extra = busy - own
    latency = _latency(chain)
    encode, decode = finite(chain.encode) * extra, finite(chain.decode) * extra
    crossing = waiting * latency.crossing + encode[:, :, :, None] + decode[:, :, None, :]
    crossing = crossing + finite(chain.size)[:, :, None, None] * send[:, None]
    leaving = latency.leaving
    if chain.leaving is not None:
        out = chain.leaving
        leaving = waiting * leaving + out.encode * extra + out.decode * extra[chain.sink] + out.size * send
    return Amount(stage=latency.stage * (extra + waiting)[:, None, None], crossing=crossing, leaving=leaving)


_TABLES = {
    "latency": _latency, "p95": _p95, "energy": _energy, "bytes": _bytes, "server": _server, "money": _money,
    "accuracy_loss": _loss, "accuracy_loss_sure": _sure_loss, "error": _error, "stages": _stages,
}  # fmt: skip
