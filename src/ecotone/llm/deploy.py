"""A language model over the nodes of a cluster, in two steps: `join` them, then `deploy_llm` a plan.

with launch(cluster, program=NODES) as nodes, join(nodes) as service:
    with deploy_llm(service, cluster, plan, Checkpoint.open(folder), text=TextModel.open(folder)) as generator:
        generator.submit(text.encode("Once"), SamplingParams(), on_piece)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ecotone.cluster import Cluster
from ecotone.decoding.answer import Piece
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import Drafter, SpeculationPolicy
from ecotone.decoding.words import Ended, Settings, Tokens
from ecotone.executors.cache import cache_root
from ecotone.llm.config import ModelError
from ecotone.llm.generator import Answer, Generator
from ecotone.llm.kv import BLOCK_TOKENS
from ecotone.llm.pipeline import Pipeline, Progress
from ecotone.llm.placement import Replan
from ecotone.llm.service import GenerationService
from ecotone.llm.sources import describe
from ecotone.llm.weights import Checkpoint, RandomWeights
from ecotone.llmplan import LlmPlan, llm_plan_violations
from ecotone.runtime.launch import Nodes, links_from
from ecotone.runtime.node import link_settings

__all__ = ["NODES", "TokenAnswer", "deploy_llm", "join", "settings_for"]

NODES = "ecotone.llm.node_main"
"""The program of node processes that offer language models, for `ecotone.runtime.launch`."""
_THIN_BYTES_PER_S = 5e7
_QUIET_S = 0.25  # probes cost little, and a node that stalls is found so much sooner


@contextlib.contextmanager
def join(nodes: Nodes, folder: Path | None = None) -> Iterator[GenerationService]:
    """The driver's own service beside `nodes`, started; `folder` keeps what it fetches."""
    cluster = nodes.cluster
    links = link_settings(links_from(cluster, cluster.source), emulate=cluster.emulate)
    device = cluster.device(cluster.source)
    service = GenerationService(nodes.port, nodes.questions, device, folder or cache_root() / "models", links)
    service.start()
    try:
        yield service
    finally:
        service.stop()


@contextlib.contextmanager
def deploy_llm(
    service: GenerationService,
    cluster: Cluster,
    plan: LlmPlan,
    source: Checkpoint | RandomWeights,
    *,
    make_answer: Callable[[SamplingParams], Answer] | None = None,
    settings: Settings | None = None,
    policy: SpeculationPolicy | None = None,
    drafter: Drafter | None = None,
    replan: Replan | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> Iterator[Generator]:
    """A Generator that runs `plan`; leaving it lets the stages go.

    `make_answer(params)` puts text together (default: token ids alone). Raises ModelError where the plan is of another model
    or cannot run on the cluster, EcotoneError where a stage cannot be loaded.
    """
    ref = describe(source, name)
    wrong = list(llm_plan_violations(plan, cluster))
    if plan.num_layers != source.config.num_layers:
        wrong.append(f"is for {plan.num_layers} layers, the model has {source.config.num_layers}")
    if wrong:
        raise ModelError(f"plan: {'; '.join(wrong)}")
    service.lend(ref, source, source.folder if isinstance(source, Checkpoint) else None)
    settings = replace(settings or settings_for(plan, cluster, ref.fingerprint), vocabulary=source.config.vocabulary)
    generator = Generator(
        service, Pipeline(service, ref), plan, cluster, settings, make_answer or TokenAnswer, policy=policy, drafter=drafter,
        replan=replan,
    )  # fmt: skip
    try:
        generator.start(progress)
        yield generator
    finally:
        generator.close()


def settings_for(plan: LlmPlan, cluster: Cluster, model: str) -> Settings:
    """The engine's settings for a plan: its bounds, and the rates that the cluster states of its links.

    Keys that move are compressed where a link of the plan is so slow that compressing takes less than it saves.
    """
    rates = {
        (str(link.source), str(link.target)): link.bandwidth_bytes_per_s
        for link in cluster.links
        if math.isfinite(link.bandwidth_bytes_per_s)
    }
    slowest = min((rates.get((str(a), str(b)), math.inf) for a, b in plan.hops), default=math.inf)
    return Settings(
        context=plan.context, max_slots=plan.max_slots, block_tokens=BLOCK_TOKENS, model=model, rates=rates,
        kv_codec="zstd" if slowest < _THIN_BYTES_PER_S else "raw", quiet_s=_QUIET_S,
    )  # fmt: skip


class TokenAnswer:
    """An Answer of token ids, without text."""

    is_stopped = False

    def __init__(self, params: SamplingParams):
        self._params = params

    def take(self, effect: Tokens | Ended) -> Piece | None:
        if isinstance(effect, Tokens):
            return Piece(tokens=effect.tokens, logprobs=effect.logprobs)
        return Piece(ending=effect.ending, reason=effect.reason, cached=effect.cached)
