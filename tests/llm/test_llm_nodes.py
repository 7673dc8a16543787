"""Text over nodes equals the whole model in one process, whatever happens to requests and machines. Nodes are threads."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
from llm_nodes import CONTEXT, Asked, ask, cluster, deployed, is_whole, plan, quick_settings, source
from safetensors.torch import load_file

from ecotone.decoding.words import Ending, Settings
from ecotone.llm.config import ModelError
from ecotone.llm.deploy import deploy_llm, join
from ecotone.llm.generator import Generator
from ecotone.llm.host import StageHost
from ecotone.llm.service import GenerationService
from ecotone.protocol.message import NodeId
from ecotone.runtime.launch import Nodes, in_memory
from ecotone.runtime.node import LocalNode
from ecotone.runtime.store import Store
from ecotone.units import EcotoneError
from ecotone.wire.memory import DELIVERED, Fate, Network, Passage

pytestmark = pytest.mark.torch
PROMPT = tuple(range(40, 75))
ABC = (("a", 0, 1), ("b", 1, 3), ("c", 3, 4))
ABCD = cluster("a", "b", "c", "d")


class Lossy:
    """A network of which directed links can go dead without a word."""

    def __init__(self) -> None:
        self.dead: set[tuple[str, str]] = set()
        self.network = Network(script=self._fate)

    def _fate(self, passage: Passage) -> Fate:
        return Fate(copies=0) if (passage.source, passage.target) in self.dead else DELIVERED

    def freeze(self, node: str) -> None:
        """As SIGSTOP does: nothing comes of it and nothing reaches it, and nobody is told."""
        for other in ABCD.devices:
            self.dead |= {(node, other.name), (other.name, node)}


def kill(nodes: Nodes, network: Network, name: str) -> None:
    network.kill(NodeId(name))


def start(nodes: Nodes, network: Network, name: str, folder: Path) -> LocalNode:
    """A node of this name again: another process would be one."""
    node = LocalNode(nodes.cluster.device(name), network.join(NodeId(name)), Store(folder), services=(GenerationService,))
    node.start()
    nodes._closing.callback(node.stop)
    return node


# ---- the same text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["native:fp32", "torch:fp32"])
def test_text_over_nodes_is_that_of_the_whole_model(executor: str) -> None:
    parts = (("a", 0, 0), ("a", 0, 1), ("pc", 1, 3), ("b", 3, 4))
    with deployed(cluster("a", "b"), plan(*parts, executor=executor)) as (_, _, generator):
        greedy = ask(generator, PROMPT, temperature=0)
        sampled = [ask(generator, PROMPT[: 7 + i], seed=i, temperature=0.9, top_p=0.9) for i in range(2)]
        for asked in (greedy, *sampled):
            is_whole(asked, executor)


def test_several_requests_share_what_they_begin_with() -> None:
    shared = PROMPT * 3
    with deployed(cluster("a", "b"), plan(("a", 0, 2), ("b", 2, 4))) as (_, _, generator):
        first = ask(generator, (*shared, 5), 20, temperature=0)
        is_whole(first)
        later = [ask(generator, (*shared, 6 + i), 20, temperature=0) for i in range(5)]
        for asked in later:
            is_whole(asked)
            assert asked.pieces[-1].cached >= 96
        assert generator.measured().counts["prompt_tokens"] == 6 * len(shared) + 6


# ---- how requests end ----------------------------------------------------------------------------------------------------


def test_cancelled_late_long_and_impossible_requests_end_as_such() -> None:
    with deployed(cluster("a", "b"), plan(("a", 0, 2), ("b", 2, 4))) as (_, _, generator):
        cancelled = ask(generator, PROMPT, 450, temperature=0).until(3)
        late = ask(generator, PROMPT[3:], 450, temperature=0, deadline_s=0.05)
        too_long = ask(generator, range(CONTEXT), temperature=0)
        outside = ask(generator, (1, 2, 10**6), temperature=0)
        good = ask(generator, PROMPT[5:], temperature=0)
        generator.cancel(cancelled.number)
        assert cancelled.ended().ending is Ending.CANCELLED
        assert len(cancelled.tokens) < 450
        assert late.ended().ending is Ending.DEADLINE
        assert too_long.ended().ending is Ending.TOO_LONG
        assert f"the context {CONTEXT}" in too_long.ended().reason
        assert outside.ended().ending is Ending.FAILED
        assert "1000000" in outside.ended().reason
        is_whole(good)
        assert counts(generator, "losses", "faults") == [0, 0]


def test_who_takes_the_text_may_fail_without_harm_to_others() -> None:
    with deployed(cluster("a"), plan(("a", 0, 4))) as (_, _, generator):
        failing = Asked(generator, PROMPT, ask(generator, PROMPT, 1, temperature=0).params)

        def fail(piece: object) -> None:
            failing.take(piece)  # type: ignore[arg-type]
            raise ValueError("a client's fault")

        good = ask(generator, PROMPT[1:], temperature=0)
        generator.submit(PROMPT, dataclasses.replace(failing.params, max_tokens=400), fail)
        assert failing.ended().ending is Ending.FAILED
        assert "a client's fault" in failing.ended().reason
        is_whole(good)
        assert generator.measured().num_active == 0


def test_closing_ends_what_runs() -> None:
    with deployed(cluster("a", "b"), plan(("a", 0, 2), ("b", 2, 4))) as (nodes, _, generator):
        running = [ask(generator, PROMPT[i:], 400, temperature=0) for i in range(3)]
        running[0].until(2)
        generator.close()
        assert [asked.ended().ending for asked in running] == [Ending.CANCELLED] * 3
        assert ask(generator, PROMPT).ended().ending is Ending.FAILED
        services = [node.services[0] for node, _ in nodes._threads.values()]
        wait(lambda: all(service.is_idle for service in services))
        generator.close()


# ---- loading -------------------------------------------------------------------------------------------------------------


def test_a_node_without_the_files_fetches_its_layers_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = cluster("a", "b")
    with in_memory(of, folder=tmp_path, services=(GenerationService,)) as nodes, join(nodes) as service:
        sent = []
        answer = service._weights
        nodes.questions.on("llm-weights", lambda peer, body: sent.append(body["key"]) or answer(peer, body), slow=True)
        for _ in range(2):
            with deploy_llm(service, of, plan(("a", 0, 2), ("b", 2, 4)), source(), name="nowhere/tiny") as generator:
                is_whole(ask(generator, PROMPT, temperature=0))
        kept = list((tmp_path / "a").rglob("*.safetensors"))
        assert kept
        assert len(kept) < len(source().files)
        assert len(sent) == len(set(sent)) == len(list(tmp_path.rglob("*.safetensors")))  # each once
        assert all(load_file(path)["tensor"].isfinite().all() for path in kept)


def test_a_tensor_that_comes_damaged_is_refused(tmp_path: Path) -> None:
    of = cluster("a")
    with in_memory(of, folder=tmp_path, services=(GenerationService,)) as nodes, join(nodes) as service:
        send = service._mail.send

        def damage(peer: NodeId, content: bytearray, *, background: bool = False) -> None:
            if bytes(content[:4]) == b"EGWP":
                content = bytearray(content)
                content[-1] ^= 1
            send(peer, content, background=background)

        service._mail.send = damage  # type: ignore[method-assign]
        with (
            pytest.raises(EcotoneError, match="came damaged from pc"),
            deploy_llm(service, of, plan(("a", 0, 4)), source(), name="nowhere/tiny"),
        ):
            pass
        assert not list((tmp_path / "a").rglob("*.safetensors"))
        assert service.host.is_idle
        assert nodes._threads["a"][0].services[0].is_idle


def test_a_plan_that_does_not_fit_says_so() -> None:
    small = cluster("a", "b", memory_bytes=6 << 20)
    with (
        pytest.raises(EcotoneError, match=r"device a has 6.* of memory: embedding \+ layers \[0, 3\) by native:fp32 needs"),
        deployed(small, plan(("a", 0, 3), ("b", 3, 4))),
    ):
        pass
    with pytest.raises(ModelError, match="names device 'z'"), deployed(small, plan(("a", 0, 3), ("z", 3, 4))):
        pass


# ---- machines are lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["a", "b", "c"])
def test_a_killed_stage_changes_no_token_and_computes_only_its_own_layers_again(victim: str) -> None:
    network = Network()
    with (
        in_memory(ABCD, network=network, services=(GenerationService,)) as nodes,
        deployed(ABCD, plan(*ABC), nodes=nodes) as (_, _, generator),
    ):
        greedy, sampled = ask(generator, PROMPT, 120, temperature=0), ask(generator, PROMPT[4:], 120, seed=7)
        greedy.until(30)
        kill(nodes, network, victim)
        is_whole(greedy)
        is_whole(sampled)
        assert counts(generator, "losses", "recomputed_tokens") == [1, 0]
        changed = [index for index, stage in enumerate(generator.plan.stages) if stage.device != ABC[index][0]]
        assert changed == [[part[0] for part in ABC].index(victim)]


def test_a_second_loss_during_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to take the lost stage's place dies while it is loading: another one is found at once."""
    network, loading = Network(), threading.Event()
    load = StageHost.load

    def hang(host: StageHost, *what: object) -> object:
        if host.name == "d" and not loading.is_set():
            loading.set()
            kill(nodes, network, "d")
        return load(host, *what)  # type: ignore[arg-type]

    monkeypatch.setattr(StageHost, "load", hang)
    of = dataclasses.replace(
        ABCD,
        devices=tuple(dataclasses.replace(d, memory_bytes=d.memory_bytes * (1 + (d.name == "d"))) for d in ABCD.devices),
    )
    with (
        in_memory(of, network=network, services=(GenerationService,)) as nodes,
        deployed(of, plan(*ABC), nodes=nodes) as (_, _, generator),
    ):
        asked = ask(generator, PROMPT, 120, temperature=0).until(20)
        kill(nodes, network, "b")
        is_whole(asked)
        assert loading.is_set()
        assert not {"b", "d"} & set(generator.plan.devices)


