"""`ecotone demo`: the main job from end to end on one computer, in a few minutes, with nothing to prepare.

Captures TileNet, starts the machines of a cluster file as processes with emulated speeds and links, profiles, plans, runs
the plan beside its baselines, slows every link down eightfold, plans again, and writes report.html, .png and .json.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ecotone.cli.console import Report, err, out, print_json, progress_bar
from ecotone.cli.demo_model import ASSETS, example_inputs, frame_paths, frames, read_frame, tile_accuracy, tilenet
from ecotone.cli.demo_run import choose, run_all, summed_up
from ecotone.cli.demo_words import conclusion, curve, headline
from ecotone.cluster import Cluster
from ecotone.codec import ImageSpec
from ecotone.model import Captured, capture
from ecotone.plan import Plan
from ecotone.profile import Profile
from ecotone.profiling import MeasureOptions, measure
from ecotone.runtime import Nodes, Session, deploy, launch
from ecotone.schema import write_aside
from ecotone.units import EcotoneError, format_quantity
from ecotone.web.drawing import milliseconds, size
from ecotone.web.picture import MissingLibrary, report_png
from ecotone.web.report import report_html
from ecotone.web.result import Act, Contender, Machine, Result, Wire

__all__ = ["demo"]

SLOWER, SEED, SAMPLES = 8.0, 0, 6
MAX_DISAGREEMENT = 0.05  # share of tiles that compression may name otherwise; accuracy itself is measured
REQUIRE = (f"accuracy_loss={100 * MAX_DISAGREEMENT:g}",)
CODECS = ("fp32", "int8", "int4", "int4+zstd", "int4c+zstd", "jpeg:90")
PIXELS = ImageSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def demo(
    cluster: Annotated[Path | None, typer.Option(help="Cluster file; the one shipped with Ecotone if left out.")] = None,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")] = Path("ecotone-demo"),
    frame_count: Annotated[int, typer.Option("--frames", min=2, max=40, help="Frames per contender and round.")] = 20,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Cut a network over three emulated machines, beside its baselines, and slow the links down.

    The machines are processes of this computer; their speeds and links are those of the cluster file. Takes some minutes.

      ecotone demo --out report
    """
    machines = Cluster.load(cluster or ASSETS / "demo.toml")
    if not machines.emulate:
        raise EcotoneError(f"cluster {machines.name}: the demo starts its machines itself; set emulate = true")
    seconds: dict[str, float] = {}
    with _phase(seconds, "capture", json_output):
        net, (pixels, labels) = tilenet(), frames(frame_count)
        captured = capture(net, example_inputs(), name="TileNet")
        reference = tile_accuracy(net, pixels, labels)
    with _phase(seconds, "start", json_output):
        nodes = launch(machines)
    with nodes:
        with _phase(seconds, "profile", True), progress_bar("profile", json_output) as report:
            profile = _profile(captured, machines, report)
        acts, plans = _play(captured, machines, nodes, profile, (pixels, labels), seconds, json_output)
    result = _result(captured, machines, profile, acts, conclusion(plans, acts, SLOWER), (reference, len(pixels)), seconds)
    _write(result, out_folder)
    if json_output:
        print_json(json.loads(result.to_json()))
    else:
        _print(result, out_folder)


@contextmanager
def _phase(seconds: dict[str, float], name: str, quiet: bool) -> Iterator[None]:
    """Time a phase under its name, with a spinner unless `quiet`."""
    began = time.perf_counter()
    if quiet:
        yield
    else:
        with err.status(name):
            yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


