"""Decoding over two machines: ours beside eager PyTorch in the same split, and beside llama.cpp RPC where it is there.

A Llama of 158 M random parameters; two machines are two processes on two cores, one thread each, on loopback; one request.
Ours: the driver holds the first six layers, a node the other six and the head. llama.cpp: its client and one RPC server in
the same cut, and two RPC servers behind a client; the faster counts. ECOTONE_LLAMA_CPP or --llama-cpp names its folder.

    decode_over_eager_torch       tokens/s of native:int8 over those of torch:fp32 (float32, eager, with key-value cache)
    decode4_over_llama_cpp_rpc    tokens/s of native:int4 over those of Q4_0 with the head in Q8_0: 4.7 bits per weight both
    decode8_over_llama_cpp_rpc    tokens/s of native:int8 over those of Q8_0: 8.5 bits per weight both
    prefill_over_llama_cpp_rpc    time to the first of 512, Q8_0 over openvino:int8+native:int8, two threads in all; with AMX
    network_added_ms_per_token    native:int4 over two machines minus whole in one process

A token's time is the mean gap of an answer, as the asker sees it. Contenders take turns within each round, engines that
are not at turn are stopped; ratios are of the round, and their medians are judged. null: not measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.llm_peers import LONG, Stamps, prompt_of, written
from benchmarks.peers.ecotone_peer import Ecotone
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.peer import Arrangement, Files, Peer, PeerError, Running

DECODE, TOKENS = 128, 40
BITS = {"4": 4.72, "8": 8.5, "f32": 32.0}
NATIVE, EAGER, PROMPT = "ecotone native", "ecotone torch eager", "ecotone openvino+native"


@dataclass(slots=True)
class Contender:
    """An engine at a precision over `machines`; seconds per token and to the first of 512, by round."""

    peer: Peer
    precision: str
    machines: int
    prompts: bool = False
    running: Running | None = None
    token_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.peer.name}, {self.precision}, {'two machines' if self.machines == 2 else 'whole'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the figures; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write figures, cases and context to FILE")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; not the judged figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--llama-cpp", type=Path, default=os.environ.get("ECOTONE_LLAMA_CPP"), metavar="DIR")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = None if options.llama_cpp is None else Path(options.llama_cpp)
    contenders, left_out = everyone(folder)
    for name, reason in left_out.items():
        print(f"{name}: left out: {reason}")
    with tempfile.TemporaryDirectory(prefix="llm-decode") as made:
        files = written(Path(made), options.seed, ("f32", "4", "8"))
        measure(contenders, files, rounds=2 if options.quick else 7)
    cases = {c.key: as_case(c) for c in contenders}
    for key, case in cases.items():
        first = case["first_token_512_s"]
        print(
            f"{key:44s} {case['ms_per_token']:.2f} ms per token" + (f", first of 512 after {first:.2f} s" if first else "")
        )
    about = report.context(
        options.seed, left_out=left_out, threads_per_machine=1, link="loopback", prompt_tokens=DECODE, tokens=TOKENS,
        shape="Llama, 12 layers of 1024, 16 heads, 8 key-value heads, FFN 2816, vocabulary 8192",
    )  # fmt: skip
    report.finish(options.json, figures(contenders), cases, about)
    return 0


def everyone(folder: Path | None) -> tuple[list[Contender], dict[str, str]]:
    """Who takes part, and who does not and why."""
    native = Ecotone({"4": "native:int4", "8": "native:int8"}, name=NATIVE)
    eager = Ecotone({"f32": "torch:fp32"}, name=EAGER)
    found = [
        Contender(native, "4", 1), Contender(native, "4", 2), Contender(native, "8", 2, prompts=True),
        Contender(eager, "f32", 2), Contender(Ecotone({"4": "native:int4"}, apart=True), "4", 2),
    ]  # fmt: skip
    if has_amx():
        found.append(Contender(Ecotone({"8": "openvino:int8+native:int8"}, name=PROMPT), "8", 2, prompts=True))
    left_out: dict[str, str] = {}
    for peer in (LlamaCpp(folder), LlamaCpp(folder, servers=2)):
        if (reason := peer.missing()) is not None:
            left_out[peer.name] = reason
            continue
        found += [Contender(peer, "4", 2), Contender(peer, "8", 2, prompts=True)]
    if folder is not None and not left_out:
        found.append(Contender(LlamaCpp(folder), "4", 1))
    return found, left_out


def has_amx() -> bool:
    """Whether this processor multiplies tiles of 8-bit integers."""
    return "amx_int8" in report.machine()


def measure(contenders: Sequence[Contender], files: Files, rounds: int) -> None:
    """Start all, then rounds in turn; round -1 warms up."""
    try:
        for contender in contenders:
            arrangement = Arrangement(precision=contender.precision, machines=contender.machines)
            contender.running = contender.peer.start(files, arrangement)
            contender.running.pause()
        for index in range(-1, rounds):
            for contender in contenders:
                one_turn(contender, index)
    finally:
        for contender in contenders:
            if contender.running is not None:
                contender.running.close()


def one_turn(contender: Contender, index: int) -> None:
    """An answer of TOKENS behind a prompt of DECODE, and the first token behind LONG."""
    running = contender.running
    assert running is not None
    running.resume()
    try:
        for length, count in ((DECODE, TOKENS), *([(LONG, 1)] if contender.prompts else [])):
            stamps = Stamps(running)
            running.generate(prompt_of(length, index), count, stamps)
            if index >= 0 and count == 1:
                contender.first_s.append(stamps.first_s)
            elif index >= 0:
                contender.token_s.append(stamps.gap_s)
    except PeerError as error:
        raise SystemExit(f"benchmarks.llm_decode: {contender.key}: {error}") from None
    finally:
        running.pause()


def figures(contenders: Sequence[Contender]) -> dict[str, float | None]:
    """The judged figures; None where a side was not measured."""
    by_key = {c.key: c for c in contenders}

    def tokens(name: str, precision: str, machines: int = 2) -> list[float]:
        return by_key[f"{name}, {precision}, {'two machines' if machines == 2 else 'whole'}"].token_s

    def theirs(precision: str) -> list[Contender]:
        return [
            c for c in contenders if c.peer.name.startswith("llama.cpp") and c.precision == precision and c.machines == 2
        ]

    found: dict[str, float | None] = {
        "decode_over_eager_torch": ratio(tokens(EAGER, "f32"), tokens(NATIVE, "8")),
        "decode4_over_llama_cpp_rpc": None, "decode8_over_llama_cpp_rpc": None, "prefill_over_llama_cpp_rpc": None,
    }  # fmt: skip
    for precision in ("4", "8"):
        rivals = theirs(precision)
        if rivals:
            best = min(rivals, key=lambda c: report.median(c.token_s))
            found[f"decode{precision}_over_llama_cpp_rpc"] = ratio(best.token_s, tokens(NATIVE, precision))
    prompts = by_key.get(f"{PROMPT}, 8, two machines")
    if prompts is not None and theirs("8"):
        best = min(theirs("8"), key=lambda c: report.median(c.first_s))
        found["prefill_over_llama_cpp_rpc"] = ratio(best.first_s, prompts.first_s)
    gaps = [1e3 * (s - w) for s, w in zip(tokens(NATIVE, "4"), tokens(NATIVE, "4", 1), strict=True)]
    found["network_added_ms_per_token"] = report.median(gaps)
    return found


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the rounds of how many times as fast ours is."""
    return report.median([a / b for a, b in zip(theirs, ours, strict=True)])


def as_case(contender: Contender) -> dict[str, Any]:
    """Medians and rounds of one contender."""
    return {
        "bits_per_weight": BITS[contender.precision],
        "ms_per_token": 1e3 * report.median(contender.token_s),
        "tokens_per_s": 1 / report.median(contender.token_s),
        "first_token_512_s": report.median(contender.first_s) if contender.first_s else None,
        "rounds_ms_per_token": [1e3 * value for value in contender.token_s],
        "rounds_first_token_s": contender.first_s,
    }


if __name__ == "__main__":
    sys.exit(main())
