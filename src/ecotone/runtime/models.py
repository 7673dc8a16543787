"""The models of one session: the one that is asked for, and its variants (smaller networks, earlier exits), by graph hash.

A plan names its graph by hash, so a plan set may hold plans of several models; each plan is cut out of its own model, and
its outputs get that model's structure. All take the same inputs. Another order of a model's blocks (Plan.order) is made when
a plan asks for it. Not a registry: it lives and ends with its session.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch

from ecotone.cluster import Cluster
from ecotone.codec import HasSpec, LearnedCodec
from ecotone.graph import Graph
from ecotone.model import Captured
from ecotone.plan import Plan, plan_violations
from ecotone.profiling import check_bottleneck
from ecotone.protocol.message import StagePart
from ecotone.runtime.errors import DeployError
from ecotone.runtime.stages import CapturedModel, Piece, learned_ids, parts_of
from ecotone.schema import SchemaError
from ecotone.units import EcotoneError

__all__ = ["Models"]


class Models:
    """`captured` and its `variants`, with what CapturedModel needs of samples, pieces, codecs; raises DeployError as below.

    A learned codec must have been trained for one of the models; raises EcotoneError where it was not.
    """

    def __init__(
        self,
        captured: Captured,
        variants: Sequence[Captured] = (),
        samples: Sequence[tuple[torch.Tensor, ...]] = (),
        pieces: Sequence[Piece] = (),
        codecs: Sequence[LearnedCodec] = (),
    ):
        for made in codecs:
            _check_codec(made, (captured, *variants))
        self.captured, self._samples, self._codecs = captured, samples, codecs
        self._models: dict[str, CapturedModel] = {}
        self._origins: dict[str, str] = {}  # by content hash: that of the same model as captured
        for model in (captured, *variants):
            if _inputs(model) != _inputs(captured):
                raise DeployError(
                    f"variant {model.graph.name} takes {_inputs(model)}, {captured.graph.name} takes {_inputs(captured)}; "
                    "a variant must take the same inputs"
                )
            self._add(model, pieces if model is captured else ())

    def _add(self, model: Captured, pieces: Sequence[Piece] = ()) -> None:
        name = model.graph.content_hash()
        self._origins[name] = model.graph.in_order(()).content_hash()
        self._models.setdefault(name, CapturedModel(model, self._samples, pieces, self._codecs))

    def graphs(self, plans: Sequence[Plan]) -> Mapping[str, Graph]:
        """All graphs by content hash, with those that `plans` cut; raises DeployError where one is of no model here."""
        for plan in plans:
            self.of(plan)
        return {name: model.captured.graph for name, model in self._models.items()}

    def of(self, plan: Plan) -> CapturedModel:
        """The model that `plan` cuts, in the order that it names; raises DeployError where it is none of these."""
        for model in tuple(self._models.values()) if plan.graph_hash not in self._models else ():
            with contextlib.suppress(SchemaError):  # an order of another model's blocks
                other = model.captured.in_order(plan.order)
                if other.graph.content_hash() == plan.graph_hash:
                    self._add(other)
        return self.of_hash(plan.graph_hash)

    def origin(self, plan: Plan | None) -> str:
        """The hash of the graph that `plan` (None: any) cuts, as captured: outputs are alike in all orders of its blocks."""
        return self._origins[(self.of(plan).captured if plan else self.captured).graph.content_hash()]

    def of_hash(self, graph_hash: str) -> CapturedModel:
        """The model of this graph hash, or of this origin; raises DeployError where it is none of these."""
        alike = (name for name, origin in tuple(self._origins.items()) if origin == graph_hash)
        try:
            return self._models[graph_hash if graph_hash in self._models else next(alike, "")]
        except KeyError:
            known = ", ".join(model.captured.graph.name for model in self._models.values())
            raise DeployError(
                f"was made for another model than {known} (graph hash {graph_hash[:12]} differs); plan again, or give its "
                "capture among the variants"
            ) from None

    def violations(self, plan: Plan, cluster: Cluster) -> tuple[str, ...]:
        """Why `plan` cannot run on `cluster`; empty when it can."""
        model = self.of(plan)
        found = plan_violations(plan, model.captured.graph, cluster)
        lacking = [name for name in learned_ids(plan) if name not in model.codecs]
        if lacking:
            return (*found, f"crosses in {', '.join(lacking)}, whose weights were not given; add the file (--bottleneck)")
        if plan.order and learned_ids(plan):
            return (
                *found,
                f"crosses in {', '.join(learned_ids(plan))} in another order of the blocks than it was trained for",
            )
        positions = {made.id: made.spec.position for made in model.codecs.values()}
        wrong = [t for t in plan.edges if positions.get(t.codec, t.position) != t.position]
        return (*found, *(f"{t.codec} is for cut {positions[t.codec]}, not for {t.position}; plan again" for t in wrong))

    def parts(self, plan: Plan) -> tuple[StagePart, ...]:
        """The parts of all stages of `plan`."""
        return parts_of(self.of(plan), plan)

    def boundary_bytes(self, plan: Plan) -> int:
        """Bytes of the tensors that first leave the source under `plan`; 0 where nothing does."""
        out = next((transfer for transfer in plan.transfers if not transfer.is_local), None)
        return self.of(plan).captured.graph.frontier_bytes(out.position) if out else 0

    def specs(self, plan: Plan, edge: int) -> Sequence[HasSpec]:
        """Names, shapes and types of the tensors on an edge of `plan`."""
        graph = self.of(plan).captured.graph
        return [graph.tensors[index] for index in graph.frontier(plan.edges[edge].position)]

    def blob(self, sha256: str) -> bytes:
        """The bytes of a blob of any of the models; raises EcotoneError where none has it."""
        for model in self._models.values():
            if model.offers(sha256):
                return model.blob(sha256)
        raise EcotoneError(f"blob {sha256[:12]} is not part of the models of this session")


def _check_codec(made: LearnedCodec, models: Sequence[Captured]) -> None:
    """Raise EcotoneError where `made` fits none of `models`."""
    for number, model in enumerate(models):
        try:
            return check_bottleneck(model, made)
        except EcotoneError:
            if number + 1 == len(models):
                raise


def _inputs(captured: Captured) -> list[tuple[tuple[int, ...], str]]:
    graph = captured.graph
    return [(tuple(graph.tensors[i].shape), graph.tensors[i].dtype) for i in graph.inputs]
