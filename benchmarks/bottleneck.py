"""Learned bottlenecks against int8 with entropy coding and JPEG of the input, at equal accuracy, on the bundled network.

Claims, over the cuts for which a trained bottleneck ships, each family by its smallest codec that loses at most one point:
`bytes_ratio_to_int8` is int8's bytes per frame over ours at the same cut, `bytes_ratio_to_jpeg` those of a JPEG of the whole
input over ours; both of the cut where ours is worst. `accuracy_loss_points` is our greatest loss. Codecs are chosen on
photographs that neither network nor bottleneck was trained on (the end of CIFAR-10's training file), and what is reported
of the chosen is of its test photographs, on which nothing was trained, chosen or tuned. Without these files both are the
shipped frames, which "context" then says. `cases` has all codecs as they were when chosen, lower bit widths, top-k, WebP and
AVIF among them, and the chosen (`best`) with times and the latency of each family on a device ten times slower.
Run: python -m benchmarks.bottleneck [--json FILE] [--quick] [--data FOLDER] [--also FILE ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.photographs import HELD_OUT, SIDE, files_in, mosaics, offer_folder, photographs
from ecotone import codec
from ecotone.cli.demo_model import ASSETS, example_inputs, frames, tilenet
from ecotone.codec import LearnedCodec
from ecotone.model import Captured, capture
from ecotone.profiling import check_bottleneck

LIMIT_POINTS = 1.0
STAGES = ("", "+zstd", "+deflate", "+rans")
FAMILIES: dict[str, tuple[str, ...]] = {
    "int8": ("int8", "int8c"),
    "fewer bits": (
        "int6", "int4", "int4c", "int4clip", "int4cclip", "int3", "int3c", "int3clip", "int3cclip", "int2", "int2c",
        "int2clip", "int2cclip",
    ),
    "topk": ("topk:50", "topk:25", "topk:10", "topk:5"),
}  # fmt: skip
PICTURES = {
    "jpeg": tuple(f"jpeg:{q}" for q in (90, 75, 60, 50, 40, 30, 20)),
    "webp": tuple(f"webp:{q}" for q in (90, 80, 70, 60, 50)),
    "avif": tuple(f"avif:{q}" for q in (70, 60, 50, 40)),
}
SLOWDOWN = 10.0
RATES_BIT_PER_S = (0.05e6, 0.1e6, 0.25e6, 1e6, 4e6)


@dataclass(frozen=True, slots=True)
class Set:
    """Frames with their labels, and what the network says of each with nothing compressed."""

    pixels: Tensor
    labels: Tensor
    right: list[int]


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    captured = capture(tilenet(), example_inputs(), name="tilenet")
    whole = captured.segment(0, captured.graph.num_blocks).module()
    ours = [codec.read_learned(path.read_bytes(), str(path)) for path in shipped(options.also)]
    for made in ours:
        check_bottleneck(captured, made)
    with torch.inference_mode(), codec.holding(ours):
        chosen_on, tested_on = (judge(whole, *part) for part in data(options.data, 8 if options.quick else None))
        inputs = pictures(whole, chosen_on, tested_on)
        cuts = [at_cut(captured, cut, ours, chosen_on, tested_on) for cut in sorted({m.spec.position for m in ours})]
        times = [latency(captured, case, inputs) for case in cuts]
    figures = judged(cuts, inputs)
    about = report.context(
        options.seed, network="tilenet", frames=len(tested_on.pixels), tiles=tested_on.labels.numel(),
        accuracy=sum(tested_on.right) / tested_on.labels.numel(), chosen_on_frames=len(chosen_on.pixels),
        data=source(options.data),
    )  # fmt: skip
    if options.json:
        draw(Path(options.json).with_suffix(".png"), cuts, inputs)
    report.finish(options.json, figures, {"cuts": cuts, "input": inputs, "slow_device": times}, about)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write figures, cases and context to FILE, a PNG beside it")
    parser.add_argument("--quick", action="store_true", help="8 frames; not the judged figures")
    offer_folder(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--also", metavar="FILE", nargs="*", default=[], help="further bottlenecks of TileNet")
    return parser.parse_args(argv)


def shipped(also: Iterable[str] = ()) -> list[Path]:
    """The bottlenecks in the package and those named."""
    return [*sorted(ASSETS.glob("*.bottleneck.safetensors")), *map(Path, also)]


# ---- data ----------------------------------------------------------------------------------------------------------------


def source(folder: Path) -> str:
    """What frames are chosen and reported on."""
    if files_in(folder) is None:
        return "the 40 shipped frames, for choosing and reporting: the CIFAR-10 files are not there (--data)"
    return "chosen on the last 1,960 photographs of cifar10-train.parquet, reported on cifar10-test.parquet"


def data(folder: Path, count: int | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Frames and labels to choose on, and to report."""
    files = files_in(folder)
    if files is None:
        print(source(folder))
        pixels, labels = frames(count)
        return (pixels, labels), (pixels, labels)
    tiles = (count or 0) * SIDE**2
    held, labels = photographs(files[0], -HELD_OUT)
    chosen = tiles or len(held)
    return mosaics(held[:chosen], labels[:chosen]), mosaics(*photographs(files[1], tiles))