def test_a_frozen_stage_is_found_by_deadline_and_is_not_chosen_again() -> None:
    lossy = Lossy()
    with (
        in_memory(ABCD, network=lossy.network, services=(GenerationService,)) as nodes,
        deployed(ABCD, plan(*ABC), nodes=nodes, settings=impatient()) as (_, service, generator),
    ):
        asked = ask(generator, PROMPT, 120, temperature=0).until(20)
        lossy.freeze("b")
        is_whole(asked)
        assert "b" in service.peers()
        assert "b" not in generator.plan.devices
        assert "nothing was heard" in generator.losses[0].reason
        lossy.dead.clear()  # it wakes up with shards that nobody wants
        kill(nodes, lossy.network, "a")
        is_whole(ask(generator, PROMPT, 60, temperature=0))
        wait(lambda: nodes._threads["b"][0].services[0].is_idle)  # type: ignore[index]


@pytest.mark.parametrize(("dead", "says"), [(("a", "b"), "frames do not reach stage 1"), (("c", "pc"), "nothing was heard")])
def test_a_link_that_is_dead_in_one_direction(dead: tuple[str, str], says: str) -> None:
    lossy = Lossy()
    with (
        in_memory(ABCD, network=lossy.network, services=(GenerationService,)) as nodes,
        deployed(ABCD, plan(*ABC), nodes=nodes, settings=impatient()) as (_, _, generator),
    ):
        asked = ask(generator, PROMPT, 120, temperature=0).until(20)
        lossy.dead.add(dead)
        is_whole(asked)
        assert says in generator.losses[0].reason
        assert not set(generator.losses[0].lost) & set(generator.plan.devices)


