"""Plans as actions of a device with one server: what each costs by its parts, as arrays that a learner can index.

An action is a plan (exit, cut, codec): the device computes the head and encodes, the link carries `up_bytes`, the server
decodes, computes the rest and answers. Legend, (A,) each, at load 1: h head_s, B up_bytes, t tail_s, b down_bytes, z back_s.

 (1) latency = u_d h + [B > 0] (2 a + (B + b) / r + u_s t + u_d z)      alone in the system;
               u_d, u_s loads of device and server, r rate of the link, a its latency one way
 (2) accuracy = (reference - loss) / 100, loss by equation 11 of cost.py; without labels the reference is 100 points

Seconds, bytes and losses are cost.py's, so they come from a Profile and its AccuracyTable. With exits taken by part of the
requests they are means over requests. Plans over a second server, or that come back to the device, are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecotone.accuracy import ExitPolicy
from ecotone.cluster import DeviceId
from ecotone.cost import CostError, CostModel, PlanCost
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.units import EcotoneError

__all__ = ["ActionTable", "FloatArray", "device_server_plans", "table_of"]

FloatArray = NDArray[np.float64]
END = ""  # the exit that is the model's end


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionTable:
    """A actions; of plan i: `exits` its last exit ("": the end), `depths` the block at which the last requests leave,
    `cuts` where it crosses (-1: nowhere), `codecs` in what."""

    plans: tuple[Plan, ...]
    device: DeviceId
    server: DeviceId
    exits: tuple[str, ...]
    depths: tuple[int, ...]
    cuts: tuple[int, ...]
    codecs: tuple[str, ...]
    head_s: FloatArray
    up_bytes: FloatArray
    tail_s: FloatArray
    down_bytes: FloatArray
    back_s: FloatArray
    accuracy: FloatArray  # in [0, 1]

    def __len__(self) -> int:
        return len(self.plans)

    @property
    def crosses(self) -> NDArray[np.bool_]:
        return self.up_bytes > 0

    def latency_s(
        self, rate_bytes_per_s: ArrayLike, one_way_s: ArrayLike, device_load: ArrayLike, server_load: ArrayLike
    ) -> FloatArray:
        """Equation 1 for every action; arguments (...) broadcast to (..., A)."""
        rate, one_way, device, server = (
            np.asarray(x, dtype=np.float64)[..., None] for x in (rate_bytes_per_s, one_way_s, device_load, server_load)
        )
        away = 2 * one_way + (self.up_bytes + self.down_bytes) / rate + server * self.tail_s + device * self.back_s
        found: FloatArray = device * self.head_s + np.where(self.crosses, away, 0.0)
        return found


def table_of(plans: Iterable[Plan], model: CostModel) -> ActionTable:
    """The table of `plans` of one graph; raises EcotoneError for a plan that is none of one device and one server."""
    chosen = tuple(plans)
    if not chosen:
        raise EcotoneError("a table of actions needs at least one plan")
    device = chosen[0].source
    servers = sorted({d for plan in chosen for d in plan.devices} - {device})
    if len(servers) > 1:
        raise EcotoneError(f"a learned policy chooses between {device} and one server; these plans use {', '.join(servers)}")
    rows = [_parts(plan, model.predict(plan), device) for plan in chosen]
    accuracy = model.profile.accuracy
    reference = accuracy.reference_points if accuracy else 100.0
    losses = np.array([model.predict(plan).loss_points for plan in chosen])
    columns = np.array(rows, dtype=np.float64)
    crossing = [next((t for t in p.transfers[:-1] if not t.is_local), None) for p in chosen]
    leaving = [_last_exit(plan, model) for plan in chosen]
    return ActionTable(
        plans=chosen, device=device, server=DeviceId(servers[0]) if servers else device,
        exits=tuple(e for e, _ in leaving), depths=tuple(d for _, d in leaving),
        cuts=tuple(t.position if t else -1 for t in crossing), codecs=tuple(t.codec if t else LOCAL for t in crossing),
        head_s=columns[:, 0], up_bytes=columns[:, 1], tail_s=columns[:, 2], down_bytes=columns[:, 3], back_s=columns[:, 4],
        accuracy=np.clip((reference - losses) / 100.0, 0.0, 1.0),
    )  # fmt: skip


def _last_exit(plan: Plan, model: CostModel) -> tuple[str, int]:
    """The exit at which the last requests leave, and its position; the model's end where some come that far."""
    policy = model.policy_of(plan)
    if policy is None or sum(policy.shares) < 1 - 1e-9:
        return END, model.graph.num_blocks
    last = next(s for s in reversed(plan.stages) if s.exit)
    return last.exit, last.stop