def hits(logits: Tensor, truth: Tensor) -> int:
    return int((logits[0].argmax(0) == truth).sum())


def judge(whole: torch.nn.Module, pixels: Tensor, labels: Tensor) -> Set:
    return Set(pixels, labels, [hits(whole(f[None])[0], t) for f, t in zip(pixels, labels, strict=True)])


# ---- measuring -----------------------------------------------------------------------------------------------------------


def measured(
    name: str, values: Sequence[Tensor], rest: torch.nn.Module, part: Set, stages: Sequence[str] = ("",)
) -> list[Any]:
    """One case per entropy stage, which all decode to the same: bytes of the body per frame, points lost."""
    right, sizes = 0, dict.fromkeys(stages, 0)
    for x, truth in zip(values, part.labels, strict=True):
        bodies = [codec.pack([("x", x)], name + stage) for stage in stages]
        for stage, body in zip(stages, bodies, strict=True):
            sizes[stage] += len(body)
        right += hits(rest(*codec.unpack(bodies[0]))[0], truth)
    lost = 100 * (sum(part.right) - right) / part.labels.numel()
    return [
        {"codec": name + stage, "bytes_per_frame": size / len(values), "accuracy_loss_points": lost}
        for stage, size in sizes.items()
    ]


def best(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The smallest that loses at most LIMIT_POINTS; the least lossy where none does."""
    within = [c for c in cases if c["accuracy_loss_points"] <= LIMIT_POINTS]
    if not within:
        return min(cases, key=lambda c: c["accuracy_loss_points"])
    return min(within, key=lambda c: c["bytes_per_frame"])


def reported(cases: Sequence[dict[str, Any]], values: Sequence[Tensor], rest: torch.nn.Module, part: Set) -> dict[str, Any]:
    """The best of `cases`, which are of the frames to choose on, measured again on those of `part`, with its times."""
    chosen = best(cases)
    (case,) = measured(chosen["codec"], values, rest, part)
    return timed(case | {"when_chosen": {k: v for k, v in chosen.items() if k != "codec"}}, values[0])


def pictures(whole: torch.nn.Module, chosen_on: Set, tested_on: Set) -> dict[str, Any]:
    """Image codecs of the input: all cases and the best of each format."""
    first, second = ([frame[None] for frame in part.pixels] for part in (chosen_on, tested_on))
    cases: dict[str, list[Any]] = {}
    for family, names in PICTURES.items():
        try:
            cases[family] = [case for name in names for case in measured(name, first, whole, chosen_on)]
        except codec.CodecError as error:
            print(f"{family}: {error}")
    return {"cases": cases, "best": {family: reported(found, second, whole, tested_on) for family, found in cases.items()}}


def at_cut(captured: Captured, cut: int, ours: Sequence[LearnedCodec], chosen_on: Set, tested_on: Set) -> dict[str, Any]:
    """All families at one cut."""
    head, rest = captured.segment(0, cut).module(), captured.segment(cut, captured.graph.num_blocks).module()
    first, second = ([head(frame[None])[0] for frame in part.pixels] for part in (chosen_on, tested_on))
    cases = {
        family: [case for name in names for case in measured(name, first, rest, chosen_on, STAGES)]
        for family, names in FAMILIES.items()
    }
    cases["learned"] = [case for m in ours if m.spec.position == cut for case in measured(m.id, first, rest, chosen_on)]
    chosen = {family: reported(found, second, rest, tested_on) for family, found in cases.items()}
    return {"cut": cut, "elements": first[0].numel(), "cases": cases, "best": chosen}


def timed(case: dict[str, Any], x: Tensor, rounds: int = 15) -> dict[str, Any]:
    """The case with median seconds of packing and unpacking one frame."""
    name = case["codec"]
    body = codec.pack([("x", x)], name)
    calls = {"encode_s": lambda: codec.pack([("x", x)], name), "decode_s": lambda: codec.unpack(body)}
    return case | {key: report.median(times) for key, times in report.interleaved(calls, rounds, warm_up=3).items()}


def latency(captured: Captured, case: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Seconds per frame by family and rate: head and encoder on a device SLOWDOWN times slower, the rest here.

    Eager PyTorch, one thread; the sum of what was measured, no run over a link. The best JPEG goes to the server.
    """
    x, cut, length = example_inputs()[0], case["cut"], captured.graph.num_blocks
    modules = {"head": captured.segment(0, cut).module(), "whole": captured.segment(0, length).module()}
    modules["tail"] = captured.segment(cut, length).module()
    value = modules["head"](x)[0]
    calls = {
        "head": lambda: modules["head"](x),
        "tail": lambda: modules["tail"](value),
        "whole": lambda: modules["whole"](x),
    }
    seconds = {name: report.median(times) for name, times in report.interleaved(calls, 11, warm_up=2).items()}
    found: dict[str, Any] = {"cut": cut, "device only": SLOWDOWN * seconds["whole"]}
    for rate in RATES_BIT_PER_S:
        row = {
            family: SLOWDOWN * (seconds["head"] + c["encode_s"])
            + 8 * c["bytes_per_frame"] / rate
            + c["decode_s"]
            + seconds["tail"]
            for family, c in case["best"].items()
        }
        jpeg = inputs["best"]["jpeg"]
        row["jpeg"] = SLOWDOWN * jpeg["encode_s"] + 8 * jpeg["bytes_per_frame"] / rate + jpeg["decode_s"] + seconds["whole"]
        found[f"{rate / 1e6:g} Mbit/s"] = row
    return found


def judged(cuts: Sequence[dict[str, Any]], inputs: dict[str, Any]) -> dict[str, float]:
    jpeg = inputs["best"]["jpeg"]["bytes_per_frame"]
    ours = [case["best"]["learned"]["bytes_per_frame"] for case in cuts]
    return {
        "bytes_ratio_to_int8": min(c["best"]["int8"]["bytes_per_frame"] / own for c, own in zip(cuts, ours, strict=True)),
        "bytes_ratio_to_jpeg": min(jpeg / own for own in ours),
        "accuracy_loss_points": max(case["best"]["learned"]["accuracy_loss_points"] for case in cuts),
    }


def draw(path: Path, cuts: Sequence[dict[str, Any]], inputs: dict[str, Any]) -> None:
    """Points lost over bytes per frame, one panel per cut; the input's pictures in each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(cuts), figsize=(5 * len(cuts), 3.6), sharey=True, squeeze=False)
    for panel, case in zip(panels[0], cuts, strict=True):
        shown = {
            "integers + zstd": [c for f in ("int8", "fewer bits") for c in case["cases"][f] if c["codec"].endswith("zstd")],
            "integers + rANS": [c for f in ("int8", "fewer bits") for c in case["cases"][f] if c["codec"].endswith("rans")],
            "top-k": [c for c in case["cases"]["topk"] if c["codec"].endswith("zstd")],
            "learned": case["cases"]["learned"],
            **{f"{name.upper()} of the input": found for name, found in inputs["cases"].items()},
        }
        for (label, found), mark in zip(shown.items(), "o^sD+x*", strict=False):
            points = sorted((c["bytes_per_frame"], max(c["accuracy_loss_points"], -0.5)) for c in found)
            panel.plot(*zip(*points, strict=True), mark, label=label, markersize=8 if label == "learned" else 5)
        panel.axhline(LIMIT_POINTS, color="grey", linewidth=0.8)
        panel.set(
            xscale="log", ylim=(-0.7, 8), xlabel="bytes per frame", title=f"cut {case['cut']}, {case['elements']:,} values"
        )
    panels[0][0].set_ylabel("points lost")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