@contextmanager
def _calm_bar(title: str, quiet: bool) -> Iterator[Report]:
    """A progress bar that draws only when told to, between requests: drawing beside them would be measured, stretched."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, auto_refresh=False, disable=quiet) as progress:
        task, drawn_s = progress.add_task(title, total=None), 0.0

        def report(done: int, total: int, what: str = "") -> None:
            nonlocal drawn_s
            progress.update(task, completed=done, total=total)
            if time.monotonic() - drawn_s > 0.25 or done == total:
                progress.refresh()
                drawn_s = time.monotonic()

        yield report


def _profile(captured: Captured, cluster: Cluster, report: Report) -> Profile:
    """Measure, or take the file that an earlier run left for the same model, devices and versions."""
    options = MeasureOptions(codecs=CODECS, max_cuts=16, max_samples=SAMPLES, seed=SEED)
    samples = tuple((read_frame(path),) for path in frame_paths()[-SAMPLES:])
    return measure(captured, cluster, samples=samples, options=options, image=PIXELS, progress=report)


def _play(
    captured: Captured,
    cluster: Cluster,
    nodes: Nodes,
    profile: Profile,
    data: tuple[torch.Tensor, torch.Tensor],
    seconds: dict[str, float],
    quiet: bool,
) -> tuple[tuple[Act, ...], tuple[Plan, ...]]:
    """Both acts: the links as stated, then every one of them SLOWER times slower, planned again."""
    acts: list[Act] = []
    plans: list[Plan] = []
    session: Session | None = None
    try:
        for title, state in (
            ("With the links as they are", cluster),
            (f"With every link {SLOWER:g} times slower", cluster.scaled_links(1 / SLOWER)),
        ):
            with _phase(seconds, "plan", quiet):
                entries = choose(captured.graph, state, profile, REQUIRE, plans[0] if plans else None)
                points = curve(captured.graph, state, profile, MAX_DISAGREEMENT)
            for link in state.links:
                nodes.set_link(link)
            session = session or deploy(entries[-1].plan, captured, nodes, image=PIXELS)
            with _phase(seconds, "run", True), _calm_bar(title, quiet) as report:
                tallies = run_all(session, entries, *data, report)
            contenders = summed_up(captured.graph, entries, tallies)
            plans.append(entries[-1].plan)
            links = tuple(
                Wire(source=k.source, target=k.target, latency_s=k.latency_s, bandwidth_bytes_per_s=k.bandwidth_bytes_per_s)
                for k in state.links
            )
            words = headline(contenders, plans[-1])
            acts.append(Act(title=title, headline=words, links=links, contenders=contenders, curve=points))
    finally:
        if session is not None:
            session.close()
    return tuple(acts), tuple(plans)


def _result(
    captured: Captured,
    cluster: Cluster,
    profile: Profile,
    acts: tuple[Act, ...],
    words: str,
    reference: tuple[float, int],
    seconds: dict[str, float],
) -> Result:
    graph = captured.graph
    alone = [s for s in profile.segments if (s.start, s.stop) == (0, graph.num_blocks)]
    whole = {d.name: min((s.median_s for s in alone if s.device == d.name), default=0.0) for d in cluster.devices}
    asked = f"compression may change at most {MAX_DISAGREEMENT:.0%} of the decisions"
    context = {"asked": asked, "machine": profile.machine or platform.platform(), "seed": str(SEED)} | (
        profile.versions or {}
    )
    return Result(
        network=graph.name,
        num_blocks=graph.num_blocks,
        flop=graph.segment_flop(0, graph.num_blocks),
        parameter_bytes=graph.segment_parameter_bytes(0, graph.num_blocks),
        block_names=tuple(block.name for block in graph.blocks),
        machines=tuple(
            Machine(name=d.name, tier=d.tier, slowdown=d.slowdown, whole_network_s=whole[d.name]) for d in cluster.devices
        ),
        source=cluster.source,
        sink=cluster.sink,
        emulated=cluster.emulate,
        reference_accuracy=reference[0],
        num_frames=reference[1],
        acts=acts,
        conclusion=words,
        seconds=seconds,
        context=context,
    )


def _write(result: Result, folder: Path) -> None:
    """report.json and report.html always; report.png where matplotlib is there."""
    write_aside(folder / "report.json", result.to_json() + "\n")
    write_aside(folder / "report.html", report_html(result))
    try:
        write_aside(folder / "report.png", report_png(result))
    except MissingLibrary as error:
        err.print(f"[yellow]no PNG: {error}[/]")


def _print(result: Result, folder: Path) -> None:
    for act in result.acts:
        out.print(f"\n[bold]{act.title}[/]")
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("", no_wrap=True)
        for name in ("latency", "95 %", "frames/s", "sent", "right", "energy*", "predicted"):
            table.add_column(name, justify="right", no_wrap=True)
        for c in act.contenders:
            style = "bold green" if c.kind == "ecotone" else ""
            table.add_row(c.name, *_cells(c), style=style)
        out.print(table)
        for c in act.contenders:
            if c.same_as:
                out.print(f"[dim]{c.name}: the same plan as {c.same_as}, measured once[/]", soft_wrap=True)
        out.print(f"[dim]Ecotone's plan: {act.contenders[-1].words}[/]", soft_wrap=True, highlight=False)
    out.print(f"\n{result.conclusion}", soft_wrap=True)
    if result.emulated:
        out.print("[dim]Speeds and links were emulated in user space; latencies were measured. *Energy was modelled.[/]")
    out.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


def _cells(contender: Contender) -> tuple[str, ...]:
    return (
        milliseconds(contender.latency_median_s),
        milliseconds(contender.latency_p95_s),
        f"{contender.throughput_per_s:.3g}",
        size(contender.bytes_per_frame),
        f"{contender.accuracy:.1%}",
        format_quantity(float(f"{contender.energy_joule:.3g}"), "joule"),
        milliseconds(contender.predicted_latency_s),
    )
