"""What mahppo and its training share: which policies and fixed actions there are, and how they were made.

    python -m benchmarks.mahppo_world             searches all fixed actions, trains all policies (7 minutes)
    python -m benchmarks.mahppo_world resnet18_5  one policy;  `static:resnet18_5` one fixed action;  `static` all of them;
                                                  `scratch:resnet18_5` learns from nothing instead and writes no file

Policies are in tables/mahppo_*.safetensors, fixed actions in tables/mahppo_static.json. Training: the published distances (1
to 100 m), tasks and cut-off; evaluation: the published test (50 m, 200 tasks). The fixed actions were searched on that test,
so the policies may look at it as well: actors begin at the fixed action, and of what is learned the state that does best
there, looked at LOOKS times, is kept. In the changing world both looked at seen episodes, and evaluation has others.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecotone.offload import PUBLISHED
from ecotone.planner.uplink import CellAction, Uplink, best_static
from ecotone.policies.cell_rules import Costs, Fixed, Trained, measure, share_of
from ecotone.policies.cells import STILL, Cells, World
from ecotone.policies.environment import CellVectorEnv
from ecotone.policies.hybrid import Actors, CellAbout, load_actors, save_actors
from ecotone.policies.hybrid_ppo import PpoSettings, train_mahppo
from ecotone.radio import Radio
from ecotone.schema import write_aside
from ecotone.simulator.cell import Cell, run_static

FOLDER = Path(__file__).parent / "tables"
STATIC = FOLDER / "mahppo_static.json"
MODELS, USERS, SWEPT = ("mobilenetv2", "resnet18", "vgg11"), (2, 3, 5, 10), "mobilenetv2"
DECADES, COPIES = 4.0, 256
CHANGING = World(walk_m_per_s=1.5, fading_db=4.0, fading_keeps=0.7, batches_per_s=0.12, batch=40.0, slots=60)
CHANGING_TASKS = 40.0
STATIC_SCORES, CHANGING_COPIES = 1500, 512
LOOKS, SEEN_COPIES, EQUAL = 8, 32, 0.005
PLANNED, SCRATCH = PpoSettings(slots=32_768, rate=5e-4), PpoSettings(slots=300_000)
WIDE, LONGER = PpoSettings(slots=122_880, rate=1e-3), MODELS
KNOWN = {
    ("resnet18", 5): (  # of an earlier search, with 1,200 simulations: the search is luck as well
        CellAction(
            points=(1, 2, 2, 1, 2), channels=(0, 0, 0, 1, 1),
            powers=(0.006658833851726135, 0.28329576994096684, 0.7438917571579667, 0.008282560007154327, 0.0719719409696161),
        ),
    ),
}  # fmt: skip
SEEN_SEED = 7  # of the changing world's episodes on which its fixed action is searched; evaluation has others


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    model: str
    num_devices: int
    settings: PpoSettings
    sees_channels: bool = False
    world: World = STILL
    beginning: tuple[float, float] = (4.0, 0.2)  # how sure of the plan, deviation of the power: see Actors.begin_at


def _recipes() -> dict[str, Recipe]:
    found = {}
    for model in MODELS:
        for count in USERS if model == SWEPT else (5,):
            found[f"{model}_{count}"] = Recipe(model=model, num_devices=count, settings=PLANNED)
    for model in LONGER:
        found[f"{model}_5"] = replace(found[f"{model}_5"], settings=WIDE, beginning=(3.0, 0.3))
    longer = replace(PLANNED, slots=81_920)
    found["changing"] = Recipe(model=SWEPT, num_devices=5, settings=longer, sees_channels=True, world=CHANGING)
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


def cost_of(costs: Costs, recipe: Recipe) -> float:
    """What a recipe's policy is to keep low: seconds + joules per task, in the changing world own seconds."""
    return (costs.own_seconds if recipe.world.slots else costs.seconds) + costs.joule


class Best:
    """Watches a training: looks at the likeliest actions of the actors now and then, and keeps the best.

    Of states within EQUAL of one another the latest, whose draws are better: it has learned to live with chance.
    """

    def __init__(self, name: str, recipe: Recipe, settings: PpoSettings) -> None:
        self._name, self._recipe, self._began = name, recipe, time.process_time()
        self._env = environment(recipe, SEEN_COPIES if recipe.world.slots else 1, is_test=True)
        self._every, self._next = settings.slots // LOOKS, 0
        self.weights: dict[str, Any] = {}
        self.lowest, self.at = math.inf, 0

    def __call__(self, actors: Actors, slots: int) -> None:
        if slots < self._next:
            return
        self._next += self._every
        costs = measure(self._env, Trained(actors, sample=False), seed=SEEN_SEED)
        value = cost_of(costs, self._recipe)
        self.lowest = min(self.lowest, value)
        if value <= (1 + EQUAL) * self.lowest:
            self.weights, self.at = {name: x.clone() for name, x in actors.state_dict().items()}, slots
        said = f"{self._name}: {slots} slots, {1e3 * value:.1f}, best {1e3 * self.lowest:.1f}"
        print(f"{said}, {time.process_time() - self._began:.0f} s", file=sys.stderr, flush=True)


