"""From a measured model to a trained policy: choose few plans that serve all conditions, train SAC-d, measure it honestly.

Steps: (1) every (exit, cut, codec) between the source and the server that computes the model soonest; (2) greedily those few
whose best one has the largest mean reward over a grid of rates, loads and deadlines, as long as every device holds them
together; (3) discrete_sac.py on scenarios of conditions.py, set to the rates and deadlines asked for; (4) on other seeds
the reward of the policy beside the best static plan in hindsight, re-solving with the margin that did best in training, and
the oracle that knows the present. The figures go into the file: whoever runs it can see what it was worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ecotone.cluster import Cluster, DeviceId
from ecotone.cost import CostModel, resident_bytes
from ecotone.graph import Graph
from ecotone.policies.actions import ActionTable, FloatArray, device_server_plans, table_of
from ecotone.policies.belief import FEATURES
from ecotone.policies.conditions import HIDDEN, TRAIN_SEED, Scenario, episodes, scenario
from ecotone.policies.discrete_sac import Progress, SacSettings, train_sac
from ecotone.policies.environment import OnDemandVectorEnv
from ecotone.policies.learned import Trained, TrainedAbout
from ecotone.policies.rules import Greedy, Network, Resolving, Rule, best_static, play
from ecotone.policies.stream import Reward, ranges_of
from ecotone.profile import Profile
from ecotone.units import EcotoneError

__all__ = ["MARGINS", "Asked", "best_resolving", "choose_plans", "compare", "scenarios_of", "train_policy"]

MARGINS = (1.0, 1.1, 1.25, 1.5, 2.0)
EPISODES = 64
_GRID_RATES, _GRID_DEADLINES, _GRID_LOADS = 12, 4, (1.0, 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a policy is to be trained for."""

    rates_bytes_per_s: tuple[float, float]
    deadlines_s: tuple[float, ...]
    period_s: float = 0.0  # between requests; 0: four times the longest deadline
    most_plans: int = 8
    scenarios: tuple[str, ...] = HIDDEN
    num_requests: int = 200  # an episode
    settings: SacSettings = field(default_factory=SacSettings)


def scenarios_of(asked: Asked, one_way_s: float) -> tuple[Scenario, ...]:
    """The scenarios by name, at the rates, deadlines and latency of the world asked for."""
    period_s = asked.period_s or 4 * max(asked.deadlines_s)
    found = []
    for name in asked.scenarios:
        of = scenario(name)
        found.append(
            replace(
                of, rates_bytes_per_s=asked.rates_bytes_per_s, deadlines_s=asked.deadlines_s,
                num_requests=asked.num_requests, one_way_s=max(one_way_s, 1e-5),
                period_s=period_s if name != "queue" else min(asked.deadlines_s),
                trace_share=asked.rates_bytes_per_s[1] / _FULL_BYTES_PER_S, probe_s=max(of.probe_s, 2 * period_s),
            )
        )  # fmt: skip
    return tuple(found)


_FULL_BYTES_PER_S = 40e6 / 8  # about the largest rate of the link models


def choose_plans(
    model: CostModel, asked: Asked, codecs: Sequence[str], server: DeviceId, executors: tuple[str, str]
) -> ActionTable:
    """Steps 1 and 2; the first plan is the one best on average. Raises EcotoneError where nothing can run."""
    table = table_of(device_server_plans(model, server, codecs, executors), model)
    values = _grid_rewards(table, asked, model)
    graphs = {model.graph.content_hash(): model.graph}
    room = {d.name: d.memory_bytes for d in model.cluster.devices}

    def fits(chosen: list[int]) -> bool:
        held = resident_bytes(graphs, [table.plans[i] for i in chosen])
        return all(size <= room[device] for device, size in held.items())

    kept: list[int] = []
    while len(kept) < asked.most_plans:
        now = values[kept].max(axis=0) if kept else np.full(values.shape[1], -math.inf)
        gains = np.maximum(values, now).mean(axis=1)
        order = [i for i in np.argsort(-gains, kind="stable").tolist() if i not in kept]
        chosen = next((i for i in order if fits([*kept, i])), None)
        if chosen is None or (kept and gains[chosen] - now.mean() < 1e-4):
            break
        kept.append(chosen)
    if len(kept) < 2:
        raise EcotoneError(
            f"{len(kept)} plan is best at all rates and deadlines asked for and fits into memory: there is nothing to "
            "choose; give other --rates or --deadline, or a profile with codecs and accuracies"
        )
    return table_of([table.plans[i] for i in kept], model)


