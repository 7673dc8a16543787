"""`ecotone lab ...`: emulated machines on this computer from a cluster file, and what one does to machines: verbs.

The command line of ecotone.lab.Laboratory: it reads quantities, prints tables, and knows nothing of namespaces.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ecotone.cli import options
from ecotone.cli.console import err, out, print_json
from ecotone.cluster import Cluster
from ecotone.lab import LabError, Laboratory
from ecotone.lab.laboratory import remove_lab
from ecotone.lab.state import lab_folder, lab_names, load_state
from ecotone.linktrace import shipped_traces
from ecotone.runtime.node import stop_on_signals
from ecotone.units import EcotoneError, UnitError, format_quantity, parse_quantity

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Emulated machines on this computer, from the cluster file that drives simulator and real machines.

    Each device becomes a network namespace with real nodes inside; links get their rate, latency, jitter and loss, devices
    their share of CPU and their memory. Needs Linux and root; without it, processes imitate it: status says what differs.

      ecotone lab up home.toml --detach
      ecotone lab exec camera -- ecotone run net.py:model frames/      (in the source's place)
      ecotone lab kill edge1;  ecotone lab restart edge1
      ecotone lab cut camera cloud;  ecotone lab heal
      ecotone lab link camera edge1 --rate 1Mbit/s --latency 20ms
      ecotone lab trace camera edge1 lte_train
      ecotone lab down
    """,
)

Lab = Annotated[str, options.option("--lab", text="Name of the laboratory, where there are several.")]
Device = Annotated[str, typer.Argument(help="A device of the cluster file.", show_default=False)]
Source = Annotated[str, typer.Argument(help="Device that the link leaves.", show_default=False)]
Target = Annotated[str, typer.Argument(help="Device that the link reaches.", show_default=False)]
OneWay = Annotated[bool, typer.Option("--one-way", help="Only from the first to the second.")]


@app.command()
def up(
    cluster_file: Annotated[Path, typer.Argument(help="Cluster file (TOML).", show_default=False)],
    name: Annotated[str, options.option("--name", text="Name of the laboratory. Default: the cluster's.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Come back when it is up; ecotone lab down ends it.")] = False,
    fabric: Annotated[
        str, typer.Option(help="auto, relay (TUN), bridge (netem in the kernel) or user (processes, no root).")
    ] = "auto",
    here: Annotated[
        bool, typer.Option("--here", help="The source is this computer's own network, not a machine of its own.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Decides losses and jitter.")] = 0,
) -> None:
    """Build the machines and start a node on each but the source; until Ctrl-C, or detached.

    ecotone lab up home.toml
    """
    cluster = _with_traces_beside(Cluster.load(cluster_file), cluster_file)
    laboratory = Laboratory(cluster, name=name or cluster.name, here=here, fabric=fabric, seed=seed, detached=detach)
    stop = None if detach else stop_on_signals()
    with err.status("building the laboratory"):
        laboratory.up()
    try:
        _print_status(laboratory.status())
        out.print(
            f"[dim]in the source's place:  ecotone lab exec {cluster.source} -- ecotone run MODEL INPUTS", highlight=False
        )
        out.file.flush()
        if stop is not None:
            err.print("[dim]Ctrl-C ends it")
            supervisor = laboratory.state.supervisor
            while not stop.wait(0.2):
                if supervisor is None or not supervisor.is_alive:
                    raise LabError(f'laboratory "{laboratory.name}": its supervisor has ended, and its machines with it')
    finally:
        if not detach:
            laboratory.down()


@app.command()
def down(
    lab: Lab = "",
    everything: Annotated[bool, typer.Option("--all", help="Every laboratory of this user.")] = False,
) -> None:
    """End a laboratory and remove all that it made, also after its supervisor was killed."""
    names = lab_names()
    if not everything:
        known = f"there are {', '.join(names)}" if names else "there is none"
        if lab and lab not in names:
            raise LabError(f'laboratory "{lab}" is not up; {known}')
        if not lab and len(names) != 1:
            raise LabError(f"which laboratory? {known}; give --lab NAME or --all" if names else "no laboratory is up")
        names = (lab,) if lab else names
    for one in names:
        remove_lab(one)
        err.print(f'[dim]laboratory "{one}" is gone', highlight=False)


