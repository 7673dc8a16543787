"""Pictures of a demo result as inline SVG: who runs what, latency of the contenders, the curve over cuts.

Pure text in, text out; colours are the page's CSS classes (see page.css in style.py), so that light and dark themes both
fit. Every word that comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ecotone.units import format_quantity
from ecotone.web.result import Act, Contender, CurvePoint, LinkPart, Machine, Result, Wire

__all__ = ["curve_picture", "latency_picture", "milliseconds", "plan_picture", "size"]


def milliseconds(seconds: float) -> str:
    """ "8.31 ms", "124 ms", "1.24 s": three digits."""
    if seconds >= 0.9995:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def size(size_bytes: float) -> str:
    """ "4.21 kB": three digits."""
    for factor, symbol in ((1e6, "MB"), (1e3, "kB")):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {symbol}"
    return f"{size_bytes:.0f} B"


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


# --- the plan -----------------------------------------------------------------------------------------------------------

_CARD, _GAP, _TOP, _HEIGHT = 226.0, 144.0, 92.0, 150.0


def plan_picture(plan: Contender, act: Act, result: Result) -> str:
    """Devices as cards, their blocks, the links between them with codec and bytes, and the network as a strip."""
    places = {machine.name: index * (_CARD + _GAP) for index, machine in enumerate(result.machines)}
    width = len(places) * (_CARD + _GAP) - _GAP
    parts = [_card(machine, places[machine.name], plan, result) for machine in result.machines]
    names = list(places)
    for source, target in [(a, b) for a in names for b in names if a != b]:
        used = [link for link in plan.links if (link.source, link.target) == (source, target)]
        wire = next((w for w in act.links if (w.source, w.target) == (source, target)), None)
        if used or (wire and names.index(target) == names.index(source) + 1):
            parts.append(_arrow(used, wire, places[source], places[target], names.index(target) - names.index(source)))
    parts.append(_strip(plan, result, width))
    above = 0 if any(names.index(k.target) > names.index(k.source) + 1 for k in plan.links) else _TOP - 8
    title = escape(f"{plan.name}: {plan.words}")
    return (
        f'<svg viewBox="-6 {above:.0f} {width + 12:.0f} {394 - above:.0f}" role="img" aria-label="{title}"><defs>'
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" class="tip"/></marker></defs>{"".join(parts)}</svg>'
    )


def _card(machine: Machine, x: float, plan: Contender, result: Result) -> str:
    index = [m.name for m in result.machines].index(machine.name)
    stages = [stage for stage in plan.stages if stage.device == machine.name]
    middle, idle = x + _CARD / 2, "" if stages else " idle"
    role = ", ".join(
        words
        for words, here in (
            ("picture in", machine.name == result.source),
            ("answer out", machine.name == result.sink),
        )
        if here
    )
    speed = f"{machine.slowdown:g} times slower" if machine.slowdown > 1 else "full speed"
    if machine.whole_network_s:
        speed += f" · alone {milliseconds(machine.whole_network_s)}"
    lines = [
        f'<rect x="{x:.1f}" y="{_TOP}" width="{_CARD}" height="{_HEIGHT}" rx="14" class="card d{index}{idle}"/>',
        _text(middle, _TOP + 27, machine.name, "name"),
        _text(middle, _TOP + 47, speed, "small"),
    ]
    if role and len(stages) < 2:
        lines.append(_text(middle, _TOP + _HEIGHT - 14, role, "small"))
    if not stages:
        lines.append(_text(middle, _TOP + 88, "computes nothing", "small"))
    for row, stage in enumerate(stages[:2]):
        took = stage.measured_s or stage.predicted_s
        top = _TOP + 80 + 46 * row
        lines.append(_text(middle, top, f"blocks {stage.start} to {stage.stop}: {milliseconds(took)}", "work"))
        lines.append(_text(middle, top + 18, f"{stage.flop_share:.0%} of the work, {stage.executor}", "tiny"))
    return "".join(lines)


def _arrow(used: list[LinkPart], wire: Wire | None, x: float, y: float, step: int) -> str:
    """One directed link: straight to the next card, an arc above when it passes one by, an arc below when back."""
    if step == 1:
        start, stop, level = x + _CARD + 4, y - 4, _TOP + _HEIGHT / 2
        path, labels = f"M{start:.1f} {level}H{stop:.1f}", ((start + stop) / 2, level - 12, level + 22)
    elif step > 1:
        start, stop = x + _CARD * 0.62, y + _CARD * 0.38
        path = f"M{start:.1f} {_TOP - 3}C{start + 60:.1f} 22 {stop - 60:.1f} 22 {stop:.1f} {_TOP - 4}"
        labels = ((start + stop) / 2, 26, 56)
    else:
        start, stop, low = x + _CARD * 0.5, y + _CARD * 0.5 + 14 * (step == -1), _TOP + _HEIGHT
        depth = low + 30 + 22 * (step < -1)
        path = f"M{start:.1f} {low + 3}C{start - 40:.1f} {depth} {stop + 40:.1f} {depth} {stop:.1f} {low + 4}"
        labels = ((start + stop) / 2, depth + 9, 0)
    parts = [
        f'<path d="{path}" class="link{"" if used else " unused"}{" back" if step < 0 else ""}" marker-end="url(#tip)"/>'
    ]
    if used:
        bytes_sent = sum(link.size_bytes for link in used)
        words = f"{size(bytes_sent)} {used[0].codec}" if step > 0 else f"answer, {size(bytes_sent)}"
        parts.append(_text(labels[0], labels[1], words, "work" if step > 0 else "tiny"))
    if wire and step > 0:
        rate = f"{format_quantity(wire.bandwidth_bytes_per_s, 'bytes_per_s')} + {milliseconds(wire.latency_s)}"
        parts.append(_text(labels[0], labels[2], rate, "tiny"))
    return "".join(parts)


def _strip(plan: Contender, result: Result, width: float) -> str:
    """The network from left to right, wide as its share of the FLOP, coloured by the device that runs it."""
    names = [machine.name for machine in result.machines]
    parts, x, top = [_text(0, 324, "the network, as wide as its work", "tiny", "start")], 0.0, 332
    parts.append(_text(width, 324, f"{result.num_blocks} blocks, {format_quantity(result.flop, 'flop')}", "tiny", "end"))
    for number, stage in enumerate(plan.stages):
        wide = width * stage.flop_share
        kind = f"bar d{names.index(stage.device)}"
        parts.append(f'<rect x="{x:.1f}" y="{top}" width="{max(wide, 1.5):.1f}" height="26" class="{kind}"/>')
        if wide > 90:
            parts.append(_text(x + wide / 2, top + 17.5, f"{stage.device} {stage.start} to {stage.stop}", "inbar"))
        if number:
            parts.append(f'<path d="M{x:.1f} {top - 5}v36" class="cut"/>')
            anchor = "start" if x < 60 else "end" if x > width - 60 else "middle"
            parts.append(_text(x, top + 46, f"cut at {stage.start}", "tiny", anchor))
        x += wide
    return "".join(parts)


# --- latency ------------------------------------------------------------------------------------------------------------


def latency_picture(contenders: Sequence[Contender]) -> str:
    """A bar per contender: measured median, a whisker to the 95th percentile, a diamond where it was predicted."""
    widest = max((max(c.latency_p95_s, c.predicted_latency_s, c.latency_median_s) for c in contenders), default=1.0) or 1.0
    left, room, row = 218.0, 660.0, 46.0
    parts = []
    for index, contender in enumerate(contenders):
        y = 14 + index * row
        bar, late, said = (
            room * v / widest for v in (contender.latency_median_s, contender.latency_p95_s, contender.predicted_latency_s)
        )
        parts.append(_text(left - 12, y + 19, contender.name, "label", "end"))
        kind = "ours" if contender.kind == "ecotone" else "other"
        parts.append(f'<rect x="{left}" y="{y}" width="{max(bar, 1.5):.1f}" height="28" rx="5" class="{kind}"/>')
        middle = y + 14
        parts.append(f'<path d="M{left + bar:.1f} {middle}H{left + late:.1f}m0 -6v12" class="whisker"/>')
        parts.append(f'<path d="M{left + said:.1f} {middle - 6}l6 6l-6 6l-6 -6z" class="said"/>')
        end = left + max(bar, late, said) + 12
        parts.append(_text(end, y + 19, milliseconds(contender.latency_median_s), "value", "start"))
    height = 20 + row * len(contenders)
    return f'<svg viewBox="0 0 960 {height:.0f}" role="img" aria-label="Latency of the contenders">{"".join(parts)}</svg>'


# --- the curve over cuts ------------------------------------------------------------------------------------------------

_LEFT, _RIGHT, _UP, _DOWN = 64.0, 936.0, 18.0, 288.0


def curve_picture(act: Act, before: Act | None, result: Result) -> str:
    """Predicted latency over the cut position, log scale: a line per pair of devices; faint: before the links slowed."""
    every = [p.latency_s for p in (*act.curve, *(before.curve if before else ()))] or [1e-3, 1.0]
    low, high = math.log10(min(every) / 1.15), math.log10(max(every) * 1.15)

    def place(point: CurvePoint) -> tuple[float, float]:
        x = _LEFT + (_RIGHT - _LEFT) * point.position / max(1, result.num_blocks)
        return x, _DOWN - (_DOWN - _UP) * (math.log10(point.latency_s) - low) / (high - low)

    parts = [_scale(low, high, result.num_blocks)]
    pairs = list(dict.fromkeys((p.first, p.second) for p in act.curve))
    for number, pair in enumerate(pairs):
        for points, faint in (((before.curve if before else ()), " faint"), (act.curve, "")):
            mine = sorted((p for p in points if (p.first, p.second) == pair), key=lambda p: p.position)
            if len(mine) < 2:
                continue
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, mine))
            parts.append(f'<path d="M{path}" class="line c{number}{faint}"/>')
            best = min(mine, key=lambda p: p.latency_s)
            parts.append(_dots(mine if not faint else [best], best, place, f"c{number}{faint}"))
        parts.append(f'<path d="M{_LEFT + 10 + 190 * number} 338h26" class="line c{number}"/>')
        parts.append(_text(_LEFT + 44 + 190 * number, 342, f"{pair[0]} then {pair[1]}", "label", "start"))
    if before:
        parts.append(_text(_RIGHT, 342, "faint: before the links slowed", "tiny", "end"))
    return f'<svg viewBox="0 0 960 352" role="img" aria-label="Latency over the cut position">{"".join(parts)}</svg>'


def _dots(points: list[CurvePoint], best: CurvePoint, place: object, kind: str) -> str:
    assert callable(place)
    parts = []
    for point in points:
        x, y = place(point)
        words = f"cut at {point.position}, {point.codec}: {milliseconds(point.latency_s)}, {size(point.size_bytes)} sent"
        radius, ring = (6, " best") if point is best else (3, "")
        spot = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
        parts.append(f'<circle {spot} class="dot {kind}{ring}"><title>{escape(words)}</title></circle>')
    return "".join(parts)


def _scale(low: float, high: float, num_blocks: int) -> str:
    parts = []
    ticks = [
        m * 10.0**e
        for e in range(math.floor(low), math.ceil(high) + 1)
        for m in ((1, 2, 5) if high - low > 1 else (1, 1.5, 2, 3, 5, 7))
    ]
    for tick in (t for t in ticks if low <= math.log10(t) <= high):
        y = _DOWN - (_DOWN - _UP) * (math.log10(tick) - low) / (high - low)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" class="grid"/>')
        label = f"{tick:g} s" if tick >= 1 else f"{tick * 1e3:g} ms"
        parts.append(_text(_LEFT - 8, y + 4, label, "tiny", "end"))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _LEFT + (_RIGHT - _LEFT) * share
        ends = {0.0: ("0: the picture is sent", "start"), 1.0: (f"{num_blocks}: all on the first", "end")}
        words, anchor = ends.get(share, (f"{round(num_blocks * share)}", "middle"))
        parts.append(_text(x, _DOWN + 18, words, "tiny", anchor))
    return "".join(parts)
