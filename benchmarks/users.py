"""Many users on one cluster: how good joint choices are, what deciding alone loses, and how true the contention model is.

1. `local_search_loss_*`: one start of the local search over the exact choice (branch and bound), random problems of 6 users,
   4 offers, 2 servers and a wire; all work together would be 0.5 to 1.6 times what the servers take. `large_gap_median`:
   problems of 60 users, over the proven bound; `large_s_max`: seconds each.
2. `decentralised_loss_*`: users that choose for themselves by posted totals and prices (protocol/market.py), over the exact
   choice; `selfish_loss_*`: the same where each looks to its own latency only.
3. `contention_error_*`: contention.py's mean latency over users against the simulator's at the rates that it had: servers
   (open, closed), a wire and a radio channel. Errors are absolute and relative; signs are in the cases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.report import arguments, context, finish, median
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.contention import Contention, Flow
from ecotone.cost import CostModel
from ecotone.graph import Block, Graph, Tensor, TensorIndex
from ecotone.media import RadioCell, Sender, SharedWire, Tuning
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner.choosing import choose_all, improve
from ecotone.planner.congestion import Congestion, Offer, Party, Queue, Visit
from ecotone.profile import Profile, SegmentTime
from ecotone.simulator import simulate_users
from ecotone.simulator.market import settle
from ecotone.workload import User, Workload

SERVER = DeviceId("server")
FRONTIER_BYTES = 400_000
REQUESTS = 3000  # of all users of a scenario together


# ---- 1 and 2: random joint problems ------------------------------------------------------------------------------------


def problem_of(random: np.random.Generator, users: int, offers: int, servers: int, load: float) -> Congestion:
    """Offer 0 stays on the device; the others send part of the work over the user's link, half of them over the wire too.

    `load`: of the servers, if everybody sent everything to them.
    """
    queues = [Queue(f"link {i}") for i in range(users)] + [Queue(f"server {j}") for j in range(servers)]
    wire = len(queues)
    queues.append(Queue("wire", 1.0))
    parties = []
    for user in range(users):
        here, link, server = random.uniform(0.2, 0.5), random.uniform(0.01, 0.08), random.uniform(0.005, 0.04)
        rate = load * servers / users / server * random.uniform(0.5, 1.5)
        found = [Offer(alone_s=here, visits=())]
        for number in range(1, offers):
            where, cut = int(random.integers(servers)), random.uniform(0, 1)
            send, work = min(link, 0.5 / rate) * (1 - cut / 2), server * (1 - cut) + 1e-4
            visits = [Visit(user, 1.0, send), Visit(users + where, 1.0, work)]
            if number % 2:
                visits.append(Visit(wire, 1.0, send * 0.5 / users))
            found.append(Offer(alone_s=here * cut + send + work, visits=tuple(visits)))
        weight = float(random.choice([1, 1, 2, 5]))
        parties.append(Party(name=f"u{user}", offers=tuple(found), rate_per_s=float(rate), weight=weight))
    return Congestion(parties=tuple(parties), queues=tuple(queues))


def local_value(problem: Congestion) -> float:
    """One start of the local search: everybody at home, users in turn."""
    start = np.zeros(len(problem.parties), dtype=np.intp)
    return problem.value(improve(problem, start, np.argsort(-problem.weight, kind="stable")))


def small_cases(random: np.random.Generator, count: int) -> list[dict[str, float]]:
    """Each way to choose, over the exact choice, less one."""
    found = []
    while len(found) < count:
        load = float(random.uniform(0.5, 1.6))
        problem = problem_of(random, 6, 4, 2, load)
        best = choose_all(problem, time_limit_s=20.0)
        if not best.is_exact:
            continue
        seed = int(random.integers(1 << 30))
        prices, selfish = settle(problem, seed=seed), settle(problem, is_selfish=True, seed=seed)
        values = {
            "local": local_value(problem), "prices": problem.value(prices.choice), "selfish": problem.value(selfish.choice)
        }  # fmt: skip
        found.append({"load": load} | {name: value / best.value - 1 for name, value in values.items()})
    return found


def large_cases(random: np.random.Generator, count: int, users: int) -> list[dict[str, float]]:
    found = []
    for _ in range(count):
        load = float(random.uniform(0.5, 1.6))
        problem = problem_of(random, users, 6, 6, load)
        start = time.perf_counter()
        chosen = choose_all(problem, time_limit_s=10.0)
        found.append({"load": load, "users": users, "gap": chosen.gap, "seconds": time.perf_counter() - start})
    return found


# ---- 3: formula and simulator ------------------------------------------------------------------------------------------


def chain() -> Graph:
    """Two blocks; each frontier is one tensor of 400 kB."""
    tensors = tuple(
        Tensor(name=f"t{i}", shape=(FRONTIER_BYTES // 4,), dtype="float32", producer=i - 1) for i in range(3)
    )  # fmt: skip
    blocks = tuple(
        Block(name=f"b{i}", inputs=(TensorIndex(i),), outputs=(TensorIndex(i + 1),), flop=1.0) for i in range(2)
    )  # fmt: skip
    return Graph(name="chain", blocks=blocks, tensors=tensors, inputs=(TensorIndex(0),), outputs=(TensorIndex(2),))


def star(count: int, rate: float, shared: float = 0.0, cell: RadioCell | None = None) -> Cluster:
    """End devices u0, u1, ... with links to a server, the uplinks of `rate`, or of a cell, or on a wire of `shared`."""
    names = [DeviceId(f"u{i}") for i in range(count)]
    devices = tuple(Device(name=n, memory_bytes=1 << 30) for n in (*names, SERVER))
    up = [
        Link(
            source=n, target=SERVER, latency_s=cell.latency_s if cell else 1e-3,
            bandwidth_bytes_per_s=cell.alone_bytes_per_s(n) if cell else rate,
        )
        for n in names
    ]  # fmt: skip
    down = [Link(source=SERVER, target=n, latency_s=1e-3, bandwidth_bytes_per_s=1e9) for n in names]
    wires = (SharedWire(name="wire", bandwidth_bytes_per_s=shared, links=("*>server",)),) if shared else ()
    radios = (cell,) if cell else ()
    return Cluster(
        name="star", devices=devices, links=(*up, *down), source=names[0], sink=names[0], shared=wires, radios=radios
    )


def profile_of(graph: Graph, cluster: Cluster, here: Sequence[float], server: Sequence[float]) -> Profile:
    """Seconds of the two blocks on every end device and on the server; coding is free."""
    segments = tuple(
        SegmentTime(
            device=d.name, executor="torch:fp32", start=a, stop=b, spread_s=0.0, memory_bytes=0,
            median_s=sum((server if d.name == SERVER else here)[a:b]),
        )
        for d in cluster.devices
        for a, b in ((0, 1), (1, 2), (0, 2))
    )  # fmt: skip
    return Profile(
        graph_hash=graph.content_hash(), cluster_name=cluster.name, num_blocks=2, cuts=(0, 1, 2), segments=segments
    )


def split_plan(graph: Graph, user: str) -> Plan:
    """The first block on the user's device, the second on the server."""
    source = DeviceId(user)
    stages = (Stage(device=source, start=0, stop=1), Stage(device=SERVER, start=1, stop=2))
    moves = ((source, source, 0, LOCAL), (source, SERVER, 1, "fp32"), (SERVER, source, 2, "fp32"))
    transfers = tuple(Transfer(source=a, target=b, position=p, codec=c) for a, b, p, c in moves)
    return Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)