@app.command("list")
def list_labs(json_output: options.Json = False) -> None:
    """Name the laboratories of this user."""
    rows: list[dict[str, object]] = []
    for name in lab_names():
        try:
            state = load_state(lab_folder(name))
            rows.append({"name": name, "up": state.is_up, "fabric": state.fabric, "devices": len(state.machines)})
        except EcotoneError:
            rows.append({"name": name, "up": False, "fabric": "", "devices": 0})
    if json_output:
        print_json(rows)
        return
    for row in rows:
        state_word = "up" if row["up"] else "left behind: ecotone lab down --lab " + str(row["name"])
        out.print(f"{row['name']}: {row['devices']} devices, {row['fabric'] or 'not built'}, {state_word}", highlight=False)
    if not rows:
        out.print("none")


@app.command()
def status(lab: Lab = "", json_output: options.Json = False) -> None:
    """Show machines, links with their rates now, and what passed or was dropped."""
    found = Laboratory.found(lab).status()
    if json_output:
        print_json(found)
    else:
        _print_status(found)


@app.command()
def kill(device: Device, lab: Lab = "") -> None:
    """Kill the node of a device at once (kill -9)."""
    Laboratory.found(lab).kill(device)


@app.command()
def restart(device: Device, lab: Lab = "") -> None:
    """Start the node of a device again, and wait until it is up."""
    Laboratory.found(lab).restart(device)


@app.command()
def stop(device: Device, lab: Lab = "") -> None:
    """Freeze the node of a device (SIGSTOP): its connections stay, it says nothing."""
    Laboratory.found(lab).stop(device)


@app.command()
def cont(device: Device, lab: Lab = "") -> None:
    """Let a frozen node go on (SIGCONT)."""
    Laboratory.found(lab).cont(device)


@app.command()
def cut(
    source: Source,
    target: Annotated[str, typer.Argument(help="The other end; without it, every link of the device.")] = "",
    one_way: OneWay = False,
    lab: Lab = "",
) -> None:
    """Let nothing pass between two devices: packets are dropped, connections are not told."""
    Laboratory.found(lab).cut(source, target, one_way=one_way)


@app.command()
def heal(
    source: Annotated[str, typer.Argument(help="One end; without it, every cut of the laboratory.")] = "",
    target: Annotated[str, typer.Argument(help="The other end; without it, every link of the device.")] = "",
    one_way: OneWay = False,
    lab: Lab = "",
) -> None:
    """End cuts: all, those of one device, or one link's."""
    Laboratory.found(lab).heal(source, target, one_way=one_way)


@app.command()
def link(
    source: Source,
    target: Target,
    rate: Annotated[str, options.option("--rate", text='Such as 1Mbit/s; "0 bit/s" is an outage.')] = "",
    latency: Annotated[str, options.option("--latency", text="One way, such as 20ms.")] = "",
    jitter: Annotated[str, options.option("--jitter", text="Standard deviation of the latency, such as 3ms.")] = "",
    loss: Annotated[str, options.option("--loss", text="Share of packets, such as 0.01 or 1%.")] = "",
    one_way: OneWay = False,
    lab: Lab = "",
) -> None:
    """Change a link now; what is not given stays as it is.

    ecotone lab link camera edge1 --rate 1Mbit/s --latency 20ms
    """
    if not (rate or latency or jitter or loss):
        raise EcotoneError("what shall change? give --rate, --latency, --jitter or --loss")
    share = _share(loss) if loss else None
    rate_value = parse_quantity(rate, "bytes_per_s", "--rate") if rate else None
    latency_s = parse_quantity(latency, "s", "--latency") if latency else None
    jitter_s = parse_quantity(jitter, "s", "--jitter") if jitter else None
    Laboratory.found(lab).link(
        source, target, one_way=one_way, loss=share, bytes_per_s=rate_value, latency_s=latency_s, jitter_s=jitter_s
    )


@app.command()
def slow(
    device: Device,
    slowdown: Annotated[float, typer.Argument(help="4: a quarter of this computer's speed.", show_default=False)],
    lab: Lab = "",
) -> None:
    """Give a device so much less CPU, live."""
    Laboratory.found(lab).slow(device, slowdown)


