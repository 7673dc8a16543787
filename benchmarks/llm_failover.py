"""What a language model over machines does when one is lost in mid-answer: tokens, the pause, and what is computed again.

Real node processes (one thread each) beside a driver that holds no layers: three stages and a spare machine, with a random
model of 12 layers x 1024 by native:int8, large enough that computing keys again is seen, and the shipped tiny model. One
request at a time; its tokens are compared with those of an unbroken run over the same nodes. A stage gets SIGKILL early, in
the middle or late in the answer, or while the prompt is computed; SIGSTOP; SIGKILL, and its successor as well while that
takes over; some also where a standby holds the weights. Nothing is told to the driver.

tokens_lost, tokens_changed: against the unbroken run, over all trials. resume_s_beyond_recompute: the worst trial's pause,
from the (last) signal to the next token, minus the seconds that the successors' shards had computed by then (the lost
span's keys; told by the nodes): detecting, planning, loading weights, routing and one token. While a prompt is computed the
pause is what it took longer than unbroken. layers_recomputed_outside_lost_span: layers of stages that lived through it
which computed more tokens than the sequence has; steps that had not come through all stages when one was lost are sent
again, and are counted apart (`in_flight_again`). cases also has moves while answers run (keys copied; Resharded's own pause
beside the time of one token) and a machine that leaves in order (SIGTERM).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ecotone
from benchmarks import report
from benchmarks.llm_shards import SHAPE
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.decoding.answer import Piece
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.words import Ending
from ecotone.llm.deploy import NODES, deploy_llm, join, settings_for
from ecotone.llm.generator import Generator
from ecotone.llm.host import ShardWork
from ecotone.llm.service import GenerationService
from ecotone.llm.weights import Checkpoint
from ecotone.llmplan import EXACT, LOCAL, LlmPlan, LlmStage, Span, Standby
from ecotone.runtime.launch import Nodes, launch
from ecotone.units import EcotoneError

PC, STAGES, SPARE = DeviceId("pc"), tuple(DeviceId(n) for n in ("a", "b", "c")), DeviceId("d")
CHUNK, PATIENCE_S, GIB = 128, 120.0, 1 << 30
KILL, STOP = signal.SIGKILL, signal.SIGSTOP


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    source: Checkpoint
    executor: str
    prompt: tuple[int, ...]
    num_tokens: int

    def plan(self, devices: tuple[DeviceId, ...] = STAGES, standbys: tuple[Standby, ...] = ()) -> LlmPlan:
        layers, count = self.source.config.num_layers, len(devices)
        ends = [round(i * layers / count) for i in range(count + 1)]
        stages = tuple(
            LlmStage(
                device=device, span=Span(start=ends[i], stop=ends[i + 1], embedding=i == 0, head=i == count - 1),
                executor=self.executor, kv_bytes=1 << 26, codec=LOCAL if i == count - 1 else EXACT,
            )
            for i, device in enumerate(devices)
        )  # fmt: skip
        return LlmPlan(model_hash=self.name, num_layers=layers, driver=PC, context=1024, stages=stages, standbys=standbys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`number` to the stages in `victims`, one after the other, when `after` tokens are there (-1: in the prompt)."""

    victim: DeviceId
    after: int
    number: int = KILL
    standby: bool = False
    successor_too: bool = False

    def describe(self) -> str:
        what = f"{signal.Signals(self.number).name} of {self.victim}"
        when = "in the prompt" if self.after < 0 else f"after {self.after} tokens"
        return f"{what} {when}{', standby' * self.standby}{', its successor too' * self.successor_too}"


@dataclass(slots=True)
class Answer:
    """What came of one request, and when."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    begun_s: float = 0.0
    end: Piece | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, piece: Piece) -> None:
        with self.changed:
            self.tokens += piece.tokens
            self.times_s += [time.perf_counter()] * len(piece.tokens)
            self.end = piece if piece.ending else None
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: condition() or self.end is not None, PATIENCE_S)

    def pause_s(self, from_s: float) -> float:
        """The longest time without a token from then on."""
        later = [from_s, *(t for t in self.times_s if t > from_s)]
        return max((b - a for a, b in itertools.pairwise(later)), default=PATIENCE_S)


def models(seed: int, folder: Path) -> list[Model]:
    """The random model as files in `folder`, as nodes have real ones on their disks, and the tiny one."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=SHAPE.vocabulary, hidden_size=SHAPE.width, intermediate_size=SHAPE.ffn_width, tie_word_embeddings=False,
        max_position_embeddings=SHAPE.max_positions, num_hidden_layers=SHAPE.num_layers, initializer_range=SHAPE.width**-0.5,
        num_attention_heads=SHAPE.num_heads, num_key_value_heads=SHAPE.num_kv_heads,
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    tiny = Checkpoint.open(Path(ecotone.__file__).parent / "assets" / "tiny-llm")
    ids = torch.randint(0, SHAPE.vocabulary, (512,)).tolist()
    few = torch.randint(0, tiny.config.vocabulary, (60,)).tolist()
    return [
        Model("12 x 1024", Checkpoint.open(folder), "native:int8", tuple(ids), 96),
        Model("tiny-llm", tiny, "native:fp32", tuple(few), 300),
    ]


