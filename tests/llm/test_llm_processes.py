"""The same over node processes: SIGKILL, SIGSTOP, SIGTERM and a restart in the middle of answers change no token."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from llm_nodes import ask, cluster, deployed, is_whole, plan

from ecotone.llm.deploy import NODES
from ecotone.runtime.launch import Nodes, launch

pytestmark = pytest.mark.loopback
OF = cluster("a", "b", "c", emulate=True)
PROMPT = tuple(range(300, 340))
PARTS = (("a", 0, 1), ("b", 1, 3), ("pc", 3, 4))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with launch(OF, program=NODES) as made:
        yield made


def test_a_stopped_stage_is_found_by_deadline(nodes: Nodes) -> None:
    with deployed(OF, plan(*PARTS), nodes=nodes) as (_, _, generator):
        asked = ask(generator, PROMPT, 100, temperature=0).until(20)
        os.kill(nodes.pids["b"], signal.SIGSTOP)  # type: ignore[index]
        try:
            is_whole(asked)
        finally:
            os.kill(nodes.pids["b"], signal.SIGCONT)  # type: ignore[index]
        assert "nothing was heard" in generator.losses[0].reason


def test_a_node_that_is_told_to_stop_is_moved_away_from_and_used_again_when_it_is_back(nodes: Nodes) -> None:
    with deployed(OF, plan(*PARTS), nodes=nodes) as (_, _, generator):
        asked = ask(generator, PROMPT, 300, temperature=0).until(20)
        nodes.children["b"].terminate()  # type: ignore[index]
        assert nodes.children["b"].wait(30.0) == 0  # type: ignore[index]
        assert generator.moves[0].moved_bytes > 0
        nodes.restart("b")
        later = ask(generator, PROMPT[2:], 300, temperature=0).until(20)
        assert not generator.reshard(plan(*PARTS)).error
        assert generator.plan.devices == ("a", "b", "pc")
        is_whole(asked)
        is_whole(later)
        assert not generator.losses


def test_a_killed_stage_in_mid_answer_and_its_successor_too(nodes: Nodes) -> None:
    """The last one: what it kills is not started again."""
    with deployed(OF, plan(*PARTS, standbys=(("c", 1),)), nodes=nodes) as (_, service, generator):
        greedy, sampled = ask(generator, PROMPT, 150, temperature=0), ask(generator, PROMPT[7:], 150, seed=3)
        greedy.until(20)
        nodes.children["b"].kill()  # type: ignore[index]
        greedy.until(60)
        assert [s.device for s in generator.plan.stages] == ["a", "c", "pc"]
        kept = next(work.shard for work in service.work_at("a") if work.span.start == 0)
        nodes.children["c"].kill()  # type: ignore[index]
        is_whole(greedy)
        is_whole(sampled)
        needed = sum(len(asked.prompt) + 149 for asked in (greedy, sampled))
        mine = next(work for work in service.work_at("a") if work.shard == kept)
        assert mine.computed_tokens - mine.dropped_tokens == needed  # its layers computed nothing twice
        assert len(generator.losses) == 2
