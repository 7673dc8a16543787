"""The tables of docs/codec.md from the file of figures: python -m benchmarks.codec_table FIGURES.json

Rewrites what stands between the two marker lines of the page, nothing else. Rates are medians over the frontiers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecotone.schema import write_aside

PAGE = Path(__file__).resolve().parents[1] / "docs" / "codec.md"
START, STOP = "<!-- figures: made by benchmarks.codec_table -->", "<!-- end of figures -->"


def main(argv: Sequence[str]) -> None:
    figures = json.loads(Path(argv[0]).read_text())
    page = PAGE.read_text()
    head, rest = page.split(START)
    _, tail = rest.split(STOP)
    write_aside(PAGE, f"{head}{START}\n{tables(figures)}{STOP}{tail}")


def tables(figures: dict[str, Any]) -> str:
    about, cases = figures["context"], figures["cases"]
    lines = [
        f"{about['machine']}; one thread; torch {about['versions']['torch']}, numpy {about['versions']['numpy']};",
        f"{about['frames']} frames, {about['tiles']} tiles, {100 * about['accuracy']:.1f} % right with nothing compressed.",
        "",
        "| codec | bits per element | | relative error | points lost: median, worst | input GB/s, pack + unpack |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in cases["codecs"].items():
        lost = [
            c["codecs"][name]["accuracy_loss_points"]
            for c in cases["frontiers"]
            if "accuracy_loss_points" in c["codecs"][name]
        ]
        points = f"{sorted(lost)[len(lost) // 2]:.2f}, {max(lost):.2f}" if lost else ""
        error = f"{values['relative_error']:.4f}" if "relative_error" in values else ""
        bar = "█" * round(values["bits_per_element"])
        rate = values["bytes_per_s"] / 1e9
        lines.append(f"| {name} | {values['bits_per_element']:.2f} | {bar} | {error} | {points} | {rate:.2f} |")
    lines += [
        "",
        "The input at cut 0:",
        "",
        "| codec | bytes per frame | points lost | pack + unpack, ms |",
        "|---|---|---|---|",
    ]
    for name, values in cases["input"].items():
        milliseconds, lost = 1e3 * values["pack_and_unpack_s"], values["accuracy_loss_points"]
        lines.append(f"| {name} | {values['bytes_per_frame']:.0f} | {lost:.2f} | {milliseconds:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
