"""Engines that split one language model over machines, beside each other: the same random Llama, cores, relay and prompts.

    python -m benchmarks.llm_peers --llama-cpp DIR --distributed-llama DIR --petals PYTHON --prima DIR [--json FILE]

Runs those that it is given; builds and downloads nothing. Each runs whole in one process on one core, and over two machines
(two processes on two cores, one thread each) on plain loopback and behind the same relay at each link of LINKS. Rounds are
interleaved; engines that are not at turn are stopped. Per engine and precision, medians:

    ms per token, and network-added ms per token: split minus the same engine whole;
    seconds to the first token of a 512-token prompt;
    bytes per token, both ways, counted at the relay while tokens are made;
    what the client sees when the second machine is killed (kill -9) in mid-answer.

The figures are ours over the best of the others; null where there is none to compare. Requests enter as a user's do (HTTP
streaming, or the engine's own client), so an engine's server counts too. distributed-llama cuts every layer across both
machines, so its two cores compute at once; the others take turns.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import llm_distributed_llama_file, llm_gguf, llm_weights, report
from benchmarks.llm_shards import SHAPE
from benchmarks.peers.distributed_llama import DistributedLlama
from benchmarks.peers.ecotone_peer import Ecotone
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.peer import Arrangement, Files, Peer, PeerError, Running
from benchmarks.peers.petals import Petals
from benchmarks.peers.prima import Prima

SHORT, LONG, TOKENS, KILL_AFTER = 64, 512, 24, 8
KILL_TOKENS, HANG_S, ONCE_S = 200, 30.0, 20.0  # what takes longer than ONCE_S is measured once
LINKS = {"10 ms, 100 Mbit/s": (0.005, 100e6 / 8)}  # round trip
UNSHAPED = "loopback"
HEADS = {"f32": "f32", "4": "8", "8": "8"}  # of GGUF: 4.72 bits in all, as native:int4 with its head of 8


@dataclass(slots=True)
class Contender:
    """One engine at one precision, and what was measured of it by arrangement: "whole", "loopback" or a link."""

    peer: Peer
    precision: str
    started: dict[str, Running] = field(default_factory=dict)  # whole, direct, relayed
    token_s: dict[str, list[float]] = field(default_factory=dict)
    first_s: dict[str, list[float]] = field(default_factory=dict)
    bytes_per_token: list[float] = field(default_factory=list)
    bytes_of_prompt: list[float] = field(default_factory=list)
    failed: str | None = None
    killed: dict[str, Any] | None = None
    tokens: list[int] | None = None

    @property
    def key(self) -> str:
        return f"{self.peer.name}, {self.precision}"


@dataclass(slots=True)
class Stamps:
    """When tokens came, from the moment of asking, which is now, and what the relays had counted by then."""

    running: Running
    asked_s: float = field(default_factory=time.perf_counter)
    seconds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    before: int = 0

    def __post_init__(self) -> None:
        self.before = self.counted()

    def __call__(self) -> None:
        self.seconds.append(time.perf_counter())
        self.counts.append(self.counted())

    def counted(self) -> int:
        return sum(relay.counted() for relay in self.running.relays)

    @property
    def first_s(self) -> float:
        return self.seconds[0] - self.asked_s

    @property
    def gap_s(self) -> float:
        """Mean seconds from one token to the next: a median would be taken in by servers that hand out several at a time."""
        return (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)


def prompt_of(length: int, index: int) -> list[int]:
    """Random token ids, other ones for each round; none is special to any engine."""
    generator = torch.Generator().manual_seed(1000 * length + index)
    return [int(token) for token in torch.randint(300, SHAPE.vocabulary - 2, (length,), generator=generator)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the table; returns 0."""
    options = parsed(argv)
    torch.set_num_threads(1)
    peers = everyone(options)
    absent = {peer.name: reason for peer in peers if (reason := peer.missing()) is not None}
    for name, reason in absent.items():
        print(f"{name}: left out: {reason}")
    rounds, prompts = (1, (SHORT,)) if options.quick else (options.rounds, (SHORT, LONG))
    with tempfile.TemporaryDirectory(prefix="llm-peers") as folder:
        files = written(Path(folder), options.seed, options.precisions)
        contenders = []
        for precision in options.precisions:
            group = [Contender(p, precision) for p in peers if p.name not in absent and precision in p.precisions]
            measure(group, files, rounds, prompts)
            contenders += group
    cases = {contender.key: as_case(contender) for contender in contenders}
    agreement(cases)
    print(table(cases))
    about = report.context(
        options.seed, threads_per_machine=1, left_out=absent,
        links={name: {"delay_s": delay_s, "bytes_per_s": rate} for name, (delay_s, rate) in LINKS.items()},
        shape="Llama, 12 layers of 1024, 16 heads, 8 key-value heads, FFN 2816, vocabulary 8192", rounds=rounds,
    )  # fmt: skip
    report.finish(options.json, figures(cases), cases, about)
    return 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write figures, cases and context to FILE")
    parser.add_argument("--quick", action="store_true", help="one round, short prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", choices=("f32", "4", "8"), default=["f32", "4"])
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="DIR", help="has llama-server and ggml-rpc-server, or bin/ with them"
    )
    parser.add_argument("--distributed-llama", type=Path, metavar="DIR", help="has dllama and dllama-api")
    parser.add_argument("--petals", type=Path, metavar="PYTHON", help="a Python that has petals installed")
    parser.add_argument("--prima", type=Path, metavar="DIR", help="has llama-cli of prima.cpp")
    return parser.parse_args(argv)