def learn(name: str, settings: PpoSettings, *, from_plan: bool = True) -> tuple[Actors, Best]:
    """The best actors of a training, and when they were."""
    recipe = RECIPES[name]
    env, best = environment(recipe, COPIES), Best(name, recipe, settings)
    known = statics()[name] if from_plan else None
    start = known and (
        known.points, known.channels, share_of(known.watts, env.cells.max_watt, DECADES), *recipe.beginning
    )  # fmt: skip
    actors = train_mahppo(env, settings, watch=best, begin_at=start)
    actors.load_state_dict(best.weights)
    return actors, best


def train(name: str) -> None:
    """Train and write one policy."""
    recipe, began = RECIPES[name], time.process_time()
    actors, best = learn(name, recipe.settings)
    env = environment(recipe, 1)
    about = CellAbout(
        model=recipe.model, num_devices=recipe.num_devices, num_points=env.cells.num_points,
        num_channels=env.cells.radio.num_channels, decades=DECADES, sees_channels=recipe.sees_channels,
        slots=best.at, seed=recipe.settings.seed, about=str(recipe.settings),
    )  # fmt: skip
    save_actors(path_of(name), actors, about)
    print(f"{name}: {time.process_time() - began:.0f} s of one core", file=sys.stderr)


# ---- fixed actions ------------------------------------------------------------------------------------------------------


def statics() -> dict[str, Fixed]:
    """The best fixed action of each world, as searched."""
    found = json.loads(STATIC.read_text())
    return {n: Fixed(tuple(a["points"]), tuple(a["channels"]), tuple(a["powers"])) for n, a in found.items()}


def search(model: str, count: int, seed: int = 0) -> CellAction:
    """The best fixed action of the published test, by planner/uplink.py, or the KNOWN one where that is better."""
    cell, scores = Cell(PUBLISHED[model], num_devices=count), STATIC_SCORES * 5 // max(count, 5)

    def score(action: CellAction, limit: float) -> tuple[float, float]:
        most = 400 if limit > 1.0 else round(limit * cell.mean_tasks / cell.slot_s) + 1
        tally = run_static(cell, action.points, action.channels, action.powers, max_slots=most)
        return (tally.s_per_task, tally.joule_per_task) if tally.is_done else (1e6, 1e6)

    found = best_static([Uplink(profile=PUBLISHED[model])] * count, Radio(), score, num_scores=scores, seed=seed)
    return min((found, *KNOWN.get((model, count), ())), key=lambda action: sum(score(action, math.inf)))


def search_changing() -> CellAction:
    """Of the changing world, by halving: random actions, and the published test's and neighbours of it, each on some seen
    episodes at once; the better half goes on with twice as many episodes each, until one is left."""
    recipe, random = RECIPES["changing"], np.random.default_rng(0)
    env, count = environment(recipe, CHANGING_COPIES), recipe.num_devices
    shape = (CHANGING_COPIES // 2, count)
    points = random.integers(env.cells.num_points, size=shape)
    channels = random.integers(env.cells.radio.num_channels, size=shape)
    watts = 10 ** random.uniform(-4, 0, shape)
    known, half = statics()[f"{recipe.model}_{count}"], shape[0] // 2
    is_kept = random.random((half, count)) < 0.8  # of the known action, the first time all of it
    is_kept[0] = True
    for part, value in ((points, known.points), (channels, known.channels), (watts, known.watts)):
        part[:half] = np.where(is_kept, value, part[:half])
    chosen = np.arange(shape[0])
    while len(chosen) > 1:
        each = CHANGING_COPIES // len(chosen)
        rows = np.repeat(chosen, each)
        costs = per_copy(env, points[rows], channels[rows], watts[rows]).reshape(len(chosen), each).mean(axis=1)
        chosen = chosen[np.argsort(costs, kind="stable")[: len(chosen) // 2]]
    best = chosen[0]
    return CellAction(
        points=tuple(points[best].tolist()), channels=tuple(channels[best].tolist()), powers=tuple(watts[best].tolist())
    )  # fmt: skip


def per_copy(env: CellVectorEnv, *action: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Own seconds + joules per task of each copy under its own fixed action, on seen episodes."""
    points, channels, watts = action
    env.reset(seed=SEEN_SEED)
    decision = (points, channels, share_of(watts, env.cells.max_watt, env.decades))
    sums = np.zeros((2, env.num_envs))
    for _ in range(env.cells.world.slots):
        about = env.step(decision)[4]
        sums += np.stack([(about["busy_s"] + about["joule"]).sum(axis=1), about["finished"].sum(axis=1)])
    found: np.ndarray[Any, Any] = sums[0] / np.maximum(sums[1], 1.0)
    return found


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
    wanted = sys.argv[1:] or ["static", *RECIPES]
    for chosen in wanted:
        if chosen.startswith("static"):
            write_statics([chosen.partition(":")[2]] if ":" in chosen else list(RECIPES))
        elif chosen.startswith("scratch:"):
            learn(chosen.partition(":")[2], SCRATCH, from_plan=False)
        else:
            train(chosen)
