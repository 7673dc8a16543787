"""Language models in shards beside transformers: logits and greedy text, over models x splits x executors.

Models: random ones of every family (llm_families.py), one with wide matrices, the two that ship. Splits: embedding, layers
and head apart or together in every way, for torch:fp32 and native:fp32; whole and one border in every place for OpenVINO,
which compiles every shard, and for OpenVINO's prompts with native decoding. transformers computes in float32, eagerly and
without a cache, so that nothing is shared with what is judged.

`max_logit_error_float32`: the largest difference of a logit over the largest logit, two sequences fed together in ragged
chunks; `greedy_mismatches_float32`: tokens that differ in greedy text. Other precisions are under `cases`: their errors, and
how often the likeliest token is that of transformers. Run: python -m benchmarks.llm_exact [--json FILE] [--quick]
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModelForCausalLM

import ecotone
from benchmarks import report
from benchmarks.llm_families import BY_LENGTH, FAMILIES, WIDE, make, reference
from ecotone.decoding.step import Row, Step
from ecotone.llm.executors import IDS, ShardExecutor, by_id, cache_dtype, catalogue
from ecotone.llm.kv import KvCache
from ecotone.llm.text import TextModel
from ecotone.llm.weights import Checkpoint
from ecotone.llmplan import Span

ASSETS = Path(ecotone.__file__).parent / "assets"
SHIPPED = ("tiny-llm", "tiny-drafter")
FLOAT = ("torch:fp32", "native:fp32", "openvino:fp32", "openvino:fp32+native:fp32")
ROUNDED = tuple(id for id in IDS if not id.endswith(":fp32"))
ROUNDED_MODELS = ("llama", "gemma2", "qwen2-moe", "wide", *SHIPPED)
LENGTHS, CHUNKS = (40, 75), (33, 1, 7)  # over a block's border; chunks below and above what kernels take for few rows
PROMPT, GREEDY = 9, 32
SHORT_PROMPT, SHORT_GREEDY, SHORT_CONTEXT = 6, 10, 16  # where a rotation depends on the length: before it changes
CACHE_BYTES = 1 << 22
TALK = [{"role": "user", "content": "What news of the king?"}]

Split = tuple[Span, ...]


@dataclass(slots=True)
class Model:
    """One model, what transformers says of it, and shards of it that were loaded."""

    name: str
    checkpoint: Checkpoint
    sequences: list[torch.Tensor]
    right: list[torch.Tensor]  # logits of every position of every sequence
    prompt: torch.Tensor
    text: list[int]  # greedy, after the prompt
    shards: dict[tuple[str, Span, int], ShardExecutor] = field(default_factory=dict)

    def shard(self, id: str, span: Span, context: int) -> ShardExecutor:
        """The shard of `span` by executor `id`, its cache with room for all that is asked here."""
        key = id, span, context
        if key not in self.shards:
            cache = KvCache(self.checkpoint.config, span, CACHE_BYTES, cache_dtype(id))
            self.shards[key] = by_id(id).load(self.checkpoint, span, cache, context=context)
        return self.shards[key]


def opened(name: str, folder: Path, seed: int) -> Model:
    """The model called `name`, made in `folder` if it is a random one, and the oracle's words on it."""
    if name in SHIPPED:
        theirs = AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32, attn_implementation="eager")
        checkpoint, prompt = Checkpoint.open(ASSETS / name), torch.tensor(TextModel.open(ASSETS / name).encode_chat(TALK))
    else:
        theirs = make(name, folder)
        checkpoint, prompt = Checkpoint.open(folder), torch.empty(0, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    sizes = (*LENGTHS, SHORT_PROMPT if name in BY_LENGTH else PROMPT)
    *sequences, drawn = (torch.randint(0, checkpoint.config.vocabulary, (n,), generator=generator) for n in sizes)
    prompt = prompt if len(prompt) else drawn
    # transformers keeps the rotation of the longest sequence that it has seen, so the longest goes last
    text = greedy_of_transformers(theirs, prompt, SHORT_GREEDY if name in BY_LENGTH else GREEDY)
    return Model(name, checkpoint, sequences, [reference(theirs, ids) for ids in sequences], prompt, text)


def greedy_of_transformers(model: torch.nn.Module, prompt: torch.Tensor, count: int) -> list[int]:
    """`count` tokens after `prompt`, everything computed anew for each."""
    ids = prompt
    for _ in range(count):
        ids = torch.cat([ids, reference(model, ids)[-1].argmax()[None]])
    return [int(token) for token in ids[len(prompt) :]]


def splits(num_layers: int) -> Iterator[Split]:
    """Every way to part embedding, layers and head into runs, the fewest shards first."""
    parts = num_layers + 2
    for count in range(parts):
        for borders in itertools.combinations(range(1, parts), count):
            ends = (0, *borders, parts)
            yield tuple(
                Span(start=max(a - 1, 0), stop=min(b - 1, num_layers), embedding=a == 0, head=b == parts)
                for a, b in itertools.pairwise(ends)
            )


def run(model: Model, id: str, split: Split, context: int, rows: Sequence[Row], ids: torch.Tensor) -> torch.Tensor:
    """One step through all shards of `split`: logits of the positions that ask."""
    x = ids
    for span in split:
        x = model.shard(id, span, context).forward(Step(rows=tuple(rows)), x)
    return x


def ragged(model: Model, id: str, split: Split, context: int, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of every position of every sequence, all fed together in chunks of cycling sizes."""
    done, made, turn = [0] * len(sequences), [[] for _ in sequences], 0  # type: ignore[var-annotated]
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        counts = [min(CHUNKS[(turn + i) % len(CHUNKS)], len(s) - done[i]) for i, s in enumerate(sequences)]
        rows = [Row(slot=i, start=done[i], count=n, num_logits=n) for i, n in enumerate(counts) if n]
        ids = torch.cat([sequences[row.slot][row.start : row.stop] for row in rows])
        for row, part in zip(rows, run(model, id, split, context, rows, ids).split([r.count for r in rows]), strict=True):
            made[row.slot].append(part)
            done[row.slot] = row.stop
        turn += 1
    return [torch.cat(parts) for parts in made]


def logits_of(model: Model, id: str, split: Split) -> list[torch.Tensor]:
    """As `ragged`; a model whose rotation depends on the length gets one sequence at a time, loaded for that length."""
    if model.name in BY_LENGTH:
        return [ragged(model, id, split, len(ids), [ids])[0] for ids in model.sequences]
    return ragged(model, id, split, 0, model.sequences)


def greedy(model: Model, id: str, split: Split) -> list[int]:
    """As many tokens after the prompt as transformers made, one step each."""
    context = SHORT_CONTEXT if model.name in BY_LENGTH else 0
    ids, start, made = model.prompt, 0, []
    while len(made) < len(model.text):
        row = Row(slot=0, start=start, count=len(ids), num_logits=1)
        made.append(int(run(model, id, split, context, [row], ids).argmax()))
        ids, start = torch.tensor(made[-1:]), row.stop
    return made


def judged(model: Model, id: str, split: Split) -> dict[str, Any]:
    """What one executor makes of one split, beside transformers."""
    pairs = list(zip(logits_of(model, id, split), model.right, strict=True))
    text = greedy(model, id, split)
    same = [float((made.argmax(-1) == right.argmax(-1)).float().mean()) for made, right in pairs]
    return {
        "max_logit_error": max(float((made - right).abs().max() / right.abs().max()) for made, right in pairs),
        "rms_logit_error": max(float((made - right).norm() / right.norm()) for made, right in pairs),
        "likeliest_token_same": sum(same) / len(same),
        "greedy_mismatches": sum(a != b for a, b in zip(text, model.text, strict=True)),
        "greedy_tokens": len(text),
    }


def case(model: Model, id: str, quick: bool) -> dict[str, Any]:
    """One model by one executor over its splits: the worst of each figure, or why it was left out."""
    reason = catalogue_reason(model, id)
    if reason:
        return {"model": model.name, "executor": id, "left_out": reason}
    exact = id in FLOAT
    most = 99 if exact and id in FLOAT[:2] and not quick else 2 if exact else 1
    chosen = [split for split in splits(model.checkpoint.config.num_layers) if len(split) <= most]
    if not exact and model.checkpoint.config.num_layers > 1:
        chosen.append(next(s for s in splits(model.checkpoint.config.num_layers) if len(s) == 2 and s[0].num_layers))
    found = [judged(model, id, split) for split in chosen]
    shards = [model.shards[key] for key in model.shards if key[0] == id]
    model.shards = {key: shard for key, shard in model.shards.items() if key[0] != id}
    return {
        "model": model.name, "executor": id, "splits": len(chosen),
        "bits_per_weight": max(shard.bits_per_weight for shard in shards),
        "max_logit_error": max(f["max_logit_error"] for f in found),
        "rms_logit_error": max(f["rms_logit_error"] for f in found),
        "likeliest_token_same": min(f["likeliest_token_same"] for f in found),
        "greedy_mismatches": sum(f["greedy_mismatches"] for f in found),
        "greedy_tokens": sum(f["greedy_tokens"] for f in found),
    }  # fmt: skip


def in_words(found: dict[str, Any]) -> str:
    """One case on one line."""
    if "left_out" in found:
        return f"left out: {found['left_out']}"
    text = f"{found['greedy_mismatches']} of {found['greedy_tokens']} tokens differ"
    likeliest = f"likeliest token the same {100 * found['likeliest_token_same']:.1f} %"
    return f"{found['splits']:3d} splits  error {found['max_logit_error']:.1e}  {likeliest}  {text}"


def catalogue_reason(model: Model, id: str) -> str:
    """Why executor `id`, or either of a pair, cannot run the model here; "" where it can."""
    known = catalogue(model.checkpoint.config, "cpu")
    return next((known[part] for part in id.split("+") if known[part]), "")


def main() -> int:
    """Compare and write the figures."""
    options = report.arguments(__doc__ or "")
    torch.set_num_threads(1)
    names = ("llama", "gemma2", "qwen2-moe", "tiny-drafter") if options.quick else (*FAMILIES, *WIDE, *SHIPPED)
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ECOTONE_CACHE"] = f"{folder}/cache"  # nothing is taken from an earlier run
        for name in names:
            model = opened(name, Path(folder) / name, options.seed)
            for id in (*FLOAT, *(ROUNDED if name in ROUNDED_MODELS else ())):
                cases.append(found := case(model, id, options.quick))
                print(f"{name:18s} {id:26s} {in_words(found)}", flush=True)
    exact = [found for found in cases if found["executor"] in FLOAT and "left_out" not in found]
    figures = {
        "max_logit_error_float32": max(found["max_logit_error"] for found in exact),
        "greedy_mismatches_float32": sum(found["greedy_mismatches"] for found in exact),
    }
    report.finish(options.json, figures, cases, report.context(options.seed, threads=1, models=list(names)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
