"""Multi-agent hybrid PPO (MAHPPO, arXiv:2205.11854): actors of hybrid.py, one critic on the joint state, clipped by parts.

The clipped loss and the advantages are TorchRL's (ClipPPOLoss, generalized_advantage_estimate): the ratios of point, channel
and power of every device are clipped each for itself, and the loss is their mean, as published. Mended against the published
code: the advantage decays with gamma * lambda; what a buffer's end or a truncated episode cuts off is bootstrapped from the
critic, and only a cell whose queues are empty ends with 0; probabilities are of the power that was used; the state may hold
what each device hears on each channel. Ours: powers in decades, a rate that falls, larger buffers, observations unscaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecotone.policies.discrete_sac import Progress, learning_parts
from ecotone.policies.environment import CellVectorEnv
from ecotone.policies.hybrid import Actors, Hybrid, shares_of

__all__ = ["PpoSettings", "train_mahppo"]

Planned = tuple[Sequence[int], Sequence[int], Sequence[float], float, float]  # arguments of Actors.begin_at


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSettings:
    """Knobs of MAHPPO; `horizon` slots of every copy make a buffer."""

    slots: int = 500_000
    horizon: int = 8
    epochs: int = 8
    batch: int = 1024
    gamma: float = 0.95
    decay: float = 0.95  # lambda
    clip: float = 0.2
    entropy: float = 0.001
    rate: float = 1e-3
    last_rate: float = 1e-4
    hidden: int = 64
    seed: int = 0


@dataclass(slots=True)
class _Buffer:
    """Lists over time of (E, ...) tensors."""

    state: list[Tensor]
    action: list[Tensor]
    log_prob: list[Tensor]
    reward: list[Tensor]
    value: list[Tensor]
    next_value: list[Tensor]
    done: list[Tensor]
    terminated: list[Tensor]


def train_mahppo(
    env: CellVectorEnv,
    settings: PpoSettings,
    progress: Progress | None = None,
    watch: Callable[[Actors, int], None] | None = None,
    begin_at: Planned | None = None,
) -> Actors:
    """The actors after `settings.slots` slots over all copies; `watch` sees them first and after each buffer.

    `begin_at`: what Actors.begin_at takes, to start from a plan; else from a ladder of powers.
    """
    objectives, tdnn, tensordict = learning_parts("torchrl.objectives", "tensordict.nn", "tensordict")
    torch.manual_seed(settings.seed)
    cells, inputs = env.cells, env.single_observation_space.shape[0]
    actors = Actors(inputs, cells.num_devices, cells.num_points, cells.radio.num_channels, settings.hidden)
    if begin_at:
        actors.begin_at(*begin_at)
    critic = nn.Sequential(nn.Linear(inputs, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1))
    loss = _loss(actors, critic, settings, objectives, tdnn)
    parameters = list(loss.parameters())
    optimizer = torch.optim.Adam(parameters, settings.rate)
    state, iterations = torch.from_numpy(env.reset(seed=settings.seed)[0]), 0
    total = max(1, settings.slots // (settings.horizon * env.num_envs))
    if watch:
        watch(actors, 0)
    while iterations < total:
        share = iterations / total
        for group in optimizer.param_groups:
            group["lr"] = settings.rate + share * (settings.last_rate - settings.rate)
        buffer, state = _collect(env, actors, critic, state, settings.horizon)
        flat = _flattened(buffer, settings)
        count = len(flat["advantage"])
        for _ in range(settings.epochs):
            for part in torch.randperm(count).split(settings.batch):
                found = loss(tensordict.TensorDict({name: value[part] for name, value in flat.items()}, [len(part)]))
                optimizer.zero_grad()
                (found["loss_objective"] + found["loss_entropy"] + found["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
        iterations += 1
        if progress:
            progress(iterations, total, f"reward {float(torch.stack(buffer.reward).mean()):.4f}")
        if watch:
            watch(actors, iterations * settings.horizon * env.num_envs)
    return actors.eval().requires_grad_(False)


def _loss(actors: Actors, critic: nn.Module, settings: PpoSettings, objectives: Any, tdnn: Any) -> Any:
    keys = ["point", "channel", "mean", "deviation"]
    policy = tdnn.ProbabilisticTensorDictSequential(
        tdnn.TensorDictModule(actors, in_keys=["observation"], out_keys=keys),
        tdnn.ProbabilisticTensorDictModule(in_keys=keys, out_keys=["action"], distribution_class=Hybrid),
    )
    value = tdnn.TensorDictModule(critic, in_keys=["observation"], out_keys=["state_value"])
    loss = objectives.ClipPPOLoss(
        policy, value, clip_epsilon=settings.clip, entropy_coeff=settings.entropy, critic_coeff=1.0, loss_critic_type="l2"
    )
    loss.set_keys(sample_log_prob="log_prob")
    return loss


@torch.no_grad()
def _collect(env: CellVectorEnv, actors: Actors, critic: nn.Module, state: Tensor, horizon: int) -> tuple[_Buffer, Tensor]:
    """`horizon` slots of every copy, and the state after them."""
    buffer = _Buffer([], [], [], [], [], [], [], [])
    for _ in range(horizon):
        policy = Hybrid(*actors(state))
        action = policy.sample()
        following, reward, terminated, truncated, _ = env.step(shares_of(action))
        after, over = torch.from_numpy(following), terminated | truncated
        for column, value in (
            (buffer.state, state), (buffer.action, action), (buffer.log_prob, policy.log_prob(action)),
            (buffer.reward, torch.from_numpy(reward).float()[:, None]), (buffer.value, critic(state)),
            (buffer.next_value, critic(after)), (buffer.done, torch.from_numpy(over)[:, None]),
            (buffer.terminated, torch.from_numpy(terminated)[:, None]),
        ):  # fmt: skip
            column.append(value)
        if over.any():
            after = torch.from_numpy(env.reset(options={"reset_mask": over})[0])
        state = after
    return buffer, state


@torch.no_grad()
def _flattened(buffer: _Buffer, settings: PpoSettings) -> dict[str, Tensor]:
    """The buffer as one batch, with advantages (normalised) and the critic's targets."""
    functional = learning_parts("torchrl.objectives.value.functional")
    columns = (buffer.value, buffer.next_value, buffer.reward, buffer.done, buffer.terminated)
    value, next_value, reward, done, terminated = (torch.stack(c, dim=1) for c in columns)  # (E, T, 1)
    advantage, target = functional.generalized_advantage_estimate(
        settings.gamma, settings.decay, value, next_value, reward, done, terminated
    )
    advantage = (advantage - advantage.mean()) / advantage.std().clamp_min(1e-8)
    wide = {name: torch.stack(c, dim=1) for name, c in
            (("observation", buffer.state), ("action", buffer.action), ("log_prob", buffer.log_prob))}  # fmt: skip
    return {name: x.flatten(0, 1) for name, x in (wide | {"advantage": advantage, "value_target": target}).items()}
