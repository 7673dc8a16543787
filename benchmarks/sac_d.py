"""SAC-d (arXiv:2201.02968): exit, cut and bits by a trained policy, beside best static, oracle and solving again.

The world: AlexNet with five exits (accuracies measured, seconds assumed: branchy_alexnet.py) on a device with a server, one
decision a request (ecotone/policies/stream.py), reward accuracy where the answer is in time, else less the later it is.
Scenarios (policies/conditions.py): *stationary*, where all is known; four with hidden state (*traces*, *fading*, *bursts*,
*load*). The two policies are those committed in tables/ (trained by sac_d_world.py on other seeds, a minute or two each).
`--train` trains the stationary one anew, and a DQN as long, and evaluates these.

Contenders on the same episodes: *device_only*, *edge_only* (8-bit input); *best_static*, the best of all 113 actions for
each deadline in hindsight on these very episodes, and the same chosen on training episodes; *edgent_static*,
*edgent_dynamic*; *resolving*, the table solved before each request at the state as believed, with the safety margin that was
best in training (and *resolving_plain*, without); *greedy*, the full-table oracle, which knows the present as it is.

Keys: mean reward of the policy over that of the oracle, stationary; over that of best_static, mean rewards over the four
hidden scenarios; share of requests in time there. Beside them: over resolving and over the oracle where hidden; whether the
share in time rises with the link's rate, and exits get earlier and bits fewer as deadlines tighten (1: throughout).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks import report, sac_d_world
from benchmarks.sac_d_world import POLICIES, actions, dqn, load, train
from ecotone.policies.actions import ActionTable
from ecotone.policies.conditions import HIDDEN, TRAIN_SEED, Episodes, Scenario, episodes, scenario
from ecotone.policies.learned import Trained
from ecotone.policies.rules import (
    EdgentDynamic,
    EdgentStatic,
    Fixed,
    Greedy,
    Network,
    Played,
    Resolving,
    Rule,
    best_static,
    play,
)
from ecotone.policies.training import best_resolving

SIZE, QUICK_SIZE = 64, 16
POLICY_OF = {"stationary": "stationary", **dict.fromkeys(HIDDEN, "hidden")}
BANDS = 5  # of rates, for the shapes


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    anew = "--train" in arguments
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", [a for a in arguments if a != "--train"])
    torch.set_num_threads(1)
    size = QUICK_SIZE if options.quick else SIZE
    policies = {name: load(name) for name in sorted(set(POLICY_OF.values()))}
    rivals: dict[str, Network] = {}
    if anew:
        policies["stationary"], rivals["dqn"] = train("stationary"), Network(dqn("stationary"))
    cases = [measure(name, policies[which], options.seed, size, rivals) for name, which in POLICY_OF.items()]
    shape = shapes(policies["stationary"], options.seed, size)
    about = report.context(
        options.seed, actions=len(actions()), episodes=size, requests=scenario("fading").num_requests, trained_anew=anew,
        policies={name: str(recipe) for name, recipe in POLICIES.items()},
    )  # fmt: skip
    report.finish(options.json, figures(cases, shape), {"scenarios": cases, "shapes": shape}, about)
    return 0


def figures(cases: list[dict[str, Any]], shape: dict[str, Any]) -> dict[str, float]:
    """The keys, from the cases."""
    reward = {case["scenario"]: {name: x["reward"] for name, x in case["contenders"].items()} for case in cases}

    def hidden(name: str) -> float:
        return float(np.mean([reward[s][name] for s in HIDDEN]))

    in_time = [case["contenders"]["sac_d"]["in_time"] for case in cases if case["scenario"] in HIDDEN]
    return {
        "policy_over_oracle_stationary": reward["stationary"]["sac_d"] / reward["stationary"]["greedy"],
        "policy_over_best_static_hidden": hidden("sac_d") / hidden("best_static"),
        "deadline_hit_rate": float(np.mean(in_time)),
        "policy_over_resolving_hidden": hidden("sac_d") / hidden("resolving"),
        "policy_over_oracle_hidden": hidden("sac_d") / hidden("greedy"),
        "hits_rise_with_rate": shape["hits_rise_with_rate"],
        "exits_earlier_when_tighter": shape["exits_earlier_when_tighter"],
        "bits_fewer_when_tighter": shape["bits_fewer_when_tighter"],
    }


# ---- contenders ---------------------------------------------------------------------------------------------------------


def action(table: ActionTable, leaves_at: str, cut: int, codec: str) -> int:
    return list(zip(table.exits, table.cuts, table.codecs, strict=True)).index((leaves_at, cut, codec))


def rules(table: ActionTable, of: Scenario, test: Episodes, size: int) -> dict[str, Rule]:
    """All that need nothing but the table and episodes."""
    return {
        "device_only": Fixed(action(table, "", -1, "none"), {}),
        "edge_only": Fixed(action(table, "", 0, "int8"), {}),
        "best_static": best_static(table, test),
        "best_static_of_training": best_static(table, episodes(of, TRAIN_SEED + 7, size)),
        "edgent_static": EdgentStatic(),
        "edgent_dynamic": EdgentDynamic(),
        "resolving_plain": Resolving(),
        "greedy": Greedy(),
    }


def measure(name: str, trained: Trained, seed: int, size: int, rivals: Mapping[str, Network]) -> dict[str, Any]:
    """One scenario, all contenders on the same episodes."""
    began, table, of = time.perf_counter(), actions(), scenario(name)
    test, margin = episodes(of, seed, size), best_resolving(table, [of], size)[of.name]
    contenders = {**rules(table, of, test, size), "resolving": margin, "sac_d": Network(trained.network)}
    contenders |= rivals if name == "stationary" else {}
    found = {
        which: summary(play(rule, table, test, ranges=trained.about.ranges), table) for which, rule in contenders.items()
    }
    case = {
        "scenario": name, "policy": trained.about.name, "contenders": found,
        "resolving_margin": margin.margin, "resolving_believes": "last rate" if margin.latest else "mean rate",
    }  # fmt: skip
    print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for which, values in found.items():
        print(f"  {which:24s} reward {values['reward']:8.4f}  in time {values['in_time']:.3f}", file=sys.stderr)
    return case


def summary(played: Played, table: ActionTable) -> dict[str, float]:
    """Mean reward, share in time, accuracy of what is in time, share sent to the server."""
    hits, accuracy = played.hits, table.accuracy[played.actions]
    return {
        "reward": played.mean_reward, "in_time": played.hit_rate,
        "accuracy_in_time": float(accuracy[hits].mean()) if hits.any() else 0.0,
        "sent": float(table.crosses[played.actions].mean()),
    }  # fmt: skip


# ---- shapes -------------------------------------------------------------------------------------------------------------


def shapes(trained: Trained, seed: int, size: int) -> dict[str, Any]:
    """How hits depend on the rate, and exits and bits on the deadline, of the stationary policy on evenly spread rates."""
    of, table = scenario("stationary"), actions()
    low, high = np.log(of.rates_bytes_per_s)
    edges, rows, hits, accuracy = np.exp(np.linspace(low, high, BANDS + 1)), [], [], []
    for band in range(BANDS):
        narrow = replace(of, rates_bytes_per_s=(edges[band], edges[band + 1]))
        played = play(Network(trained.network), table, episodes(narrow, seed, size), ranges=trained.about.ranges)
        hits.append(played.hit_rate)
        accuracy.append(played.mean_reward)
        rows.append({"mbit_per_s": float(edges[band] * 8e-6), "in_time": played.hit_rate, "reward": played.mean_reward})
    by_deadline = []
    for deadline in of.deadlines_s:
        one = replace(of, deadlines_s=(deadline,))
        played = play(Network(trained.network), table, episodes(one, seed, size), ranges=trained.about.ranges)
        chosen = played.actions
        sent = table.crosses[chosen]
        by_deadline.append(
            {
                "deadline_s": deadline, "in_time": played.hit_rate, "accuracy": float(table.accuracy[chosen].mean()),
                "depth": float(np.array(table.depths)[chosen].mean()), "sent": float(sent.mean()),
                "bits": float(bits(table)[chosen][sent].mean()) if sent.any() else 0.0,
            }
        )  # fmt: skip
    return {
        "by_rate": rows, "by_deadline": by_deadline,
        "hits_rise_with_rate": float(_rises(hits)), "reward_rises_with_rate": float(_rises(accuracy)),
        "exits_earlier_when_tighter": float(_rises([row["depth"] for row in by_deadline])),
        "bits_fewer_when_tighter": float(_rises([row["bits"] for row in by_deadline])),
    }  # fmt: skip


def bits(table: ActionTable) -> np.ndarray[Any, Any]:
    """Bits of each action's codec, 0 where nothing crosses."""
    width = {codec: b for b, codec in sac_d_world.net.CODECS.items()}
    return np.array([width.get(codec, 0) for codec in table.codecs])


def _rises(values: list[float], slack: float = 0.005) -> bool:
    """Never falls by more than `slack` of the largest."""
    return all(b >= a - slack * max(values) for a, b in itertools.pairwise(values))


if __name__ == "__main__":
    sys.exit(main())
