"""What is asked of a plan for a language model, and as which sums and maxima the search sees it.

Every objective and limit is a linear form of four sums over stages and hops (one token's loop, the prompt's mean chunk, the
loop of a frame of several rows, loss) and of two maxima over devices and links (chunk, frame): llmcost.py, (6) to (13).
How the prompt is cut and how requests are dealt into frames changes the forms, so each pair is a View of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from ecotone.cluster import Cluster, DeviceId
from ecotone.llmcost import LlmCost, Shape, frames_of
from ecotone.llmplan import CODECS, EXACT
from ecotone.schema import check

__all__ = ["LOOP", "LOSS", "OBJECTIVES", "PROMPT", "ROWS", "Asked", "Form", "View", "value_of", "views"]

OBJECTIVES = ("request", "tpot", "ttft", "throughput")
LOOP, PROMPT, ROWS, LOSS = range(4)  # sums
CHUNK_MAX, ROWS_MAX = range(2)  # maxima


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """`objective` of OBJECTIVES is made best under the limits (0: no limit).

    "request": seconds of a whole request, equation (11); "tpot": per token; "ttft": to the first; "throughput": tokens per
    second of `shape.concurrency` requests. `max_loss`: nats per token that answers may lose, see ExecutorFacts. `executors`,
    `devices`: only these (none: all). `codecs`: those that hidden states may cross in; only "fp32" changes nothing.
    `driver`: the device that schedules; "": the cluster's source.
    """

    shape: Shape = field(default_factory=Shape)
    objective: str = "request"
    tpot_s: float = 0.0
    ttft_s: float = 0.0
    request_s: float = 0.0
    tokens_per_s: float = 0.0
    max_loss: float = 0.01
    executors: tuple[str, ...] = ()
    codecs: tuple[str, ...] = (EXACT,)
    devices: tuple[DeviceId, ...] = ()
    driver: str = ""

    def __post_init__(self) -> None:
        wrong = (
            [] if self.objective in OBJECTIVES else [f"objective {self.objective!r} is not one of {', '.join(OBJECTIVES)}"]
        )
        limits = (self.tpot_s, self.ttft_s, self.request_s, self.tokens_per_s, self.max_loss)
        if not all(math.isfinite(v) and v >= 0 for v in limits):
            wrong.append("limits must be finite and not negative")
        if not self.codecs or set(self.codecs) - set(CODECS):
            wrong.append(f"codecs {', '.join(self.codecs) or 'none'}: known are {', '.join(CODECS)}")
        check("what is asked", wrong)

    def driver_of(self, cluster: Cluster) -> DeviceId:
        """The driver; raises EcotoneError where the cluster has no such device."""
        return cluster.device(self.driver or cluster.source).name

    def missed(self, cost: LlmCost) -> Iterator[str]:
        """Each limit that a plan of `cost` does not keep."""
        slack = 1 + 1e-9
        for name, value, limit in (
            ("time per token", cost.tpot_s, self.tpot_s),
            ("time to first token", cost.ttft_s, self.ttft_s),
            ("time of a request", cost.request_s, self.request_s),
        ):
            if limit and value > limit * slack:
                yield f"{name} is {value:.4g} s, at most {limit:.4g} s is asked"
        if self.tokens_per_s and cost.tokens_per_s * slack < self.tokens_per_s:
            yield f"{cost.tokens_per_s:.4g} tokens/s, at least {self.tokens_per_s:.4g} are asked"
        if cost.loss > self.max_loss * slack:
            yield f"loss is {cost.loss:.3g}, at most {self.max_loss:.3g} is asked"


def value_of(asked: Asked, cost: LlmCost) -> float:
    """What is made least: seconds; of throughput seconds per token."""
    if asked.objective == "throughput":
        return 1 / cost.tokens_per_s if cost.tokens_per_s > 0 else math.inf
    return {"request": cost.request_s, "tpot": cost.tpot_s, "ttft": cost.ttft_s}[asked.objective]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """sums . `sums` + maxima . `maxima`; part of the objective where `limit` is None, else at most `limit`."""

    sums: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    maxima: tuple[float, float] = (0.0, 0.0)
    limit: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One way to cut the prompt (`chunk` tokens) and to deal requests (`rows` in each of `frames`); the value is the
    largest of the objective's forms."""

    chunk: int
    rows: int
    frames: int
    forms: tuple[Form, ...]

    @property
    def sums(self) -> list[tuple[float, float, float, float]]:
        """Distinct weights of the forms' sums."""
        return list(dict.fromkeys(form.sums for form in self.forms if any(form.sums)))

    @property
    def maxima(self) -> list[int]:
        """Maxima that some form weighs."""
        return [index for index in (CHUNK_MAX, ROWS_MAX) if any(form.maxima[index] for form in self.forms)]

    def uses(self, index: int) -> bool:
        return any(form.sums[index] for form in self.forms)


def views(asked: Asked, *, limit_loss: bool = True) -> tuple[View, ...]:
    """All that may differ; where neither prompt nor rows matter there is one."""
    shape = asked.shape
    sees_prompt = asked.objective in ("ttft", "request") or asked.ttft_s or asked.request_s
    sees_rows = asked.objective == "throughput" or asked.tokens_per_s
    chunks = shape.chunks() if sees_prompt else shape.chunks()[-1:]
    dealt = frames_of(shape.concurrency) if sees_rows else ((1, shape.concurrency),)
    return tuple(
        View(chunk=chunk, rows=rows, frames=frames, forms=tuple(_forms(asked, chunk, frames, limit_loss)))
        for chunk in chunks
        for rows, frames in dealt
    )


def _forms(asked: Asked, chunk: int, frames: int, limit_loss: bool) -> Iterator[Form]:
    shape = asked.shape
    more = float(shape.num_chunks(chunk) - 1)
    loop, n = _only(LOOP, 1.0), shape.concurrency
    ttft, maxima = _only(PROMPT, 1.0), (more, 0.0)
    request = (float(shape.answer - 1), 1.0, 0.0, 0.0)
    rows, rows_max = _only(ROWS, 1 / n), (0.0, frames / n)
    match asked.objective:
        case "tpot":
            yield Form(sums=loop)
        case "ttft":
            yield Form(sums=ttft, maxima=maxima)
        case "request":
            yield Form(sums=request, maxima=maxima)
        case "throughput":
            yield Form(sums=rows)
            yield Form(maxima=rows_max)
    if asked.tpot_s:
        yield Form(sums=loop, limit=asked.tpot_s)
    if asked.ttft_s:
        yield Form(sums=ttft, maxima=maxima, limit=asked.ttft_s)
    if asked.request_s:
        yield Form(sums=request, maxima=maxima, limit=asked.request_s)
    if asked.tokens_per_s:
        yield Form(sums=rows, limit=1 / asked.tokens_per_s)
        yield Form(maxima=rows_max, limit=1 / asked.tokens_per_s)
    if limit_loss:
        yield Form(sums=_only(LOSS, 1.0), limit=asked.max_loss)


def _only(index: int, weight: float) -> tuple[float, float, float, float]:
    sums = [0.0, 0.0, 0.0, 0.0]
    sums[index] = weight
    return (sums[0], sums[1], sums[2], sums[3])