def everyone(options: argparse.Namespace) -> list[Peer]:
    """Every engine, present or not."""
    return [
        Ecotone(), LlamaCpp(options.llama_cpp), LlamaCpp(options.llama_cpp, servers=2),
        DistributedLlama(options.distributed_llama), Petals(options.petals), Prima(options.prima),
    ]  # fmt: skip


def written(folder: Path, seed: int, precisions: Sequence[str]) -> Files:
    """The model in every format."""
    llm_weights.write_folder(folder / "hf", SHAPE, seed)
    gguf, dllama = {}, {}
    for precision in precisions:
        gguf[precision] = folder / f"{precision}.gguf"
        llm_gguf.write(gguf[precision], SHAPE, seed, precision, HEADS[precision])
        if precision in llm_distributed_llama_file.WEIGHT_TYPES:
            dllama[precision] = folder / f"{precision}.m"
            llm_distributed_llama_file.write_model(dllama[precision], SHAPE, seed, precision)
    tokenizer = folder / "tokenizer.t"
    llm_distributed_llama_file.write_tokenizer(tokenizer, SHAPE.vocabulary)
    return Files(folder=folder / "hf", gguf=gguf, dllama=dllama, dllama_tokenizer=tokenizer)


def measure(group: list[Contender], files: Files, rounds: int, prompts: Sequence[int]) -> None:
    """All contenders of one precision, interleaved, then the kill of each."""
    try:
        for contender in group:
            start(contender, files)
        for index in range(-1, rounds):  # round -1 warms up
            for contender in (c for c in group if c.failed is None):
                try:
                    one_round(contender, index, prompts)
                except PeerError as error:
                    contender.failed = f"round {index}: {error}"
                    print(f"{contender.key}: {contender.failed}", flush=True)
        for contender in group:
            if "direct" in contender.started and contender.failed is None:
                contender.killed = kill(contender.started["direct"])
                print(f"{contender.key}: kill -9: {contender.killed['outcome']}", flush=True)
    finally:
        for contender in group:
            for running in contender.started.values():
                running.close()


def start(contender: Contender, files: Files) -> None:
    """Start all three arrangements of a contender, paused."""
    kinds = {"whole": (1, False), "direct": (2, False), "relayed": (2, True)}
    try:
        for name, (machines, relay) in kinds.items():
            arrangement = Arrangement(precision=contender.precision, machines=machines, relay=relay)
            contender.started[name] = contender.peer.start(files, arrangement)
            contender.started[name].pause()
    except PeerError as error:
        contender.failed = f"start: {error}"
        print(f"{contender.key}: {contender.failed}", flush=True)


