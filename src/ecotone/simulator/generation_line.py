"""Generation over equal stages in a line: the world in which formulas on paper can be held against the driver.

The driver stands at the first stage; hops lead from stage to stage and back, so that T = stages*(stage_s + hop_s).
"""

from __future__ import annotations

from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import SpeculationPolicy
from ecotone.decoding.words import Settings
from ecotone.simulator.generation import DRIVER, Generation, LinkTime, SpanSpec, StageTimes
from ecotone.simulator.hashmodel import HashDrafter, hash_text

__all__ = ["run_line"]


def run_line(
    stages: int, *, stage_s: float, hop_s: float, policy: SpeculationPolicy | None = None, accuracy: float = 0.0,
    requests: int = 1, tokens: int = 200, draft_s: float = 0.0, are_rows_free: bool = False, seed: int = 0,
) -> tuple[float, Generation]:  # fmt: skip
    """Tokens per second of all requests together after their first, and the world; asserts that every text is right.

    A row takes `stage_s` on a stage; where `are_rows_free` a frame does, whatever its rows. `accuracy`: of each draft.
    """
    nodes = [f"n{i}" for i in range(stages)]
    prompts = [(r + 1, 2, 3) for r in range(requests)]
    texts = {r + 1: (*p, *hash_text(p, stages, 1000, tokens)) for r, p in enumerate(prompts)}
    fixed_s, token_s = (stage_s, 0.0) if are_rows_free else (0.0, stage_s)
    world = Generation(
        nodes, Settings(context=4096), times=StageTimes(fixed_s=fixed_s, token_s=token_s, long_token_s=stage_s),
        link=LinkTime(latency_s=hop_s), links={(DRIVER, nodes[0]): LinkTime()}, policy=policy,
        drafter=HashDrafter(texts, accuracy, seed) if policy else None, draft_s=draft_s,
    )  # fmt: skip
    world.begin([SpanSpec(node, i, i + 1) for i, node in enumerate(nodes)])
    for prompt in prompts:
        world.submit(prompt, SamplingParams(max_tokens=tokens, temperature=0.0))
    world.run()
    answers = list(world.answers.values())
    for number, answer in world.answers.items():
        assert tuple(answer.tokens) == texts[number][3:], f"the text of request {number} was changed"
    began_s, ended_s = min(a.times_s[0] for a in answers), max(a.times_s[-1] for a in answers)
    return sum(len(a.tokens) - 1 for a in answers) / (ended_s - began_s), world
