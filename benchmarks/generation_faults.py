"""Random scenes of generation with faults: does every text stay the model's, and does every request end as it should?

Each scene is a seed: up to five nodes and a driver, a chain of spans, requests that share prefixes, drafts right and wrong,
little memory for keys; nodes die (also while another is replaced) and come back, freeze, are slow, fail a step; links carry
nothing for a while; the pipeline moves (simulator/generation_scene.py). The driver and stages of ecotone.decoding run it on
a virtual clock, and generation_chaos.py judges. `changed`, `lost`, `stuck` and `left` count scenes.

`--replay SEED` runs one scene again and cuts it down if it fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter

from benchmarks import report
from ecotone.simulator.generation_chaos import run_generation_scene, run_generation_seed, shrink_generation_scene
from ecotone.simulator.generation_scene import draw_generation_scene

SEEDS, BLOCK = 4000, 50
WAYS = ("changed", "lost", "stuck", "left")


def main(argv: list[str] | None = None) -> int:
    """Run all scenes; 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write figures, cases and context to FILE")
    parser.add_argument("--quick", action="store_true", help="a tenth of the scenes; not the judged figures")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; a scene is a seed")
    parser.add_argument("--seeds", type=int, default=0, help=f"how many ({SEEDS})")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one scene again, cut it down if it fails")
    options = parser.parse_args(argv)
    if options.replay is not None:
        return replay(options.replay)
    count = options.seeds or (SEEDS // 10 if options.quick else SEEDS)
    blocks = [(s, min(s + BLOCK, options.seed + count)) for s in range(options.seed, options.seed + count, BLOCK)]
    total, failed, began_s = Counter[str](), [], time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for counts, lines in pool.imap_unordered(run_block, blocks):
            total.update(counts)
            failed += lines
    for line in failed:
        print(line, file=sys.stderr)
    figures = {"seeds": count, **{way: total[way] for way in WAYS}}
    endings = {key.removeprefix("ending_"): n for key, n in sorted(total.items()) if key.startswith("ending_")}
    done = {key.removeprefix("count_"): n for key, n in sorted(total.items()) if key.startswith("count_")}
    about = report.context(options.seed, events=total["events"], wall_s=time.perf_counter() - began_s)
    report.finish(options.json, figures, {"endings": endings, "counts": done, "failed": failed}, about)
    return 1 if failed else 0


def run_block(seeds: tuple[int, int]) -> tuple[Counter[str], list[str]]:
    """Counts over all scenes of these seeds, and a line for each that failed."""
    total, failed = Counter[str](), []
    for seed in range(*seeds):
        verdict = run_generation_seed(seed)
        total.update(verdict.ways)
        total.update({"events": verdict.num_events})
        total.update({f"ending_{name}": n for name, n in verdict.endings})
        total.update({f"count_{name}": n for name, n in verdict.counts if not name.startswith("ended_")})
        if verdict.ways:
            failed.append(f"seed {seed}: {verdict}; python -m benchmarks.generation_faults --replay {seed}")
    return total, failed


def replay(seed: int) -> int:
    """Run one scene again; the shortest that fails likewise is printed."""
    scene = draw_generation_scene(seed)
    verdict = run_generation_scene(scene)
    print(f"seed {seed}: {verdict}")
    if not verdict.ways:
        return 0
    short = shrink_generation_scene(scene)
    print(f"{short}\n{run_generation_scene(short)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
