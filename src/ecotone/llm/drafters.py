"""Drafters that compute: a small model, or the first layers of the model itself, run by a shard executor of their own.

Early exit (LayerSkip, arXiv 2404.16710, without its training): layers [0, k) and the model's own final norm and head are a
shard like any other. A request has a slot of keys; an ask whose tokens differ from what the slot holds rolls it back to
where they agree, so refused drafts cost nothing more. Sampled requests are drafted with their own noise (sampling.py):
where both distributions agree, so do the tokens. Drafts never change a text; a drafter that has no room says nothing.
Asks are computed together, one step per drafted position: O(count) steps, after one for the tokens that are new.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import DraftAsk, Drafter
from ecotone.decoding.step import Row, Step
from ecotone.decoding.tail import Chooser
from ecotone.llm.config import ModelError
from ecotone.llm.executors import by_id, cache_dtype
from ecotone.llm.executors.executor import Continues, ShardExecutor
from ecotone.llm.kv import BLOCK_TOKENS, KvCache, KvCacheFull
from ecotone.llm.sampling import GrammarMasks, agreeing, make_chooser
from ecotone.llm.text import TextModel
from ecotone.llm.weights import Checkpoint, WeightSource
from ecotone.llmplan import Span

__all__ = ["Chain", "ModelDrafter", "check_vocabularies", "layers_drafter", "model_drafter"]

_CHUNK = 512
_SEQUENCES = 4
_MOST_REQUESTS = 64


def check_vocabularies(model: TextModel, draft: TextModel) -> None:
    """Raise ModelError unless both have the same tokens under the same ids: drafts are token ids."""
    own, other = model.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if own == other:
        return
    wrong = [token for token in {*own, *other} if own.get(token) != other.get(token)]
    first = min(wrong, key=lambda token: (own.get(token, len(own)), token))
    text = f"{len(wrong)} tokens differ, such as {first!r}: id {own.get(first)} and {other.get(first)}"
    raise ModelError(f"{draft.where} cannot draft for {model.where}: {text}; use a drafter with the same tokenizer")


def model_drafter(
    source: Checkpoint, text: TextModel, executor: str = "native:int8", *, context: int = 0, kv_bytes: int = 0,
    accelerator: str = "cpu", threads: int = 1, grammars: GrammarMasks | None = None,
) -> ModelDrafter:  # fmt: skip
    """A whole small model as drafter for the model of `text`, whose tokens it must have.

    `context` 0: the drafter's own maximum. `kv_bytes` bounds its keys and values; 0: four sequences of that length.
    Raises ModelError, ShardError.
    """
    check_vocabularies(text, TextModel.open(source.folder))
    span = Span(start=0, stop=source.config.num_layers, embedding=True, head=True)
    return _loaded(source, span, text.vocabulary, executor, context, kv_bytes, accelerator, threads, grammars)


def layers_drafter(
    source: WeightSource, num_layers: int, executor: str = "native:int8", *, context: int = 0, kv_bytes: int = 0,
    accelerator: str = "cpu", threads: int = 1, grammars: GrammarMasks | None = None,
) -> ModelDrafter:  # fmt: skip
    """The first `num_layers` layers of the model of `source` itself, with its final norm and head, as its drafter."""
    if not 1 <= num_layers < source.config.num_layers:
        reason = f"{num_layers} of {source.config.num_layers} layers cannot draft"
        raise ModelError(f"{reason}; give 1 to {source.config.num_layers - 1}")
    span = Span(start=0, stop=num_layers, embedding=True, head=True)
    vocabulary = source.config.vocabulary
    return _loaded(source, span, vocabulary, executor, context, kv_bytes, accelerator, threads, grammars)


def _loaded(
    source: WeightSource, span: Span, vocabulary: int, executor: str, context: int, kv_bytes: int, accelerator: str,
    threads: int, grammars: GrammarMasks | None,
) -> ModelDrafter:  # fmt: skip
    config, dtype = source.config, cache_dtype(executor)
    context = min(context or config.max_positions, config.max_positions)
    if not kv_bytes:
        blocks = _SEQUENCES * -(-context // BLOCK_TOKENS)
        kv_bytes = blocks * BLOCK_TOKENS * config.kv_bytes_per_token(span.num_layers, dtype.itemsize)
    cache = KvCache(config, span, kv_bytes, dtype, accelerator)
    shard = by_id(executor).load(source, span, cache, accelerator, threads, context)
    return ModelDrafter(shard, vocabulary, context, grammars)


@dataclass(slots=True)
class _Held:
    """What the drafter knows of a request: `tokens` are those whose keys are in the cache."""

    slot: int
    chooser: Chooser
    is_plain: bool  # the most likely token is chosen, whatever came before
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Job:
    """One ask under way: `tokens` so far, with drafts; `pending` of the last of them are not computed yet."""

    request: int
    held: _Held
    tokens: list[int]
    pending: int
    left: int


class ModelDrafter:
    """A Drafter by a shard with embedding and head. One thread; keeps at most 64 requests, the last used ones.

    It never names a token that the model of `vocabulary` tokens does not have, and says nothing beyond `context` tokens.
    """

    never_waits = True

    def __init__(self, shard: ShardExecutor, vocabulary: int, context: int, grammars: GrammarMasks | None = None):
        if not (shard.span.embedding and shard.span.head):
            raise ModelError(f"a drafter needs a shard with embedding and head, not {shard.span.describe()}")
        self._shard, self._context, self._grammars = shard, context, grammars
        self._vocabulary = min(vocabulary, shard.config.vocabulary)
        self._held: OrderedDict[int, _Held] = OrderedDict()  # least recently used first
        self._next_slot = 0

    def draft(self, asks: Sequence[DraftAsk]) -> Sequence[Sequence[int]]:
        jobs = [self._begin(ask) if index < _MOST_REQUESTS else None for index, ask in enumerate(asks)]
        active = [job for job in jobs if job is not None]
        if len(active) == 1 and active[0].held.is_plain and isinstance(self._shard, Continues):
            self._continue(active[0], self._shard)
        for job in active:
            while job.pending > _CHUNK and job.left:
                self._step([job], _CHUNK)
        while active := [job for job in active if job.left]:
            self._step(active, _CHUNK)
        return [() if job is None else job.tokens[len(ask.tokens) :] for ask, job in zip(asks, jobs, strict=True)]

    def end(self, request: int) -> None:
        held = self._held.pop(request, None)
        if held is not None:
            self._shard.cache.tables.free(held.slot)

    def _begin(self, ask: DraftAsk) -> _Job | None:
        """The job of an ask; None where it cannot be drafted for."""
        tables = self._shard.cache.tables
        count = min(ask.count, self._context - len(ask.tokens) + 1)
        does_fit = tables.blocks_for(len(ask.tokens) + count - 1) <= tables.num_blocks
        if count < 1 or not does_fit or max(ask.tokens, default=self._vocabulary) >= self._vocabulary:
            return None
        held = self._held.get(ask.request)
        if held is None:
            chooser = self._chooser(ask.params, ask.prompt_length)
            held = self._held[ask.request] = _Held(self._next_slot, chooser, ask.params.is_plain)
            self._next_slot += 1
        self._held.move_to_end(ask.request)
        if len(self._held) > _MOST_REQUESTS:
            self.end(next(iter(self._held)))
        tokens = list(ask.tokens)
        agreed = min(agreeing(held.tokens, tokens), len(tokens) - 1)  # the last one is computed again, for its logits
        del held.tokens[agreed:]
        return _Job(ask.request, held, tokens, len(tokens) - agreed, count)

    def _chooser(self, params: SamplingParams, prompt_length: int) -> Chooser:
        bias = tuple((token, bias) for token, bias in params.logit_bias if token < self._vocabulary)
        grammar = params.grammar if self._grammars is not None else None
        params = replace(params, logprobs=None, logit_bias=bias, grammar=grammar)
        return make_chooser(params, prompt_length, self._vocabulary, self._grammars)

    def _step(self, jobs: list[_Job], most: int) -> None:
        """Compute up to `most` pending tokens of each job; those without any left choose the next one."""
        while jobs:
            rows, parts = [], []
            for job in jobs:
                start, count = len(job.held.tokens), min(job.pending, most)
                rows.append(Row(slot=job.held.slot, start=start, count=count, num_logits=int(count == job.pending)))
                parts.append(job.tokens[start : start + count])
            try:
                logits = self._shard.forward(Step(rows=tuple(rows)), torch.tensor([t for part in parts for t in part]))
                break
            except KvCacheFull:
                self._make_room(jobs)
        else:
            return
        at = 0
        for job, part, row in zip(jobs, parts, rows, strict=True):
            job.held.tokens += part
            job.pending -= len(part)
            if row.num_logits:
                job.tokens.append(job.held.chooser.choose(logits[at][: self._vocabulary], job.tokens).token)
                job.pending, job.left, at = 1, job.left - 1, at + 1

    def _continue(self, job: _Job, shard: Continues) -> None:
        """Let the shard choose all that `job` asks for, once what is new to it is computed; nothing where keys run out."""
        while job.pending > 1 and job.left:
            self._step([job], min(_CHUNK, job.pending - 1))
        held, token = job.held, job.tokens[-1]
        if not job.left:
            return
        try:
            made = shard.continue_greedily(held.slot, len(held.tokens), token, job.left, self._vocabulary)
        except KvCacheFull:
            return  # the usual way makes room
        job.tokens += made
        held.tokens += [token, *made[:-1]]
        job.pending, job.left = 1, 0

    def _make_room(self, jobs: list[_Job]) -> None:
        """Forget the request that was asked for longest ago, if need be one of `jobs`, which then drafts no further."""
        working = {job.request for job in jobs}
        idle = next((request for request in self._held if request not in working), None)
        if idle is None:
            job = jobs.pop()
            idle, job.left = job.request, 0
        self.end(idle)


@dataclass(frozen=True, slots=True)
class Chain:
    """Ask `first`, and `second` where it has nothing to say: n-grams where they match, a model elsewhere."""

    first: Drafter
    second: Drafter

    @property
    def never_waits(self) -> bool:
        return all(getattr(each, "never_waits", False) for each in (self.first, self.second))

    def draft(self, asks: Sequence[DraftAsk]) -> Sequence[Sequence[int]]:
        made = list(self.first.draft(asks))
        dry = [index for index, tokens in enumerate(made) if not tokens]
        if dry:
            for index, tokens in zip(dry, self.second.draft([asks[index] for index in dry]), strict=True):
                made[index] = tokens
        return made

    def end(self, request: int) -> None:
        self.first.end(request)
        self.second.end(request)