@app.command()
def trace(
    source: Annotated[str, typer.Argument(help="Device that the link leaves; without it: name the shipped traces.")] = "",
    target: Annotated[str, typer.Argument(help="Device that the link reaches.")] = "",
    which: Annotated[str, typer.Argument(help="A shipped trace, or the path of a CSV file.", metavar="TRACE")] = "",
    at: Annotated[str, options.option("--from", text="Begin at this time of the trace, such as 30s.")] = "",
    off: Annotated[bool, typer.Option("--off", help="Follow no trace any more; the link stays as it is now.")] = False,
    one_way: OneWay = False,
    lab: Lab = "",
) -> None:
    """Have a link follow a trace of rates, latencies and losses from now on.

    ecotone lab trace camera edge1 lte_train
    """
    if not source:
        out.print("shipped traces: " + ", ".join(shipped_traces()), highlight=False)
        return
    if not target or (not which and not off):
        raise EcotoneError("give both devices and a trace, or --off: ecotone lab trace camera edge1 lte_train")
    at_s = parse_quantity(at, "s", "--from") if at else 0.0
    Laboratory.found(lab).trace(source, target, None if off else which, at_s=at_s, one_way=one_way)


@app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(
    device: Device,
    command: Annotated[list[str], typer.Argument(help="The command, after --.", show_default=False)],
    lab: Lab = "",
) -> None:
    """Run a command inside a machine: its network, its share of CPU, a member of the cluster.

    ecotone lab exec camera -- ecotone run net.py:model frames/
    """
    laboratory = Laboratory.found(lab)
    words = laboratory.command_in(device, command[1:] if command[0] == "--" else command)
    variables = os.environ | laboratory.environment(device)
    sys.stdout.flush()
    os.execvpe(words[0], words, variables)


def _with_traces_beside(cluster: Cluster, file: Path) -> Cluster:
    """Paths of traces are meant from the cluster file's folder."""
    links = []
    for one in cluster.links:
        beside = file.parent / one.trace
        links.append(replace(one, trace=str(beside)) if one.trace and beside.is_file() else one)
    return replace(cluster, links=tuple(links))


def _share(text: str) -> float:
    """ "1%" or "0.01"."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise UnitError(f'--loss "{text}": write a share of packets below 1, such as 0.01 or 1%')
    return value


def _print_status(found: dict[str, Any]) -> None:
    fabric = {"relay": "namespaces and TUN relay", "bridge": "namespaces and bridge", "user": "processes, user space"}
    title = f'laboratory "{found["name"]}", up {_duration(found["up_s"])}: {fabric[found["fabric"]]}'
    out.print(f"[bold]{title}[/]" + (f", {found['subnet']}" if found["subnet"] else ""), highlight=False)
    out.print(
        _table(("device", "state", "address", "process", "memory", "slowdown"), [_machine(m) for m in found["machines"]])
    )
    columns = ("link", "state", "rate", "latency", "jitter", "loss", "trace", "packets", "bytes", "dropped")
    out.print(_table(columns, [_link_row(row) for row in found["links"]]))
    for remark in found["remarks"]:
        out.print(f"[yellow]differs:[/] {escape(remark)}", highlight=False, soft_wrap=True)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column == "link")
    for row in rows:
        table.add_row(*row)
    return table


def _machine(machine: dict[str, Any]) -> tuple[str, ...]:
    state = machine["state"]
    colour = "green" if state in ("up", "here", "for commands") else "yellow" if state in ("starting", "stopped") else "red"
    memory = format_quantity(machine["rss_bytes"], "bytes") if "rss_bytes" in machine else "-"
    slowdown = f"{machine['slowdown']:g}" if machine["slowdown"] != 1 else "-"
    process = str(machine["pid"] or "-")
    return (machine["device"], f"[{colour}]{escape(state)}[/]", machine["address"], process, memory, slowdown)


def _link_row(row: dict[str, Any]) -> tuple[str, ...]:
    state = "[red]cut[/]" if row["is_cut"] else "[yellow]outage[/]" if row["is_out"] else "[green]open[/]"
    counts = row["counters"]
    dropped = [f"{counts[key]} {word}" for key, word in _DROPS.items() if counts.get(key)]
    trace = f"{Path(row['trace']).name} at {row['trace_s']:.0f} s" if row["trace"] and row["trace_s"] is not None else "-"
    return (
        f"{row['source']} > {row['target']}", state, format_quantity(row["bytes_per_s"], "bytes_per_s"),
        format_quantity(row["latency_s"], "s"), format_quantity(row["jitter_s"], "s") if row["jitter_s"] else "-",
        f"{row['loss']:.2%}" if row["loss"] else "-", trace,
        str(counts["packets"]) if counts else "-",
        format_quantity(counts["bytes"], "bytes") if counts else "-",
        ", ".join(dropped) or "-",
    )  # fmt: skip


_DROPS = {"lost": "lost", "overflowed": "too many", "cut_off": "cut off"}


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds >= 60 else f"{seconds:.0f} s"
