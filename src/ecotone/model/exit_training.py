"""Training of exits, with the backbone as it is or jointly with it.

Loss (BranchyNet, ICPR 2016): sum over exits of w_e * L(exit e), early exits weighing more (1.0 first to 0.3 last), and
in joint training L(final) as well. L is (1 - d) * cross-entropy with the label + d * T^2 * KL(softmax(final / T) ||
softmax(exit / T)): the model's own final answers teach its exits (self-distillation); without labels they alone do (d = 1).
Outputs that decide nothing are drawn to the model's by mean squares. In joint training the answers of the model as it was
teach everyone, so that it forgets nothing; norms keep their statistics, as is usual in fine-tuning.

With the backbone frozen it runs once per sample, where the tensors at the exits fit into `cache_bytes`. AdamW, one cycle.
The same seed gives the same weights on the same machine. What was learnt is only as good as the samples: see calibration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from ecotone import schema
from ecotone.model.capture import Captured
from ecotone.model.confidence import ExitRule
from ecotone.model.errors import ModelError
from ecotone.model.exit_heads import Head, capture_head, default_rule, fold_temperature, make_head
from ecotone.model.exit_places import exit_places

__all__ = ["Data", "Progress", "Sample", "TrainOptions", "train_exits"]

Sample = tuple[Sequence[Tensor], Tensor | None]
"""Flat inputs as Captured.flatten_inputs gives them, of as many samples as the graph takes at once, and their labels."""
Data = Sequence[Sample] | Callable[[], Iterable[Sample]]
"""A sequence: the same samples in each epoch. A function: called once per epoch, for samples that change."""
Progress = Callable[[int, int, str], None]
FIRST_WEIGHT, LAST_WEIGHT = 1.0, 0.3
TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How to train. `distil` is d and `temperature` T of the loss; `batch` counts samples, `epochs` passes over the data.

    `batch` 0: an eighth of the samples, 4 to 64. `bf16`: products in bfloat16, quick where the processor has units for it.
    `weights` by exit, in order of position (empty: 1.0 first to 0.3 last). `joint`: the backbone learns as well, at
    `backbone_rate` times the rate. `flop_budget`: a head's FLOP at most this share of the model's.
    """

    epochs: int = 10
    batch: int = 0
    rate: float = 3e-3
    weight_decay: float = 0.05
    distil: float = 0.7
    temperature: float = 3.0
    weights: tuple[float, ...] = ()
    joint: bool = False
    backbone_rate: float = 0.05
    flop_budget: float = 0.05
    cache_bytes: int = 1 << 30
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if self.epochs < 1 or self.batch < 0 or not (self.rate > 0 and self.temperature > 0 and self.flop_budget > 0):
            wrong.append("epochs, rate, temperature and flop_budget must be above zero, batch not below")
        if not 0 <= self.distil <= 1:
            wrong.append(f"distil is {self.distil}, must be from 0 (labels only) to 1 (the model's own answers only)")
        if any(not w > 0 for w in self.weights):
            wrong.append("weights must be above zero")
        schema.check("training options", wrong)


def train_exits(
    captured: Captured,
    data: Data,
    *,
    at: Sequence[int] = (),
    count: int = 3,
    heads: Mapping[int, nn.Module] | None = None,
    rule: ExitRule | None = None,
    held_out: Data | None = None,
    options: TrainOptions | None = None,
    progress: Progress | None = None,
) -> Captured:
    """`captured` with trained exits at `at`, or at `count` places of its own choice.

    `heads`: modules by position, instead of the usual ones: one tensor in, a tuple of the model's distinct outputs out.
    `held_out`: samples on which each head's temperature is fitted and folded into its last layer. Labels are class numbers,
    shaped as the deciding output without its dimension of classes. Raises ModelError where a position, a head, a sample
    or a label does not fit.
    """
    options, rule = options or TrainOptions(), rule or default_rule(captured.backbone)
    torch.manual_seed(options.seed)
    places = exit_places(captured.backbone, count, tuple(heads) if heads else at)
    if options.weights and len(options.weights) != len(places):
        raise ModelError(f"{len(options.weights)} weights for {len(places)} exits; give one each, in order of position")
    modules = [(heads or {}).get(p) or make_head(captured.backbone, p, options.flop_budget) for p in places]
    trainer = _Trainer(captured, places, modules, rule, options)
    trainer.run(data, progress)
    if options.joint:
        captured = captured.with_weights(trainer.backbone.learnt())
    if held_out is not None:
        trainer.fit_temperatures(held_out)
    made = [capture_head(captured, f"e{p}", p, m, rule) for p, m in zip(places, modules, strict=True)]
    return captured.with_exits(made)


