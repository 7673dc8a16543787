"""`ecotone bottleneck`: train a learned codec for one cut of a model, and say what it is worth beside the others there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ecotone import codec
from ecotone.cli import options
from ecotone.cli.console import err, out, print_json, progress_bar
from ecotone.cli.tables import listing
from ecotone.cli.workflow import Work, load_work, make_profile, open_nodes, write_file
from ecotone.planner import Latency, solve
from ecotone.profile import CodecCost, Payload, Profile
from ecotone.profiling import BottleneckOptions, TrainedBottleneck, payloads, train_bottleneck, trainable_cuts
from ecotone.serving.sources import open_source
from ecotone.units import EcotoneError, format_quantity

__all__ = ["best_cut", "bottleneck"]

BESIDE = ("int8+zstd", "int4+zstd", "int3clip+rans", "int2cclip+rans")
GUESS = f"learned:guess@{'0' * 16}"
GUESS_BITS = 0.3
GUESS_SLOWER = 10  # than int8+zstd, about: what learned codecs turn out to take


def bottleneck(
    model: options.Model,
    out_file: Annotated[Path, options.option("--out", "-o", text="Where to write the codec.")],
    samples: Annotated[
        str, options.option("--samples", group=options.KNOWN, text="Real inputs to train on: a directory or file.")
    ],
    cut: Annotated[str, typer.Option(help="The cut to train for, or auto: where a plan would gain most.")] = "auto",
    cluster: options.ClusterFile = None,
    profile_file: options.ProfileFile = None,
    price: Annotated[
        float, options.trained("What a bit per element may cost the answer, in nats per decision: more makes it smaller.")
    ] = 0.5,
    latents: Annotated[int, options.trained("Channels that cross; 0: as many as the tensor has, at most 32.")] = 0,
    stride: Annotated[int, options.trained("How many pixels each way share a latent: 1, 2, 4.")] = 2,
    hidden: Annotated[int, options.trained("Channels inside the decoder; 0: a decoder of one layer.")] = 32,
    coding: Annotated[
        str, options.trained("prior (learned tables), or an int codec such as int8+zstd: the rate follows from --latents.")
    ] = "prior",
    epochs: Annotated[int, options.trained("Passes over the samples with an estimate of the loss.")] = 20,
    final_epochs: Annotated[
        int, options.trained("Passes through the rest of the model after these; each costs far more.")
    ] = 1,
    limit: Annotated[int, options.trained("Use at most so many samples.", min=4)] = 2000,
    seed: Annotated[int, options.trained("Same seed, same machine: same codec.")] = 0,
    input_shape: options.InputShape = "",
    json_output: options.Json = False,
) -> None:
    """Train a learned bottleneck: a small encoder and decoder for the one tensor that crosses a cut.

    The model stays as it is; the codec learns to keep its answers. Give the file to profile, plan, run and serve with
    --bottleneck, and it competes with all other codecs at its cut.

      ecotone bottleneck net.py:model --cut 5 --samples photos/ --out net.bottleneck.safetensors
      ecotone plan net.py:model --cluster home.toml --bottleneck net.bottleneck.safetensors
    """
    asked = BottleneckOptions(
        latents=latents, stride=stride, kernel=stride, hidden=hidden, coding=coding, price=price, epochs=epochs,
        final_epochs=final_epochs, seed=seed,
    )  # fmt: skip
    if out_file.is_dir():
        raise EcotoneError(f"--out {out_file}: is a directory; name a file in it")
    work = load_work(model, cluster, input_shape=input_shape, branches=False, quiet=json_output)
    items = [item for item, _ in zip(open_source(samples, "all"), range(limit), strict=False)]
    inputs = [work.preparation.flat(item) for item in items]
    position = _position(work, cut, profile_file)
    with progress_bar("training", json_output) as report:
        made = train_bottleneck(work.captured, position, inputs, options=asked, progress=report)
    write_file(out_file, made.codec.data)
    beside = _beside(work, made, inputs[-made.num_validation :])
    if json_output:
        figures = {field.name: getattr(made, field.name) for field in fields(made) if field.name != "codec"}
        print_json({"id": made.codec.id, "cut": position, **figures, "beside": [asdict(payload) for payload in beside]})
        return
    _show(made, beside)


def _position(work: Work, text: str, profile_file: Path | None) -> int:
    """The cut that --cut names or that a plan would choose; raises EcotoneError."""
    if text != "auto":
        if not text.isdigit():
            raise EcotoneError(f"--cut {text!r}: write a position between two blocks, or auto")
        return int(text)
    if len(work.cluster.devices) == 1:
        raise EcotoneError("--cut auto: one machine sends nothing to another; give --cluster with more, or name a cut")
    with open_nodes(work) as nodes:
        profile = make_profile(work, nodes, path=profile_file)
    position = best_cut(work, profile)
    err.print(f"[dim]a plan would gain most from a bottleneck at cut {position}")
    return position


def best_cut(work: Work, profile: Profile) -> int:
    """Where the fastest plan would cross in a codec of GUESS_BITS per element; EcotoneError where it needs none."""
    graph = work.captured.graph
    sizes = {p: graph.tensors[graph.frontier(p)[0]].num_elements for p in trainable_cuts(graph) if p in profile.cuts}
    guesses = tuple(Payload(position=p, codec=GUESS, size_bytes=n * GUESS_BITS / 8) for p, n in sizes.items())
    like = [cost for cost in profile.codecs if cost.codec == "int8+zstd"]
    costs = tuple(
        CodecCost(
            device=c.device, codec=GUESS, encode_fixed_s=GUESS_SLOWER * c.encode_fixed_s,
            encode_s_per_raw_byte=GUESS_SLOWER * c.encode_s_per_raw_byte, decode_fixed_s=GUESS_SLOWER * c.decode_fixed_s,
            decode_s_per_raw_byte=GUESS_SLOWER * c.decode_s_per_raw_byte,
        )
        for c in like
    )  # fmt: skip
    imagined = replace(profile, payloads=(*profile.payloads, *guesses), codecs=(*profile.codecs, *costs))
    plan = solve(graph, work.cluster, imagined, Latency()).plan
    found = next((t.position for t in plan.transfers if t.codec == GUESS), None)
    if found is None:
        raise EcotoneError(f"--cut auto: the fastest plan, {plan}, needs no bottleneck on these machines; name a cut")
    return found


def _beside(work: Work, made: TrainedBottleneck, inputs: Sequence[tuple[torch.Tensor, ...]]) -> tuple[Payload, ...]:
    """What the codec and the usual ones make of the cut's tensor on the validation samples."""
    cuts = (0, made.codec.spec.position, work.captured.graph.num_blocks)
    with codec.holding([made.codec]):
        found = payloads(work.captured, inputs, cuts, (*BESIDE, made.codec.id))
    return tuple(payload for payload in found if payload.position == cuts[1])


def _show(made: TrainedBottleneck, beside: Sequence[Payload]) -> None:
    table = listing("codec", right=("bytes a sample", "decisions changed", "error of the answer"))
    for payload in beside:
        size = format_quantity(payload.size_bytes, "bytes")
        table.add_row(payload.codec, size, f"{payload.disagreement:.2%}", f"{payload.relative_error:.3f}")
    out.print(table)
    text = (
        f"on {made.num_validation} held-out samples, cut {made.codec.spec.position}, {len(made.codec.data)} bytes of weights"
    )
    err.print(f"[dim]{text}")