def test_a_node_that_begins_anew_is_used_again_where_there_is_no_other(tmp_path: Path) -> None:
    network, of = Network(), cluster("a", "b")
    small = dataclasses.replace(of, devices=(dataclasses.replace(of.device("pc"), memory_bytes=1), *of.devices[1:]))
    small = dataclasses.replace(
        small, devices=(*small.devices[:1], dataclasses.replace(of.device("a"), memory_bytes=9 << 20), small.devices[2])
    )
    with (
        in_memory(small, network=network, services=(GenerationService,)) as nodes,
        deployed(small, plan(("a", 0, 2), ("b", 2, 4)), nodes=nodes) as (_, _, generator),
    ):
        asked = ask(generator, PROMPT, 120, temperature=0).until(20)
        kill(nodes, network, "b")
        start(nodes, network, "b", tmp_path)
        is_whole(asked)
        assert counts(generator, "losses") == [1]
        assert "b" in generator.plan.devices


def test_a_standby_is_loaded_and_takes_over_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    network, loads = Network(), []
    load = StageHost.load
    monkeypatch.setattr(StageHost, "load", lambda host, *rest: loads.append(host.name) or load(host, *rest))
    with (
        in_memory(ABCD, network=network, services=(GenerationService,)) as nodes,
        deployed(ABCD, plan(*ABC, standbys=(("d", 1), ("a", 2))), nodes=nodes) as (_, _, generator),
    ):
        asked = ask(generator, PROMPT, 120, temperature=0).until(20)
        assert sorted(loads) == ["a", "a", "b", "c", "d"]
        kill(nodes, network, "b")
        is_whole(asked)
        assert len(loads) == 5
        assert [s.device for s in generator.plan.stages] == ["a", "d", "c"]
        assert [s.device for s in generator.plan.standbys] == ["a"]


