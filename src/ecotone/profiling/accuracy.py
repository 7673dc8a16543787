"""The accuracy table A(cut, codec, exits, variant) of a model on a calibration set: measured, fitted, kept in a file.

    table = measure_accuracy(captured, frames, labels, codecs=("int8", "int4+zstd"))
    table.cell(5, "int4+zstd").fitted_points

The table of JALAD (arXiv 1812.10027) and DynO (2104.09949), with exits and variants, with a confidence interval of each
paired loss (paired.py) and monotone along each ladder (ladders.py). It is used again while the hash of all that it depends
on is the same. One pass (cells.py) gives the payloads of the profile too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ecotone import schema
from ecotone.accuracy import AccuracyTable, ExitPolicy
from ecotone.codec import ImageSpec
from ecotone.executors.cache import cache_root, key_of
from ecotone.model import Captured
from ecotone.profiling.cells import Calibration, Setup, check_labels, measured
from ecotone.profiling.codecs import codec_ids
from ecotone.profiling.crossings import ExitRun
from ecotone.profiling.cuts import DEFAULT_LIMIT, candidate_cuts
from ecotone.profiling.labels import Labels
from ecotone.profiling.measurement import Progress
from ecotone.profiling.samples import Samples, checked, contents_hash, require_sized
from ecotone.units import EcotoneError

__all__ = ["calibration_key", "measure_accuracy", "set_hash", "setup_of", "tabulate"]

MEANING = 1  # of a table's numbers: raised when they would be other ones


def measure_accuracy(
    captured: Captured,
    samples: Samples,
    labels: Any = None,
    *,
    cuts: Sequence[int] = (),
    codecs: Sequence[str] = (),
    policies: Sequence[ExitPolicy] = (),
    exits: Sequence[ExitRun] = (),
    variants: Sequence[Captured] = (),
    image: ImageSpec | None = None,
    confidence: float = 0.95,
    names: Sequence[str] = (),
    progress: Progress | None = None,
    path: str | os.PathLike[str] | None = None,
) -> AccuracyTable:
    """The accuracy table of `captured` on `samples` (flat inputs; see samples.py), reused from `path` (None: the cache).

    `labels`: one per sample, class numbers in the shape of its decisions (labels.py); None: agreement with the model itself
    is counted. `cuts`: positions, empty: those of a profile. `codecs`: ids, empty: the usual ones. `policies`: thresholds
    for `exits`; shares and losses in the table are those measured here. `variants`: models of the same inputs and outputs.
    `image`: how pixels became the input. `names`: of the samples, for messages. Raises LabelError, CodecError, or
    EcotoneError where there is nothing to measure.
    """
    setup = setup_of(
        captured, cuts, codecs, policies=policies, exits=exits, variants=variants, image=image, confidence=confidence
    )
    return tabulate(setup, samples, labels, names=names, progress=progress, path=path).table


def setup_of(
    captured: Captured,
    cuts: Sequence[int] = (),
    codecs: Sequence[str] = (),
    *,
    policies: Sequence[ExitPolicy] = (),
    exits: Sequence[ExitRun] = (),
    variants: Sequence[Captured] = (),
    image: ImageSpec | None = None,
    confidence: float = 0.95,
) -> Setup:
    """What to measure, checked; see `measure_accuracy`. Variants are cut at as many positions as `captured`."""
    if not 0.5 <= confidence < 1:
        raise EcotoneError(f"accuracy: confidence {confidence:g} must lie in [0.5, 1), for example 0.95")
    inner = sum(0 < cut < captured.graph.num_blocks for cut in cuts) or DEFAULT_LIMIT
    return Setup(
        captured=captured, cuts=tuple(cuts) or candidate_cuts(captured.graph),
        codecs=tuple(dict.fromkeys(codec_ids(codecs))), policies=_known(policies, exits), exits=tuple(exits),
        variants=tuple((variant, candidate_cuts(variant.graph, inner)) for variant in _alike(captured, variants)),
        image=image, confidence=confidence,
    )  # fmt: skip


def tabulate(
    setup: Setup,
    samples: Samples,
    labels: Any = None,
    *,
    names: Sequence[str] = (),
    progress: Progress | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Calibration:
    """The table of `measure_accuracy`, with the payloads that its pass gives beside it."""
    require_sized(samples)
    if not len(samples):
        raise EcotoneError("accuracy: there is no sample; give real inputs, as many as can be had")
    truth = None if labels is None else Labels(labels, samples, names)
    data = set_hash(setup.captured, samples, truth, names)
    key = calibration_key(setup, data)
    target = Path(path) if path is not None else cache_root() / "accuracy" / f"{key}.json"
    known = _reused(target, key) if all(head.content for head in setup.exits) else None
    if known is not None:
        return known
    if truth is not None:
        check_labels(setup, samples, truth, progress)
    sums = measured(setup, samples, truth, progress)
    cells = sums.cells(is_labelled=truth is not None)
    reference = next(cell for cell in cells if cell.position < 0 and not cell.policy and not cell.variant)
    table = AccuracyTable(
        graph_hash=setup.captured.graph.content_hash(), data_hash=data, is_labelled=truth is not None,
        reference_points=reference.points, cells=cells, policies=tuple(sums.policies(cells)),
        confidence=setup.confidence, key=key, num_samples=len(samples),
    )  # fmt: skip
    found = Calibration(table=table, payloads=sums.payloads.payloads())
    schema.write_aside(target, found.to_json())
    return found


def set_hash(captured: Captured, samples: Samples, labels: Labels | None, names: Sequence[str] = ()) -> str:
    """Hex hash of a calibration set; raises EcotoneError for a sample that the model does not take."""
    return key_of(contents_hash(checked(captured, samples, names)), contents_hash(labels.contents()) if labels else "")


def calibration_key(setup: Setup, data_hash: str) -> str:
    """Hex hash of all that a calibration depends on."""
    heads = sorted((head.name, head.position, head.content) for head in setup.exits)
    others = [(variant.graph.content_hash(), cuts) for variant, cuts in setup.variants]
    packages = [(package, version(package)) for package in ("ecotone", "torch", "numpy", "pillow")]
    return key_of(
        MEANING, setup.captured.graph.content_hash(), data_hash, setup.cuts, setup.codecs, schema.write(setup.policies),
        heads, others, setup.image, setup.confidence, packages,
    )  # fmt: skip


def _known(policies: Sequence[ExitPolicy], exits: Sequence[ExitRun]) -> tuple[ExitPolicy, ...]:
    """The policies, their exits all there and in order."""
    at: Mapping[str, int] = {head.name: head.position for head in exits}
    for policy in policies:
        missing = [name for name in policy.exits if name not in at]
        if missing:
            known = ", ".join(at) or "none"
            raise EcotoneError(f"exit policy {policy.name}: exit {missing[0]!r} cannot be run; exits given are {known}")
        places = [at[name] for name in policy.exits]
        if places != sorted(set(places)):
            raise EcotoneError(f"exit policy {policy.name}: exits {', '.join(policy.exits)} are not in order of position")
    names = [policy.name for policy in policies]
    if len(set(names)) < len(names):
        raise EcotoneError(f"exit policies {', '.join(names)}: two have one name")
    return tuple(policies)


def _alike(captured: Captured, variants: Sequence[Captured]) -> tuple[Captured, ...]:
    """The variants, all of the same inputs as `captured`; their outputs are compared when they come."""
    graph = captured.graph
    wanted = [(graph.tensors[i].shape, graph.tensors[i].dtype) for i in graph.inputs]
    for variant in variants:
        other = variant.graph
        if [(other.tensors[i].shape, other.tensors[i].dtype) for i in other.inputs] != wanted:
            raise EcotoneError(f"variant {other.name}: takes other inputs than {graph.name}; a variant must take the same")
    return tuple(variants)


def _reused(path: Path, key: str) -> Calibration | None:
    """The calibration in `path` if it is whole and has this key; anything else is measured again."""
    try:
        found = Calibration.from_json(path.read_bytes(), str(path))
    except (OSError, EcotoneError):
        return None
    return found if found.table.key == key else None
