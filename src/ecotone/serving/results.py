"""Results on their way to a person or a program: a table, JSON lines, or one .npz file, written whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecotone.schema import write_aside
from ecotone.units import EcotoneError

__all__ = ["Answer", "json_line", "save", "summary"]

INLINE_ELEMENTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outputs for one item, by name, how long it took from acceptance to result, and the exit where it left early."""

    item: str
    outputs: dict[str, np.ndarray]
    latency_s: float
    exit: str = ""


def summary(answer: Answer, labels: Sequence[str] = ()) -> str:
    """One short text per answer: the best label of a classifier, counts of labels on a map, else shape and range."""
    name, array = next(iter(answer.outputs.items()))
    if labels and array.ndim >= 2 and array.shape[1] == len(labels):
        return _decisions(array, labels)
    if array.ndim == 2 and array.shape[0] == 1 and array.shape[1] > 1:
        best = int(array[0].argmax())
        return f"class {best} ({_share(array[0], best):.0%})"
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    return f"{name} {tuple(array.shape)} in [{low:.4g}, {high:.4g}]"


def _decisions(array: np.ndarray, labels: Sequence[str]) -> str:
    if array.ndim == 2:
        best = int(array[0].argmax())
        return f"{labels[best]} ({_share(array[0], best):.0%})"
    counts = np.bincount(array[0].argmax(axis=0).ravel(), minlength=len(labels))
    order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    more = f", {len(order) - 4} more" if len(order) > 4 else ""
    return ", ".join(f"{counts[i]} {labels[i]}" for i in order[:4]) + more


def _share(logits: np.ndarray, index: int) -> float:
    """Softmax probability of one entry."""
    shifted = np.exp(logits.astype(np.float64) - float(logits.max()))
    return float(shifted[index] / shifted.sum())


def json_line(answer: Answer, labels: Sequence[str] = ()) -> str:
    """One line of JSON; large tensors are given by shape only (ask for .npz to have them)."""
    outputs = {}
    for name, array in answer.outputs.items():
        entry: dict[str, object] = {"shape": list(array.shape), "dtype": str(array.dtype)}
        if array.size <= INLINE_ELEMENTS:
            entry["data"] = [None if isinstance(v, float) and not np.isfinite(v) else v for v in array.ravel().tolist()]
        outputs[name] = entry
    document = {"item": answer.item, "latency_s": round(answer.latency_s, 6), "summary": summary(answer, labels)}
    return json.dumps(document | ({"exit": answer.exit} if answer.exit else {}) | {"outputs": outputs})


def save(path: Path, answers: Sequence[Answer], labels: Sequence[str] = ()) -> None:
    """Write all answers to `path`: .npz (arrays by output, item names), .jsonl or .txt; raises for others."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        write_aside(path, _npz(answers))
    elif suffix in (".jsonl", ".json"):
        write_aside(path, "".join(json_line(a, labels) + "\n" for a in answers))
    elif suffix == ".txt":
        write_aside(path, "".join(f"{a.item}\t{summary(a, labels)}\n" for a in answers))
    else:
        raise EcotoneError(f"output {path}: suffix {suffix or 'none'} is not known; .npz, .jsonl and .txt are")


def _npz(answers: Sequence[Answer]) -> bytes:
    arrays: dict[str, np.ndarray] = {"items": np.array([a.item for a in answers])}
    arrays["latency_s"] = np.array([a.latency_s for a in answers])
    for name in answers[0].outputs if answers else ():
        parts = [a.outputs[name] for a in answers]
        if len({p.shape for p in parts}) == 1:
            arrays[name] = np.stack(parts)
        else:
            arrays |= {f"{name}/{i}": part for i, part in enumerate(parts)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