def _parts(plan: Plan, cost: PlanCost, device: DeviceId) -> tuple[float, float, float, float, float]:
    """(h, B, t, b, z) of one plan."""
    places = [s.device for s in plan.stages]
    first_away = next((i for i, place in enumerate(places) if place != device), len(places))
    if plan.source != device or plan.sink != device or device in places[first_away:]:
        raise EcotoneError(f"a learned policy needs plans from {device} to a server and back once; this is {plan}")
    head = sum(s.share * s.compute_s for s in cost.stages[:first_away])
    tail = sum(s.share * s.compute_s for s in cost.stages[first_away:])
    up = [t for t in cost.edges if t.source == device and t.target != device]
    down = [t for t in cost.edges if t.target == device and t.source != device]
    head += sum(t.share * t.encode_s for t in up)
    tail += sum(t.share * t.decode_s for t in up) + sum(t.share * t.encode_s for t in down)
    sent, answered = (sum(t.share * t.size_bytes for t in way) for way in (up, down))
    return head, sent, tail, answered, sum(t.share * t.decode_s for t in down)


def device_server_plans(
    model: CostModel, server: DeviceId, codecs: Iterable[str], executors: tuple[str, str] = ("torch:fp32", "torch:fp32")
) -> tuple[Plan, ...]:
    """Every (exit, cut, codec) of the source and `server`: exits as calibrated in the accuracy table, cuts of the profile.

    Cuts behind the last exit that anyone passes are left out, and what was not measured is passed over. `executors`: of the
    source and of the server. The first plan is the whole model on the source. O(exits * cuts * codecs).
    """
    table = model.profile.accuracy
    policies: list[ExitPolicy | None] = [None, *(table.policies if table else ())]
    names = tuple(codecs)
    found: dict[Plan, None] = {}
    for policy in policies:
        for cut in sorted(model.profile.cuts, reverse=True):
            for codec in names if cut < model.graph.num_blocks else (LOCAL,):
                plan = _plan(model, server, policy, cut, codec, executors)
                if plan is not None and _is_priced(plan, model):
                    found[plan] = None
    return tuple(found)


def _is_priced(plan: Plan, model: CostModel) -> bool:
    try:
        model.predict(plan)
    except CostError:
        return False
    return True


def _plan(
    model: CostModel, server: DeviceId, policy: ExitPolicy | None, cut: int, codec: str, executors: tuple[str, str]
) -> Plan | None:
    """Blocks before `cut` on the source, the rest on `server`; None where no request would come as far as the cut."""
    graph, source, last = model.graph, model.cluster.source, model.graph.num_blocks
    places = {} if policy is None else dict(zip(policy.exits, policy.thresholds, strict=True))
    positions = {e.position: e for e in graph.exits if e.name in places}
    all_leave = policy is not None and sum(policy.shares) >= 1 - 1e-9
    if cut < last and cut >= (max(positions) if all_leave else last):
        return None
    ends = sorted({cut, *positions, last} - {0})
    stages, start = [], 0
    for stop in ends:
        device, executor = (source, executors[0]) if stop <= cut else (server, executors[1])
        place = positions.get(stop)
        leaves = {"exit": place.name, "threshold": places[place.name]} if place else {}
        stages.append(Stage(device=device, start=start, stop=stop, executor=executor, **leaves))  # type: ignore[arg-type]
        start = stop
    ends_at = [source, *(s.device for s in stages), model.cluster.sink]
    at = [0, *(s.stop for s in stages)]
    return Plan(
        graph_hash=graph.content_hash(), stages=tuple(stages),
        transfers=tuple(
            _transfer(a, b, p, codec if p < last else "fp32") for a, b, p in zip(ends_at, ends_at[1:], at, strict=False)
        ),
        exit_transfers=tuple(_transfer(s.device, model.cluster.sink, last, "fp32") for s in stages if s.exit),
    )  # fmt: skip


def _transfer(source: DeviceId, target: DeviceId, position: int, codec: str) -> Transfer:
    return Transfer(source=source, target=target, position=position, codec=LOCAL if source == target else codec)
