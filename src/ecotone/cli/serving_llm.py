"""`ecotone serve MODEL` where MODEL is a language model: measured, planned over the cluster, served as OpenAI's API is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ecotone.cli import options
from ecotone.cli.console import err, out, progress_bar
from ecotone.cli.language import LlmWork, load_llm, reached
from ecotone.cli.language_plans import Planned, Replanner, asked_of, plan_llm, show_plan
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import Drafter, PromptLookup
from ecotone.decoding.window import AdaptivePolicy
from ecotone.llm.answers import AnswerText
from ecotone.llm.backend import LlmBackend
from ecotone.llm.deploy import deploy_llm, settings_for
from ecotone.llm.drafters import Chain, layers_drafter, model_drafter
from ecotone.llm.executors import by_id
from ecotone.llm.generator import Generator
from ecotone.llm.grammar import Grammars
from ecotone.llm.service import GenerationService
from ecotone.llm.weights import Checkpoint, find_model
from ecotone.serving.openai.admission import load_keys
from ecotone.serving.openai.options import Options
from ecotone.serving.openai.run import serve as serve_http
from ecotone.units import EcotoneError

__all__ = ["announce", "serve_llm", "server_options"]

_DRAFTS_BY = "native:int8"


def serve_llm(
    model: options.Model,
    cluster: options.ClusterFile = None,
    plan_file: options.PlanFile = None,
    profile_file: options.ProfileFile = None,
    objective: options.Objective = "latency",
    name: Annotated[str, options.option("--name", text="Name of the model for clients. Default: the directory's.")] = "",
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = "127.0.0.1:8000",
    token_file: Annotated[
        Path | None, options.option("--token-file", text="File with the keys that clients may send, a line each.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are answered 429.", min=1)] = 64,
    context: options.Context = 0,
    slots: options.Slots = 8,
    precision: options.Precision = None,
    draft: options.Draft = "ngram",
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    per_minute: options.PerMinute = 0,
) -> None:
    """A language model (a Hugging Face directory or hub id of one) is served as OpenAI's API is, at /v1.

    No layer range is written by hand: each device is measured, and the plan says what runs where, in which precision. Lost
    machines are replaced while answers go on; machines that join are used. Any OpenAI client works, and `ecotone chat`.

      ecotone serve ./Llama-3.2-1B --cluster home.toml --precision int8
    """
    host, port = options.host_and_port(listen)
    http = server_options(host, token_file, tls_cert, tls_key, per_minute)
    work = load_llm(model, cluster, name)
    asked = asked_of(work, objective, context, slots, precision or ())
    drafter = _drafter(draft, work, asked.shape.context)
    with reached(work) as service:
        planned = plan_llm(work, service, asked, plan_file, profile_file)
        show_plan(planned)
        with _running(work, service, planned, drafter, queue) as generator:
            backend = _backend(work, generator)
            serve_http(backend, host, port, http, on_start=lambda address: _invite(work.name, address))
    err.print("[dim]stopped")


@contextlib.contextmanager
def _running(
    work: LlmWork, service: GenerationService, planned: Planned, drafter: Drafter | None, queue: int
) -> Iterator[Generator]:  # fmt: skip
    """The model deployed by the plan; where devices were measured, they are chosen anew when some are lost or come."""
    settings = replace(settings_for(planned.plan, work.cluster, work.ref.fingerprint), queue_limit=queue)
    if planned.chunk_tokens:
        settings = replace(settings, chunk_tokens=planned.chunk_tokens)
    replan = None if planned.profile is None else Replanner(work, service, planned.profile, planned.asked)
    with contextlib.ExitStack() as closing:
        with progress_bar("loading") as report:
            generator = closing.enter_context(
                deploy_llm(
                    service, work.cluster, planned.plan, work.source, settings=settings, drafter=drafter,
                    policy=AdaptivePolicy() if drafter is not None else None, progress=report, name=work.ref.name,
                    make_answer=lambda params: AnswerText(work.text, params), replan=replan,
                )
            )  # fmt: skip
        yield generator


def _backend(work: LlmWork, generator: Generator) -> LlmBackend:
    config = work.source.config
    own = () if work.text.stop_token is None else (work.text.stop_token,)
    stops = tuple(dict.fromkeys((*config.stop_tokens, *own)))
    grammars = Grammars(work.text, config.vocabulary, stops)

    def check(params: SamplingParams) -> None:
        if params.grammar is not None:
            grammars.check(params.grammar)

    return LlmBackend(work.name, generator, work.text, config.vocabulary, stops, check)


def _drafter(text: str, work: LlmWork, context: int) -> Drafter | None:
    """Who drafts: nobody, n-grams, or n-grams before a small model or before the first layers of the model itself."""
    if text == "none":
        return None
    if text == "ngram":
        return PromptLookup()
    executor = "torch:bf16" if by_id(_DRAFTS_BY).available("cpu") else _DRAFTS_BY
    if text.startswith("layers:"):
        count = text.removeprefix("layers:")
        if not count.isdigit():
            raise EcotoneError(f"--draft {text}: write how many, for example layers:2")
        return Chain(PromptLookup(), layers_drafter(work.source, int(count), executor, context=context))
    return Chain(PromptLookup(), model_drafter(Checkpoint.open(find_model(text)), work.text, executor, context=context))


def server_options(
    host: str, token_file: Path | None, tls_cert: Path | None, tls_key: Path | None, per_minute: int
) -> Options:  # fmt: skip
    """What the command line and the environment say of the server; raises EcotoneError where `host` does not allow it."""
    keys = load_keys(token_file, os.environ)
    made = Options(keys=keys, tls_cert=tls_cert, tls_key=tls_key, max_requests_per_minute=per_minute)
    made.check(host)
    return made


def _invite(name: str, address: str) -> None:
    announce(name, address)
    out.print(f"[dim]talk to it:  ecotone chat --url {address}/v1", highlight=False)
    out.file.flush()


def announce(name: str, address: str) -> None:
    """Say where a model is served, once it is."""
    out.print(f"serving [bold]{escape(name)}[/] at {address}/v1", highlight=False)
    out.file.flush()