def compared(
    cluster: Cluster, users: Sequence[User], here: Sequence[float], server: Sequence[float], requests: int, seed: int,
    tunings: dict[str, Tuning] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Mean over users of mean latency and of p95: formula over simulator, less one."""
    graph = chain()
    profile = profile_of(graph, cluster, here, server)
    plans, model = {u.name: split_plan(graph, u.name) for u in users}, CostModel(graph, cluster, profile)
    per_s = sum(u.rate_per_s + u.in_flight / model.predict(plans[u.name]).latency_s for u in users)
    many = simulate_users(
        Workload(name="bench", users=tuple(users)), plans, cluster, [(graph, profile)], tunings=tunings,
        duration_s=1.1 * requests / per_s, warm_up_s=0.1 * requests / per_s, max_in_flight=10_000, queue_limit=10_000,
        seed=seed,
    )  # fmt: skip
    flows = [
        Flow(
            name=u.name, cost=model.predict(plans[u.name]), in_flight=u.in_flight, weight=u.weight,
            rate_per_s=0.0 if u.in_flight else len(many.users[u.name].outcomes) / many.window_s,
        )
        for u in users
    ]  # fmt: skip
    standing = Contention(cluster).standing(flows, tunings)
    rows = [(standing.user(n).mean_s, r.mean_s, standing.user(n).p95_s, r.p95_s) for n, r in many.users.items()]
    mean, mean_true, p95, p95_true = np.mean(np.array(rows), axis=0).tolist()
    return {"mean": mean / mean_true - 1, "p95": p95 / p95_true - 1}


def open_users(rates: Sequence[float]) -> list[User]:
    return [User(name=f"u{i}", source=DeviceId(f"u{i}"), rate_per_s=float(r)) for i, r in enumerate(rates)]


def at_server(random: np.random.Generator, load: float) -> Callable[[int, int], dict[str, float]]:
    """Open users with a server of 20 ms each."""
    count = int(random.integers(2, 9))
    rates = random.dirichlet(np.full(count, 4.0)) * load / 0.02
    return lambda requests, seed: compared(star(count, 4e7), open_users(rates), (0.01, 1.0), (1.0, 0.02), requests, seed)


def closed_at_server(random: np.random.Generator, load: float) -> Callable[[int, int], dict[str, float]]:
    """Users with one to three requests under way; the load follows from that."""
    count = 2 + int(load * 4)
    users = [User(name=f"u{i}", source=DeviceId(f"u{i}"), in_flight=int(random.integers(1, 4))) for i in range(count)]
    return lambda requests, seed: compared(star(count, 4e7), users, (0.03, 1.0), (1.0, 0.02), requests // 3, seed)


def on_wire(random: np.random.Generator, load: float) -> Callable[[int, int], dict[str, float]]:
    """Links of which one to five fill the wire of 10 MB/s."""
    count, rate = int(random.integers(4, 9)), 1e7 / random.uniform(1, 5)
    rates = random.dirichlet(np.full(count, 8.0)) * load * 1e7 / FRONTIER_BYTES
    rates = np.minimum(rates, 0.8 * rate / FRONTIER_BYTES)
    cluster = star(count, rate, shared=1e7)
    return lambda requests, seed: compared(cluster, open_users(rates), (0.001, 1.0), (1.0, 1e-4), requests, seed)


def on_radio(random: np.random.Generator, load: float) -> Callable[[int, int], dict[str, float]]:
    """Three senders on two channels, those on one 20 dB apart; `load` is scaled to what such a cell can carry."""
    distances = random.uniform(30, 60, 3)
    senders = tuple(Sender(device=f"u{i}", distance_m=float(d)) for i, d in enumerate(distances))
    cell = RadioCell(name="cell", receiver="server", sender=senders)
    tunings = {f"u{i}": Tuning(channel=c, watt=w) for i, (c, w) in enumerate(((0, 1.0), (0, 0.01), (1, 1.0)))}
    alone_s = FRONTIER_BYTES / cell.alone_bytes_per_s("u0")
    rates = np.full(3, 0.3 * load / alone_s / 2)
    cluster = star(3, 1e7, cell=cell)
    return lambda requests, seed: compared(
        cluster, open_users(rates), (0.001, 1.0), (1.0, 1e-4), requests // 2, seed, tunings
    )


SCENARIOS = {"server, open": at_server, "server, closed": closed_at_server, "wire": on_wire, "radio": on_radio}


def contention_cases(random: np.random.Generator, loads: Sequence[float], requests: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, make in SCENARIOS.items():
        for load in loads:
            scenario = make(random, load)
            error = scenario(requests, int(random.integers(1 << 30)))
            found.append({"scenario": name, "load": load, **error})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    asked = arguments(__doc__ or "", argv)
    random = np.random.default_rng(asked.seed)
    small = small_cases(random, 20 if asked.quick else 200)
    large = large_cases(random, 1 if asked.quick else 5, 60)
    loads = (0.3, 0.6) if asked.quick else (0.2, 0.35, 0.5, 0.6, 0.7, 0.8)
    held = contention_cases(random, loads, REQUESTS // 5 if asked.quick else REQUESTS)
    mean, p95 = ([abs(case[key]) for case in held] for key in ("mean", "p95"))
    figures = {}
    for key, name in (("local", "local_search"), ("prices", "decentralised"), ("selfish", "selfish")):
        losses = [case[key] for case in small]
        figures |= {f"{name}_loss_mean": float(np.mean(losses)), f"{name}_loss_max": max(losses)}
    figures |= {
        "large_gap_median": median([case["gap"] for case in large]),
        "large_s_max": max(case["seconds"] for case in large),
        "contention_error_median": median(mean),
        "contention_error_max": max(mean),
        "contention_p95_error_median": median(p95),
    }
    cases = {"small": small, "large": large, "contention": held}
    for name in SCENARIOS:
        row = [f"{case['load']:g}: {case['mean']:+.1%}" for case in held if case["scenario"] == name]
        print(f"{name:16s} {', '.join(row)}")
    finish(asked.json, figures, cases, context(asked.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
