"""The driver against formulas on paper: no bubbles, prompts in chunks, what is computed after a loss, frames of drafts."""

from __future__ import annotations

import pytest

from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import FixedPolicy, Window
from ecotone.decoding.window import AdaptivePolicy
from ecotone.decoding.words import Settings
from ecotone.simulator.generation import Generation, LinkTime, SpanSpec, StageTimes
from ecotone.simulator.generation_line import run_line
from ecotone.simulator.hashmodel import HashDrafter, hash_text

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("requests", [1, 3, 4, 9])
@pytest.mark.parametrize("hop_s", [0.0, 0.02])
def test_there_are_no_bubbles(requests: int, hop_s: float) -> None:
    tau, loop_s = 0.01, 4 * (0.01 + hop_s)
    per_s, _ = run_line(4, stage_s=tau, hop_s=hop_s, requests=requests, tokens=60)
    assert per_s == pytest.approx(requests / max(requests * tau, loop_s), rel=0.1)
    bubbles = requests / (loop_s + (requests - 1) * tau)
    assert per_s > 0.95 * bubbles


@pytest.mark.parametrize(("stages", "chunks"), [(1, 4), (3, 1), (3, 8), (4, 16)])
def test_the_first_token_of_a_long_prompt_comes_by_the_formula(stages: int, chunks: int) -> None:
    chunk, token_s = 32, 0.001
    settings = Settings(context=4096, chunk_tokens=chunk, least_chunk_tokens=chunk, most_chunk_tokens=chunk)
    nodes = [f"n{i}" for i in range(stages)]
    world = Generation(nodes, settings, times=StageTimes(token_s=token_s, long_token_s=token_s))
    world.begin([SpanSpec(node, i, i + 1) for i, node in enumerate(nodes)])
    request = world.submit(range(chunk * chunks), SamplingParams(max_tokens=1, temperature=0.0))
    world.run()
    answer = world.answers[request]
    step_s = chunk * token_s
    assert answer.times_s[0] - answer.submitted_s == pytest.approx((chunks + stages - 1) * step_s, rel=0.02)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_after_a_loss_only_the_lost_span_computes_again(lost: int) -> None:
    spans = [SpanSpec(f"n{i}", 2 * i, 2 * i + 2) for i in range(3)]
    found = {}
    for is_killed in (False, True):
        world = Generation(["n0", "n1", "n2", "x"], Settings(context=512), times=StageTimes(token_s=1e-3, long_token_s=1e-4))
        world.begin(spans)
        request = world.submit(range(100), SamplingParams(max_tokens=50, temperature=0.0))
        if is_killed:
            world.at(0.2, lambda world=world: world.kill(f"n{lost}"))
        world.run()
        assert world.answers[request].tokens == hash_text(range(100), 6, 1000, 50)
        found[is_killed] = [world.steps((s.first, s.last)) // 2 for s in spans]  # layers of each
        told = sum(t < 0.2 for t in world.answers[request].times_s)
        losses = world.engine.measured().counts.get("losses", 0)
    assert losses == 1
    assert found[False] == [149] * 3  # the last token is never computed
    for index, computed in enumerate(found[True]):
        if index != lost:
            assert computed <= 149 + 1  # one token was in flight
        else:
            assert 149 + 100 + told - 2 <= computed <= 149 + 100 + told + 1


TABLE = {0.5: {6: 5.0, 16: 5.1}, 0.74: {6: 8.0, 16: 9.1}, 0.9: {6: 11.9, 16: 18.3, 32: 19.6}, 0.97: {16: 30.6}}
"""Acceptance -> frames in flight -> tokens per second, for 6 stages of 15 ms and hops of 48 ms (methods, section 3.1)."""


@pytest.mark.parametrize(("accuracy", "frames", "per_s"), [(a, w, x) for a, row in TABLE.items() for w, x in row.items()])
def test_frames_of_drafts_are_as_fast_as_the_table_says(accuracy: float, frames: int, per_s: float) -> None:
    policy = FixedPolicy(window=Window(frames=frames))
    found, _ = run_line(6, stage_s=0.015, hop_s=0.048, policy=policy, accuracy=accuracy, tokens=400)
    assert found == pytest.approx(per_s, rel=0.15)


@pytest.mark.parametrize(
    ("stages", "stage_s", "hop_s", "accuracy", "draft_s", "requests", "are_rows_free", "least"),
    [
        (6, 0.015, 0.048, 0.0, 0.0, 1, False, 0.97),  # a drafter that is always wrong
        (1, 0.002, 0.0, 0.0, 0.001, 1, False, 0.97),
        (2, 0.05, 0.1, 0.0, 0.1, 1, True, 0.97),  # and slow
        (4, 0.01, 0.0, 0.97, 1.0, 1, True, 0.97),  # right, but far too slow
        (4, 0.01, 0.0, 0.9, 0.0, 8, False, 0.95),  # the pipe is full
        (6, 0.015, 0.048, 0.9, 0.0, 1, False, 6.0),
        (1, 0.01, 0.0, 0.85, 0.0, 1, True, 3.5),  # one machine, where rows cost nothing: all in one frame
        (2, 0.01, 0.02, 0.6, 0.001, 2, True, 1.9),
    ],
)
def test_the_adaptive_policy_pays_where_it_can_and_costs_nothing_where_not(
    stages: int, stage_s: float, hop_s: float, accuracy: float, draft_s: float, requests: int, are_rows_free: bool,
    least: float,
) -> None:  # fmt: skip
    shape = {"stage_s": stage_s, "hop_s": hop_s, "requests": requests, "are_rows_free": are_rows_free}
    plain, _ = run_line(stages, **shape)
    found, _ = run_line(stages, **shape, policy=AdaptivePolicy(), accuracy=accuracy, draft_s=draft_s)
    assert found > least * plain


def test_a_drafter_that_never_answers_costs_one_short_wait() -> None:
    class Silent(HashDrafter):
        def draft(self, asks):
            return [[1] * 10**6 for _ in asks]  # takes for ever

    plain, _ = run_line(2, stage_s=0.01, hop_s=0.01)
    nodes = ["n0", "n1"]
    world = Generation(
        nodes, Settings(context=4096), times=StageTimes(token_s=0.01, long_token_s=0.01), link=LinkTime(latency_s=0.01),
        links={("driver", "n0"): LinkTime()}, policy=FixedPolicy(window=Window(rows=4)), drafter=Silent({}, 0.0),
        draft_s=1.0,
    )  # fmt: skip
    world.begin([SpanSpec(node, i, i + 1) for i, node in enumerate(nodes)])
    request = world.submit((1, 2, 3), SamplingParams(max_tokens=200, temperature=0.0))
    world.run(1e5)
    times = world.answers[request].times_s
    assert (len(times) - 1) / (times[-1] - times[0]) > 0.99 * plain