def _grid_rewards(table: ActionTable, asked: Asked, model: CostModel) -> FloatArray:
    """(A, conditions): the reward of each action alone in the system."""
    link = next((k for k in model.cluster.links if (k.source, k.target) == (table.device, table.server)), None)
    rates = np.geomspace(*asked.rates_bytes_per_s, _GRID_RATES)
    deadlines = np.geomspace(min(asked.deadlines_s), max(asked.deadlines_s), _GRID_DEADLINES)
    rate, deadline, load = (x.ravel() for x in np.meshgrid(rates, deadlines, _GRID_LOADS))
    latency = table.latency_s(rate, link.latency_s if link else 0.0, 1.0, load)
    reward = Reward()
    late = -np.minimum(reward.k * (latency / deadline[:, None] - 1), reward.worst)
    found: FloatArray = np.where(latency <= deadline[:, None], table.accuracy, late).T
    return found


def best_resolving(table: ActionTable, scenarios: Sequence[Scenario], size: int = EPISODES) -> dict[str, Resolving]:
    """For each scenario the margin, and the rate believed, with which re-solving did best on training seeds."""
    found = {}
    for of in scenarios:
        train = episodes(of, TRAIN_SEED, size)
        tried = [Resolving(margin, latest) for margin in MARGINS for latest in (True, False)]
        found[of.name] = max(tried, key=lambda rule: play(rule, table, train).mean_reward)
    return found


def compare(table: ActionTable, scenarios: Sequence[Scenario], policy: Rule, seed: int = 0) -> dict[str, float]:
    """Mean rewards on seeds not trained on, of the policy and of its rivals, and the share of requests in time."""
    resolving = best_resolving(table, scenarios)
    sums: dict[str, list[float]] = {}
    for of in scenarios:
        test = episodes(of, seed, EPISODES)
        rules: dict[str, Rule] = {
            "policy": policy, "best_static": best_static(table, test), "resolving": resolving[of.name], "oracle": Greedy()
        }  # fmt: skip
        for name, rule in rules.items():
            played = play(rule, table, test, ranges=ranges_of(scenarios))
            sums.setdefault(f"{name}_reward", []).append(played.mean_reward)
            sums.setdefault(f"{name}_in_time", []).append(played.hit_rate)
    return {name: round(float(np.mean(values)), 6) for name, values in sums.items()}


def train_policy(
    name: str,
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    asked: Asked,
    codecs: Sequence[str],
    progress: Progress | None = None,
) -> Trained:
    """A policy for the source of `cluster` and its fastest other device; raises EcotoneError, also without the extra."""
    model = CostModel(graph, cluster, profile)
    server, executors = _fastest(model)
    table = choose_plans(model, asked, codecs, server, executors)
    link = model.link(cluster.source, server)
    scenarios = scenarios_of(asked, link.latency_s if link else 0.0)
    env = OnDemandVectorEnv(table, scenarios, EPISODES)
    network = train_sac(env, asked.settings, progress)
    measured = compare(table, scenarios, Network(network))
    about = TrainedAbout(
        name=name, graph_hash=graph.content_hash(), device=cluster.source, server=server,
        plans=tuple(plan.with_epoch(0) for plan in table.plans), ranges=ranges_of(scenarios), features=FEATURES,
        scenarios=asked.scenarios, seed=asked.settings.seed, measured=measured,
    )  # fmt: skip
    return Trained(about, network)


def _fastest(model: CostModel) -> tuple[DeviceId, tuple[str, str]]:
    """The device but the source that computes the whole model soonest, and the best executor of each of the two."""
    last, best = model.graph.num_blocks, {}
    for device in model.devices:
        times = {e: model.stage_times(device, e) for e in model.executors(device)}
        seconds = {e: t.seconds(0, last)[0] for e, t in times.items() if t is not None}
        if seconds:
            executor = min(seconds, key=lambda e: (seconds[e], e))
            best[device] = (seconds[executor], executor)
    source = model.cluster.source
    others = {d: s for d, (s, _) in best.items() if d != source and model.link(source, d) and model.link(d, source)}
    if source not in best or not others:
        raise EcotoneError(f"a learned policy needs measured times of {source} and of a device that it has links with")
    server = min(others, key=lambda d: (others[d], d))
    return server, (best[source][1], best[server][1])
