"""A front as one PNG: points that trade one quantity against another, each kind of placement in a colour of its own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from ecotone.web.picture import figure_library

__all__ = ["Dot", "front_png"]

_INK, _SOFT, _STEP = "#1b2420", "#5d6b64", "#a9b8b1"
_COLOURS = ("#0f7b5f", "#c2571a", "#2563a8", "#b8860b", "#7a3b8f", "#5d6b64")


class Dot(NamedTuple):
    """A point in the units of its labels, and where that plan runs."""

    x: float
    y: float
    where: str


def front_png(dots: Sequence[Dot], title: str, x_label: str, y_label: str) -> bytes:
    """A PNG of 1200 pixels width; raises MissingLibrary where matplotlib is not installed."""
    figure = figure_library().Figure(figsize=(10, 6), dpi=120, facecolor="white", layout="constrained")
    axes: Any = figure.add_subplot()
    along = sorted(dots)
    axes.step([d.x for d in along], [d.y for d in along], where="post", color=_STEP, linewidth=1.2, zorder=1)
    for number, where in enumerate(dict.fromkeys(d.where for d in dots)):
        chosen = [d for d in dots if d.where == where]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.scatter([d.x for d in chosen], [d.y for d in chosen], s=52, color=colour, label=where, zorder=2)
    axes.set_title(title, loc="left", fontsize=14, weight="bold", color=_INK)
    axes.set_xlabel(x_label, color=_SOFT)
    axes.set_ylabel(y_label, color=_SOFT)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="where it runs", alignment="left")
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
