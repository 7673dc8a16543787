"""`ecotone up` and `ecotone status`: make this machine a node, invite others, and see who is there."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.markup import escape

from ecotone.cli import options
from ecotone.cli.console import err, out, print_json
from ecotone.cli.tables import listing
from ecotone.cluster import Cluster, Device, DeviceId
from ecotone.executors.cache import cache_root
from ecotone.llm.service import GenerationService
from ecotone.protocol.message import NodeId
from ecotone.protocol.settings import WorkerSettings
from ecotone.runtime import NodeUnreachable, attach
from ecotone.runtime.node import EXPLAIN, NodeSettings, run_node
from ecotone.runtime.port import GUEST
from ecotone.runtime.questions import QuestionError
from ecotone.trust.identity import Authority, Identity, TrustError
from ecotone.trust.join import Enrolment, join
from ecotone.units import EcotoneError, parse_quantity
from ecotone.wire.wire import WireError
from ecotone.wire.zenoh import lan_address

__all__ = ["status", "up"]

PORT, JOIN_PORT = 7447, 7448
CODE_TTL_S = 3600.0


@dataclass(frozen=True, slots=True)
class _Membership:
    """Who this machine is, and the authority where it founded the cluster."""

    cluster: str
    identity: Identity | None
    authority: Authority | None


def up(
    name: Annotated[str, options.option("--name", text="Name of this device. Default: the host's name.")] = "",
    cluster: options.ClusterFile = None,
    network: Annotated[str, typer.Option(help="Name of the cluster to found with --invite, or to be a member of.")] = "",
    join_code: Annotated[str, options.option("--join", text="Become a member by this one-time code.")] = "",
    invite: Annotated[int, typer.Option(help="Print this many one-time codes for other machines.")] = 0,
    listen: Annotated[
        str, options.option("--listen", text="HOST:PORT of this machine. Default: loopback until joined.")
    ] = "",
    connect: Annotated[list[str] | None, options.option("--connect", text="HOST:PORT of another node, repeatable.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Go on trying where no node answers at --connect yet.")] = False,
    threads: Annotated[int, typer.Option(help="Threads for computing.")] = 1,
    accelerator: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")] = "cpu",
    store: Annotated[str, typer.Option(help="Disk for weights of others' models.")] = "8 GB",
    max_sessions: Annotated[int, typer.Option(help="Askers served at one time; 0: any number.", min=0)] = 0,
    max_load: Annotated[
        float,
        typer.Option(help="Share of the processor that askers may be promised together, such as 0.9; 0: any.", min=0.0),
    ] = 0.0,
) -> None:
    """Make this machine a node, until Ctrl-C.

    Alone it serves only this computer (loopback). To bring machines together, on the first one:

      ecotone up --network home --invite 2

    and on each other one, with a code that the first has printed:

      ecotone up --join eco1-...

    From then on every link uses mutual TLS; a code is good once and for one hour.
    """
    device = _device(name, cluster, threads, accelerator)
    member = _membership(device.name, network, join_code, invite, listen)
    host = listen or f"{_address(member)}:{PORT}"
    settings = NodeSettings(
        device=device,
        folder=cache_root() / "nodes" / device.name,
        cluster=member.cluster,
        listen=(host,),
        connect=tuple(connect or ()) or (member.identity.endpoints if member.identity else ()),
        insist=not retry,
        cap_bytes=round(parse_quantity(store, "bytes", "--store")),
        identity=member.identity,
        multicast=member.identity is not None and not _is_loopback(host),
        worker=WorkerSettings(max_sessions=max_sessions, max_load=max_load),
    )
    with contextlib.ExitStack() as services:
        run_node(
            settings, lambda endpoints: _announce(settings, member, endpoints, invite, services), (GenerationService,)
        )  # fmt: skip
    err.print("[dim]left in order")


def _device(name: str, cluster: Path | None, threads: int, accelerator: str) -> Device:
    """The device of the cluster file, where one is given, else this machine as it is."""
    chosen = name or socket.gethostname().split(".")[0]
    if cluster:
        device = Cluster.load(cluster).device(chosen)
        return replace(device, slowdown=1.0)
    memory = psutil.virtual_memory().total
    return Device(name=DeviceId(chosen), memory_bytes=memory, threads=threads, accelerator=accelerator)


def _membership(node: str, network: str, join_code: str, invite: int, listen: str) -> _Membership:
    """Join, found or recall a cluster; an open node on loopback where nothing is asked."""
    if join_code and invite:
        raise EcotoneError("--join and --invite exclude each other: the founder invites, a new machine joins")
    if join_code:
        host = listen.rpartition(":")[0] or lan_address()
        identity = join(join_code, node, addresses=[host] if host else [])
        err.print(f'joined "{identity.cluster}" as {identity.node}; next time:  ecotone up --network {identity.cluster}')
        return _Membership(identity.cluster, identity, None)
    if not network:
        if invite:
            raise EcotoneError("--invite needs the name of the cluster: ecotone up --network home --invite 1")
        return _Membership("local", None, None)
    authority = _authority(network, found=invite > 0)
    try:
        identity = Identity.load(network)
    except TrustError:
        if authority is None:
            raise
        host = listen.rpartition(":")[0] or lan_address()
        identity = authority.issue(node, addresses=[host] if host else [])
    if invite and authority is None:
        raise EcotoneError(f'this machine did not found "{network}"; make codes on the one that did')
    return _Membership(network, identity, authority)


def _authority(network: str, found: bool) -> Authority | None:
    """The cluster's authority where this machine founded it, or shall found it now."""
    with contextlib.suppress(TrustError):
        return Authority.load(network)
    with contextlib.suppress(TrustError):
        Identity.load(network)
        return None
    if not found:
        return None
    authority = Authority.create(network)
    err.print(f'founded cluster "{network}"; its key is in {authority.folder}')
    return authority


