"""MAHPPO (arXiv:2205.11854): offload point, channel and power of many devices by trained actors, beside the best static.

The published cell (ecotone/simulator/cell.py and policies/cells.py: same slots, tested) with its measured tables of three
models; test as published: 5 devices at 50 m, 200 tasks each, 2 channels. Policies are those committed in tables/, trained
by mahppo_world.py on random distances from the planner's action on; `--train` trains one of them anew and evaluates that.

Contenders: *local*; *raw*, inputs at full power; *round_robin* channels at full power, the best of points 1 to 4; *greedy*,
re-solving with a model, each slot the action of best reward in this slot by simulating it; *best_static*, one action for all
slots, searched by planner/uplink.py on this very test with 1,500 simulations (750 of ten devices), the oracle among fixed
actions; *mahppo*, the policy's likeliest actions, as it is deployed; *mahppo_sampled*, its draws, as published. Costs per
task: `seconds` as published (whole slots of all devices until the last queue is empty), `own_seconds` of a device that
works, `joule`. Savings are relative to local, so measured.

Keys: largest saving over the models of seconds and of joules (each with its model in cases), 5 devices, of mahppo;
policy_minus_best_static: saving of the objective seconds + joules by mahppo minus that by best_static, the *worst* model;
saving_falls_with_users: 1 where that saving never rises by more than SLACK from 2 to 10 devices (model SWEPT). Beside them:
the saving over best_static in a *changing* world: devices walk, gains fade, tasks come in batches (see cases).
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import report
from benchmarks.mahppo_world import CHANGING, MODELS, RECIPES, SWEPT, USERS, environment, learn, load, statics
from ecotone.policies.cell_rules import CellRule, Costs, Greedy, RoundRobin, Trained, local, measure, raw
from ecotone.policies.hybrid import Actors

SLACK, CHANGING_SEED, CHANGING_COPIES, GREEDY_COPIES = 0.01, 1001, 64, 4
SAMPLED_COPIES = 32


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    anew = "--train" in arguments
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", [a for a in arguments if a != "--train"])
    torch.set_num_threads(1)
    copies = 4 if options.quick else SAMPLED_COPIES
    names = [f"{model}_5" for model in MODELS] + [f"{SWEPT}_{count}" for count in USERS if count != 5]
    policies = {name: load(name) for name in [*names, "changing"]}
    if anew:
        policies[f"{SWEPT}_5"] = learn(f"{SWEPT}_5", RECIPES[f"{SWEPT}_5"].settings)[0]
    cases = {}
    for name in names:
        torch.manual_seed(options.seed)
        cases[name] = case(name, policies[name], copies, options.seed, quick=options.quick)
    changing = in_a_changing_world(policies["changing"], 8 if options.quick else CHANGING_COPIES, quick=options.quick)
    about = report.context(
        options.seed, copies=copies, recipes={name: str(recipe) for name, recipe in RECIPES.items()}, changing=str(CHANGING),
        trained_anew=anew,
    )  # fmt: skip
    report.finish(options.json, figures(cases, changing), {"test": cases, "changing": changing}, about)
    return 0


def figures(cases: dict[str, Any], changing: dict[str, Any]) -> dict[str, float]:
    """The keys, from the cases."""
    five = [cases[f"{model}_5"]["saved"] for model in MODELS]
    by_users = [cases[f"{SWEPT}_{count}"]["saved"]["mahppo"]["objective"] for count in USERS]
    gaps = [saved["mahppo"]["objective"] - saved["best_static"]["objective"] for saved in five]
    saved = changing["saved"]
    return {
        "latency_saved_5_users": max(s["mahppo"]["seconds"] for s in five),
        "energy_saved_5_users": max(s["mahppo"]["joule"] for s in five),
        "policy_minus_best_static": min(gaps),
        "saving_falls_with_users": float(all(b <= a + SLACK for a, b in itertools.pairwise(by_users))),
        "policy_minus_best_static_changing": saved["mahppo"]["objective"] - saved["best_static"]["objective"],
    }


def objective(costs: Costs, *, own: bool = False) -> float:
    return (costs.own_seconds if own else costs.seconds) + costs.joule


def savings(found: dict[str, Costs], *, own: bool = False) -> dict[str, dict[str, float]]:
    """Of all contenders, relative to local."""
    base = found["local"]
    rows = {}
    for name, costs in found.items():
        seconds, own_seconds, joule = costs.saved(base)
        rows[name] = {
            "seconds": seconds, "own_seconds": own_seconds, "joule": joule,
            "objective": 1 - objective(costs, own=own) / objective(base, own=own),
        }  # fmt: skip
    return rows


def case(name: str, actors: Actors, copies: int, seed: int, *, quick: bool) -> dict[str, Any]:
    """The published test of one model and number of devices; whatever is not random runs once."""
    began, recipe = time.perf_counter(), RECIPES[name]
    once, many = environment(recipe, 1, is_test=True), environment(recipe, copies, is_test=True)
    count, points = recipe.num_devices, once.cells.num_points
    found = {
        "local": measure(once, local(count, points), seed=seed),
        "best_static": measure(once, statics()[name], seed=seed),
        "mahppo": measure(once, Trained(actors, sample=False), seed=seed),
        "mahppo_sampled": measure(many, Trained(actors), seed=seed),
    }
    if not quick:
        found["greedy"] = measure(once, Greedy(), seed=seed)
    if not quick and count == 5:
        found["raw"] = measure(once, raw(count, once.cells.radio.num_channels, 1.0), seed=seed)
        found["round_robin"] = min((measure(once, RoundRobin(p), seed=seed) for p in range(1, points - 1)), key=objective)
    saved = savings(found)
    print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    show(found, saved)
    return {"costs": {n: _finite(c) for n, c in found.items()}, "saved": saved}


def show(found: dict[str, Costs], saved: dict[str, dict[str, float]]) -> None:
    for which, costs in found.items():
        row = saved[which]
        print(
            f"  {which:18s} {1e3 * costs.seconds:8.1f} ms {1e3 * costs.own_seconds:8.1f} own {1e3 * costs.joule:7.1f} mJ"
            f"   saved {row['seconds']:7.1%} {row['own_seconds']:7.1%} {row['joule']:7.1%}, both {row['objective']:7.1%}",
            file=sys.stderr,
        )


def in_a_changing_world(actors: Actors, copies: int, *, quick: bool) -> dict[str, Any]:
    """Walking, fading, batches: all contenders on the same episodes, none of which anyone has seen."""
    torch.manual_seed(CHANGING_SEED)
    recipe = RECIPES["changing"]
    env, few = environment(recipe, copies, is_test=True), environment(recipe, GREEDY_COPIES, is_test=True)
    count, points = recipe.num_devices, env.cells.num_points
    rules: dict[str, CellRule] = {
        "local": local(count, points), "best_static": statics()["changing"],
        "mahppo": Trained(actors, sample=False), "mahppo_sampled": Trained(actors),
    }  # fmt: skip
    found = {name: measure(env, rule, seed=CHANGING_SEED) for name, rule in rules.items()}
    found["round_robin"] = min(
        (measure(env, RoundRobin(point), seed=CHANGING_SEED) for point in range(1, points - 1)),
        key=lambda costs: objective(costs, own=True),
    )
    if not quick:
        found["greedy"] = measure(few, Greedy(rounds=1), seed=CHANGING_SEED)
    saved = savings(found, own=True)
    print("changing world", file=sys.stderr)
    show(found, saved)
    return {"costs": {n: _finite(c) for n, c in found.items()}, "saved": saved, "greedy_copies": GREEDY_COPIES}


def _finite(costs: Costs) -> dict[str, float]:
    """For JSON: what never ended has -1 seconds."""
    return {name: value if value < 1e300 else -1.0 for name, value in asdict(costs).items()}


if __name__ == "__main__":
    sys.exit(main())
