"""The report of a demonstration as one HTML page that needs nothing else: no script, no outside resource, all text escaped.

`report_html(result)` is a pure function of the result; see result.py for what it holds and drawing.py for the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from ecotone.units import format_quantity
from ecotone.web.drawing import curve_picture, latency_picture, milliseconds, plan_picture, size
from ecotone.web.result import Act, Contender, Result
from ecotone.web.style import STYLE

__all__ = ["report_html"]

_COLUMNS: tuple[tuple[str, Callable[[Contender], str], Callable[[Contender], float] | None], ...] = (
    ("latency, median", lambda c: milliseconds(c.latency_median_s), lambda c: c.latency_median_s),
    ("latency, 95 %", lambda c: milliseconds(c.latency_p95_s), lambda c: c.latency_p95_s),
    ("frames per second", lambda c: f"{c.throughput_per_s:.3g}", lambda c: -c.throughput_per_s),
    ("sent per frame", lambda c: size(c.bytes_per_frame), None),
    ("tiles named right", lambda c: f"{c.accuracy:.1%}", None),
    (
        "energy per frame (modelled)",
        lambda c: format_quantity(float(f"{c.energy_joule:.3g}"), "joule"),
        lambda c: c.energy_joule,
    ),
    ("latency predicted", lambda c: milliseconds(c.predicted_latency_s), None),
    ("prediction less measured", lambda c: f"{c.prediction_error:+.0%}", None),
)


def report_html(result: Result) -> str:
    """The whole page as text; the same result gives the same text."""
    body = [f"<h1>Where should {escape(result.network)} run?</h1>", _opening(result), _facts(result)]
    for number, act in enumerate(result.acts):
        body.append(_act(act, result.acts[number - 1] if number else None, result))
    body.append(_closing(result))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Ecotone: {escape(result.network)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _opening(result: Result) -> str:
    machines = ", ".join(machine.name for machine in result.machines)
    kind = (
        "Devices are processes of one computer; their speeds, link rates and latencies are emulated in user space. "
        "Latencies are measured all the same: a slow device waits in that very execution, a slow link delays those very "
        "bytes."
        if result.emulated
        else "Devices are real machines, links as they are."
    )
    return (
        f'<p class="lead">{escape(result.conclusion)}</p><p class="soft">{result.num_frames} frames, three ways to run them '
        f"without Ecotone and one with it, on {len(result.machines)} machines ({escape(machines)}). {kind}</p>"
    )


def _facts(result: Result) -> str:
    ours = result.acts[0].contender("ecotone") if result.acts else None
    if ours is None:
        return ""
    facts = [(milliseconds(ours.latency_median_s), "median latency of Ecotone's plan")]
    others = [c for c in result.acts[0].contenders if c.kind != "ecotone"]
    if others:
        best = min(others, key=lambda c: c.latency_median_s)
        facts.append((milliseconds(best.latency_median_s), f"the best of the others: {best.name}"))
    picture = result.acts[0].contender("jpeg")
    beside = f"; {size(picture.bytes_per_frame)} as JPEG to the server" if picture else ""
    facts.append((size(ours.bytes_per_frame), f"sent per frame{beside}"))
    whole = f"{result.reference_accuracy:.1%} by the whole network without compression"
    facts.append((f"{ours.accuracy:.1%}", f"of the tiles named right; {whole}"))
    facts.append((f"{abs(ours.prediction_error):.0%}", "between the latency predicted before the run and the one measured"))
    cells = (f'<div class="fact"><b>{escape(number)}</b><span>{escape(words)}</span></div>' for number, words in facts)
    return f'<div class="facts">{"".join(cells)}</div>'


def _act(act: Act, before: Act | None, result: Result) -> str:
    ours = act.contender("ecotone")
    parts = [f"<h2>{escape(act.title)}</h2><p>{escape(act.headline)}</p>"]
    if ours:
        parts.append(_figure(plan_picture(ours, act, result), "Who runs which blocks, and what crosses each link."))
    parts.append(_table(act.contenders))
    caption = "Bars: measured median; line: 95th percentile; diamond: predicted before the run."
    parts.append(_figure(latency_picture(act.contenders), caption))
    if act.curve:
        caption = "Predicted latency of one cut between two machines, each in its best codec; ring: the least."
        parts.append(_figure(curve_picture(act, before, result), caption))
    return "".join(parts)


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(contenders: Sequence[Contender]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title, _, _ in _COLUMNS)
    best = [min((key(c) for c in contenders), default=0.0) if key else None for _, _, key in _COLUMNS]
    rows = []
    for contender in contenders:
        shared = f". The same plan as {contender.same_as}, measured once." if contender.same_as else ""
        cells = [f"<td>{escape(contender.name)}<small>{escape(contender.words + shared)}</small></td>"]
        for (_, show, key), least in zip(_COLUMNS, best, strict=True):
            words = escape(show(contender))
            cells.append(f"<td><b>{words}</b></td>" if key and key(contender) == least else f"<td>{words}</td>")
        rows.append(f'<tr class="{escape(contender.kind)}">{"".join(cells)}</tr>')
    return f'<div class="table"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _closing(result: Result) -> str:
    spent = ", ".join(f"{escape(phase)} {value:.1f} s" for phase, value in result.seconds.items())
    context = "".join(f"<br>{escape(key)}: <code>{escape(value)}</code>" for key, value in result.context.items())
    blocks = ", ".join(f"{i} {escape(name)}" for i, name in enumerate(result.block_names))
    return (
        f'<h2>How this was made</h2><p class="soft">Time spent: {spent}.{context}</p>'
        '<p class="soft">Energy is modelled: seconds times the watts that the cluster file states, plus bytes times joules '
        "per byte; nothing was metered. Bytes count every link, the answer included.</p>"
        f'<details><summary>The {result.num_blocks} blocks</summary><p class="soft">{blocks}</p></details>'
    )
