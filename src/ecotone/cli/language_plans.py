"""Plans of language models for the commands: what is asked, measured where it is not known yet, chosen, shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from ecotone.cli.console import err, out
from ecotone.cli.language import LlmWork, candidates, measured_on
from ecotone.cli.tables import listing, seconds
from ecotone.cli.workflow import read_file, write_file
from ecotone.cluster import Cluster, Device, DeviceId
from ecotone.executors.cache import cache_root
from ecotone.llm.profile_build import build_profile
from ecotone.llm.recipes import layer_recipes
from ecotone.llm.service import GenerationService
from ecotone.llm.timing import WAY
from ecotone.llmcost import LlmCost, LlmCostModel, Shape
from ecotone.llmplan import LlmPlan, Span
from ecotone.llmprofile import LlmProfile
from ecotone.planner.generation import Asked, choose_plan, replan_without, value_of
from ecotone.units import EcotoneError, format_quantity

__all__ = [
    "Planned", "Replanner", "asked_of", "known_profile", "make_llm_profile", "measured_cluster", "plan_llm", "show_plan",
]  # fmt: skip

_LONG_CONTEXT = 4096
_OBJECTIVES = {"latency": "request", "request": "request", "tpot": "tpot", "ttft": "ttft", "throughput": "throughput"}
_ANY_LOSS = 1e3
_GAP = 0.01  # near enough to the best while somebody waits
_LEAST_GAIN = 1.1


def asked_of(work: LlmWork, objective: str, context: int, slots: int, precisions: Sequence[str]) -> Asked:
    """What the command line says of requests and precision. `context` 0: the model's, at most 4096.

    Raises EcotoneError for what the model cannot do.
    """
    longest = work.source.config.max_positions
    if context > longest:
        raise EcotoneError(f"--context {context}: {work.name} takes at most {longest} tokens")
    if objective not in _OBJECTIVES:
        raise EcotoneError(
            f"--objective {objective!r}: of a language model latency, ttft, tpot and throughput can be made best"
        )
    context = context or min(longest, _LONG_CONTEXT)
    shape = Shape(
        prompt=max(min(512, context * 3 // 4), 1), answer=max(min(128, context // 4), 1), context=context,
        concurrency=slots if objective == "throughput" else 1, max_slots=slots,
    )  # fmt: skip
    return Asked(
        shape=shape, objective=_OBJECTIVES[objective], max_loss=_ANY_LOSS if precisions else Asked().max_loss,
        executors=candidates(tuple(precisions) or (_stored_precision(work),)),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan and what it was chosen on. `profile` None: a plan of a file, without figures."""

    plan: LlmPlan
    asked: Asked
    profile: LlmProfile | None = None
    cost: LlmCost | None = None
    gap: float = 0.0

    @property
    def chunk_tokens(self) -> int:
        return self.cost.chunk_tokens if self.cost is not None else 0


def plan_llm(
    work: LlmWork, service: GenerationService, asked: Asked, plan_file: Path | None, profile_file: Path | None
) -> Planned:
    """The plan of a file, or the best one on the machines that answer; raises EcotoneError saying what is missing."""
    if plan_file is not None:
        plan = LlmPlan.from_json(read_file(plan_file), str(plan_file))
        if plan.model_hash != work.ref.fingerprint:
            raise EcotoneError(f"plan {plan_file}: is for another model than {work.name}; make one with ecotone plan")
        return Planned(plan=plan, asked=asked)
    profile = make_llm_profile(work, service, asked.executors, profile_file)
    return chosen(profile, measured_cluster(_only(work.cluster, service.peers()), profile), asked)


def chosen(profile: LlmProfile, cluster: Cluster, asked: Asked) -> Planned:
    """The best plan; raises PlannerError saying by how much nothing fits and what would help."""
    solution = choose_plan(profile, cluster, asked, gap=_GAP)
    return Planned(plan=solution.plan, asked=asked, profile=profile, cost=solution.cost, gap=solution.gap)


def measured_cluster(cluster: Cluster, profile: LlmProfile) -> Cluster:
    """`cluster` with the devices that were measured alone; the driver is always one of them, or nothing can be planned."""
    known = {device.name for device in cluster.devices if profile.executors_of(device)}
    if cluster.source not in known:
        raise EcotoneError(f"{cluster.source}, which drives, was not measured; none of the executors works there")
    return replace(_only(cluster, known), sink=cluster.source)


def known_profile(work: LlmWork, executors: Sequence[str], path: Path | None) -> LlmProfile | None:
    """The profile of a file, or the one that was kept when such devices were measured; None where there is none."""
    file = _profile_file(work, executors, path)
    if not file.is_file():
        return None
    profile = LlmProfile.from_json(read_file(file), str(file))
    if profile.model_hash != work.ref.fingerprint:
        raise EcotoneError(f"{file} is the profile of another model; delete it or name another file")
    if not work.quiet:
        err.print(f"[dim]profile: {escape(str(file))}", soft_wrap=True)
    return profile


def make_llm_profile(
    work: LlmWork, service: GenerationService, executors: Sequence[str], path: Path | None
) -> LlmProfile:  # fmt: skip
    """What is known, and measured now what is not known of devices that answer; kept in the file (or in the cache)."""
    known, file, present = known_profile(work, executors, path), _profile_file(work, executors, path), service.peers()
    lacking = [d for d in work.cluster.devices if d.name in present and not (known and known.executors_of(d))]
    if known is not None and not lacking:
        return known
    measured = measured_on(work, service, executors, lacking)
    if known is None and not any(found.times for per_device in measured.values() for found in per_device):
        reasons = dict.fromkeys(f.reason for per_device in measured.values() for f in per_device if f.reason)
        raise EcotoneError(f"no device can run {work.name}: {'; '.join(reasons) or 'none answered'}")
    profile = build_profile(work.ref, measured)
    profile = profile if known is None else known.with_devices_of(profile)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, profile.to_json())
    return profile


