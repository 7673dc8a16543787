"""`ecotone run` and `ecotone serve`: answers for files and streams, and answers for whoever asks over HTTP."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
import uvicorn
from rich.markup import escape

from ecotone.cli import options
from ecotone.cli.asked import check_asked
from ecotone.cli.console import err, out, progress_bar
from ecotone.cli.resident import Asked, adapting, expected_s, resident_plans, shadowing
from ecotone.cli.tables import listing, seconds
from ecotone.cli.workflow import Work, load_work, open_nodes, read_file
from ecotone.planset import PlanSet
from ecotone.runtime import Future, Nodes, Session, deploy
from ecotone.serving.http import Service, application
from ecotone.serving.live import Live
from ecotone.serving.results import Answer, json_line, save, summary
from ecotone.serving.sources import Item, Source, Take, open_source
from ecotone.units import EcotoneError, parse_quantity

__all__ = ["run", "serve"]

TABLE_ROWS = 40
KEPT_RESULTS = 10_000
SHADOW_S = 10.0  # how long the end waits for what the shadow has still to compare
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(slots=True)
class _Pending:
    item: Item
    future: Future
    start_s: float


def run(
    model: options.Model,
    source: Annotated[
        str, typer.Argument(help="A file, a directory, a video, camera:0, rtsp://..., or - for standard input.")
    ],
    cluster: options.ClusterFile = None,
    plan_file: options.PlanFile = None,
    profile_file: options.ProfileFile = None,
    objective: options.Objective = "latency",
    require: options.Require = None,
    survive: options.Survive = "",
    adapt: options.Adapt = False,
    policy: options.PolicyFile = None,
    shadow: options.Shadow = 0.0,
    weight: options.Weight = 1.0,
    out_file: Annotated[
        Path | None, options.option("--out", "-o", text="Write results to FILE.npz, .jsonl or .txt.")
    ] = None,
    take: options.Take = "auto",
    in_flight: Annotated[
        int, typer.Option(rich_help_panel=options.RUNNING, help="Requests under way at once.", min=1, max=256)
    ] = 4,
    limit: Annotated[int, typer.Option(help="Stop after so many inputs; 0: all.", min=0)] = 0,
    exits: options.Exits = "",
    bottleneck: options.Bottlenecks = None,
    input_shape: options.InputShape = "",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON line per result.")] = False,
) -> None:
    """Run a model on files or a stream, over the cluster, and print or save the answers in order.

    ecotone run ecotone.cli.demo_model:bundled frames/ --cluster home.toml --out answers.npz
    """
    if out_file and out_file.suffix.lower() not in (".npz", ".jsonl", ".json", ".txt"):
        raise EcotoneError(f"output {out_file}: suffix {out_file.suffix or 'none'} is not known; .npz, .jsonl and .txt are")
    asked = Asked.of(objective, require, plan_file, survive, adapt, profile_file, shadow, policy=policy)
    items = open_source(source, _take(take))
    work = load_work(model, cluster, input_shape=input_shape, exits=exits, bottlenecks=bottleneck, quiet=json_output)
    check_asked(objective, require or (), work.cluster)
    with open_nodes(work, () if plan_file else None) as nodes:
        plans, profile = resident_plans(work, nodes, asked)
        expected = expected_s(work, plans, profile)
        with (
            _deploy(work, plans, nodes, expected_s=expected, weight=weight) as session,
            adapting(work, session, profile, asked),
            shadowing(work, session, profile, asked) as compared,
        ):
            for plan in () if json_output else plans.plans:
                err.print(f"[dim]{escape(str(plan))}", soft_wrap=True)
            answers = _answers(work, session, items, in_flight, limit)
            kept = _show(work, answers, items, limit, json_output, keep=out_file is not None)
            for line in compared.summary(SHADOW_S) if compared else ():
                err.print(line, soft_wrap=True, highlight=False, markup=False)
    if out_file:
        save(out_file, kept, work.preparation.labels)
        err.print(f"[dim]wrote {len(kept)} results to {out_file}")


def _deploy(work: Work, plans: PlanSet, nodes: Nodes, **more: Any) -> Session:
    """Put `plans` in force with all that the command line gave."""
    return deploy(plans, work.captured, nodes, image=work.preparation.image, bottlenecks=work.bottlenecks, **more)


def _take(text: str) -> Take:
    if text in ("auto", "newest", "all"):
        return cast(Take, text)
    raise EcotoneError(f"--take {text!r} is not known; auto, newest and all are")


def _answers(work: Work, session: Session, items: Source, in_flight: int, limit: int) -> Iterator[Answer]:
    """Results in the order of the items, at most `in_flight` under way."""
    waiting: collections.deque[_Pending] = collections.deque()
    try:
        for number, item in enumerate(items):
            if limit and number >= limit:
                break
            while len(waiting) >= in_flight:
                yield _finish(work, waiting.popleft())
            call = work.preparation.prepare(item)
            waiting.append(_Pending(item, session.submit(call.args, call.kwargs), time.perf_counter()))
            while waiting and waiting[0].future.done():
                yield _finish(work, waiting.popleft())
        while waiting:
            yield _finish(work, waiting.popleft())
    finally:
        for pending in waiting:
            session.cancel(pending.future)


def _finish(work: Work, pending: _Pending) -> Answer:
    outputs = work.preparation.outputs(pending.future.result())
    took_s = time.perf_counter() - pending.start_s
    return Answer(item=pending.item.name, outputs=outputs, latency_s=took_s, exit=pending.future.exit)


def _show(work: Work, answers: Iterator[Answer], items: Source, limit: int, json_output: bool, keep: bool) -> list[Answer]:
    """Print answers as they come (JSON) or as a table at the end; returns those that a file wants."""
    kept: list[Answer] = []
    rows: list[tuple[str, str, str]] = []
    latencies: list[float] = []
    left: collections.Counter[str] = collections.Counter()
    total = min(limit, items.length) if limit and items.length else (limit or items.length or 0)
    start = time.perf_counter()
    quiet = json_output or not sys.stderr.isatty()
    with progress_bar("running", quiet=quiet) as report:
        for number, answer in enumerate(answers):
            latencies.append(answer.latency_s)
            left[answer.exit] += 1
            report(number + 1, total or number + 1, answer.item)
            if json_output:
                sys.stdout.write(json_line(answer, work.preparation.labels) + "\n")
                sys.stdout.flush()
            elif len(rows) < TABLE_ROWS:
                rows.append((answer.item, summary(answer, work.preparation.labels), seconds(answer.latency_s)))
            if keep:
                kept.append(answer)
    if not json_output:
        _print_table(rows, latencies, time.perf_counter() - start, items.dropped)
        if len(left) > 1 or "" not in left:
            gone = ", ".join(f"{left[head.name]} at {head.name}" for head in work.captured.exits if left[head.name])
            out.print(f"left early: {gone or 'none'}; {left['']} went to the end", highlight=False)
    return kept


def _print_table(rows: list[tuple[str, str, str]], latencies: list[float], elapsed_s: float, dropped: int) -> None:
    table = listing("input", "answer", "latency")
    for row in rows:
        table.add_row(*(escape(text) for text in row))
    out.print(table)
    if len(latencies) > len(rows):
        out.print(f"[dim]... and {len(latencies) - len(rows)} more; --out FILE.npz keeps them all")
    if latencies:
        middle = sorted(latencies)[len(latencies) // 2]
        more = f", {dropped} old frames dropped" if dropped else ""
        out.print(f"{len(latencies)} inputs, median {seconds(middle)}, {len(latencies) / elapsed_s:.3g} /s{more}")


def serve(
    model: options.Model,
    cluster: options.ClusterFile = None,
    plan_file: options.PlanFile = None,
    profile_file: options.ProfileFile = None,
    objective: options.Objective = "latency",
    require: options.Require = None,
    survive: options.Survive = "",
    adapt: options.Adapt = False,
    policy: options.PolicyFile = None,
    shadow: options.Shadow = 0.0,
    weight: options.Weight = 1.0,
    name: Annotated[
        str, options.option("--name", text="Name of the model in the URLs. Default: the callable's or file's.")
    ] = "",
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = "127.0.0.1:8000",
    token_file: Annotated[
        Path | None, options.option("--token-file", text="File with the bearer token that clients must send.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are answered 429.", min=1)] = 64,
    source: Annotated[
        str, options.option("--source", text="Also answer a camera:0, rtsp://..., video or - at /results.")
    ] = "",
    take: options.Take = "auto",
    journal: Annotated[
        Path | None, options.option("--journal", text="File that accepted requests with an id survive in; see below.")
    ] = None,
    keep: Annotated[str, typer.Option(help="With --journal: how long a result can be asked for again.")] = "1h",
    exits: options.Exits = "",
    bottleneck: options.Bottlenecks = None,
    input_shape: options.InputShape = "",
) -> None:
    """Serve a model over HTTP by the Open Inference Protocol v2, computed over the cluster.

    Health at /v2/health/ready, inference at POST /v2/models/NAME/infer, counters at /metrics, the plan at /status.
    Off loopback a token is required: --token-file, or the variable ECOTONE_TOKEN.

    With --journal the "id" of a request names it: accepted means written to the disk, a second request of that id gets the
    result of the first without running again, also after this server was killed and started anew on the same file.

      ecotone serve net.py:model --cluster home.toml --require latency=50ms
    """
    asked = Asked.of(objective, require, plan_file, survive, adapt, profile_file, shadow, policy=policy)
    host, port = options.host_and_port(listen)
    token = _token(token_file, host)
    stream = open_source(source, _take(take)) if source else None
    work = load_work(model, cluster, input_shape=input_shape, exits=exits, bottlenecks=bottleneck)
    check_asked(objective, require or (), work.cluster)
    keep_s = parse_quantity(keep, "s", "--keep")
    with open_nodes(work, () if plan_file else None) as nodes:
        plans, profile = resident_plans(work, nodes, asked)
        with (
            _deploy(work, plans, nodes, queue_limit=queue, journal=journal, weight=weight) as session,
            adapting(work, session, profile, asked),
            shadowing(work, session, profile, asked),
        ):
            live = Live(work.preparation, session, stream) if stream else None
            service = _service(work, session, name or _short_name(model), token, keep_s if journal else None)
            _serve(service, live, host, port)
    err.print("[dim]stopped; every accepted request was answered")


def _service(work: Work, session: Session, name: str, token: str, keep_s: float | None = None) -> Service:
    """The model as the HTTP application sees it; with a journal results are kept for `keep_s`."""

    def status() -> dict[str, object]:
        first, *rest = session.plans or (None,)
        return {
            "plan": str(first), "epoch": first.epoch if first else None, "standbys": [str(plan) for plan in rest],
            "cluster": work.cluster.name, "explanation": session.explanation(),
        }  # fmt: skip

    def infer_once(tensors: Sequence[torch.Tensor], deadline_s: float | None, request_id: str) -> Any:
        session.expire(KEPT_RESULTS, keep_s or 0.0)
        return work.preparation.submit(session, tensors, deadline_s, request_id)

    def cancel(future: concurrent.futures.Future[Any]) -> None:
        session.cancel(future.session_future)  # type: ignore[attr-defined]

    return Service(
        name=name,
        inputs=work.preparation.input_specs(),
        outputs=work.preparation.output_specs(),
        infer=lambda tensors, deadline_s: work.preparation.submit(session, tensors, deadline_s),
        infer_once=infer_once if keep_s is not None else None,
        ready=lambda: session.is_ready,
        cancel=cancel,
        status=status,
        token=token,
    )


def _serve(service: Service, live: Live | None, host: str, port: int) -> None:
    """Run the server until SIGINT or SIGTERM; uvicorn finishes open requests before it returns."""
    application_ = application(service, live.routes(service.token) if live else ())
    settings = uvicorn.Config(application_, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)
    server = uvicorn.Server(settings)

    def announce() -> None:
        while not server.started and not stopped.is_set():
            stopped.wait(0.05)
        if server.started:
            place = server.servers[0].sockets[0].getsockname()
            out.print(
                f"serving [bold]{service.name}[/] at http://{place[0]}:{place[1]}/v2/models/{service.name}", highlight=False
            )
            out.file.flush()

    # uvicorn raises the signal that stopped it once more when it has finished; the session must still drain after that.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    stopped = threading.Event()
    watcher = threading.Thread(target=announce, daemon=True)
    watcher.start()
    with contextlib.ExitStack() as closing:
        if live:
            closing.callback(live.close)
            live.start()
        try:
            asyncio.run(server.serve())
        except SystemExit:
            raise EcotoneError(
                f"{host}:{port} cannot be listened on; is something else there? choose another --listen"
            ) from None
        finally:
            stopped.set()


def _token(file: Path | None, host: str) -> str:
    token = read_file(file).decode("utf-8", "replace").strip() if file else os.environ.get("ECOTONE_TOKEN", "").strip()
    if file and not token:
        raise EcotoneError(f"{file}: is empty; write the token into it")
    if not token and host not in LOOPBACK and not host.startswith("127."):
        raise EcotoneError(f"listening on {host} needs a token: --token-file FILE, or the variable ECOTONE_TOKEN")
    return token


def _short_name(model: str) -> str:
    """ "package.module:tilenet" -> tilenet; "runs/resnet.pt2" -> resnet."""
    last = model.rpartition(":")[2] if ":" in model else Path(model).stem
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in last) or "model"