def _address(member: _Membership) -> str:
    return (lan_address() or "127.0.0.1") if member.identity else "127.0.0.1"


def _is_loopback(endpoint: str) -> bool:
    return endpoint.rpartition("/")[2].startswith(("127.", "localhost", "[::1]"))


def _announce(
    settings: NodeSettings, member: _Membership, endpoints: tuple[str, ...], invite: int, services: contextlib.ExitStack
) -> None:
    """Say where the node is, who may use it, and show the invitations."""
    who = f'members of "{member.cluster}"' if member.identity else "programs of this computer only"
    out.print(f"node [bold]{settings.device.name}[/] is up at {', '.join(endpoints)} for {who}", highlight=False)
    if invite and member.authority:
        host = settings.listen[0].rpartition("/")[2].rpartition(":")[0]
        service = Enrolment(member.authority, host=host, port=_free_port(host, JOIN_PORT), endpoints=endpoints)
        services.enter_context(service)
        for _ in range(invite):
            out.print(f"  ecotone up --join {service.code(ttl_s=CODE_TTL_S)}", highlight=False, soft_wrap=True)
        out.print("[dim]each code is good once, within one hour, while this node is up")
    out.file.flush()


def _free_port(host: str, wanted: int) -> int:
    """`wanted` where it is free on `host`, else 0: the system's choice."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host.strip("[]"), wanted))
        except OSError:
            return 0
    return wanted


def status(
    cluster: options.ClusterFile = None,
    deadline: Annotated[str, typer.Option(help="How long to wait for each node.")] = "3s",
    explain: Annotated[
        bool, typer.Option("--explain", help="Also the plan in force, what it was chosen for, what happened lately.")
    ] = False,
    json_output: options.Json = False,
) -> None:
    """Say which nodes of a cluster answer, how fast, and with --explain what runs on them and why.

    ecotone status --cluster home.toml --explain
    """
    if cluster is None:
        raise EcotoneError("which cluster? give its file: ecotone status --cluster home.toml")
    deadline_s = parse_quantity(deadline, "s", "--deadline")
    if deadline_s <= 0:
        raise EcotoneError(f"--deadline {deadline}: must be above zero, for example 3s")
    machines = Cluster.load(cluster)
    if machines.emulate and not any(device.address for device in machines.devices):
        raise EcotoneError(f"{cluster}: an emulated cluster has nodes only while a command runs it")
    rows = [_ask(machines, device, deadline_s) for device in machines.devices]
    told = _explanations(machines, deadline_s) if explain else {}
    if json_output:
        print_json({"nodes": rows, "explanation": told} if explain else rows)
    else:
        table = listing("device", "state", "round trip", "threads", "accelerator", "address")
        for row in rows:
            mark = {"up": "[green]up[/]", "here": "[green]here[/]"}.get(str(row["state"]), "[red]down[/]")
            trip = f"{float(str(row['round_trip_s'])) * 1e3:.2f} ms" if row.get("round_trip_s") is not None else "-"
            table.add_row(str(row["device"]), mark, trip, str(row["threads"]), str(row["accelerator"]), str(row["address"]))
        out.print(table)
        for name, lines in told.items():
            out.print(f"\n[bold]{name}[/]", highlight=False)
            for line in lines:
                out.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    if any(row["state"] == "down" for row in rows):
        raise typer.Exit(1)


def _explanations(machines: Cluster, deadline_s: float) -> dict[str, list[str]]:
    """What the asker says of its plans; where no asker is at work, what each node holds."""
    source = NodeId(machines.source)
    with attach(machines, deadline_s=deadline_s, guest=True, needed=()) as nodes:
        with contextlib.suppress(NodeUnreachable):
            nodes.port.wait_for(frozenset([source]), deadline_s)
            with contextlib.suppress(QuestionError):
                return {source: nodes.questions.ask(source, EXPLAIN, deadline_s=deadline_s)["lines"]}
        found: dict[str, list[str]] = {source: ["no asker is at work (ecotone run, ecotone serve)"]}
        for name in sorted(nodes.port.peers() - {source}):
            if not name.startswith(GUEST):
                with contextlib.suppress(NodeUnreachable, QuestionError):
                    lines = nodes.questions.ask(name, EXPLAIN, deadline_s=deadline_s)["lines"]
                    found[name] = lines or ["holds no plan"]
    return found


def _ask(machines: Cluster, device: Device, deadline_s: float) -> dict[str, object]:
    """One row of the table; a node that does not answer is "down", with the reason."""
    row: dict[str, object] = {"device": device.name, "threads": device.threads, "accelerator": device.accelerator}
    row["address"] = device.address or "-"
    if device.name == machines.source:
        return row | {"state": "here", "round_trip_s": None}
    pair = Cluster(
        name=machines.name,
        devices=(machines.device(machines.source), device),
        links=(),
        source=machines.source,
        sink=machines.source,
        emulate=machines.emulate,
    )
    try:
        with attach(pair, deadline_s=deadline_s, guest=True) as nodes:
            told = nodes.questions.ask(NodeId(device.name), "device", deadline_s=deadline_s)
            _, trip = nodes.questions.ask_timed(NodeId(device.name), "echo", deadline_s=deadline_s)
    except (NodeUnreachable, WireError) as error:
        return row | {"state": "down", "round_trip_s": None, "reason": str(error)}
    return row | {"state": "up", "round_trip_s": trip, "threads": told["threads"], "accelerator": told["accelerator"]}
