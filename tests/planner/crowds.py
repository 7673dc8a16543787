"""Random joint problems for tests: users with a link of their own, some servers and a wire, offers drawn from a seed."""

from __future__ import annotations

import math

import numpy as np

from ecotone.planner.congestion import Congestion, Offer, Party, Queue, Visit


def crowd(
    random: np.random.Generator, num_users: int, num_offers: int, num_servers: int, *, aim: str = "mean", rate: float = 3.0,
    deadlines: bool = False, memory: bool = False, alike: bool = False,
) -> Congestion:  # fmt: skip
    """Offer 0 stays on the device; the others send over the user's link to a server, some of them over the wire as well."""
    queues = [Queue(f"link {i}") for i in range(num_users)] + [Queue(f"processor s{j}") for j in range(num_servers)]
    wire = len(queues)
    queues.append(Queue("wire", 1.0))
    parties = []
    here, link, server = 0.3, 0.03, 0.02
    for user in range(num_users):
        if not alike:
            here, link, server = random.uniform(0.2, 0.5), random.uniform(0.01, 0.08), random.uniform(0.005, 0.04)
        offers = [Offer(alone_s=here, visits=())]
        for number in range(1, num_offers):
            where, cut = (number % num_servers, 0.5) if alike else (int(random.integers(num_servers)), random.uniform(0, 1))
            send, work = link * (1 - cut / 2), server * (1 - cut) + 1e-4
            visits = [Visit(user, 1.0, send), Visit(num_users + where, 1.0, work)]
            if not alike and random.random() < 0.5:
                visits.append(Visit(wire, 1.0, link * 0.1))
            size = int(random.integers(1, 50))
            held = ((f"s{where}", f"{user}-{number}", size, 10),) if memory else ()
            offers.append(Offer(alone_s=here * cut + send + work, visits=tuple(visits), resident=held))
        parties.append(
            Party(
                name=f"u{user}", offers=tuple(offers), rate_per_s=rate if alike else float(random.uniform(0.5, 1.5) * rate),
                weight=1.0 if alike else float(random.choice([1, 1, 2, 5])),
                deadline_s=float(random.uniform(0.1, 0.6)) if deadlines else math.inf,
            )
        )  # fmt: skip
    sizes = {f"s{j}": 60 for j in range(num_servers)} if memory else {}
    return Congestion(parties=tuple(parties), queues=tuple(queues), aim=aim, memory_bytes=sizes)  # type: ignore[arg-type]
