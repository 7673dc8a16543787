"""How often each drafter's tokens are the model's, and what a drafted token costs; tiny-llm on text that it has not seen.

Prompts are pieces of Tiny Shakespeare's last tenth (../shared/data), which neither model was trained on; without it, lines
of this file's own. The model answers in rounds: a window of 4 drafts, judged by decoding.tail as the last stage does. A
draft is judged when those before it were right, so `acceptance` is the chance that the formulas of speculation use.
`texts_differ`: answers that a drafter changed; every executor here computes a token alone and in a window with the same
bits, so it is 0. Seconds are of processor time, one thread. Run: python -m benchmarks.llm_drafters [--json FILE] [--quick]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import ecotone
from benchmarks import report
from ecotone.decoding.frame import FrameRow, Open
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import DraftAsk, Drafter, PromptLookup
from ecotone.decoding.step import Row, Step
from ecotone.decoding.tail import Tail
from ecotone.llm.drafters import Chain, layers_drafter, model_drafter
from ecotone.llm.executors import ShardExecutor, by_id, cache_dtype
from ecotone.llm.kv import KvCache
from ecotone.llm.sampling import make_chooser
from ecotone.llm.text import TextModel
from ecotone.llm.weights import Checkpoint
from ecotone.llmplan import Span

ASSETS = Path(ecotone.__file__).parent / "assets"
SHAKESPEARE = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
OWN = "KING:\nThe night is long, and yet the morning comes.\n\nQUEEN:\nThen let us speak of what the morning brings.\n\n"
EXECUTOR, CACHE_BYTES, WINDOW, PROMPT = "native:fp32", 1 << 24, 4, 96


@dataclass(slots=True)
class Found:
    """What one drafter did over all answers."""

    rounds: int = 0
    drafted: int = 0
    judged: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    model_s: float = 0.0
    texts: tuple[tuple[int, ...], ...] = ()


def prompts(text: TextModel, count: int) -> list[list[int]]:
    """`count` pieces of text of PROMPT tokens, far apart."""
    whole = SHAKESPEARE.read_text() if SHAKESPEARE.is_file() else OWN * 200
    held_out = whole[int(0.9 * len(whole)) :]
    step = len(held_out) // count
    return [text.encode(held_out[i * step : i * step + 8 * PROMPT])[:PROMPT] for i in range(count)]


def answer(
    model: ShardExecutor, drafter: Drafter | None, number: int, prompt: Sequence[int], params: SamplingParams, found: Found
) -> None:
    """One answer of params.max_tokens tokens, in rounds of a window of drafts."""
    vocabulary = model.config.vocabulary
    tail = Tail(lambda p, n: make_chooser(p, n, vocabulary))
    tail.open(Open(number, len(prompt), params.to_bytes()))
    tokens, start = list(prompt), 0
    while len(tokens) < len(prompt) + params.max_tokens:
        drafts: tuple[int, ...] = ()
        if drafter is not None:
            ask = DraftAsk(
                request=number, ticket=1, tokens=tuple(tokens), num_settled=len(tokens), count=WINDOW, params=params,
                prompt_length=len(prompt),
            )  # fmt: skip
            before = time.process_time()
            drafts = tuple(drafter.draft([ask])[0])
            found.draft_s += time.process_time() - before
        fed = (*tokens[start:], *drafts)
        row = Row(slot=number, start=start, count=len(fed), num_logits=1 + len(drafts))
        before = time.process_time()
        logits = model.forward(Step(rows=(row,)), torch.tensor(fed))
        found.model_s += (time.process_time() - before) * (start > 0)  # without the prompt
        told = tail.judge([FrameRow(number, start, fed, num_logits=1 + len(drafts))], logits)[0].tokens  # type: ignore[arg-type]
        start = len(tokens) + len(told) - 1
        tokens += told
        found.rounds += 1
        found.drafted += len(drafts)
        found.accepted += len(told) - 1
        found.judged += min(len(drafts), len(told))
    model.cache.tables.free(number)
    if drafter is not None:
        drafter.end(number)
    found.texts += (tuple(tokens[len(prompt) : len(prompt) + params.max_tokens]),)


def loaded(source: Checkpoint, executor: str) -> ShardExecutor:
    """The whole model."""
    span = Span(start=0, stop=source.config.num_layers, embedding=True, head=True)
    return by_id(executor).load(source, span, KvCache(source.config, span, CACHE_BYTES, cache_dtype(executor)))


def contenders(model: Checkpoint, small: Checkpoint, text: TextModel) -> dict[str, Callable[[], Drafter | None]]:
    """Drafters by name; made anew for each kind of request."""

    def of_small() -> Drafter:
        return model_drafter(small, text, EXECUTOR)

    made: dict[str, Callable[[], Drafter | None]] = {
        "none": lambda: None,
        "n-grams of 3": PromptLookup,
        "n-grams of 2": lambda: PromptLookup(min_match=2),
        "tiny-drafter": of_small,
        "n-grams of 3, else tiny-drafter": lambda: Chain(PromptLookup(), of_small()),
    }
    for count in range(1, model.config.num_layers):
        made[f"first {count} of {model.config.num_layers} layers"] = lambda count=count: layers_drafter(  # type: ignore[misc]
            model, count, EXECUTOR
        )
    return made


def case(name: str, kind: str, found: Found, plain: Found) -> dict[str, Any]:
    """The figures of one drafter for one kind of request."""
    tokens = sum(map(len, found.texts))
    return {
        "drafter": name, "requests": kind, "tokens": tokens, "rounds": found.rounds,
        "acceptance": found.accepted / found.judged if found.judged else None,
        "drafts_per_round": found.drafted / found.rounds, "tokens_per_round": tokens / found.rounds,
        "model_s_per_round": found.model_s / (found.rounds - len(found.texts)),
        "s_per_draft": found.draft_s / found.drafted if found.drafted else None,
        "texts_differ": sum(a != b for a, b in zip(found.texts, plain.texts, strict=True)),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    count, length = (3, 32) if options.quick else (12, 96)
    model, small = Checkpoint.open(ASSETS / "tiny-llm"), Checkpoint.open(ASSETS / "tiny-drafter")
    text = TextModel.open(ASSETS / "tiny-llm")
    target, pieces, cases = loaded(model, EXECUTOR), prompts(text, count), []
    kinds = {"greedy": SamplingParams(temperature=0.0, max_tokens=length)}
    kinds["sampled, temperature 0.8"] = SamplingParams(temperature=0.8, max_tokens=length)
    for kind, params in kinds.items():
        drafters = {name: make() for name, make in contenders(model, small, text).items()}
        found = {name: Found() for name in drafters}
        for number, prompt in enumerate(pieces):  # drafters in turn, so that a drift of the machine hits all alike
            for name, drafter in drafters.items():
                answer(target, drafter, number, prompt, replace(params, seed=options.seed + number), found[name])
        for name, each in found.items():
            cases.append(case(name, kind, each, found["none"]))
            print(in_words(cases[-1]), flush=True)
    plain = cases[0]
    best = {kind: max(c["acceptance"] or 0.0 for c in cases if c["requests"] == kind) for kind in kinds}
    figures = {
        "texts_differ": float(sum(c["texts_differ"] for c in cases)),
        "best_acceptance_greedy": best["greedy"],
        "best_acceptance_sampled": best["sampled, temperature 0.8"],
        "model_s_per_token": plain["model_s_per_round"],
    }
    about = report.context(options.seed, executor=EXECUTOR, window=WINDOW, held_out=SHAKESPEARE.is_file())
    report.finish(options.json, figures, cases, about)
    return 0


def in_words(found: dict[str, Any]) -> str:
    """One case on one line."""
    text = f"{found['requests']:25s} {found['drafter']:32s}"
    if found["acceptance"] is None:
        return f"{text} {found['tokens_per_round']:.2f} tokens a round"
    rest = f"{found['drafts_per_round']:.2f} drafts and {found['tokens_per_round']:.2f} tokens a round"
    return f"{text} acceptance {found['acceptance']:.3f}, {rest}, {1e3 * found['s_per_draft']:.3f} ms a draft"


if __name__ == "__main__":
    sys.exit(main())