def plan_table(planned: Planned) -> Table:
    """A row per stage and way over a link."""
    plan, cost = planned.plan, planned.cost
    table = listing("what", "where", "how", right=("weights", "keys", "per token", "chunk"))
    for index, stage in enumerate(plan.stages):
        at = cost.stages[index] if cost is not None else None
        table.add_row(
            escape(stage.span.describe()), stage.device, stage.executor,
            format_quantity(at.weight_bytes, "bytes") if at else "", format_quantity(stage.kv_bytes, "bytes"),
            seconds(at.decode_s) if at else "", seconds(at.chunk_s) if at else "",
        )  # fmt: skip
    for hop in cost.hops if cost is not None else ():
        size = format_quantity(hop.decode_bytes, "bytes")
        way = f"{hop.source} -> {hop.target}"
        table.add_row("send", way, hop.codec, "", size, seconds(hop.decode_s), seconds(hop.chunk_s), style="cyan")
    return table


def show_plan(planned: Planned) -> None:
    """The plan as a table, and what a request may expect of it."""
    out.print(plan_table(planned))
    if planned.cost is not None:
        out.print()
        for name, text in _figures(planned.cost, planned.asked.shape, planned.gap):
            out.print(f"[bold]{name:18s}[/] {escape(text)}", highlight=False, soft_wrap=True)


def _figures(cost: LlmCost, shape: Shape, gap: float) -> Iterator[tuple[str, str]]:
    yield "first token", f"{seconds(cost.ttft_s)} for {shape.prompt} tokens, in chunks of {cost.chunk_tokens}"
    yield "per token", seconds(cost.tpot_s)
    yield "tokens per second", f"{cost.tokens_per_s:.3g} with {shape.concurrency} at a time"
    for memory in cost.memory:
        used, has = (format_quantity(n, "bytes") for n in (memory.used_bytes, memory.has_bytes))
        yield f"memory of {memory.device}", f"{used} of {has}"
    yield "proven", "best" if gap <= 1e-6 else f"within {gap:.1%} of the best"


def _stored_precision(work: LlmWork) -> str:
    """The precision in which the weights lie on disk: nothing is rounded unless it is asked for."""
    config = work.source.config
    stored = sum(work.source.stored_bytes(Span(start=0, stop=config.num_layers))[1])
    elements = sum(r.num_elements for layer in range(config.num_layers) for r in layer_recipes(config, layer))
    return "fp32" if stored > 3 * elements else "bf16"


def _profile_file(work: LlmWork, executors: Sequence[str], path: Path | None) -> Path:
    return path or cache_root() / "llm-profiles" / f"{_key(work, executors)}.json"


def _key(work: LlmWork, executors: Sequence[str]) -> str:
    """Names a profile: the model's shape, the devices, the executors."""
    devices = [(d.name, d.threads, d.accelerator, d.slowdown, d.address) for d in work.cluster.devices]
    text = json.dumps([work.ref.fingerprint, devices, list(executors), WAY], default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(slots=True)
class Replanner:
    """Decides where stages go when machines are lost or come (llm/placement.py); by measurements, of newcomers too.

    After a loss every living stage stays. Where none is lost the best plan is taken if it is better by `_LEAST_GAIN`:
    moving costs keys on the links.
    """

    work: LlmWork
    service: GenerationService
    profile: LlmProfile
    asked: Asked

    def __call__(self, plan: LlmPlan, alive: frozenset[DeviceId]) -> LlmPlan:
        """The plan to go on with on the devices that are `alive`; raises EcotoneError where there is none."""
        self._measure([device for device in self.work.cluster.devices if device.name in alive])
        if not set(plan.devices) <= alive:
            lost = [device.name for device in self.work.cluster.devices if device.name not in alive]
            machines = measured_cluster(self.work.cluster, self.profile)
            return replan_without(lost, plan, self.profile, machines, self.asked).plan
        machines = measured_cluster(_only(self.work.cluster, alive), self.profile)
        best = choose_plan(self.profile, machines, self.asked, gap=_GAP)
        present = LlmCostModel(self.profile, machines, self.asked.shape).predict(plan)
        return best.plan if best.value * _LEAST_GAIN < value_of(self.asked, present) else plan

    def _measure(self, devices: Sequence[Device]) -> None:
        new = [device for device in devices if not self.profile.executors_of(device)]
        if new:
            measured = measured_on(replace(self.work, quiet=True), self.service, self.asked.executors, new)
            self.profile = self.profile.with_devices_of(build_profile(self.work.ref, measured))


def _only(cluster: Cluster, names: Collection[str]) -> Cluster:
    """`cluster` with these devices and what joins them."""
    devices = tuple(device for device in cluster.devices if device.name in names)
    kinds = {device.kind for device in devices}
    return replace(
        cluster,
        devices=devices,
        links=tuple(link for link in cluster.links if link.source in names and link.target in names),
        kind_links=tuple(link for link in cluster.kind_links if {link.source_kind, link.target_kind} <= kinds),
    )