def faults(model: Model, quick: bool) -> list[Fault]:
    a, b, c = STAGES
    early, middle, late = 2, model.num_tokens // 2, model.num_tokens - 6
    if quick:
        return [Fault(victim=b, after=middle), Fault(victim=b, after=middle, number=STOP, standby=True)]
    if model.name == "tiny-llm":
        return [Fault(victim=a, after=middle), Fault(victim=c, after=late), Fault(victim=b, after=early, number=STOP)]
    return [
        Fault(victim=a, after=middle), Fault(victim=b, after=early), Fault(victim=c, after=late), Fault(victim=b, after=-1),
        Fault(victim=b, after=middle, number=STOP), Fault(victim=b, after=middle, successor_too=True),
        Fault(victim=b, after=middle, standby=True), Fault(victim=c, after=late, standby=True),
        Fault(victim=b, after=middle, number=STOP, standby=True), Fault(victim=b, after=-1, standby=True),
    ]  # fmt: skip


def cluster() -> Cluster:
    devices = tuple(Device(name=n, memory_bytes=(4 if n == SPARE else 2) * GIB, threads=1) for n in (PC, *STAGES, SPARE))
    links = tuple(
        Link(source=x.name, target=y.name, bandwidth_bytes_per_s=1.25e9, latency_s=0.0)
        for x in devices for y in devices if x != y
    )  # fmt: skip
    return Cluster(name="failover", devices=devices, links=links, source=PC, sink=PC, emulate=True)


@contextlib.contextmanager
def generating(nodes: Nodes, model: Model, plan: LlmPlan) -> Iterator[tuple[GenerationService, Generator]]:
    """A fresh driver; prompts are always cut alike, so that equal requests have equal bits."""
    of = nodes.cluster
    settings = replace(
        settings_for(plan, of, model.name), chunk_tokens=CHUNK, least_chunk_tokens=CHUNK, most_chunk_tokens=CHUNK
    )
    with join(nodes) as service, deploy_llm(service, of, plan, model.source, settings=settings) as generator:
        yield service, generator


def ask(generator: Generator, model: Model, skip: int = 0) -> Answer:
    answer = Answer(begun_s=time.perf_counter())
    generator.submit(model.prompt[skip:], SamplingParams(max_tokens=model.num_tokens, temperature=0), answer.take)
    return answer


def unbroken(nodes: Nodes, model: Model) -> Answer:
    with generating(nodes, model, model.plan()) as (_, generator):
        ask(generator, model).wait(lambda: False)  # warm
        answer = ask_fresh(generator, model)
    return answer


def ask_fresh(generator: Generator, model: Model) -> Answer:
    answer = ask(generator, model)
    answer.wait(lambda: False)
    return answer


def trial(nodes: Nodes, model: Model, fault: Fault, wanted: Answer) -> dict[str, Any]:
    """One fault in one answer; what is ended is started again."""
    standbys = (Standby(device=SPARE, stage=STAGES.index(fault.victim)),) if fault.standby else ()
    with generating(nodes, model, model.plan(standbys=standbys)) as (service, generator):
        before = shards(service, generator)
        answer = ask(generator, model)
        at_s = inflict(nodes, generator, answer, fault)
        computed_s = recomputing_s(service, generator, answer, before, at_s)
        answer.wait(lambda: False)
        after = shards(service, generator)
        lived = {n: w for n, w in after.items() if n in before}
        pause_s = answer.pause_s(at_s)
        if fault.after < 0:
            pause_s = (answer.times_s[0] - answer.begun_s) - (wanted.times_s[0] - wanted.begun_s)
        needed = len(model.prompt) + len(answer.tokens) - 1
        reasons = [f"{', '.join(loss.lost)}: {loss.reason}" for loss in generator.losses]
    mend(nodes)
    lost = len(wanted.tokens) - len(answer.tokens)
    is_right = answer.end is not None and answer.end.ending is Ending.LENGTH
    return {
        "model": model.name, "fault": fault.describe(), "pause_s": pause_s,
        "longest_gap_s": answer.pause_s(answer.begun_s), "recompute_s": computed_s, "beyond_s": pause_s - computed_s,
        "tokens_lost": lost if is_right else model.num_tokens,
        "tokens_changed": sum(a != b for a, b in zip(wanted.tokens, answer.tokens, strict=False)),
        "layers_again": sum(w.span.num_layers for w in lived.values() if w.computed_tokens - w.dropped_tokens > needed),
        "in_flight_again": {w.span.describe(): w.dropped_tokens for w in lived.values()}, "detected": reasons,
    }  # fmt: skip


