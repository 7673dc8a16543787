"""What mahppo and its training share: which policies and fixed actions there are, and how they were made.

    python -m benchmarks.mahppo_world             trains all policies, searches all fixed actions (hours on one core)
    python -m benchmarks.mahppo_world resnet18_5  one policy;  `static:resnet18_5` one fixed action;  `static` all of them

Policies are in tables/mahppo_*.safetensors, fixed actions in tables/mahppo_static.json. Training: the published distances (1
to 100 m), tasks and cut-off; evaluation: the published test (50 m, 200 tasks), on which the fixed actions were searched.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecotone.offload import PUBLISHED
from ecotone.planner.uplink import CellAction, Uplink, best_static
from ecotone.policies.cell_rules import Fixed, measure
from ecotone.policies.cells import STILL, Cells, World
from ecotone.policies.environment import CellVectorEnv
from ecotone.policies.hybrid import Actors, CellAbout, load_actors, save_actors
from ecotone.policies.hybrid_ppo import PpoSettings, train_mahppo
from ecotone.radio import Radio
from ecotone.schema import write_aside
from ecotone.simulator.cell import Cell, run_static

FOLDER = Path(__file__).parent / "tables"
STATIC = FOLDER / "mahppo_static.json"
MODELS, USERS, SWEPT = ("mobilenetv2", "resnet18", "vgg11"), (2, 3, 5, 7, 10), "mobilenetv2"
DECADES, COPIES = 4.0, 256
CHANGING = World(walk_m_per_s=1.5, fading_db=4.0, fading_keeps=0.7, batches_per_s=0.12, batch=40.0, slots=60)
CHANGING_TASKS = 40.0
STATIC_SCORES, CHANGING_SCORES, CHANGING_COPIES = 1500, 400, 16
SEEN_SEED = 7  # of the changing world's episodes on which its fixed action is searched; evaluation has others


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    model: str
    num_devices: int
    settings: PpoSettings
    sees_channels: bool = False
    world: World = STILL


def _recipes() -> dict[str, Recipe]:
    found = {}
    for model in MODELS:
        for count in USERS if model == SWEPT else (5,):
            found[f"{model}_{count}"] = Recipe(model=model, num_devices=count, settings=PpoSettings(slots=400_000))
    found["changing"] = Recipe(
        model=SWEPT, num_devices=5, settings=PpoSettings(slots=400_000), sees_channels=True, world=CHANGING
    )
    return found


RECIPES = _recipes()


def environment(recipe: Recipe, copies: int, *, is_test: bool = False) -> CellVectorEnv:
    """The environment of a recipe; `is_test`: the published test, or a whole episode of the changing world."""
    changes = bool(recipe.world.slots)
    cells = Cells(
        PUBLISHED[recipe.model], num_copies=copies, num_devices=recipe.num_devices, world=recipe.world,
        mean_tasks=CHANGING_TASKS if changes else 200.0,
    )  # fmt: skip
    limit = 0 if is_test or changes else None
    return CellVectorEnv(
        cells, decades=DECADES, sees_channels=recipe.sees_channels, limit=limit, is_test=is_test and not changes
    )


def path_of(name: str) -> Path:
    return FOLDER / f"mahppo_{name}.safetensors"


def load(name: str) -> Actors:
    return load_actors(path_of(name))[0]


def train(name: str) -> None:
    """Train and write one policy."""
    recipe, began = RECIPES[name], time.process_time()
    env = environment(recipe, COPIES)

    def say(done: int, total: int, what: str) -> None:
        if done % 20 == 0:
            print(f"{name}: {done} of {total}, {what}", file=sys.stderr, flush=True)

    actors = train_mahppo(env, recipe.settings, say)
    about = CellAbout(
        model=recipe.model, num_devices=recipe.num_devices, num_points=env.cells.num_points,
        num_channels=env.cells.radio.num_channels, decades=DECADES, sees_channels=recipe.sees_channels,
        slots=recipe.settings.slots, seed=recipe.settings.seed, about=str(recipe.settings),
    )  # fmt: skip
    save_actors(path_of(name), actors, about)
    print(f"{name}: {time.process_time() - began:.0f} s of one core", file=sys.stderr)


# ---- fixed actions ------------------------------------------------------------------------------------------------------


def statics() -> dict[str, Fixed]:
    """The best fixed action of each world, as searched."""
    found = json.loads(STATIC.read_text())
    return {n: Fixed(tuple(a["points"]), tuple(a["channels"]), tuple(a["powers"])) for n, a in found.items()}


def search(model: str, count: int, scores: int = STATIC_SCORES, seed: int = 0) -> CellAction:
    """The best fixed action of the published test, by planner/uplink.py."""
    cell = Cell(PUBLISHED[model], num_devices=count)

    def score(action: CellAction, limit: float) -> tuple[float, float]:
        most = 400 if limit > 1.0 else round(limit * cell.mean_tasks / cell.slot_s) + 1
        tally = run_static(cell, action.points, action.channels, action.powers, max_slots=most)
        return (tally.s_per_task, tally.joule_per_task) if tally.is_done else (1e6, 1e6)

    return best_static([Uplink(profile=PUBLISHED[model])] * count, Radio(), score, num_scores=scores, seed=seed)


def search_changing() -> CellAction:
    """Of the changing world: many random actions, then climbing from the best, all scored on the same seen episodes."""
    recipe, random = RECIPES["changing"], np.random.default_rng(0)
    env, count = environment(recipe, CHANGING_COPIES), recipe.num_devices
    points, channels = env.cells.num_points, env.cells.radio.num_channels

    def drawn() -> list[np.ndarray[Any, Any]]:
        return [
            random.integers(points, size=count),
            random.integers(channels, size=count),
            10 ** random.uniform(-4, 0, count),
        ]

    def value(action: list[np.ndarray[Any, Any]]) -> float:
        costs = measure(env, Fixed(*(tuple(x.tolist()) for x in action)), seed=SEEN_SEED)
        return costs.own_seconds + costs.joule

    tried = [drawn() for _ in range(CHANGING_SCORES // 2)]
    best = min(tried, key=value)
    lowest = value(best)
    for _ in range(CHANGING_SCORES // 2):
        other, fresh, i, kind = [x.copy() for x in best], drawn(), int(random.integers(count)), int(random.integers(4))
        if kind < 3:
            other[kind][i] = fresh[kind][i]
        else:
            other[2] = np.minimum(1.0, other[2] * np.exp(0.3 * random.standard_normal(count)))
        if (found := value(other)) < lowest:
            best, lowest = other, found
    return CellAction(
        points=tuple(best[0].tolist()), channels=tuple(best[1].tolist()), powers=tuple(best[2].tolist())
    )  # fmt: skip


def write_statics(names: list[str]) -> None:
    """Search the fixed actions of `names` and put them into the file."""
    known = json.loads(STATIC.read_text()) if STATIC.exists() else {}
    for name in names:
        began, recipe = time.process_time(), RECIPES[name]
        action = search_changing() if name == "changing" else search(recipe.model, recipe.num_devices)
        known[name] = {"points": action.points, "channels": action.channels, "powers": action.powers}
        write_aside(STATIC, json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        print(f"{name}: {action}, {time.process_time() - began:.0f} s of one core", file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [*RECIPES, "static"]
    for chosen in wanted:
        if chosen.startswith("static"):
            write_statics([chosen.partition(":")[2]] if ":" in chosen else list(RECIPES))
        else:
            train(chosen)