def one_round(contender: Contender, index: int, prompts: Sequence[int]) -> None:
    """One answer to each prompt in each arrangement; round -1 is not written down."""
    cells = [("whole", "whole", None), (UNSHAPED, "direct", None), *((link, "relayed", link) for link in LINKS)]
    for cell, name, link in cells:
        running = contender.started[name]
        for relay in running.relays:
            relay.shape(*LINKS[link] if link else (0.0, None))
        running.resume()
        try:
            for length in prompts:
                tried_s = contender.first_s.get(cell, [0.0])[-1] if length == LONG else 0.0
                if tried_s > ONCE_S or (length == LONG and cell in LINKS and index < 0):
                    continue
                stamps = answer(contender, running, index, length)
                if index >= 0:
                    note(contender, cell, length, stamps)
        finally:
            running.pause()
    if index >= 0:
        print(
            f"{contender.key}: round {index}: "
            + ", ".join(f"{c} {1e3 * contender.token_s[c][-1]:.1f} ms" for c, _, _ in cells),
            flush=True,
        )


def answer(contender: Contender, running: Running, index: int, length: int) -> Stamps:
    """One answer: TOKENS behind the short prompt, the first ones behind the long."""
    stamps = Stamps(running)
    made = running.generate(prompt_of(length, index), TOKENS if length == SHORT else 2, stamps)
    if index == 0 and length == SHORT and contender.tokens is None:
        contender.tokens = made
    return stamps


def note(contender: Contender, cell: str, length: int, stamps: Stamps) -> None:
    """Write an answer's figures down: time per token of the short prompt, time to the first token of the long one."""
    if length == LONG:
        contender.first_s.setdefault(cell, []).append(stamps.first_s)
    else:
        contender.token_s.setdefault(cell, []).append(stamps.gap_s)
    if cell in LINKS and length == SHORT:
        contender.bytes_per_token.append((stamps.counts[-1] - stamps.counts[0]) / (len(stamps.counts) - 1))
    if cell in LINKS and length == LONG:
        contender.bytes_of_prompt.append(stamps.counts[0] - stamps.before)


def kill(running: Running) -> dict[str, Any]:
    """Kill the second machine after KILL_AFTER tokens; what the client sees, and after how long."""
    running.resume()
    began_s: list[float] = []
    came_s: list[float] = []
    said: list[tuple[str, float]] = []

    def on_token() -> None:
        came_s.append(time.perf_counter())
        if len(came_s) == KILL_AFTER and running.worker is not None:
            began_s.append(time.perf_counter())
            running.worker.kill()

    def ask() -> None:
        try:
            running.generate(list(range(300, 300 + SHORT)), KILL_TOKENS, on_token)
            said.append(("", time.perf_counter()))
        except PeerError as error:
            said.append((str(error), error.seen_s))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HANG_S)
    if not began_s:
        return {"outcome": f"could not be killed: {said}", "answered": False, "known_after_s": None, "pause_s": None}
    if not said:
        waited = f"hangs: the client is told nothing for {HANG_S:.0f} s"
        return {"outcome": waited, "answered": False, "known_after_s": None, "pause_s": None}
    words, seen_s = said[0]
    if words:
        known_after_s = seen_s - began_s[0]
        return {"outcome": f"request lost: {words}", "answered": False, "known_after_s": known_after_s, "pause_s": None}
    pause_s = max(later - earlier for earlier, later in zip(came_s[KILL_AFTER - 1 :], came_s[KILL_AFTER:], strict=False))
    outcome = f"answer goes on and is complete, after a pause of {pause_s:.1f} s"
    return {"outcome": outcome, "answered": True, "known_after_s": None, "pause_s": pause_s}


