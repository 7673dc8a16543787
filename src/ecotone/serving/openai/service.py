"""The work behind each address: chat, completions, embeddings, models, health, status, metrics. Runs any Backend.

Requests are read by `asks.py` and told by `telling.py`; here is what lies between: which model, its tokenizer in a thread
of its own, one job per choice.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.responses import PlainTextResponse, Response

from ecotone.serving.openai.asks import Prompt, read_chat, read_completion, read_embedding
from ecotone.serving.openai.backend import Backend, Embedder
from ecotone.serving.openai.channel import Answers, Job
from ecotone.serving.openai.choices import ChatChoice, TextChoice
from ecotone.serving.openai.endpoint import Call
from ecotone.serving.openai.errors import ONCE_MORE, SERVER, ApiError, bad_value, too_long
from ecotone.serving.openai.fields import parse_body
from ecotone.serving.openai.metrics import Metrics
from ecotone.serving.openai.options import Options
from ecotone.serving.openai.sampling import Wish
from ecotone.serving.openai.telling import Run, json_response
from ecotone.units import EcotoneError

__all__ = ["Service"]

T = TypeVar("T")


class Service:
    """A language model, an embedder, or both, under one set of options. Made and used in one event loop."""

    def __init__(self, backend: Backend | None, embedder: Embedder | None, options: Options):
        if backend is None and embedder is None:
            raise EcotoneError("there is nothing to serve: give a language model, an embedder, or both")
        self._backend, self._embedder, self._options = backend, embedder, options
        name = backend.name if backend is not None else embedder.name if embedder is not None else ""
        self.metrics = Metrics(name, backend.measured if backend is not None else None)
        self._text = ThreadPoolExecutor(1, "openai-text")  # tokenizers are not safe to use from several threads
        self._grammars = ThreadPoolExecutor(1, "openai-grammar")  # a hostile one takes seconds, and holds up its like alone
        self._vectors = ThreadPoolExecutor(1, "openai-embed")
        self._running: set[Answers] = set()
        self.is_stopping = False

    def close(self) -> None:
        self._text.shutdown(wait=False, cancel_futures=True)
        self._grammars.shutdown(wait=False, cancel_futures=True)
        self._vectors.shutdown(wait=False, cancel_futures=True)

    def abort(self, reason: str) -> None:
        """End every answer under way with an error."""
        for answers in tuple(self._running):
            answers.fail(ApiError(503, reason, kind=SERVER, code="shutting_down"))

    # ---- addresses -------------------------------------------------------------------------------------------------------

    async def chat(self, call: Call) -> None:
        document = await self._document(call)
        backend = self._chosen(document, self._backend)
        ask = read_chat(document, backend)
        await self._check(backend, ask.wish, document)
        tokens = await self._in_text(backend.encode_chat, ask.messages, ask.tools or None, param="messages")
        jobs = self._jobs(backend, ask.wish, [tuple(tokens)], ask.n, "messages")
        names = [tool["function"]["name"] for tool in ask.tools] if ask.calls else []
        tells = ask.wish.params.logprobs is not None
        choices = [ChatChoice(backend, names, ask.most_calls, tells) for _ in jobs]
        head = self._head(backend, "chatcmpl", "chat.completion.chunk" if ask.stream else "chat.completion")
        await Run(self._running, self.metrics, self._options, backend, jobs, choices, ask, head, "messages").go(call)

    async def completion(self, call: Call) -> None:
        document = await self._document(call)
        backend = self._chosen(document, self._backend)
        ask = read_completion(document, backend)
        await self._check(backend, ask.wish, document)
        prompts = [await self._tokens(backend, prompt, "prompt") for prompt in ask.prompts]
        jobs = self._jobs(backend, ask.wish, prompts, ask.best_of, "prompt")
        echoes = [await self._echo(backend, prompt) if ask.echo else "" for prompt in ask.prompts]
        choices = [TextChoice(backend, echoes[i // ask.best_of], ask.tells_logprobs) for i in range(len(jobs))]
        head = self._head(backend, "cmpl", "text_completion")
        await Run(self._running, self.metrics, self._options, backend, jobs, choices, ask, head, "prompt").go(call)

    async def embeddings(self, call: Call) -> None:
        document = await self._document(call)
        embedder = self._chosen(document, self._embedder)
        ask = read_embedding(document, embedder)
        inputs = [await self._tokens(embedder, given, "input") for given in ask.inputs]
        for index, tokens in enumerate(inputs):
            if len(tokens) > embedder.context:
                message = f"input[{index}] has {len(tokens)} tokens, {embedder.name} takes {embedder.context}"
                raise too_long("input", message)
        loop = asyncio.get_running_loop()
        vectors = await loop.run_in_executor(self._vectors, embedder.embed, inputs)
        data = []
        for index, vector in enumerate(vectors):
            told = [float(x) for x in vector]
            if ask.dimensions is not None and ask.dimensions < len(told):
                told = _shortened(told, ask.dimensions)
            packed: Any = base64.b64encode(struct.pack(f"<{len(told)}f", *told)).decode() if ask.is_base64 else told
            data.append({"object": "embedding", "index": index, "embedding": packed})
        num_tokens = sum(map(len, inputs))
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        await call.reply(json_response({"object": "list", "data": data, "model": embedder.name, "usage": usage}))

    async def models(self, call: Call) -> None:
        await call.reply(json_response({"object": "list", "data": [*map(_card, self._served())]}))

    async def model(self, call: Call) -> None:
        name = call.request.path_params["name"]
        found = next((each for each in self._served() if name in self._names(each)), None)
        if found is None:
            raise self._no_model(name)
        await call.reply(json_response(_card(found)))

    async def ready(self, call: Call) -> None:
        self._check_ready(*self._served())
        await call.reply(PlainTextResponse(""))

    async def live(self, call: Call) -> None:
        await call.reply(PlainTextResponse(""))

    async def status(self, call: Call) -> None:
        document: dict[str, Any] = {"models": [each.name for each in self._served()], "stopping": self.is_stopping}
        document |= {"answers": len(self._running)}
        if self._backend is not None:
            document |= {"engine": await asyncio.to_thread(self._engine_status, self._backend)}
        await call.reply(json_response(document))

    async def scrape(self, call: Call) -> None:
        text = await asyncio.to_thread(self.metrics.render)
        await call.reply(Response(text, media_type="text/plain; version=0.0.4; charset=utf-8"))

    # ---- steps -----------------------------------------------------------------------------------------------------------

    def _engine_status(self, backend: Backend) -> dict[str, Any]:
        return dataclasses.asdict(backend.measured()) | backend.status()

    def _served(self) -> list[Backend | Embedder]:
        return [each for each in (self._backend, self._embedder) if each is not None]

    def _names(self, served: Backend | Embedder) -> tuple[str, ...]:
        return (served.name, *(self._options.aliases if served is self._served()[0] else ()))

    def _no_model(self, name: str) -> ApiError:
        here = " or ".join(each.name for each in self._served())
        return ApiError(404, f"the model {name!r:.80} is not served here; {here} is", param="model", code="model_not_found")

    def _chosen(self, document: dict[str, Any], served: T | None) -> T:
        """`served` where the request names it; raises ApiError 400, 404 or 503."""
        name = document.get("model")
        if not isinstance(name, str):
            raise bad_value("model", "you must provide model, a string", "missing_required_parameter")
        known = [each for each in self._served() if name in self._names(each)]
        if not known:
            raise self._no_model(name)
        if served is None or known[0] is not served:
            raise bad_value("model", f"the model {name!r:.80} is not one for this address", "model_not_supported")
        self._check_ready(known[0])
        return served

    def _check_ready(self, *served: Backend | Embedder) -> None:
        if self.is_stopping or not all(each.is_ready() for each in served):
            message = (
                "the server is shutting down" if self.is_stopping else "the model is not ready: its stages are not there"
            )
            raise ApiError(503, message, kind=SERVER, code="not_ready", headers=ONCE_MORE)

    async def _document(self, call: Call) -> dict[str, Any]:
        is_short = len(call.body) < 1 << 16
        document = parse_body(call.body) if is_short else await asyncio.to_thread(parse_body, call.body)
        call.drop_body()
        return document

    async def _check(self, backend: Backend, wish: Wish, document: dict[str, Any]) -> None:
        thread = self._text if wish.params.grammar is None else self._grammars
        await self._in_text(backend.check, wish.params, param=_grammar_field(document), thread=thread)

    async def _in_text(
        self, function: Callable[..., T], *arguments: Any, param: str | None, thread: ThreadPoolExecutor | None = None
    ) -> T:
        """Run what reads text, in its thread; an EcotoneError of it is the request's fault."""
        try:
            return await asyncio.get_running_loop().run_in_executor(thread or self._text, function, *arguments)
        except ApiError:
            raise
        except EcotoneError as error:
            raise bad_value(param, str(error)) from None

    async def _tokens(self, model: Backend | Embedder, prompt: Prompt, param: str) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            return prompt
        return tuple(await self._in_text(model.encode, prompt, param=param))

    async def _echo(self, backend: Backend, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else await self._in_text(backend.decode, prompt, param="prompt")

    def _jobs(
        self, backend: Backend, wish: Wish, prompts: Sequence[tuple[int, ...]], per_prompt: int, param: str
    ) -> list[Job]:
        """A job per choice; the prompts are counted once each."""
        jobs = []
        for tokens in prompts:
            if not tokens:
                raise bad_value(param, f"{param} has no token; write something")
            for choice in range(per_prompt):
                jobs.append(Job(tokens, wish.settled(len(tokens), backend.context, choice, param)))
        for tokens in prompts:
            self.metrics.prompted(len(tokens))
        return jobs

    def _head(self, backend: Backend, prefix: str, kind: str) -> dict[str, Any]:
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": backend.name}
        fingerprint = backend.fingerprint()
        return head | ({"system_fingerprint": fingerprint} if fingerprint else {})


def _card(served: Backend | Embedder) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created_s, "owned_by": "ecotone",
            "max_model_len": served.context}  # fmt: skip


def _shortened(vector: list[float], size: int) -> list[float]:
    """The first numbers of a nested vector, of length 1 again."""
    kept = vector[:size]
    length = sum(x * x for x in kept) ** 0.5
    return [x / length for x in kept] if length else kept


def _grammar_field(document: dict[str, Any]) -> str | None:
    """The field to name where the backend refuses the parameters."""
    names = (
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_grammar",
        "guided_choice",
        "tools",
    )
    return next((name for name in names if document.get(name) is not None), None)
