"""Makes docs/gallery.md and its pictures from what the benchmarks measured: `python -m benchmarks.gallery`.

Reads results/NAME.json (see `make bench`), or the files given, and the PNG beside it where the benchmark draws its own. A
section whose file is missing stays as it was: it was measured by an earlier state of the code.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecotone.schema import write_aside
from ecotone.web.picture import figure_library

ROOT = Path(__file__).resolve().parents[1]
PAGE, FOLDER = ROOT / "docs" / "gallery.md", ROOT / "docs" / "gallery"
HEAD = """# Gallery

What the benchmarks measured, as pictures; `python -m benchmarks.gallery` makes this page from their files (`make bench`).
Every sentence with a number is filled in from the same file as its picture.
"""
GREEN, ORANGE, BLUE, GREY = "#0f7b5f", "#c2571a", "#2563a8", "#9aa8a1"


@dataclass(frozen=True, slots=True)
class Picture:
    """One section. `text`: with {key} for figures of the file. `draw`: None where the benchmark drew the PNG itself."""

    name: str
    title: str
    text: str
    draw: Callable[[dict[str, Any], Any], None] | None = None


def main(files: list[str]) -> int:
    """Write the page; returns 0, or 2 where no file is there."""
    paths = [Path(f) for f in files] or [
        path for path in (ROOT / "results" / f"{p.name}.json" for p in PICTURES) if path.is_file()
    ]
    if not paths:
        print("gallery: no results/NAME.json is there; run make bench, or name files", file=sys.stderr)
        return 2
    found = {path.stem: path for path in paths}
    former = sections(PAGE.read_text() if PAGE.is_file() else "")
    FOLDER.mkdir(exist_ok=True)
    parts = [HEAD]
    for picture in PICTURES:
        if picture.name in found:
            parts.append(section(picture, found[picture.name]))
        elif picture.title in former:
            parts.append(former[picture.title])
    write_aside(PAGE, "\n".join(parts))
    print(f"{len(found)} of {len(PICTURES)} pictures in {FOLDER.relative_to(ROOT)}, page in {PAGE.relative_to(ROOT)}")
    return 0


def sections(page: str) -> dict[str, str]:
    """The sections of a page by title."""
    parts = page.split("\n## ")[1:]
    return {part.splitlines()[0]: f"## {part.rstrip()}\n" for part in parts}


def section(picture: Picture, path: Path) -> str:
    """Draw or copy the picture; its section of the page."""
    document = json.loads(path.read_text())
    target = FOLDER / f"{picture.name}.png"
    if picture.draw is None:
        shutil.copyfile(path.with_suffix(".png"), target)
    else:
        figure = figure_library().Figure(figsize=(9, 4.6), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        picture.draw(document, axes)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(target)
    numbers = {k: v for k, v in document.items() if isinstance(v, int | float)}
    text = picture.text.format(**numbers)
    shown = f"![{picture.title}](gallery/{picture.name}.png)"
    return f"## {picture.title}\n\n{shown}\n\n{text}\n\n`python -m benchmarks.{picture.name}`\n"


# ---- pictures that benchmarks do not draw themselves --------------------------------------------------------------------


def draw_sequential(document: dict[str, Any], axes: Any) -> None:
    """How much is lost by choosing one thing after another, over worlds, sorted."""
    lost = sorted(100 * (case["ratio"] - 1) for case in document["cases"]["sequential"])
    axes.plot([100 * i / max(1, len(lost) - 1) for i in range(len(lost))], lost, color=ORANGE, linewidth=2)
    axes.axhline(0, color=GREEN, linewidth=2, label="chosen together")
    axes.set(xlabel="share of worlds in %", ylabel="slower by %")
    axes.set_title("cut, then precision, then exits", loc="left")
    axes.legend(frameon=False)


def draw_users(document: dict[str, Any], axes: Any) -> None:
    """What users save of time and energy together (the published objective), over their number."""
    cases, counts = document["cases"]["test"], (2, 3, 5, 10)
    lines = (("mahppo", GREEN, "-"), ("best_static", ORANGE, "--"), ("greedy", BLUE, "-"))
    for who, colour, line in lines:
        known = [n for n in counts if who in cases[f"mobilenetv2_{n}"]["saved"]]
        saved = [100 * cases[f"mobilenetv2_{n}"]["saved"][who]["objective"] for n in known]
        axes.plot(known, saved, line, color=colour, marker="o", label=who.replace("_", " "))
    axes.set(xlabel="users on 2 channels", ylabel="saved against local in %", ylim=(0, 100), xticks=counts)
    axes.set_title("MobileNetV2, published profile table: time and energy", loc="left")
    axes.legend(frameon=False)


def draw_policies(document: dict[str, Any], axes: Any) -> None:
    """Share of requests in time, by scenario, for those that decide by deadline."""
    names = {
        "best_static": GREY, "edgent_static": "#c9b458", "edgent_dynamic": ORANGE, "resolving": BLUE, "sac_d": GREEN,
    }  # fmt: skip
    scenarios = document["cases"]["scenarios"]
    width = 0.8 / len(names)
    for number, (name, colour) in enumerate(names.items()):
        heights = [100 * s["contenders"][name]["in_time"] for s in scenarios]
        places = [i + width * (number - len(names) / 2 + 0.5) for i in range(len(scenarios))]
        axes.bar(places, heights, width, color=colour, label=name.replace("_", " "))
    axes.set_xticks(range(len(scenarios)), [s["scenario"] for s in scenarios])
    axes.set(ylabel="requests in time in %", ylim=(0, 100))
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.12))


def draw_contention(document: dict[str, Any], axes: Any) -> None:
    """What choosing for many users at once saves: loss of the ways that are not exact, sorted."""
    cases = document["cases"]["small"]
    for name, colour in (("local", GREEN), ("prices", BLUE), ("selfish", ORANGE)):
        lost = sorted(100 * case[name] for case in cases)
        axes.plot([100 * i / max(1, len(lost) - 1) for i in range(len(lost))], lost, color=colour, linewidth=2, label=name)
    axes.set(xlabel="share of worlds in %", ylabel="worse than the exact assignment by %")
    axes.legend(frameon=False)


PICTURES = (
    Picture(
        "dyno", "Throughput over link rate: cut and precision together",
        "A device and a server 20 times faster, 0.5 to 100 Mbit/s. Never under {ours_over_best_min:.2f} of the best "
        "contender, up to {ours_over_device_only_max:.0f} times device only and up to "
        "{ours_over_float32_offloaders_max:.1f} times what ships float32 or raw pixels, with "
        "{bytes_ratio_to_float32_split:.0f} times fewer bytes than float32 at the same cut, at {accuracy_loss_points:.2f} "
        "points of accuracy.",
    ),
    Picture(
        "edge_prune", "The best cut moves with the rate",
        "A tracker on a device ten times slower than the server: every cut measured at several rates. {speedup_50mbit:.1f} "
        "times faster than device only at 50 Mbit/s, {speedup_max:.1f} times at best.",
    ),
    Picture(
        "exits", "Early exits: accuracy over compute",
        "Compute saved on test photographs with thresholds from held-out ones: {compute_saved_at_half_point:.0%} within "
        "half a point, {compute_saved_at_one_point:.0%} within one.",
    ),
    Picture(
        "bottleneck", "Bytes and accuracy at one cut",
        "The learned bottleneck against int8 with entropy coding at equal accuracy: {bytes_ratio_to_int8:.1f} times fewer "
        "bytes, {bytes_ratio_to_jpeg:.0f} times fewer than JPEG of the input, at {accuracy_loss_points:.2f} points.",
    ),
    Picture(
        "joint_planner", "What choosing one after another loses",
        "Median over random worlds: {sequential_over_joint_median:.2f} times the joint plan. A chain of 1,000 blocks over "
        "1,000 devices takes {large_instance_s:.0f} s to a gap of {large_instance_gap:.1%}.",
        draw_sequential,
    ),
    Picture(
        "users", "Many users: exact, by search, by prices, selfish",
        "Small worlds, against the exact assignment: local search loses {local_search_loss_mean:.1%} on average, the "
        "decentralised variant with prices {decentralised_loss_mean:.1%}, selfish users {selfish_loss_mean:.1%}.",
        draw_contention,
    ),
    Picture(
        "mahppo", "Learned offloading for many users",
        "With 5 users and 2 channels {latency_saved_5_users:.0%} of the time and {energy_saved_5_users:.0%} of the energy "
        "are saved at best over models. The best fixed action per user does as well, and deciding anew each slot with all "
        "known (greedy) does better: in this world nothing is hidden.",
        draw_users,
    ),
    Picture(
        "sac_d", "Learned exits, cuts and bits under a deadline",
        "With all known {policy_over_oracle_stationary:.2f} of the oracle's reward; where rate or load are hidden "
        "{policy_over_best_static_hidden:.2f} of the best fixed action's; {deadline_hit_rate:.0%} of deadlines are met.",
        draw_policies,
    ),
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