@dataclass(slots=True)
class _Seen:
    """What the backbone made of some samples: tensors at the exits, its distinct outputs, labels."""

    features: list[Tensor]
    finals: list[Tensor]
    labels: Tensor | None

    @property
    def size_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.features, *self.finals))


class _Backbone:
    """The model in pieces between the exits; with `learns` its parameters take gradients."""

    def __init__(self, captured: Captured, places: Sequence[int], learns: bool) -> None:
        stops = (0, *places, captured.graph.num_blocks)
        segments = [captured.segment(a, b) for a, b in itertools.pairwise(stops)]
        self.pieces = [segment.module() for segment in segments]
        self.parameters: dict[str, nn.Parameter] = {}
        for segment, piece in zip(segments, self.pieces, strict=True) if learns else ():
            for number, spec in enumerate(segment.program.weights):
                tensor = segment.weights[spec.name]
                if spec.name in captured.parameter_names and tensor.is_floating_point():
                    shared = self.parameters.setdefault(spec.name, nn.Parameter(tensor.detach().clone()))
                    del piece._buffers[f"weight_{number}"]
                    piece.register_parameter(f"weight_{number}", shared)

    def run(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors at the exits, and the model's distinct outputs."""
        tensors, features = tuple(inputs), []
        for piece in self.pieces[:-1]:
            tensors = tuple(piece(*tensors))
            features.append(tensors[0])
        return features, list(self.pieces[-1](*tensors))

    def learnt(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


@dataclass(slots=True)
class _Trainer:
    captured: Captured
    places: Sequence[int]
    modules: Sequence[nn.Module]
    rule: ExitRule
    options: TrainOptions
    batch: int = 0
    backbone: _Backbone = field(init=False)
    teacher: _Backbone = field(init=False)

    def __post_init__(self) -> None:
        self.teacher = _Backbone(self.captured, self.places, learns=False)
        self.backbone = _Backbone(self.captured, self.places, learns=True) if self.options.joint else self.teacher
        if self.options.joint and not self.backbone.parameters:
            raise ModelError(f"{self.captured.graph.name}: has no parameters to train; leave joint out")

    def run(self, data: Data, progress: Progress | None) -> None:
        """All epochs; the data is looked through once before, to know how much there is."""
        options = self.options
        kept, total = self._look(data)
        self.batch = options.batch or min(64, max(4, total // 8))
        steps = options.epochs * math.ceil(total / self.batch)
        groups = [{"params": [p for m in self.modules for p in m.parameters()], "lr": options.rate}]
        if options.joint:
            groups.append({"params": list(self.backbone.parameters.values()), "lr": options.rate * options.backbone_rate})
        optimiser = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _one_cycle(step, steps))
        done, running = 0, 0.0
        for module in self.modules:
            module.train()
        for _ in range(options.epochs):
            for batch in self._batches(data, kept):
                if done >= steps:
                    break  # the data grew since it was looked through
                with self._products():
                    loss = self._loss(batch)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
                done += 1
                running += ((float(loss.detach()) - running) * 0.1) if done > 1 else float(loss.detach())
                if progress:
                    progress(done, steps, f"loss {running:.3f}")
        for module in self.modules:
            module.eval()

    def fit_temperatures(self, held_out: Data) -> None:
        """Per exit the temperature of least cross-entropy with the labels, or with the model's own answers."""
        number, rule = self.rule.output, self.rule
        logits: list[list[Tensor]] = [[] for _ in self.modules]
        wanted: list[Tensor] = []
        for inputs, labels in _samples(held_out):
            with torch.no_grad():
                features, finals = self.backbone.run(inputs)
                for rows, module, feature in zip(logits, self.modules, features, strict=True):
                    rows.append(_rows(module(feature)[number], rule))
            classes = finals[number].shape[rule.dim]
            known = None if labels is None else _checked(labels, finals[number], rule).reshape(-1)
            wanted.append(
                _rows(finals[number], rule).softmax(-1) if known is None else functional.one_hot(known, classes).float()
            )
        for rows, module in zip(logits, self.modules, strict=True):
            if isinstance(module, Head) and wanted:
                fold_temperature(module, number, _best_temperature(torch.cat(rows), torch.cat(wanted)))

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _look(self, data: Data) -> tuple[list[_Seen] | None, int]:
        """What the backbone makes of all samples, where that may be kept, and how many samples there are."""
        kept: list[_Seen] | None = None if callable(data) or self.options.joint else []
        total = size = 0
        for sample in _samples(data):
            if kept is None:
                total += len(sample[0][0])
                continue
            seen = self._seen(sample)
            kept.append(seen)
            total, size = total + len(seen.finals[0]), size + seen.size_bytes
            kept = kept if size <= self.options.cache_bytes else None
        if not total:
            raise ModelError(f"exits of {self.captured.graph.name}: there are no samples to learn from")
        return kept, total

    def _batches(self, data: Data, kept: list[_Seen] | None) -> Iterator[list[_Seen]]:
        """Samples in random order (a function's in its own), as many at once as a batch has."""
        if kept is not None:
            order: Iterable[_Seen] = (kept[i] for i in torch.randperm(len(kept)).tolist())
        elif callable(data):
            order = (self._seen(sample) for sample in data())
        else:
            order = (self._seen(data[i]) for i in torch.randperm(len(data)).tolist())
        gathered: list[_Seen] = []
        for seen in order:
            gathered.append(seen)
            if sum(len(s.finals[0]) for s in gathered) >= self.batch:
                yield gathered
                gathered = []
        if sum(len(s.finals[0]) for s in gathered) > 1:  # a norm needs more than one
            yield gathered

    def _seen(self, sample: Sample) -> _Seen:
        inputs, labels = sample
        with torch.no_grad(), self._products():
            features, finals = self.teacher.run(inputs)
        if labels is not None:
            labels = _checked(labels, finals[self.rule.output], self.rule)
        if self.options.joint:
            features = list(inputs)  # the backbone runs on them again, with gradients
        return _Seen(features, finals, labels)

    def _products(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.options.bf16)

    def _loss(self, parts: Sequence[_Seen]) -> Tensor:
        batch, total = _Seen([], _cat([p.finals for p in parts]), None), torch.zeros(())
        labels = [p.labels for p in parts if p.labels is not None]
        batch.labels = torch.cat(labels) if len(labels) == len(parts) else None
        if self.options.joint:
            made = [self.backbone.run(p.features) for p in parts]
            features = _cat([each for each, _ in made])
            total = total + self._loss_of(_cat([finals for _, finals in made]), batch)
        else:
            features = _cat([p.features for p in parts])
        for number, module in enumerate(self.modules):
            total = total + self._weight(number) * self._loss_of(module(features[number]), batch)
        return total

    def _weight(self, number: int) -> float:
        if self.options.weights:
            return self.options.weights[number]
        steps = max(1, len(self.modules) - 1)
        return FIRST_WEIGHT + (LAST_WEIGHT - FIRST_WEIGHT) * number / steps

    def _loss_of(self, outputs: Sequence[Tensor], batch: _Seen) -> Tensor:
        """L of the file's docstring for the outputs of one exit."""
        rule, heat = self.rule, self.options.temperature
        made, wanted = _rows(outputs[rule.output], rule), _rows(batch.finals[rule.output], rule)
        teaching = functional.kl_div(
            torch.log_softmax(made / heat, -1), torch.log_softmax(wanted / heat, -1), reduction="batchmean", log_target=True
        )
        share = 1.0 if batch.labels is None else self.options.distil
        loss = share * heat * heat * teaching
        if batch.labels is not None and share < 1:
            loss = loss + (1 - share) * functional.cross_entropy(made, batch.labels.reshape(-1))
        for number, (mine, theirs) in enumerate(zip(outputs, batch.finals, strict=True)):
            if number != rule.output:
                loss = loss + functional.mse_loss(mine.float(), theirs.float())
        return loss


def _one_cycle(step: int, steps: int) -> float:
    """Share of the full rate: up over the first fifth, down along half a cosine."""
    warm = max(1, steps // 5)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _samples(data: Data) -> Iterable[Sample]:
    return data() if callable(data) else data


def _rows(output: Tensor, rule: ExitRule) -> Tensor:
    """One row of logits per decision: [decisions, classes] in float32."""
    return output.float().movedim(rule.dim, -1).flatten(0, -2)


def _checked(labels: Tensor, output: Tensor, rule: ExitRule) -> Tensor:
    """Labels as int64; raises ModelError where they are not one class number per decision."""
    shape = [size for dim, size in enumerate(output.shape) if dim != rule.dim]
    classes = output.shape[rule.dim]
    if list(labels.shape) != shape or labels.is_floating_point():
        kind = str(labels.dtype).removeprefix("torch.")
        remedy = f"the model decides {shape} times; give class numbers so shaped"
        raise ModelError(f"labels {list(labels.shape)} {kind}: {remedy}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise ModelError(f"labels from {found}: the model has classes 0 to {classes - 1}")
    return labels.long()


def _cat(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The tensors of several runs, each with those of the same number behind one another."""
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def _best_temperature(logits: Tensor, target: Tensor) -> float:
    """Golden section over log T: the cross-entropy is convex in 1 / T, so unimodal in log T (Guo et al. 2017)."""

    def loss(log_heat: float) -> float:
        return float(functional.cross_entropy(logits / math.exp(log_heat), target))

    low, high = (math.log(t) for t in TEMPERATURES)
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) <= loss(b) else (a, high)
    return math.exp((low + high) / 2)
