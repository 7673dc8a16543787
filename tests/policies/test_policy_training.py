"""Which plans a policy is given to choose among, and what training reports of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import small_world as world
import torch

from ecotone.cost import CostModel, resident_bytes
from ecotone.policies.actions import device_server_plans, table_of
from ecotone.policies.discrete_sac import SacSettings
from ecotone.policies.network import mlp
from ecotone.policies.rules import Network
from ecotone.policies.training import Asked, _grid_rewards, choose_plans, compare, scenarios_of, train_policy
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

ASKED = Asked(rates_bytes_per_s=(2e4, 4e6), deadlines_s=(0.012, 0.03, 0.08), most_plans=4)
EXECUTORS = ("torch:fp32", "torch:fp32")


def test_few_plans_come_close_to_all_of_them() -> None:
    """The four kept reach nearly the mean reward of the best of all ten at each condition; the first is the best alone."""
    model = world.model()
    full = table_of(device_server_plans(model, world.B, ("int4", "int8")), model)
    every = _grid_rewards(full, ASKED, model)
    kept = choose_plans(model, ASKED, ("int4", "int8"), world.B, EXECUTORS)
    few = _grid_rewards(kept, ASKED, model)
    assert len(kept) <= 4
    assert few.max(axis=0).mean() >= every.max(axis=0).mean() - 0.02
    assert few[0].mean() == pytest.approx(every.mean(axis=1).max())


def test_plans_are_kept_only_as_far_as_memory_goes() -> None:
    graph = world.graph()
    weighty = replace(
        graph, blocks=tuple(replace(b, parameters=(i,)) for i, b in enumerate(graph.blocks)),
        parameters=tuple(replace_parameter(i) for i in range(3)),
    )  # fmt: skip
    table = replace(world.accuracy(), graph_hash=weighty.content_hash())
    profile = replace(world.profile(), graph_hash=weighty.content_hash(), accuracy=table)
    small = replace(world.cluster(), devices=tuple(replace(d, memory_bytes=3_200_000) for d in world.cluster().devices))
    model = CostModel(weighty, small, profile)
    kept = choose_plans(model, replace(ASKED, most_plans=8), ("int4", "int8"), world.B, EXECUTORS)
    held = resident_bytes({weighty.content_hash(): weighty}, kept.plans)
    assert all(size <= 3_200_000 for size in held.values())
    full = table_of(device_server_plans(model, world.B, ("int4", "int8")), model)
    assert any(size > 3_200_000 for size in resident_bytes({weighty.content_hash(): weighty}, full.plans).values())


def replace_parameter(index: int):  # type: ignore[no-untyped-def]
    from ecotone.graph import Parameter

    return Parameter(name=f"w{index}", size_bytes=1_000_000)


def test_where_one_plan_is_always_best_there_is_nothing_to_learn() -> None:
    lazy = replace(ASKED, deadlines_s=(10.0,))  # whatever the link, the whole here is in time and the most accurate
    with pytest.raises(EcotoneError, match="nothing to choose"):
        choose_plans(world.model(), lazy, ("int4", "int8"), world.B, EXECUTORS)


def test_the_report_has_every_rival_and_the_oracle_above_them() -> None:
    table = choose_plans(world.model(), ASKED, ("int4", "int8"), world.B, EXECUTORS)
    scenarios = tuple(replace(s, num_requests=30) for s in scenarios_of(ASKED, 0.002))
    net = mlp((10, len(table)))
    with torch.no_grad():
        net[0].weight.zero_()
    found = compare(table, scenarios, Network(net))
    assert found["oracle_reward"] >= max(found[f"{n}_reward"] for n in ("policy", "best_static", "resolving")) - 1e-9
    assert found["best_static_reward"] >= found["policy_reward"] - 1e-9  # this network always takes the first
    assert all(0 <= found[f"{n}_in_time"] <= 1 for n in ("policy", "best_static", "resolving", "oracle"))


def test_a_policy_is_trained_from_a_profile() -> None:
    pytest.importorskip("gymnasium", reason="the extra `learn` is not installed")
    pytest.importorskip("torchrl", reason="the extra `learn` is not installed")
    settings = SacSettings(updates=5, warm_up=64, batch=32, hidden=(8,))
    asked = replace(ASKED, scenarios=("fading",), num_requests=30, settings=settings)
    trained = train_policy("toy", world.graph(), world.cluster(), world.profile(), asked, ("int4", "int8"))
    assert (trained.about.device, trained.about.server) == (world.A, world.B)
    assert trained.about.measured["oracle_reward"] > 0
    with torch.no_grad():
        assert trained.network(torch.zeros(1, 10)).shape == (1, len(trained.about.plans))
    alone = replace(world.profile(), segments=tuple(s for s in world.profile().segments if s.device == world.A))
    with pytest.raises(EcotoneError, match="measured times"):
        train_policy("toy", world.graph(), world.cluster(), alone, asked, ("int8",))
    assert np.isfinite(list(trained.about.measured.values())).all()