def shards(service: GenerationService, generator: Generator) -> dict[tuple[str, int], ShardWork]:
    """(node, shard) -> what the stages in force have done."""
    found: dict[tuple[str, int], ShardWork] = {}
    for node in generator.plan.devices:
        with contextlib.suppress(EcotoneError):
            found |= {(node, work.shard): work for work in service.work_at(node)}
    return found


def inflict(nodes: Nodes, generator: Generator, answer: Answer, fault: Fault) -> float:
    """Send the signal when it is time; returns when that was, the last one where there are two."""
    if fault.after >= 0:
        answer.wait(lambda: len(answer.tokens) >= fault.after)
    else:
        wait(lambda: generator.measured().counts.get("frames_prefill", 0) >= 3)
    at_s = time.perf_counter()
    os.kill(nodes.pids[fault.victim], fault.number)
    if fault.successor_too:
        wait(lambda: SPARE in generator.plan.devices)  # it is loaded, and being told its place
        at_s = time.perf_counter()
        os.kill(nodes.pids[SPARE], fault.number)
        wait(lambda: len(generator.losses) > 1)
    return at_s


def recomputing_s(
    service: GenerationService, generator: Generator, answer: Answer, before: dict[tuple[str, int], ShardWork], at_s: float
) -> float:  # fmt: skip
    """What shards that took over have computed when the first token after the loss is there; 0 where none came."""
    wait(lambda: bool(generator.losses) or answer.end is not None)
    wait(lambda: generator.measured().mode == "running" or answer.end is not None)
    told = len(answer.tokens)
    answer.wait(lambda: len(answer.tokens) > told)
    return sum(work.seconds for key, work in shards(service, generator).items() if key not in before)


def mend(nodes: Nodes) -> None:
    """Whole again: what was stopped goes on, what ended is started."""
    for name, child in list(nodes.children.items()):
        if child.is_alive:
            os.kill(child.pid, signal.SIGCONT)
        else:
            nodes.restart(name)


def wait(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.0005)


def moves(nodes: Nodes, model: Model, wanted: Answer) -> list[dict[str, Any]]:
    """The middle stage goes to the spare while answers run, and by SIGTERM."""
    found = []
    for how in ("reshard", "SIGTERM"):
        with generating(nodes, model, model.plan()) as (_, generator):
            answers = [ask(generator, model, skip) for skip in (0, 1)]
            answers[0].wait(lambda: len(answers[0].tokens) >= 10)  # noqa: B023
            at_s, token_s = time.perf_counter(), generator.measured().loop_s
            if how == "reshard":
                report_ = generator.reshard(model.plan((STAGES[0], SPARE, STAGES[2])))
            else:
                nodes.children[STAGES[1]].terminate()
                nodes.children[STAGES[1]].wait(60.0)
                report_ = generator.moves[-1]
            for answer in answers:
                answer.wait(lambda: False)
            found.append({
                "model": model.name, "how": how, "error": report_.error, "choice": report_.choice,
                "pause_s": report_.pause_s, "token_s": token_s, "pause_over_token": report_.pause_s / token_s,
                "moved_bytes": report_.moved_bytes, "rounds": report_.rounds, "longest_gap_s": answers[0].pause_s(at_s),
                "tokens_lost": model.num_tokens * 2 - sum(len(a.tokens) for a in answers),
                "tokens_changed": sum(a != b for a, b in zip(wanted.tokens, answers[0].tokens, strict=False)),
            })  # fmt: skip
        mend(nodes)
    return found


def main(argv: list[str] | None = None) -> int:
    """All trials; returns 0."""
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    trials: list[dict[str, Any]] = []
    moved: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, launch(cluster(), program=NODES) as nodes:
        for model in models(options.seed, Path(folder)):
            wanted = unbroken(nodes, model)
            for fault in faults(model, options.quick):
                trials.append(trial(nodes, model, fault, wanted))
                say(trials[-1])
            moved += moves(nodes, model, wanted)
            say(*moved[-2:])
    figures = {
        "tokens_lost": sum(t["tokens_lost"] for t in (*trials, *moved)),
        "tokens_changed": sum(t["tokens_changed"] for t in (*trials, *moved)),
        "resume_s_beyond_recompute": max(t["beyond_s"] for t in trials),
        "layers_recomputed_outside_lost_span": sum(t["layers_again"] for t in trials),
    }
    about = report.context(options.seed, seconds=round(time.perf_counter() - began_s), chunk_tokens=CHUNK)
    report.finish(options.json, figures, {"trials": trials, "moves": moved}, about)
    return 0


def say(*cases: dict[str, Any]) -> None:
    for case in cases:
        print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in case.items()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
