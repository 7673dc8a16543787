"""Random scenes of two to five unequal machines with several faults each, and every process hurt at every event.

Each script is a seed: world, plans, requests and faults are drawn from it (simulator/draw.py), run on the virtual clock by
the machines of ecotone.protocol, and held against an oracle that knows the script alone (simulator/oracle.py). Links lie
between 1 kbit/s and 1 Gbit/s. `scripts` counts random ones; the exhaustive runs of small worlds are beside them under
`cases`, and what they find counts into `lost`, `duplicated` and `stuck` alike (each counts requests). `scripts_per_s` is
scripts over seconds of processor time: of one core, however many processes share the work.

A failing seed is replayed, cut down and written as TOML by `python -m benchmarks.fault_simulation --replay SEED`; such a
file is run again by `--replay FILE`.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import report
from ecotone.schema import write_aside
from ecotone.simulator import faults as ft
from ecotone.simulator.chaos import Verdict, run_scene
from ecotone.simulator.draw import draw_scene
from ecotone.simulator.exhaustive import SMALL, attacks, num_events, run_attacked, small_scene
from ecotone.simulator.scene import Scene
from ecotone.simulator.shrink import same_failure, shrink
from ecotone.units import EcotoneError

SCRIPTS, BLOCK = 24_000, 250
WAYS = ("lost", "duplicated", "stuck", "broken", "left")
Counts = Counter[str]


def main(argv: list[str] | None = None) -> int:
    """Run all scripts; 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write figures, cases and context to FILE")
    parser.add_argument("--quick", action="store_true", help="a tenth of the scripts; not the judged figures")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; a script is a seed")
    parser.add_argument("--scripts", type=int, default=0, help=f"how many ({SCRIPTS})")
    parser.add_argument(
        "--replay", metavar="SEED|FILE", help="run one script again, cut it down if it fails, write it as TOML"
    )
    options = parser.parse_args(argv)
    try:
        if options.replay is not None:
            return replay(options.replay)
        return measure(options)
    except EcotoneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(options: argparse.Namespace) -> int:
    """The benchmark proper."""
    count = options.scripts or (SCRIPTS // 10 if options.quick else SCRIPTS)
    blocks = [
        (first, min(first + BLOCK, options.seed + count)) for first in range(options.seed, options.seed + count, BLOCK)
    ]
    small = [(name, record) for name in SMALL for record in (False, True)]
    began_s = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 8), seldom_collect) as pool:
        parts = []
        for number, part in enumerate(pool.imap_unordered(run_block, blocks), 1):
            parts.append(part)
            if number % 8 == 0 or number == len(blocks):
                print(f"{number * BLOCK} scripts, {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
        exhaustive = pool.map(run_small, small)
    total = sum((part[0] for part in parts), Counter())
    by_case: dict[str, Counts] = {}
    for part in parts:
        for name, counts in part[1].items():
            by_case.setdefault(name, Counter()).update(counts)
    failed = sorted(line for part in parts for line in part[2]) + [line for part in exhaustive for line in part[1]]
    hurt = sum((part[0] for part in exhaustive), Counter())
    figures = {
        "scripts": total["scripts"],
        "lost": total["lost"] + hurt["lost"],
        "duplicated": total["duplicated"] + hurt["duplicated"],
        "stuck": total["stuck"] + hurt["stuck"],
        "answered_over_possible": (total["possible_answered"] + hurt["possible_answered"])
        / max(1, total["possible"] + hurt["possible"]),
        "scripts_per_s": total["scripts"] / max(1e-9, sum(part[3] for part in parts)),
    }
    cases: dict[str, Any] = {name: _plain(by_case[name]) for name in sorted(by_case)}
    cases |= {
        f"exhaustive: {name}{', recorded' if rec else ''}": _plain(p[0])
        for (name, rec), p in zip(small, exhaustive, strict=True)
    }
    cases["failed"] = failed
    about = report.context(
        options.seed, requests=total["asked"], answered=total["answered"], possible=total["possible"],
        rerouted=total["rerouted"], events=total["events"], broken=total["broken"] + hurt["broken"],
        left_behind=total["left"] + hurt["left"], exhaustive_runs=hurt["scripts"],
        wall_s=time.perf_counter() - began_s,
    )  # fmt: skip
    for line in failed:
        print(line, file=sys.stderr)
    report.finish(options.json, figures, cases, about)
    return 1 if failed else 0


def seldom_collect() -> None:
    """Worlds are small cycles: collecting them one by one would take a tenth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def run_block(seeds: tuple[int, int]) -> tuple[Counts, dict[str, Counts], list[str], float]:
    """Counts of all scripts of these seeds, the same by topology and fault, what failed, and seconds of processor time."""
    total, by_case, failed = Counter[str](), dict[str, Counts](), list[str]()
    began_s = time.process_time()
    for seed in range(*seeds):
        scene = draw_scene(seed)
        verdict = run_scene(scene)
        counts = counts_of(verdict)
        total.update(counts)
        for name in labels(scene):
            by_case.setdefault(name, Counter()).update(counts)
        if not verdict.is_good:
            failed.append(f"seed {seed}: {verdict}; python -m benchmarks.fault_simulation --replay {seed}")
    return total, by_case, failed, time.process_time() - began_s


def run_small(case: tuple[str, bool]) -> tuple[Counts, list[str]]:
    """One small scene under every attack at every event."""
    name, record = case
    scene = small_scene(name, record=record)
    total, failed = Counter[str](), list[str]()
    for attack in attacks(scene, num_events(scene)):
        verdict, _ = run_attacked(scene, attack)
        total.update(counts_of(verdict))
        if not verdict.is_good:
            failed.append(f"exhaustive {name}, recorded {record}, {attack}: {verdict}")
    return total, failed


def counts_of(verdict: Verdict) -> Counts:
    """What a verdict adds to the sums."""
    return Counter(
        scripts=1, asked=verdict.num_asked, answered=verdict.num_answered, possible=verdict.num_possible,
        possible_answered=verdict.num_possible_answered, rerouted=verdict.num_rerouted, events=verdict.num_events,
        **{way: len(getattr(verdict, way)) for way in WAYS},
    )  # fmt: skip


def labels(scene: Scene) -> list[str]:
    """The cases that a scene counts into: its topology, and each kind of fault that it holds."""
    first = scene.deployments[0]
    alone = f"{scene.asker}:{len(scene.size_bytes) - 1}"
    twins = [plan for plan in first.plans[1:] if plan != alone]
    parts = ["T2a" if first.active else "T2b"] if twins else []
    parts += ["T1"] if alone in first.plans[1:] else []
    kinds = {type(fault).__name__ for fault in scene.faults} - {"RestartNode", "ResumeNode", "HealLink", "HealAll"}
    if any(isinstance(f, ft.KillNode) and f.device == scene.asker for f in scene.faults):
        kinds.add("KillNode of the asker")
    if len(scene.deployments) > 1:
        kinds.add("Replan")
    exits = ["exits"] if any("?" in plan for d in scene.deployments for plan in d.plans) else []
    return [f"topology {'+'.join(parts) or 'none'}", *exits, *(f"fault {kind}" for kind in kinds)]


def replay(text: str) -> int:
    """Run a seed or a file again; a failing one is cut down and written beside us. 1 where it fails."""
    scene = draw_scene(int(text)) if text.isdigit() else read_scene(Path(text))
    verdict = run_scene(scene)
    print(f"{text}: {verdict}", *verdict.reasons, f"digest {verdict.digest}", sep="\n  ")
    if verdict.is_good:
        return 0
    short = shrink(scene, same_failure(verdict))
    again = run_scene(short)
    path = Path(f"fault_{Path(text).stem}.toml")
    remark = f"cut down from {text}: {again}\n" + "\n".join(again.reasons)
    write_aside(path, short.to_toml(remark + f"\nreplay: python -m benchmarks.fault_simulation --replay {path}"))
    print(f"shortest script: {len(short.faults)} faults, {len(short.asks)} requests, in {path}")
    return 1


def read_scene(path: Path) -> Scene:
    """A scene file; raises EcotoneError."""
    try:
        return Scene.from_toml(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise EcotoneError(f"{path}: {error}; give a seed or a scene that --replay has written") from error


def _plain(counts: Counts) -> dict[str, int]:
    return {key: value for key, value in counts.items() if value or key in ("lost", "duplicated", "stuck")}


if __name__ == "__main__":
    sys.exit(main())
