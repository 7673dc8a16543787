"""MAHPPO's parts: probabilities against torch.distributions, loss and advantages against hand computation, the learner
against a cell whose best action is known, and its file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, Normal, SigmoidTransform, TransformedDistribution

from ecotone.offload import OffloadProfile
from ecotone.policies.cells import Cells
from ecotone.policies.environment import CellVectorEnv
from ecotone.policies.hybrid import Actors, CellAbout, Hybrid, load_actors, save_actors
from ecotone.policies.hybrid_ppo import PpoSettings, _Buffer, _flattened, _loss, train_mahppo
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch
pytest.importorskip("gymnasium", reason="the extra `learn` is not installed")
pytest.importorskip("torchrl", reason="the extra `learn` is not installed")


def policy(batch: int = 4, devices: int = 3) -> Hybrid:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Hybrid(normal(batch, devices, 6), normal(batch, devices, 2), normal(batch, devices), normal(batch, devices).exp())


def test_probabilities_are_those_of_the_parts_and_of_the_power_that_is_used() -> None:
    torch.manual_seed(0)
    found = policy()
    action = found.sample()
    log_prob, entropy = found.log_prob(action), found.entropy()
    point, channel, z = action.unbind(-1)
    squashed = TransformedDistribution(Normal(found.power.mean, found.power.stddev), SigmoidTransform())
    assert torch.allclose(log_prob[..., 0], Categorical(logits=found.point.logits).log_prob(point))
    assert torch.allclose(log_prob[..., 1], Categorical(logits=found.channel.logits).log_prob(channel))
    assert torch.allclose(log_prob[..., 2], squashed.log_prob(torch.sigmoid(z)), atol=1e-4)
    assert torch.allclose(entropy[..., 2], 0.5 * torch.log(2 * math.pi * math.e * found.power.variance))
    assert torch.equal(found.mode[..., 0], found.point.logits.argmax(-1).float())


def test_actors_do_not_share_weights_and_start_on_a_ladder_of_powers() -> None:
    torch.manual_seed(0)
    actors = Actors(inputs=12, num_devices=3, num_points=6, num_channels=2, hidden=8)
    state = torch.rand(5, 12)
    means = actors(state)[2]
    assert means.shape == (5, 3)
    assert means.mean(0).tolist() == pytest.approx([0.0, 1.5, 3.0], abs=0.1)
    actors(state)[0][:, 1].sum().backward()  # device 1's points depend on its weights alone
    assert actors.weight_0.grad is not None
    assert [bool(g.abs().sum() > 0) for g in actors.weight_0.grad] == [False, True, False]


def test_actors_that_begin_at_a_plan_all_but_always_follow_it() -> None:
    torch.manual_seed(0)
    actors = Actors(inputs=8, num_devices=2, num_points=6, num_channels=2, hidden=8)
    actors.begin_at((2, 5), (1, 0), (0.5, 1.0))
    state = torch.rand(200, 8)
    points, channels, share = actors.decide(state.numpy(), sample=False)
    assert (points == [2, 5]).all()
    assert (channels == [1, 0]).all()
    assert share.mean(0).tolist() == pytest.approx([0.5, 0.99], abs=0.02)
    drawn = [actors.decide(state.numpy())[i] for i in (0, 1)]
    for part, plan, options in zip(drawn, ((2, 5), (1, 0)), (6, 2), strict=True):
        expected = math.exp(4) / (math.exp(4) + options - 1)  # softmax of one logit of 4 among zeros
        assert (part == plan).mean() == pytest.approx(expected, abs=0.06)


def test_every_part_is_clipped_for_itself() -> None:
    """The loss that TorchRL makes of our distribution, against min(r A, clip(r) A) over parts and devices by hand."""
    objectives, tdnn = pytest.importorskip("torchrl.objectives"), pytest.importorskip("tensordict.nn")
    from tensordict import TensorDict

    torch.manual_seed(2)
    actors, critic = Actors(8, 2, 6, 2, 8), torch.nn.Linear(8, 1)
    loss = _loss(actors, critic, PpoSettings(clip=0.2, entropy=0.0), objectives, tdnn)
    state = torch.rand(6, 8)
    with torch.no_grad():
        action = Hybrid(*actors(state)).sample()
        old = Hybrid(*actors(state)).log_prob(action) + 0.5 * torch.randn(6, 2, 3)
        advantage = torch.randn(6, 1)
        batch = {
            "observation": state, "action": action, "log_prob": old, "advantage": advantage,
            "value_target": torch.zeros(6, 1),
        }  # fmt: skip
        found = loss(TensorDict(batch, [6]))["loss_objective"]
        ratio = (Hybrid(*actors(state)).log_prob(action) - old).exp()
        wide = advantage[:, :, None]
        expected = -torch.minimum(ratio * wide, ratio.clamp(0.8, 1.2) * wide).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_advantages_by_hand_over_a_cut_and_an_end() -> None:
    """Two copies, three slots: one is cut off after slot 1 (the critic counts on), one ends there (nothing follows).

    delta_t = r + gamma V' (1 - ended) - V;  A_t = delta_t + gamma lambda A_(t+1) unless over;  lambda alone would differ.
    """
    gamma, decay = 0.9, 0.5
    reward = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    value, next_value = [[0.5, 0.6, 0.7], [0.5, 0.6, 0.7]], [[0.6, 10.0, 0.8], [0.6, 10.0, 0.8]]
    over, ended = [[False, True, False], [False, True, False]], [[False, False, False], [False, True, False]]
    expected = []
    for i in range(2):
        after, row = 0.0, []
        for t in (2, 1, 0):
            delta = reward[i][t] + gamma * next_value[i][t] * (not ended[i][t]) - value[i][t]
            after = delta + gamma * decay * after * (not over[i][t])
            row.append(after)
        expected += row[::-1]

    def column(rows: list[list[float]]) -> list[torch.Tensor]:
        return list(torch.tensor(rows).T.unsqueeze(-1))

    buffer = _Buffer(
        column(reward), column(reward), column(reward), column(reward), column(value), column(next_value), column(over),  # type: ignore[arg-type]
        column(ended),  # type: ignore[arg-type]
    )  # fmt: skip
    flat = _flattened(buffer, PpoSettings(gamma=gamma, decay=decay))
    by_hand = torch.tensor(expected)
    normalised = (by_hand - by_hand.mean()) / by_hand.std()
    assert flat["advantage"].flatten().tolist() == pytest.approx(normalised.tolist(), abs=1e-5)
    assert flat["value_target"].flatten().tolist() == pytest.approx(
        (by_hand + torch.tensor(value).flatten()).tolist(), abs=1e-5
    )


TOY = OffloadProfile(
    name="toy", compute_s=(0.0, 0.01, 0.1), compute_watt=(0.0, 1.0, 2.0), payload_bytes=(200_000.0, 2_000.0, 0.0), norm_s=0.1
)


def test_the_learner_finds_the_best_point_of_a_lonely_device() -> None:
    """Alone at 50 m: point 1 takes 11 ms, the input 120 ms of sending, the whole here 100 ms and 200 mJ."""
    cells = Cells(TOY, num_copies=32, num_devices=1, mean_tasks=60, distance_m=(50.0, 50.0))
    env = CellVectorEnv(cells, limit=12)
    settings = PpoSettings(slots=32 * 8 * 14, epochs=6, batch=128, rate=5e-3, last_rate=1e-3, hidden=16)
    seen: list[int] = []
    actors = train_mahppo(env, settings, watch=lambda _, slots: seen.append(slots))
    state = env.reset(seed=99)[0]
    points, _, share = actors.decide(state, sample=False)
    assert (points == 1).all()
    assert (share > 0.5).all()
    assert seen == [256 * i for i in range(15)]


def about(**changes: object) -> CellAbout:
    base = CellAbout(
        model="toy", num_devices=2, num_points=3, num_channels=2, decades=4.0, sees_channels=True, slots=1, seed=0
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_actors_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    actors, path = Actors(about().num_inputs, 2, 3, 2, 8), tmp_path / "cell.safetensors"
    save_actors(path, actors, about())
    found, read = load_actors(path)
    state = torch.rand(4, 12)
    assert read == about()
    assert torch.equal(found(state)[0], actors(state)[0])
    save_actors(path, actors, about(num_devices=3))
    with pytest.raises(EcotoneError, match="expected"):
        load_actors(path)