def as_case(contender: Contender) -> dict[str, Any]:
    """Medians of a contender, in the units that the table has."""
    token_ms = {cell: 1e3 * report.median(values) for cell, values in contender.token_s.items()}
    whole = token_ms.get("whole")
    return {
        "failed": contender.failed,
        "ms_per_token": token_ms,
        "network_added_ms_per_token": {c: ms - whole for c, ms in token_ms.items() if c != "whole"} if whole else {},
        "first_token_512_s": {cell: report.median(values) for cell, values in contender.first_s.items()},
        "bytes_per_token": report.median(contender.bytes_per_token) if contender.bytes_per_token else None,
        "bytes_of_512_token_prompt": report.median(contender.bytes_of_prompt) if contender.bytes_of_prompt else None,
        "kill_9": contender.killed,
        "greedy_tokens": contender.tokens,
        "rounds_ms_per_token": {cell: [1e3 * v for v in values] for cell, values in contender.token_s.items()},
    }  # fmt: skip


def figures(cases: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Ours over the best of the others, the worst of the precisions: 1 or less is at least as good. None: nobody to compare.

    Network-added times and first tokens are those behind the relay.
    """
    link = next(iter(LINKS))

    def over_best(value: Callable[[dict[str, Any]], float | None]) -> float | None:
        ratios = []
        for precision in {key.rsplit(", ", 1)[1] for key in cases}:
            found = {key: value(case) for key, case in cases.items() if key.endswith(f", {precision}")}
            ours = found.pop(f"{Ecotone.NAME}, {precision}", None)
            theirs = [number for number in found.values() if number is not None]
            if ours is not None and theirs:
                ratios.append(ours / min(theirs))
        return max(ratios, default=None)

    lost = [bool(c["kill_9"]) and not c["kill_9"]["answered"] for k, c in cases.items() if k.startswith(f"{Ecotone.NAME}, ")]
    return {
        "network_added_over_best_peer": over_best(lambda case: case["network_added_ms_per_token"].get(link)),
        "ms_per_token_over_best_peer": over_best(lambda case: case["ms_per_token"].get(link)),
        "first_token_over_best_peer": over_best(lambda case: case["first_token_512_s"].get(link)),
        "bytes_per_token_over_best_peer": over_best(lambda case: case["bytes_per_token"]),
        "requests_lost_on_kill": float(sum(lost)),
    }


def agreement(cases: dict[str, dict[str, Any]]) -> None:
    """Write into each case how many first greedy tokens equal ours at that precision; None where ids are not told."""
    for key, case in cases.items():
        ours = (cases.get(f"{Ecotone.NAME}, {key.rsplit(', ', 1)[1]}") or {}).get("greedy_tokens")
        case["first_tokens_like_ours"] = None
        if ours and case["greedy_tokens"]:
            pairs = zip(ours, case["greedy_tokens"], strict=False)
            case["first_tokens_like_ours"] = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def table(cases: dict[str, dict[str, Any]]) -> str:
    """The one table, as Markdown."""
    cells = [UNSHAPED, *LINKS]
    head = ["engine", "ms/token whole", *(f"ms/token {c}" for c in cells), *(f"network-added {c}" for c in cells)]
    head += ["first token 512 whole, s", *(f"first token 512 {c}, s" for c in cells), "bytes/token", "kill -9 of one worker"]
    rows = [head, ["---"] * len(head)]
    for key, case in cases.items():
        if not case["ms_per_token"]:
            rows.append([key, f"failed: {case['failed']}", *[""] * (len(head) - 2)])
            continue
        numbers = [
            *(case["ms_per_token"].get(c) for c in ("whole", *cells)),
            *(case["network_added_ms_per_token"].get(c) for c in cells),
            *(case["first_token_512_s"].get(c) for c in ("whole", *cells)),
        ]  # fmt: skip
        numbers.append(case["bytes_per_token"])
        kill9 = case["kill_9"] or {"outcome": case["failed"] or "", "known_after_s": None}
        after = "" if kill9["known_after_s"] is None else f" (known after {kill9['known_after_s']:.2f} s)"
        rows.append([key, *("" if n is None else f"{n:.4g}" for n in numbers), kill9["outcome"] + after])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
