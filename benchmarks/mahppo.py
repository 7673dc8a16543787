"""MAHPPO (arXiv:2205.11854): offload point, channel and power of many devices by trained actors, beside the best static.

The published cell (ecotone/simulator/cell.py and policies/cells.py: same slots, tested) with its measured tables of three
models; test as published: 5 devices at 50 m, 200 tasks each, 2 channels. Policies are those committed in tables/ (trained on
random distances by mahppo_world.py: some 5 minutes each on one core); a short training is repeated here as a check.

Contenders: *local*; *raw*, inputs at full power; *round_robin* channels at full power, the best of points 1 to 4; *greedy*,
each slot the action of best reward in this slot by simulating it; *best_static*, one action for all slots, searched by
planner/uplink.py on this very test with 1,500 simulations; *mahppo*, sampled as published, means over COPIES runs, and
*mahppo_likeliest*. Costs per task: `seconds` as published (whole slots of all devices until the last queue is empty),
`own_seconds` of a device that works, `joule`. Savings are relative to local, so measured.

Keys: largest saving over the models of seconds and of joules (each with its model in cases), 5 devices, of mahppo;
policy_minus_best_static: saving of the objective seconds + joules by mahppo minus that by best_static, the *worst* model;
saving_falls_with_users: 1 where that saving never rises by more than SLACK from 2 to 10 devices (model SWEPT). Beside them:
the saving over best_static in a *changing* world: devices walk, gains fade, tasks come in batches (see cases).
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks import report
from benchmarks.mahppo_world import CHANGING, COPIES, MODELS, RECIPES, SWEPT, USERS, environment, load, statics
from ecotone.policies.cell_rules import CellRule, Costs, Greedy, RoundRobin, Trained, local, measure, raw
from ecotone.policies.hybrid_ppo import train_mahppo

SLACK, CHANGING_SEED, CHANGING_COPIES, GREEDY_COPIES = 0.01, 1001, 64, 2
CHECK_SLOTS = 40_000


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns 0."""
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    copies = 16 if options.quick else COPIES
    names = [f"{model}_5" for model in MODELS] + [f"{SWEPT}_{count}" for count in USERS if count != 5]
    cases = {name: case(name, copies, options.seed, quick=options.quick) for name in names}
    changing = in_a_changing_world(copies=8 if options.quick else CHANGING_COPIES, quick=options.quick)
    check = {} if options.quick else trained_again()
    about = report.context(
        options.seed, copies=copies, recipes={name: str(recipe) for name, recipe in RECIPES.items()}, changing=str(CHANGING)
    )
    everything = {"test": cases, "changing": changing, "trained_again": check}
    report.finish(options.json, figures(cases, changing), everything, about)
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


def case(name: str, copies: int, seed: int, *, quick: bool) -> dict[str, Any]:
    """The published test of one model and number of devices; whatever is not random runs once."""
    began, recipe = time.perf_counter(), RECIPES[name]
    once, many = environment(recipe, 1, is_test=True), environment(recipe, copies, is_test=True)
    count, points = recipe.num_devices, once.cells.num_points
    found = {
        "local": measure(once, local(count, points), seed=seed),
        "raw": measure(once, raw(count, once.cells.radio.num_channels, 1.0), seed=seed),
        "best_static": measure(once, statics()[name], seed=seed),
        "mahppo": measure(many, Trained(load(name)), seed=seed),
        "mahppo_likeliest": measure(once, Trained(load(name), sample=False), seed=seed),
    }
    tried = [measure(once, RoundRobin(point), seed=seed) for point in range(1, points - 1)]
    found["round_robin"] = min(tried, key=objective)
    if not quick:
        found["greedy"] = measure(once, Greedy(), seed=seed)
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


def in_a_changing_world(copies: int, *, quick: bool) -> dict[str, Any]:
    """Walking, fading, batches: all contenders on the same episodes, none of which anyone has seen."""
    recipe = RECIPES["changing"]
    env, few = environment(recipe, copies, is_test=True), environment(recipe, GREEDY_COPIES, is_test=True)
    count, points = recipe.num_devices, env.cells.num_points
    rules: dict[str, CellRule] = {
        "local": local(count, points), "best_static": statics()["changing"], "mahppo": Trained(load("changing")),
        "mahppo_likeliest": Trained(load("changing"), sample=False),
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


def trained_again() -> dict[str, Any]:
    """A short training by the code of this state: the reward of a slot before and after."""
    recipe, began = RECIPES[f"{SWEPT}_5"], time.perf_counter()
    env = environment(recipe, COPIES)
    settings = replace(recipe.settings, slots=CHECK_SLOTS)
    test = environment(recipe, 64, is_test=True)
    actors = train_mahppo(env, settings)
    costs = measure(test, Trained(actors), seed=0)
    return {"slots": CHECK_SLOTS, "seconds": time.perf_counter() - began, "costs": _finite(costs)}


def _finite(costs: Costs) -> dict[str, float]:
    """For JSON: what never ended has -1 seconds."""
    return {name: value if value < 1e300 else -1.0 for name, value in asdict(costs).items()}


if __name__ == "__main__":
    sys.exit(main())
