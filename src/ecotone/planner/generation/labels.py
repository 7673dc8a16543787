"""Labels of the search: partial plans as rows of numbers over the columns that the view's forms look at.

A label has blocks done, sums (one per distinct form) and maxima. It is beaten by one of the same place and block that is not
worse in any column, since every form grows with every column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ecotone.planner.generation.problem import FloatArray, IntArray, Problem

__all__ = ["Counts", "Forms", "Labels", "undominated"]

Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Labels:
    """Rows: block, sums, maxima, and the number of the record that says how it came about."""

    block: IntArray
    sums: FloatArray
    maxima: FloatArray
    record: IntArray

    def take(self, index: IntArray | np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Labels:
        return Labels(self.block[index], self.sums[index], self.maxima[index], self.record[index])

    @staticmethod
    def join(parts: list[Labels]) -> Labels:
        if len(parts) == 1:
            return parts[0]
        return Labels(
            np.concatenate([p.block for p in parts]), np.concatenate([p.sums for p in parts]),
            np.concatenate([p.maxima for p in parts]), np.concatenate([p.record for p in parts]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.block)


class Forms:
    """The view's forms over compact columns: `sums` (distinct combinations) and `maxima` (those used)."""

    def __init__(self, problem: Problem):
        forms, distinct = problem.view.forms, problem.view.sums
        self.used = problem.view.maxima
        self.matrix = np.array(distinct).reshape(len(distinct), 4)
        self.rows = [
            (distinct.index(f.sums) if any(f.sums) else -1, np.array([f.maxima[i] for i in self.used]), f.limit)
            for f in forms
        ]
        self.main = next(index for index, (column, _, limit) in enumerate(self.rows) if limit is None and column >= 0)

    def sums(self, rows: FloatArray) -> FloatArray:
        made: FloatArray = rows @ self.matrix.T
        return made

    def maxima(self, rows: FloatArray) -> FloatArray:
        return rows[..., self.used]

    def start(self, problem: Problem) -> Labels:
        """The one label from which everything begins, with nothing done."""
        block, none = np.zeros(1, dtype=np.int64), np.full(1, -1, dtype=np.int64)
        return Labels(block, np.zeros((1, len(self.matrix))), self.maxima(problem.least_maxima[None, :]), none)

    def value(self, sums: FloatArray, maxima: FloatArray, rest: FloatArray | None = None) -> FloatArray:
        """The objective of each row, inf where a limit is broken; `rest` (row, form): what each form's sum still pays."""
        value = np.zeros(len(sums))
        for index, (column, weights, limit) in enumerate(self.rows):
            form = maxima @ weights if self.used else np.zeros(len(sums))
            if column >= 0:
                form = form + sums[:, column]
                if rest is not None:
                    form = form + rest[:, index]
            is_broken = np.zeros(len(sums), dtype=bool) if limit is None else form > limit * (1 + 1e-9)
            value = np.where(is_broken, np.inf, np.maximum(value, form) if limit is None else value)
        return value


def undominated(labels: Labels) -> Labels:
    """Without labels that another one of the same block is not worse than; of equal ones the first stays."""
    if len(labels) < 2:
        return labels
    columns = np.concatenate([labels.sums, labels.maxima], axis=1)
    order = np.lexsort((*columns.T[::-1], labels.block))
    block, columns = labels.block[order], columns[order]
    starts = np.flatnonzero(np.concatenate([[True], block[1:] != block[:-1]]))
    if columns.shape[1] == 1:
        return labels.take(order[starts])
    keep = np.zeros(len(order), dtype=bool)
    for first, last in zip(starts, [*starts[1:], len(order)], strict=True):
        keep[first:last] = _front(columns[first:last])
    return labels.take(order[keep])


def _front(rows: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of lexicographically sorted rows are on the front."""
    count = len(rows)
    keep = np.ones(count, dtype=bool)
    if count == 1:
        return keep
    if rows.shape[1] == 2:
        keep[1:] = rows[1:, 1] < np.minimum.accumulate(rows[:-1, 1])
        return keep
    for i in range(count):
        if keep[i]:
            keep[i + 1 :] &= (rows[i + 1 :] < rows[i]).any(axis=1)
    return keep
