"""The tables of docs/bottleneck.md from the file of figures: python -m benchmarks.bottleneck_table FIGURES.json

Rewrites what stands between the two marker lines of the page, nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ecotone.schema import write_aside

PAGE = Path(__file__).resolve().parents[1] / "docs" / "bottleneck.md"
START, STOP = "<!-- figures: made by benchmarks.bottleneck_table -->", "<!-- end of figures -->"


def main(argv: Sequence[str]) -> None:
    figures = json.loads(Path(argv[0]).read_text())
    head, rest = PAGE.read_text().split(START)
    _, tail = rest.split(STOP)
    write_aside(PAGE, f"{head}{START}\n" + "\n".join(lines(figures)) + f"\n{STOP}{tail}")


def lines(figures: dict[str, Any]) -> Iterator[str]:
    about, cases = figures["context"], figures["cases"]
    yield f"{about['machine']}; one thread; torch {about['versions']['torch']}. {about['data'].capitalize()}:"
    right = f"{100 * about['accuracy']:.1f} % right with nothing compressed"
    yield f"{about['chosen_on_frames']} and {about['frames']} frames, {about['tiles']} tiles reported on, {right}."
    yield from (
        "",
        "| at cut | family: its smallest within a point | bytes a frame | points lost | when chosen | pack, unpack ms |",
    )
    yield "|---|---|---|---|---|---|"
    yield from (row("0, the input", name, case) for name, case in cases["input"]["best"].items())
    for cut in cases["cuts"]:
        yield from (row(f"{cut['cut']}, {cut['elements']:,} values", name, case) for name, case in cut["best"].items())
    yield from ("", "Latency of a frame in ms, device ten times slower than the server, by what the table says:", "")
    first = cases["slow_device"][0]
    rates = [key for key in first if key.endswith("bit/s")]
    families = [name for name in first[rates[0]] if name != "jpeg"]
    yield "| at cut | rate | device only | JPEG, all on the server | " + " | ".join(families) + " |"
    yield "|---|---|---|---|" + "---|" * len(families)
    for case in cases["slow_device"]:
        for rate in rates:
            shown = [case["device only"], case[rate]["jpeg"], *(case[rate][name] for name in families)]
            yield f"| {case['cut']} | {rate} | " + " | ".join(f"{1e3 * seconds:.0f}" for seconds in shown) + " |"


def row(where: str, family: str, case: dict[str, Any]) -> str:
    name = case["codec"].partition("@")[0]
    label = f"{family}: `{name}`"
    milliseconds = f"{1e3 * case['encode_s']:.1f}, {1e3 * case['decode_s']:.1f}"
    then = case["when_chosen"]["accuracy_loss_points"]
    return (
        f"| {where} | {label} | {case['bytes_per_frame']:.0f} | {case['accuracy_loss_points']:.2f} "
        f"| {then:.2f} | {milliseconds} |"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
