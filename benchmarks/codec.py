"""Codecs: speed on one core, bits per element and accuracy lost, on every inner frontier of the bundled network.

Claims: `int8_bytes_per_s`, `int4_bytes_per_s` and `int4_entropy_bytes_per_s` are float32 input bytes per second through
pack *and* unpack of a whole body (names, shapes, checksums and all) as it crosses a link for one frame;
`int4_bits_per_element` (every byte of the body counted) and `int4_accuracy_loss_points` are of the very coder of the third
figure. Each is the median over all frontiers between the first and the last block. Baselines in the same rounds: torch.save
with a weights-only load, and a textbook numpy quantiser with zlib. Run: python -m benchmarks.codec [--json FILE] [--quick]
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import report
from ecotone import codec
from ecotone.cli.demo_model import example_inputs, frames, tilenet
from ecotone.model import Captured, capture

ENTROPY = "int4+zstd"
TIMED = (
    "fp32", "fp16", "bf16", "int8", "int6", "int4", "int3", "int2", "int4c", "int8+zstd", "int8+rans", ENTROPY,
    "int4+deflate", "int4+rans", "int4c+zstd", "int3+zstd", "int3+rans", "int3clip+zstd", "int3clip+rans", "int3c+zstd",
    "int3cclip+zstd", "int2+zstd", "int2clip+zstd", "int2clip+rans", "int2c+zstd", "int2cclip+zstd", "topk:25+zstd",
    "topk:10+zstd", "topk:10+rans",
)  # fmt: skip
SLOW = tuple(name for name in TIMED if name.endswith("+rans"))
JUDGED_ACCURACY = ("fp32", "int8", ENTROPY)
MEGABYTE = 1 << 20
IN_A_ROW = 5  # calls of one codec per round, as a stream of frames makes them; one of those that take milliseconds
Frontier = tuple[Tensor, ...]


def main(argv: Sequence[str] | None = None) -> None:
    options = report.arguments(__doc__ or "", argv)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    captured = capture(tilenet(), example_inputs(), name="tilenet")
    pixels, labels = frames(8 if options.quick else None)
    names = JUDGED_ACCURACY if options.quick else TIMED
    with torch.inference_mode():
        steps = [captured.segment(p, p + 1).module() for p in range(captured.graph.num_blocks)]
        timings = time_frontiers(captured, walk(steps, pixels[:1]), 5 if options.quick else 31)
        accuracy = accuracy_by_frontier(captured, steps, pixels, labels, names)
        image = image_cases(captured, pixels, labels)
    for case in timings:
        case["codecs"] = {
            name: {**values, **accuracy.get((case["position"], name), {})} for name, values in case["codecs"].items()
        }
    figures = judged(timings)
    about = report.context(
        options.seed, threads=1, network="tilenet", frames=len(pixels), tiles=labels.numel(), accuracy=accuracy_of(accuracy)
    )
    report.finish(options.json, figures, {"frontiers": timings, "codecs": by_codec(timings), "input": image}, about)


def walk(steps: Sequence[nn.Module], frame: Tensor) -> list[Frontier]:
    """The frontiers at positions 0 to L for one frame, by running the blocks one after another."""
    found: list[Frontier] = [(frame,)]
    for step in steps:
        found.append(tuple(step(*found[-1])))
    return found


def named(captured: Captured, position: int, tensors: Frontier) -> list[tuple[str, Tensor]]:
    graph = captured.graph
    return [(graph.tensors[index].name, tensor) for index, tensor in zip(graph.frontier(position), tensors, strict=True)]


def time_frontiers(captured: Captured, frontiers: list[Frontier], rounds: int) -> list[dict[str, Any]]:
    """One case per inner position: bytes in, and for each contender bits per element and bytes per second."""
    cases = []
    for position in range(1, captured.graph.num_blocks):
        tensors = frontiers[position]
        case = measure(captured, position, tensors, rounds)
        repeats = max(1, round(MEGABYTE / case["input_bytes"]))
        repeated = tuple(t.repeat(repeats, 1, 1, 1) for t in tensors)
        large = measure(captured, position, repeated, max(rounds // 3, 3), [n for n in TIMED if n not in SLOW])
        case["about_one_megabyte"] = {"input_bytes": large["input_bytes"]} | {
            name: values["bytes_per_s"] for name, values in large["codecs"].items()
        }
        cases.append(case)
    return cases


def measure(
    captured: Captured, position: int, tensors: Frontier, rounds: int, names: Sequence[str] = TIMED
) -> dict[str, Any]:
    """One frontier; SLOW codecs in a sixth of the rounds, after the others."""
    body, count = named(captured, position, tensors), sum(t.numel() for t in tensors)
    calls: dict[str, Callable[[], object]] = {name: ours(body, name, in_a_row(name)) for name in names}
    calls |= {"torch.save": lambda: torch_save(body)[1], "numpy int8 + zlib": lambda: numpy_zlib(tensors)[1]}
    slow = {name: calls.pop(name) for name in SLOW if name in calls}
    seconds = report.interleaved(calls, rounds, warm_up=2) | report.interleaved(slow, max(rounds // 6, 3))
    sizes = {name: len(codec.pack(body, name)) for name in names}
    sizes |= {"torch.save": torch_save(body)[0], "numpy int8 + zlib": numpy_zlib(tensors)[0]}
    errors = {name: relative_error(tensors, codec.unpack(codec.pack(body, name))) for name in names}
    return {
        "position": position,
        "shapes": [list(t.shape) for t in tensors],
        "input_bytes": 4 * count,
        "zeros": sum(int((t == 0).sum()) for t in tensors) / count,
        "codecs": {
            name: {
                "bytes_per_s": 4 * count * in_a_row(name) / report.median(times),
                "bits_per_element": 8 * sizes[name] / count,
                **({"relative_error": errors[name]} if name in errors else {}),
            }
            for name, times in sorted(seconds.items(), key=lambda item: order(item[0]))
        },
    }


def order(name: str) -> int:
    """Where a contender stands in the table."""
    return TIMED.index(name) if name in TIMED else len(TIMED)


def in_a_row(name: str) -> int:
    return IN_A_ROW if name in TIMED and name not in SLOW else 1


def ours(body: list[tuple[str, Tensor]], name: str, count: int = 1) -> Callable[[], object]:
    def run() -> None:
        for _ in range(count):
            codec.unpack(codec.pack(body, name))

    return run


def torch_save(body: list[tuple[str, Tensor]]) -> tuple[int, object]:
    file = io.BytesIO()
    torch.save(dict(body), file)
    size = file.tell()
    file.seek(0)
    return size, torch.load(file, weights_only=True)  # our own bytes of a moment ago, as a baseline


def numpy_zlib(tensors: Frontier) -> tuple[int, object]:
    """What one writes in five minutes: min-max to bytes, zlib at its default level, and back."""
    size, back = 0, []
    for tensor in tensors:
        x = tensor.numpy()
        low, high = x.min(), x.max()
        data = zlib.compress(np.round((x - low) / (high - low) * 255).astype(np.uint8).tobytes())
        size += len(data) + 8
        codes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(x.shape)
        back.append(codes.astype(np.float32) / 255 * (high - low) + low)
    return size, back


def relative_error(sent: Frontier, got: Sequence[Tensor]) -> float:
    wrong = sum(float((a - b).square().sum()) for a, b in zip(sent, got, strict=True))
    return (wrong / max(sum(float(a.square().sum()) for a in sent), 1e-30)) ** 0.5


def accuracy_by_frontier(
    captured: Captured, steps: Sequence[nn.Module], pixels: Tensor, labels: Tensor, names: Sequence[str]
) -> dict[tuple[int, str], dict[str, float]]:
    """Per (position, codec): share of tiles named right when that frontier crosses in that codec, frame by frame.

    An entropy stage changes bytes only, so each codec is run without it.
    """
    num_blocks = captured.graph.num_blocks
    bases = dict.fromkeys(name.partition("+")[0] for name in names)
    right: dict[tuple[int, str], int] = {}
    for frame, truth in zip(pixels, labels, strict=True):
        frontiers = walk(steps, frame[None])
        whole = int((frontiers[-1][0].argmax(1)[0] == truth).sum())
        for position in range(1, num_blocks):
            body = named(captured, position, frontiers[position])
            for name in bases:
                found = whole
                if name != "fp32":
                    tensors: Frontier = tuple(codec.unpack(codec.pack(body, name)))
                    for step in steps[position:]:
                        tensors = tuple(step(*tensors))
                    found = int((tensors[0].argmax(1)[0] == truth).sum())
                right[position, name] = right.get((position, name), 0) + found
    total = labels.numel()
    lost = {
        key: {"accuracy": count / total, "accuracy_loss_points": 100 * (right[key[0], "fp32"] - count) / total}
        for key, count in right.items()
    }
    return {(position, name): lost[position, name.partition("+")[0]] for position, _ in lost for name in names}


def accuracy_of(accuracy: dict[tuple[int, str], dict[str, float]]) -> float:
    """Accuracy of the network with nothing compressed."""
    return next(values["accuracy"] for (_, name), values in accuracy.items() if name == "fp32")


def image_cases(captured: Captured, pixels: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """The input at cut 0 as a picture: bits per value, accuracy lost, seconds of pack and unpack."""
    whole = captured.segment(0, captured.graph.num_blocks).module()
    cases: dict[str, dict[str, float]] = {}
    baseline = 0
    for name in ("fp32", *codec.IMAGE_CANDIDATES):
        right, size = 0, 0
        for frame, truth in zip(pixels, labels, strict=True):
            body = codec.pack([("x", frame[None])], name)
            right += int((whole(*codec.unpack(body))[0].argmax(1)[0] == truth).sum())
            size += len(body)
        baseline = right if name == "fp32" else baseline
        seconds = report.interleaved({name: ours([("x", pixels[:1])], name)}, 5)[name]
        cases[name] = {
            "bytes_per_frame": size / len(pixels),
            "bits_per_element": 8 * size / pixels.numel(),
            "accuracy_loss_points": 100 * (baseline - right) / labels.numel(),
            "pack_and_unpack_s": report.median(seconds),
        }
    return cases


def by_codec(cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the frontiers, per contender and value."""
    return {
        name: {key: report.median([case["codecs"][name][key] for case in cases]) for key in values}
        for name, values in cases[0]["codecs"].items()
    }


def judged(cases: list[dict[str, Any]]) -> dict[str, float]:
    medians = by_codec(cases)
    return {
        "int8_bytes_per_s": medians["int8"]["bytes_per_s"],
        "int4_bytes_per_s": medians["int4"]["bytes_per_s"],
        "int4_entropy_bytes_per_s": medians[ENTROPY]["bytes_per_s"],
        "int4_bits_per_element": medians[ENTROPY]["bits_per_element"],
        "int4_accuracy_loss_points": medians[ENTROPY]["accuracy_loss_points"],
    }


if __name__ == "__main__":
    main()
