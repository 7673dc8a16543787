"""The report of a demonstration as one PNG, drawn by matplotlib: for a README, a slide, a chat.

`report_png(result)` gives the bytes of the file and writes nothing. Left: latency of the contenders; right: the curve
over cuts; one row per act.
"""

from __future__ import annotations

import importlib
import io
from typing import Any

from ecotone.units import EcotoneError, format_quantity
from ecotone.web.drawing import milliseconds, size
from ecotone.web.result import Act, Contender, Result

__all__ = ["MissingLibrary", "figure_library", "report_png"]

_INK, _SOFT, _OURS, _OTHER, _LINE = "#1b2420", "#5d6b64", "#0f7b5f", "#a9b8b1", "#dfe5e1"
_DEVICES = ("#c2571a", "#b8860b", "#2563a8")
_PAIRS = ("#b8860b", "#2563a8", "#0f7b5f", "#c2571a")


class MissingLibrary(EcotoneError):
    """matplotlib is not installed."""


def figure_library() -> Any:
    """matplotlib.figure; raises MissingLibrary where it is not installed."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise MissingLibrary('a PNG needs matplotlib; install it with: pip install "ecotone[report]"') from None


def report_png(result: Result) -> bytes:
    """A PNG of 1920 pixels width; MissingLibrary where matplotlib is not installed."""
    figures = figure_library()
    rows = len(result.acts)
    figure = figures.Figure(figsize=(16, 1.5 + 4.4 * rows), dpi=120, facecolor="white")
    high = 1.5 + 4.4 * rows
    figure.text(0.03, 1 - 0.42 / high, f"Where should {result.network} run?", fontsize=21, weight="bold", color=_INK)
    figure.text(0.03, 1 - 0.82 / high, _wrapped(result.conclusion, 170), fontsize=11.5, color=_SOFT, va="top")
    places = {"left": 0.165, "right": 0.985, "top": 1 - 1.85 / high, "bottom": 0.62 / high}
    grid = figure.add_gridspec(rows, 2, wspace=0.13, hspace=0.42, width_ratios=(1.1, 1), **places)
    for row, act in enumerate(result.acts):
        left = grid[row, 0].subgridspec(2, 1, height_ratios=(0.13, 1), hspace=0.12)
        _strip(figure.add_subplot(left[0]), act, result)
        _bars(figure.add_subplot(left[1]), act)
        _curve(figure.add_subplot(grid[row, 1]), act, result.acts[row - 1] if row else None, result)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _wrapped(words: str, width: int) -> str:
    lines = [""]
    for word in words.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _said(contender: Contender) -> str:
    return (
        f" {milliseconds(contender.latency_median_s)}   {contender.throughput_per_s:.3g} frames/s   "
        f"{size(contender.bytes_per_frame)}   {contender.accuracy:.1%} right   "
        f"{format_quantity(float(f'{contender.energy_joule:.3g}'), 'joule')} modelled"
    )


def _strip(axes: Any, act: Act, result: Result) -> None:
    """Ecotone's plan: the network as wide as its work, coloured by the machine that runs it."""
    _plain(axes, act.title)
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    plan, begin = act.contender("ecotone"), 0.0
    for stage in plan.stages if plan else ():
        place = [machine.name for machine in result.machines].index(stage.device)
        axes.barh(0, stage.flop_share, 0.9, left=begin, color=_DEVICES[place % len(_DEVICES)], edgecolor="white")
        if stage.flop_share > 0.12:
            words = f"{stage.device}: blocks {stage.start} to {stage.stop}"
            axes.text(
                begin + stage.flop_share / 2, 0, words, color="white", weight="bold", ha="center", va="center", fontsize=9.5
            )
        begin += stage.flop_share


def _bars(axes: Any, act: Act) -> None:
    _plain(axes, "")
    names = [c.name for c in act.contenders]
    median = [c.latency_median_s * 1e3 for c in act.contenders]
    late = [max(0.0, c.latency_p95_s - c.latency_median_s) * 1e3 for c in act.contenders]
    said = [c.predicted_latency_s * 1e3 for c in act.contenders]
    rows = list(range(len(names)))
    colours = [_OURS if c.kind == "ecotone" else _OTHER for c in act.contenders]
    axes.barh(rows, median, 0.44, color=colours, xerr=[[0] * len(rows), late], ecolor=_SOFT, capsize=3)
    axes.scatter(said, rows, marker="D", s=46, facecolor="white", edgecolor=_INK, zorder=3, label="predicted before the run")
    for row, contender in zip(rows, act.contenders, strict=True):
        axes.text(0, row - 0.37, _said(contender), fontsize=9.5, color=_SOFT, va="center")
    axes.set_yticks(rows, names, fontsize=11, color=_INK)
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel("latency per frame, ms: measured median, whisker to the 95th percentile", color=_SOFT)
    axes.legend(frameon=False, loc="lower right", fontsize=9.5)


def _curve(axes: Any, act: Act, before: Act | None, result: Result) -> None:
    _plain(axes, "One cut between two machines: predicted latency")
    for number, pair in enumerate(dict.fromkeys((p.first, p.second) for p in act.curve)):
        for points, style in (
            ((before.curve if before else ()), {"alpha": 0.3, "linestyle": "--"}),
            (act.curve, {"marker": "o"}),
        ):
            mine = sorted((p for p in points if (p.first, p.second) == pair), key=lambda p: p.position)
            if not mine:
                continue
            label = f"{pair[0]} then {pair[1]}" if "marker" in style else None
            values = [p.latency_s * 1e3 for p in mine]
            axes.plot([p.position for p in mine], values, color=_PAIRS[number % 4], markersize=3, label=label, **style)
            least = min(mine, key=lambda p: p.latency_s)
            spot = {"s": 90, "facecolor": "none", "edgecolor": _PAIRS[number % 4], "alpha": style.get("alpha", 1.0)}
            axes.scatter([least.position], [least.latency_s * 1e3], **spot)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axes.set_xlabel(
        f"place of the cut, 0 to {result.num_blocks}; dashed: before the links slowed; ring: the least", color=_SOFT
    )
    axes.set_ylabel("ms", color=_SOFT)
    axes.legend(frameon=False, fontsize=9.5)


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, weight="bold", color=_INK)
    axes.grid(True, color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
