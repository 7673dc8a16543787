"""What sac_d and its training share: AlexNet with five exits as a table of actions, and which policies are trained on what.

    python -m benchmarks.sac_d_world            trains all of POLICIES again and writes tables/sac_d_*.safetensors
    python -m benchmarks.sac_d_world hidden     trains one

Seeds of training are those of conditions.TRAIN_SEED on; sac_d evaluates on others only.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from benchmarks import branchy_alexnet as net
from ecotone.cost import CostModel
from ecotone.policies.actions import ActionTable, device_server_plans, table_of
from ecotone.policies.belief import FEATURES
from ecotone.policies.conditions import HIDDEN, Scenario, scenario
from ecotone.policies.discrete_sac import DqnSettings, SacSettings, train_dqn, train_sac
from ecotone.policies.environment import OnDemandVectorEnv
from ecotone.policies.learned import Trained, TrainedAbout, load_trained, save_trained
from ecotone.policies.stream import ranges_of

FOLDER = Path(__file__).parent / "tables"
COPIES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A policy: the scenarios it is trained on in turn, with which knobs."""

    scenarios: tuple[str, ...]
    settings: SacSettings


POLICIES = {
    "stationary": Recipe(scenarios=("stationary",), settings=SacSettings(updates=6_000, gamma=0.0)),
    "hidden": Recipe(scenarios=HIDDEN, settings=SacSettings(updates=4_000)),
}


@cache
def model() -> CostModel:
    return CostModel(net.graph(), net.cluster(), net.profile())


@cache
def actions() -> ActionTable:
    """Every (exit, cut, bits): 113 that are possible of the 240 of the grid."""
    return table_of(device_server_plans(model(), net.SERVER, net.CODECS.values()), model())


def scenarios_of(recipe: Recipe) -> tuple[Scenario, ...]:
    return tuple(scenario(name) for name in recipe.scenarios)


def path_of(name: str) -> Path:
    return FOLDER / f"sac_d_{name}.safetensors"


def load(name: str) -> Trained:
    return load_trained(path_of(name))


def environment(recipe: Recipe) -> OnDemandVectorEnv:
    return OnDemandVectorEnv(actions(), scenarios_of(recipe), COPIES)


def train(name: str) -> Trained:
    """Train one policy."""
    recipe, began = POLICIES[name], time.process_time()
    network = train_sac(environment(recipe), recipe.settings, _said(name))
    table, scenarios = actions(), scenarios_of(recipe)
    about = TrainedAbout(
        name=f"sac_d_{name}", graph_hash=net.graph().content_hash(), device=table.device, server=table.server,
        plans=table.plans, ranges=ranges_of(scenarios), features=FEATURES, scenarios=recipe.scenarios,
        seed=recipe.settings.seed, about=f"{recipe.settings}",
    )  # fmt: skip
    print(f"{name}: {time.process_time() - began:.0f} s of one core", file=sys.stderr)
    return Trained(about, network)


def dqn(name: str) -> nn.Sequential:
    """A DQN trained as long as that policy."""
    recipe = POLICIES[name]
    settings = DqnSettings(updates=recipe.settings.updates, gamma=recipe.settings.gamma, seed=recipe.settings.seed)
    return train_dqn(environment(recipe), settings, _said(f"dqn {name}"))


def _said(name: str):  # type: ignore[no-untyped-def]
    def say(done: int, total: int, what: str) -> None:
        if done % 1000 == 0:
            print(f"{name}: {done} of {total}, {what}", file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or POLICIES:
        made = train(chosen)
        save_trained(path_of(chosen), made.network, made.about)
