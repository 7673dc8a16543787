"""`ecotone serve MODEL` where MODEL is a text encoder: planned and deployed like any module, served at /v1/embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from ecotone.cli import options
from ecotone.cli.asked import parse_objective
from ecotone.cli.console import err, progress_bar
from ecotone.cli.serving_llm import announce, server_options
from ecotone.cli.workflow import load_cluster, reach
from ecotone.llm.embedder import EncoderBackend
from ecotone.llm.encoders import TextEncoder
from ecotone.llm.weights import find_model
from ecotone.planner import solve
from ecotone.profiling import default_path, profile_key
from ecotone.runtime import deploy, measure
from ecotone.serving.openai.run import serve as serve_http
from ecotone.units import EcotoneError

__all__ = ["serve_encoder"]

_LENGTH = 256


def serve_encoder(
    model: options.Model,
    cluster: options.ClusterFile = None,
    objective: options.Objective = "latency",
    name: Annotated[str, options.option("--name", text="Name of the model for clients. Default: the directory's.")] = "",
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = "127.0.0.1:8000",
    token_file: Annotated[
        Path | None, options.option("--token-file", text="File with the keys that clients may send, a line each.")
    ] = None,
    context: options.Context = 0,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    per_minute: options.PerMinute = 0,
) -> None:
    """A text encoder (BERT and its kin) is served at /v1/embeddings; it is cut over the cluster like any model.

    ecotone serve ./all-MiniLM-L6-v2 --cluster home.toml
    """
    host, port = options.host_and_port(listen)
    http = server_options(host, token_file, tls_cert, tls_key, per_minute)
    folder = find_model(model)
    encoder = TextEncoder.open(folder)
    if context > encoder.max_tokens:
        raise EcotoneError(f"--context {context}: {folder.name} takes at most {encoder.max_tokens} tokens")
    length = context or min(encoder.max_tokens, _LENGTH)
    machines = load_cluster(cluster)
    with err.status(f"capturing {model}"):
        captured = encoder.capture(length)
    with reach(machines) as nodes:
        with progress_bar("profiling") as report:
            file = default_path(profile_key(captured.graph, machines))
            profile = measure(captured, nodes, path=file, progress=report)
        plan = solve(captured.graph, machines, profile, parse_objective(objective), ()).plan
        err.print(f"[dim]{escape(str(plan))}", soft_wrap=True)
        with deploy(plan, captured, nodes) as session:

            def infer(ids: torch.Tensor, mask: torch.Tensor) -> Any:
                return session(ids, mask)

            shown = name or folder.resolve().name
            backend = EncoderBackend(shown, encoder, {length: infer}, lambda: session.is_ready)
            serve_http(None, host, port, http, embedder=backend, on_start=lambda place: announce(shown, place))
    err.print("[dim]stopped")
