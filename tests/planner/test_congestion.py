"""The joint choice in numbers: latencies by hand, search and bound against enumeration, admission, and 200 users."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from crowds import crowd

from ecotone.planner.bounds import lower_bound
from ecotone.planner.choosing import choose_all
from ecotone.planner.congestion import TAIL, Congestion, Offer, Party, Queue, Visit
from ecotone.planner.objective import PlannerError

pytestmark = pytest.mark.pure

AIMS = ("mean", "worst", "fair")


def enumerated(problem: Congestion) -> tuple[float, float]:
    """Least weight refused and then least value over all choices, straight from the definitions."""
    best = (math.inf, math.inf)
    for choice in itertools.product(*(range(-1, len(p.offers)) for p in problem.parties)):
        if not problem.violations(np.array(choice)):
            refused = sum(p.weight for p, o in zip(problem.parties, choice, strict=True) if o < 0)
            best = min(best, (round(refused, 9), written_out(problem, choice)))
    return best


def written_out(problem: Congestion, choice: tuple[int, ...]) -> float:
    """Equations 1 to 3 of congestion.py without arrays."""
    load, moment = [0.0] * len(problem.queues), [0.0] * len(problem.queues)
    picked = [(p, p.offers[o]) for p, o in zip(problem.parties, choice, strict=True) if o >= 0]
    for party, offer in picked:
        for v in offer.visits:
            own = party.rate_per_s * v.share * v.seconds
            load[v.queue] += own
            moment[v.queue] += own * (v.seconds if problem.queues[v.queue].factor == 0.5 else 1.0)
    seconds = []
    for party, offer in picked:
        wait = 0.0
        for v in offer.visits:
            factor = problem.queues[v.queue].factor
            delay = factor * moment[v.queue] / (1 - load[v.queue])
            wait += v.share * delay * (1.0 if factor == 0.5 else v.seconds)
        seconds.append((party, offer.alone_s + wait))
    if not seconds:
        return 0.0
    weight = sum(p.weight for p, _ in seconds)
    if problem.aim == "worst":
        return max(t / min(o.alone_s for o in p.offers) for p, t in seconds)
    if problem.aim == "fair":
        return math.exp(sum(p.weight * math.log(t) for p, t in seconds) / weight)
    return sum(p.weight * t for p, t in seconds) / weight


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("aim", AIMS)
def test_the_choice_is_that_of_enumeration_and_the_bound_is_below(aim: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    problem = crowd(
        random, 4, 3, 2, aim=aim, rate=(3.0, 20.0, 60.0)[seed % 3], deadlines=seed % 2 == 0, memory=seed % 5 == 0
    )  # fmt: skip
    found = choose_all(problem)
    refused, value = enumerated(problem)
    assert found.is_exact
    assert float(problem.weight[found.choice < 0].sum()) == pytest.approx(refused)
    assert found.value == pytest.approx(value)
    assert not problem.violations(found.choice)
    assert lower_bound(problem, found.choice >= 0, found.value) <= value * (1 + 1e-6)


@pytest.mark.parametrize("aim", AIMS)
def test_alternatives_are_what_each_change_would_come_to(aim: str) -> None:
    random = np.random.default_rng(5)
    problem = crowd(random, 6, 4, 2, aim=aim, rate=6.0, deadlines=True)
    choice = random.integers(-1, 4, 6)
    for user in range(6):
        seconds, fits = problem.alternatives(choice, user)
        for offer in range(4):
            other = choice.copy()
            other[user] = offer
            assert seconds[offer] == pytest.approx(problem.latencies(other), nan_ok=True)
            assert fits[offer] == (not problem.violations(other))
            guide = float(problem.guides(seconds)[offer])
            if aim != "worst":
                assert guide == pytest.approx(problem.value(other))
            else:
                assert problem.value(other) * 6 ** (-1 / 16) <= guide <= problem.value(other) * (1 + 1e-12)


@pytest.mark.parametrize(("aim", "limit"), [("mean", 0.06), ("worst", 0.35), ("fair", 0.2)])
def test_forty_users_come_close_to_their_bound(aim: str, limit: float) -> None:
    problem = crowd(np.random.default_rng(1), 40, 8, 4, aim=aim)
    found = choose_all(problem, num_starts=1, time_limit_s=20.0)
    assert not problem.violations(found.choice)
    assert (found.choice >= 0).all()
    assert found.gap <= limit
    assert found.value < problem.value(np.zeros(40, dtype=np.intp))  # all at home


def test_two_hundred_users_are_placed_in_seconds() -> None:
    problem = crowd(np.random.default_rng(2), 200, 12, 10)
    start = time.process_time()
    found = choose_all(problem, num_starts=1, time_limit_s=60.0)
    assert time.process_time() - start < 30  # a few seconds on an idle core
    assert found.gap <= 0.06


def test_a_bound_needs_no_choice() -> None:
    problem = crowd(np.random.default_rng(3), 5, 3, 1, rate=400.0)
    only_server = Congestion(
        parties=tuple(Party(name=p.name, offers=p.offers[1:], rate_per_s=p.rate_per_s) for p in problem.parties),
        queues=problem.queues,
    )  # fmt: skip
    assert math.isinf(lower_bound(only_server, np.ones(5, dtype=bool), math.inf))
    assert lower_bound(only_server, np.zeros(5, dtype=bool), math.inf) == 0.0


# ---- admission, in numbers -------------------------------------------------------------------------------------------


def server(rates: list[float], weights: list[float], seconds: float = 0.1, **more: object) -> Congestion:
    offer = Offer(alone_s=seconds, visits=(Visit(0, 1.0, seconds),))
    parties = tuple(
        Party(name=f"u{i}", offers=(offer,), rate_per_s=r, weight=w)
        for i, (r, w) in enumerate(zip(rates, weights, strict=True))
    )
    return Congestion(parties=parties, queues=(Queue("processor edge"),), **more)  # type: ignore[arg-type]


def test_of_users_that_do_not_all_fit_the_greatest_weight_goes_in() -> None:
    """Loads 0.4, 0.4, 0.4, 0.9: the first three do not fit together, any two of them do, the last fits alone."""
    found = choose_all(server([4.0, 4.0, 4.0, 9.0], [1.0, 1.0, 1.0, 2.5]))
    assert found.choice.tolist() == [-1, -1, -1, 0]
    found = choose_all(server([4.0, 4.0, 4.0, 9.0], [1.0, 1.0, 1.0, 1.5]))
    assert sorted(found.choice.tolist()[:3]) == [-1, 0, 0]
    assert found.choice[3] == -1


def test_what_is_too_much_is_said_with_its_figure() -> None:
    problem = server([4.0, 9.0], [1.0, 1.0])
    assert problem.violations(np.array([0, 0])) == ["processor edge would be at 130%, at most 95% is promised"]
    assert problem.violations(np.array([0, -1])) == []


def test_a_deadline_is_held_against_the_tail_of_the_wait() -> None:
    wait = 0.4 * 0.1 / 2 / 0.6
    for deadline, fits in ((0.1 + (1 + TAIL) * wait + 1e-6, True), (0.1 + (1 + TAIL) * wait - 1e-6, False)):
        problem = server([4.0], [1.0])
        party = Party(name="a", offers=problem.parties[0].offers, rate_per_s=4.0, deadline_s=deadline)
        problem = Congestion(parties=(party,), queues=problem.queues)
        assert (problem.violations(np.array([0])) == []) is fits
        assert choose_all(problem).choice.tolist() == [0 if fits else -1]


def test_equal_stages_of_a_device_are_held_once() -> None:
    offer = Offer(alone_s=0.1, visits=(), resident=(("edge", "net 0 4", 60, 10),))
    other = Offer(alone_s=0.1, visits=(), resident=(("edge", "net 0 5", 60, 20),))

    def problem(*offers: Offer) -> Congestion:
        parties = tuple(Party(name=f"u{i}", offers=(o,), rate_per_s=1.0) for i, o in enumerate(offers))
        return Congestion(parties=parties, queues=(), memory_bytes={"edge": 100})

    assert problem(offer, offer).violations(np.array([0, 0])) == []
    assert problem(offer, other).violations(np.array([0, 0])) == ["edge would hold 140 bytes and has 100"]


def test_nobody_and_no_offers_are_refused() -> None:
    with pytest.raises(PlannerError, match="nobody: no plan to choose from"):
        Congestion(parties=(), queues=())
    with pytest.raises(PlannerError, match="a: no plan to choose from"):
        Congestion(parties=(Party(name="a", offers=(), rate_per_s=1.0),), queues=())