def test_nobody_is_left() -> None:
    network, of = Network(), cluster("a")
    small = dataclasses.replace(of, devices=(dataclasses.replace(of.device("pc"), memory_bytes=1), of.devices[1]))
    settings = dataclasses.replace(quick_settings(plan(("a", 0, 4)), small), strand_s=0.5)
    with (
        in_memory(small, network=network, services=(GenerationService,)) as nodes,
        deployed(small, plan(("a", 0, 4)), nodes=nodes, settings=settings) as (_, _, generator),
    ):
        asked = ask(generator, PROMPT, 400, temperature=0).until(5)
        kill(nodes, network, "a")
        assert asked.ended().ending is Ending.NODE_LOST
        assert "a is lost" in asked.ended().reason
        assert "add a machine" in asked.ended().reason


# ---- machines come and go in order ---------------------------------------------------------------------------------------


def test_a_move_while_answers_run_carries_the_keys() -> None:
    """Onto a machine that has just joined, with other borders; then back, for requests that began in between."""
    with deployed(ABCD, plan(("a", 0, 2), ("b", 2, 4))) as (nodes, _, generator):
        before = [ask(generator, PROMPT[i:], 150, temperature=0) for i in range(4)]
        before[0].until(10)
        moved = generator.reshard(plan(("d", 0, 1), ("a", 1, 2), ("pc", 2, 3), ("b", 3, 4)))
        assert not moved.error
        assert moved.moved_bytes > 0
        assert moved.choice.startswith("migrate")
        between = [ask(generator, PROMPT[i:], 60, seed=i) for i in range(2)]
        between[0].until(5)
        back = generator.reshard(plan(("a", 0, 2), ("b", 2, 4)))
        assert not back.error
        assert not generator.reshard(plan(("a", 0, 2), ("b", 2, 4))).error
        for asked in (*before, *between):
            is_whole(asked)
        assert counts(generator, "losses", "recomputed_tokens") == [0, 0]
        wait(lambda: nodes._threads["d"][0].services[0].is_idle)  # type: ignore[index]


def test_a_node_that_leaves_is_moved_away_from_and_goes() -> None:
    with deployed(ABCD, plan(*ABC)) as (nodes, _, generator):
        asked = ask(generator, PROMPT, 200, temperature=0).until(20)
        leaving = threading.Thread(target=nodes._threads["b"][0].leave, args=(30.0,))  # type: ignore[index]
        leaving.start()
        leaving.join(20.0)
        assert not leaving.is_alive()
        assert "b" not in generator.plan.devices
        is_whole(asked)
        assert counts(generator, "losses", "recomputed_tokens") == [0, 0]
        assert generator.moves[0].moved_bytes > 0


def test_a_machine_that_comes_is_used_where_a_planner_decides(tmp_path: Path) -> None:
    network = Network()
    wide, narrow = plan(("a", 0, 2), ("d", 2, 4)), plan(("a", 0, 4))
    with (
        in_memory(ABCD, network=network, services=(GenerationService,)) as nodes,
        deployed(ABCD, wide, nodes=nodes, replan=lambda now, there: wide if "d" in there else narrow) as (_, _, generator),
    ):
        asked = ask(generator, PROMPT, 400, temperature=0).until(10)
        kill(nodes, network, "d")
        asked.until(30)
        assert generator.plan == narrow
        start(nodes, network, "d", tmp_path)
        is_whole(asked)
        wait(lambda: generator.plan == wide)
        is_whole(ask(generator, PROMPT[9:], temperature=0))


def test_one_process_drives_one_model_at_a_time() -> None:
    of = cluster("a")
    with deployed(of, plan(("a", 0, 4))) as (_, service, generator):
        with (
            pytest.raises(EcotoneError, match="drives a language model already"),
            deploy_llm(service, of, plan(("a", 0, 4)), source()),
        ):
            pass
        is_whole(ask(generator, PROMPT, temperature=0))


def counts(generator: Generator, *names: str) -> list[int]:
    found = generator.measured().counts
    return [found.get(name, 0) for name in names]


def impatient() -> Settings:
    return dataclasses.replace(quick_settings(plan(*ABC), ABCD), quiet_s=0.2, silent_s=0.4, probe_s=0.1, reach_s=0.5)


def wait(condition: object) -> None:
    """Until a condition of other threads holds."""
    end = threading.Event()
    for _ in range(2000):
        if condition():  # type: ignore[operator]
            return
        end.wait(0.01)
    raise AssertionError("it never came to be")
