"""Soft actor-critic for discrete actions (SAC-d, arXiv:2201.02968; Christodoulou 2019), and DQN to compare with.

Losses, targets and replay are TorchRL's (DiscreteSACLoss, DQNLoss, SoftUpdate, ReplayBuffer); this file only collects from a
vector environment and turns the crank. Legend: pi = softmax(logits); V(s) = sum_a pi(a) (min(Q1, Q2)(a) - alpha log pi(a));
critics to r + gamma V(s'), which a truncated episode does not cut off; actor E_s sum_a pi(a) (alpha log pi(a) - min Q(a));
alpha such that the entropy is `entropy` * log |A|. The usual share is 0.98, with gamma 0.99 and rate 3e-4; ours differ
(see SacSettings), because a policy held at 0.98 of the largest entropy is all but uniform: docs/policies.md has both.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecotone.policies.environment import OnDemandVectorEnv
from ecotone.policies.network import mlp
from ecotone.units import EcotoneError

__all__ = ["DqnSettings", "SacSettings", "learning_parts", "train_dqn", "train_sac"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What both learners take. `updates` gradient steps, `steps_per_update` decisions collected for each."""

    updates: int = 10_000
    steps_per_update: int = 16
    gamma: float = 0.9
    tau: float = 0.005
    rate: float = 1e-3
    batch: int = 256
    buffer: int = 100_000
    warm_up: int = 5_000
    hidden: tuple[int, ...] = (64, 64)
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SacSettings(_Settings):
    """Knobs of SAC-d."""

    entropy: float = 0.3
    first_alpha: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class DqnSettings(_Settings):
    """Double DQN; the share of random decisions falls linearly from 1 to `last_random` over the first half."""

    last_random: float = 0.05


def learning_parts(*names: str) -> Any:
    """Modules of TorchRL and TensorDict by dotted name; raises EcotoneError that says what to install."""
    try:
        found = tuple(importlib.import_module(name) for name in names)
    except ImportError as error:
        raise EcotoneError(f"training needs TorchRL ({error.name} is missing); pip install 'ecotone[learn]'") from None
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it writes to standard output
    return found if len(found) > 1 else found[0]


def train_sac(env: OnDemandVectorEnv, settings: SacSettings, progress: Progress | None = None) -> nn.Sequential:
    """The actor, an `mlp` from observations to logits, trained on `env`; equal seeds give equal weights on one machine."""
    objectives, tdnn = learning_parts("torchrl.objectives", "tensordict.nn")
    torch.manual_seed(settings.seed)
    inputs, actions = env.single_observation_space.shape[0], int(env.single_action_space.n)
    actor, critic = (mlp((inputs, *settings.hidden, actions)) for _ in range(2))
    policy = tdnn.ProbabilisticTensorDictSequential(
        tdnn.TensorDictModule(actor, in_keys=["observation"], out_keys=["logits"]),
        tdnn.ProbabilisticTensorDictModule(
            in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical
        ),
    )
    value = tdnn.TensorDictModule(critic, in_keys=["observation"], out_keys=["action_value"])
    loss = objectives.DiscreteSACLoss(
        policy, value, action_space="categorical", loss_function="l2", alpha_init=settings.first_alpha,
        target_entropy=settings.entropy * math.log(actions),
    )  # fmt: skip
    loss.make_value_estimator(gamma=settings.gamma)

    def act(observation: Tensor, _: float) -> Tensor:
        return torch.distributions.Categorical(logits=actor(observation)).sample()

    _learn(env, loss, ("loss_actor", "loss_qvalue", "loss_alpha"), act, settings, progress)
    return actor.eval().requires_grad_(False)


def train_dqn(env: OnDemandVectorEnv, settings: DqnSettings, progress: Progress | None = None) -> nn.Sequential:
    """The Q network, an `mlp` whose largest output is the decision."""
    objectives, modules = learning_parts("torchrl.objectives", "torchrl.modules")
    torch.manual_seed(settings.seed)
    inputs, actions = env.single_observation_space.shape[0], int(env.single_action_space.n)
    network = mlp((inputs, *settings.hidden, actions))
    actor = modules.QValueActor(network, in_keys=["observation"], action_space="categorical")
    loss = objectives.DQNLoss(actor, action_space="categorical", delay_value=True, double_dqn=True)
    loss.make_value_estimator(gamma=settings.gamma)

    def act(observation: Tensor, share: float) -> Tensor:
        random = max(settings.last_random, 1.0 - 2.0 * share * (1.0 - settings.last_random))
        best, any_ = network(observation).argmax(-1), torch.randint(actions, (len(observation),))
        return torch.where(torch.rand(len(observation)) < random, any_, best)

    _learn(env, loss, ("loss",), act, settings, progress)
    return network.eval().requires_grad_(False)


def _learn(
    env: OnDemandVectorEnv,
    loss: Any,
    parts: tuple[str, ...],
    act: Callable[[Tensor, float], Tensor],
    settings: SacSettings | DqnSettings,
    progress: Progress | None,
) -> None:
    """Collect `steps_per_update` decisions for each gradient step on the sum of the loss's `parts`."""
    objectives, data, tensordict = learning_parts("torchrl.objectives", "torchrl.data", "tensordict")
    target = objectives.SoftUpdate(loss, tau=settings.tau)
    optimizer = torch.optim.Adam(loss.parameters(), settings.rate)
    replay = data.TensorDictReplayBuffer(storage=data.LazyTensorStorage(settings.buffer), batch_size=settings.batch)
    observation = torch.from_numpy(env.reset(seed=settings.seed)[0])
    collected, done = 0, 0
    while done < settings.updates:
        with torch.no_grad():
            action = act(observation, done / settings.updates)
        following, reward, terminated, truncated, _ = env.step(action.numpy())
        after = {
            "observation": torch.from_numpy(following), "reward": torch.from_numpy(reward).float()[:, None],
            "terminated": torch.from_numpy(terminated)[:, None], "done": torch.from_numpy(terminated)[:, None],
        }  # fmt: skip
        before = {"observation": observation, "action": action, "next": after}
        replay.extend(tensordict.TensorDict(before, [env.num_envs]))
        collected += env.num_envs
        if (terminated | truncated).any():
            following = env.reset()[0]
        observation = torch.from_numpy(following)
        while done < settings.updates and collected >= settings.warm_up + (done + 1) * settings.steps_per_update:
            found = loss(replay.sample())
            total = sum(found[name] for name in parts)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            target.step()
            done += 1
            if progress and done % 100 == 0:
                progress(done, settings.updates, f"reward {float(after['reward'].mean()):.3f}")
