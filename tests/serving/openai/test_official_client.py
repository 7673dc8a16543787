"""The official client against the real server on a real socket, in front of a small model of bytes (`fake_model.py`)."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from fake_model import FakeEmbedder, FakeModel
from serving_thread import client, serving

from ecotone.serving.openai.run import Server

pytestmark = pytest.mark.loopback

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/Place"}},
            "required": ["place"],
            "additionalProperties": False,
            "$defs": {"Place": {"enum": ["here", "there"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def model() -> Iterator[FakeModel]:
    made = FakeModel()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(model: FakeModel) -> Iterator[Server]:
    with serving(model, embedder=FakeEmbedder()) as running:
        yield running


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[openai.OpenAI]:
    with client(server) as made:
        yield made


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_a_chat_answer_and_its_usage(api: openai.OpenAI, model: FakeModel) -> None:
    answer = api.chat.completions.create(
        model="bytes", messages=user("say héllo €"), temperature=0.5, top_p=0.9, seed=7, presence_penalty=1,
        frequency_penalty=-1, logit_bias={"65": 5}, max_completion_tokens=100, stop=["\x00"],
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 2, "priority": -1},
    )  # fmt: skip
    assert (answer.object, answer.model, answer.system_fingerprint) == ("chat.completion", "bytes", "fp_bytes")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "héllo €", "stop")
    prompt, made = 1 + len("say héllo €".encode()), len("héllo €".encode())
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, made)
    _, params, priority = model.seen[-1]
    assert (params.temperature, params.top_p, params.seed, params.logit_bias) == (0.5, 0.9, 7, ((65, 5.0),))
    assert (params.presence_penalty, params.frequency_penalty, params.max_tokens) == (1, -1, 100)
    assert (params.top_k, params.min_p, params.repetition_penalty, params.min_tokens, priority) == (3, 0.1, 1.5, 2, -1)
    assert (params.stop, params.stop_tokens, params.logprobs) == (("\x00",), (256,), None)


def test_a_stream_is_the_whole_in_parts(api: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(api.chat.completions.create(
        model="bytes", messages=user("say naïve text"), stream=True, stream_options=options, logprobs=True, top_logprobs=1,
    ))  # fmt: skip
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == "naïve text"
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in parts)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len("naïve text".encode())
    assert len({chunk.id for chunk in chunks}) == 1
    told = [each for chunk in parts if (found := chunk.choices[0].logprobs) for each in found.content or ()]
    assert b"".join(bytes(each.bytes or ()) for each in told) == "naïve text".encode()
    assert [len(each.top_logprobs) for each in told] == [1] * len(told)


def test_length_and_stop(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="bytes", messages=user("count"), max_tokens=5)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("1 2 3", "length")
    answer = api.chat.completions.create(model="bytes", messages=user("count"), stop="4")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("1 2 3 ", "stop")


def test_several_choices_have_seeds_of_their_own(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="bytes", messages=user("seed"), n=3, seed=40)
    assert [choice.message.content for choice in answer.choices] == ["40", "41", "42"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 6)
    texts = {0: "", 1: ""}
    for chunk in api.chat.completions.create(model="bytes", messages=user("seed"), n=2, seed=8, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "8", 1: "9"}


def test_plain_completions(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="bytes", prompt="abc", echo=True)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abccba", "stop")
    assert api.completions.create(model="bytes", prompt="count").choices[0].text == "1 2 3 4 5 6 7 8 "  # 16 tokens
    many = api.completions.create(model="bytes", prompt=["ab", "cd"], n=2)
    assert [(choice.index, choice.text) for choice in many.choices] == [(0, "ba"), (1, "ba"), (2, "dc"), (3, "dc")]
    assert many.usage is not None
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (4, 8)
    ids = api.completions.create(model="bytes", prompt=[list(b"ab"), list(b"xyz")], echo=True)
    assert [choice.text for choice in ids.choices] == ["abba", "xyzzyx"]
    stream = api.completions.create(model="bytes", prompt="abc", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abccba"


def test_logprobs_of_plain_completions_and_the_best_of_several(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="bytes", prompt="aé", logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None
    assert answer.choices[0].text == "éa"
    assert told.text_offset == [0, 0, 1]  # the character's first byte is no character yet
    assert told.token_logprobs == [-0.5] * 3
    assert told.top_logprobs is not None
    assert told.top_logprobs[2] == {"a": -0.5, "b": -1.5}
    best = api.completions.create(model="bytes", prompt="seed", best_of=3, n=2, seed=5, echo=False)
    assert [choice.text for choice in best.choices] == ["5", "6"]  # the model says that a greater seed is less likely
    assert best.choices[0].logprobs is None


def test_json_that_the_client_parses(api: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        name: str
        kind: Literal["x", "y"]
        numbers: list[int]

    parsed = api.chat.completions.parse(model="bytes", messages=user("go"), response_format=Answer).choices[0].message.parsed
    assert parsed is not None
    assert parsed.kind in ("x", "y")
    answer = api.chat.completions.create(model="bytes", messages=user("go"), response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    for extra, wanted in (
        ({"guided_regex": "[ab]{3}c"}, "aaac"),
        ({"guided_choice": ["yes (1)", "yes (1)"]}, "yes (1)"),
        ({"structured_outputs": {"json": {"const": 5}}}, "5"),
    ):
        answer = api.chat.completions.create(model="bytes", messages=user("go"), extra_body=extra)
        assert answer.choices[0].message.content == wanted


def test_a_required_tool_is_called_by_its_schema(api: openai.OpenAI, model: FakeModel) -> None:
    tools: Any = [CLOCK, WEATHER]
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    answer = api.chat.completions.create(model="bytes", messages=user("go"), tools=tools, tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"place": "here"})
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None)
    assert model.templates[-1][1] == tools
    answer = api.chat.completions.create(model="bytes", messages=user("go"), tools=tools, tool_choice="required")
    assert len(answer.choices[0].message.tool_calls or ()) == 1


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_in_the_models_own_words(api: openai.OpenAI, model: FakeModel, parallel: bool) -> None:
    one = '<tool_call>{"name": "clock", "arguments": {"zone": "é"}}</tool_call>'
    tools: Any = [CLOCK]
    before, asked = len(model.cancelled), f"Well: {one}" + ("\\n" + one + " and then" if parallel else "")
    with api.chat.completions.stream(
        model="bytes", messages=user(f"{'say' if parallel else 'hold'} {asked}"), tools=tools, parallel_tool_calls=parallel
    ) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    assert calls == [("clock", {"zone": "é"})] * (2 if parallel else 1)
    assert final.choices[0].finish_reason == "tool_calls"
    assert message.content == ("Well:  and then" if parallel else "Well: ")
    if not parallel:
        assert model.wait_cancelled(before + 1)  # the rest of the answer is not made
    plain = api.chat.completions.create(model="bytes", messages=user(f"say {one}"), tools=tools, tool_choice="none")
    assert (plain.choices[0].message.content, plain.choices[0].message.tool_calls) == (one, None)


def test_messages_as_templates_want_them(api: openai.OpenAI, model: FakeModel) -> None:
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": 1}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "noon"}]},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "say so"}]},
    ]  # fmt: skip
    assert api.chat.completions.create(model="bytes", messages=messages).choices[0].message.content == "so"
    assert model.templates[-1][0] == [
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": {"zone": 1}}}]},
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
        {"role": "user", "content": "and\nsay so"},
    ]  # fmt: skip


def test_models_and_vectors(api: openai.OpenAI) -> None:
    assert [each.id for each in api.models.list()] == ["bytes", "byte-vectors"]
    assert api.models.retrieve("bytes").created == 1_700_000_000
    made = api.embeddings.create(model="byte-vectors", input=["ab", "c"])  # the client asks for base64 by itself
    assert [each.embedding for each in made.data] == [[2, 195, 97, 98], [1, 99, 99, 99]]
    plain = api.embeddings.create(model="byte-vectors", input=list(b"ab"), encoding_format="float")
    assert plain.data[0].embedding == [2, 195, 97, 98]
    assert plain.usage.prompt_tokens == 2
    with pytest.raises(openai.BadRequestError, match="dimensions can only be 4"):
        api.embeddings.create(model="byte-vectors", input="ab", dimensions=2)
    with pytest.raises(openai.BadRequestError, match="takes 64"):
        api.embeddings.create(model="byte-vectors", input="a" * 65)
    with serving(None, embedder=FakeEmbedder(is_nested=True)) as other, client(other) as nested:
        short = nested.embeddings.create(model="byte-vectors", input="ab", dimensions=2).data[0].embedding
        assert math.hypot(*short) == pytest.approx(1)
        with pytest.raises(openai.BadRequestError, match="not one for this address"):
            nested.chat.completions.create(model="byte-vectors", messages=user("x"))


WRONG: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None, str | None]] = [
    ({"temperature": 3}, openai.BadRequestError, "temperature", "decimal_above_max_value"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature", "invalid_type"),
    ({"n": 0}, openai.BadRequestError, "n", "integer_below_min_value"),
    ({"extra_body": {"tempperature": 1}}, openai.BadRequestError, "tempperature", "unknown_parameter"),
    ({"model": "gpt-9"}, openai.NotFoundError, "model", "model_not_found"),
    ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
    ({"messages": user("a" * 4096)}, openai.BadRequestError, "messages", "context_length_exceeded"),
    ({"messages": user("refuse")}, openai.BadRequestError, "messages", "invalid_value"),
    ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, "messages[0].role", "invalid_value"),
    ({"messages": user([{"type": "image_url", "image_url": {"url": "x"}}])}, openai.BadRequestError,  # type: ignore[arg-type]
     "messages[0].content[0].type", "invalid_value"),
    ({"logit_bias": {"300": 1}}, openai.BadRequestError, "logit_bias", "invalid_value"),
    ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", "invalid_value"),
    ({"extra_body": {"guided_regex": "(("}}, openai.BadRequestError, "guided_regex", "invalid_value"),
    ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", "invalid_value"),
    ({"messages": user("fail busy")}, openai.RateLimitError, None, "queue_full"),
    ({"messages": user("fail too-long")}, openai.BadRequestError, "messages", "context_length_exceeded"),
    ({"messages": user("fail node-lost 2")}, openai.InternalServerError, None, "stage_lost"),
    ({"messages": user("fail failed")}, openai.InternalServerError, None, "generation_failed"),
    ({"messages": user("hold"), "extra_body": {"deadline_s": 0.05}}, openai.InternalServerError, None, "deadline_exceeded"),
]  # fmt: skip
STATUS = {"queue_full": 429, "stage_lost": 503, "generation_failed": 500, "deadline_exceeded": 504, "model_not_found": 404}


@pytest.mark.parametrize(("change", "kind", "param", "code"), WRONG)
def test_errors_are_those_of_the_client(
    api: openai.OpenAI, change: dict[str, Any], kind: type[openai.APIStatusError], param: str | None, code: str | None
) -> None:
    with pytest.raises(kind) as caught:
        api.chat.completions.create(**({"model": "bytes", "messages": user("say x")} | change))
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.status_code == STATUS.get(code or "", 400)


def test_plain_completions_refuse_what_they_cannot_do(api: openai.OpenAI) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"suffix": "end"}, "filling in"),
        ({"echo": True, "logprobs": 1}, "prompt"),
        ({"best_of": 1, "n": 2}, "at least n"),
        ({"best_of": 2, "stream": True}, "streamed"),
        ({"prompt": ""}, "no token"),
        ({"prompt": [999]}, "beyond"),
        ({"n": 100, "prompt": ["a", "b"]}, "more than 128"),
    ]
    for change, text in wrong:
        arguments: Any = {"model": "bytes", "prompt": "x"} | change
        with pytest.raises(openai.BadRequestError, match=text):
            api.completions.create(**arguments)


def test_an_error_within_a_stream_ends_it_without_a_finish(api: openai.OpenAI) -> None:
    told, reasons = "", []

    def read() -> None:
        nonlocal told
        for chunk in api.chat.completions.create(model="bytes", messages=user("fail node-lost 3"), stream=True):
            told += chunk.choices[0].delta.content or ""
            reasons.append(chunk.choices[0].finish_reason)

    with pytest.raises(openai.APIError, match="as was asked") as caught:
        read()
    assert told == "xxx"[: len(told)]
    assert set(reasons) <= {None}
    assert caught.value.code == "stage_lost"
    with pytest.raises(openai.RateLimitError):  # refused before anything was told: a status, not an event
        api.chat.completions.create(model="bytes", messages=user("fail busy"), stream=True)


def test_a_client_that_leaves_cancels_its_request(api: openai.OpenAI, model: FakeModel) -> None:
    before = len(model.cancelled)
    stream = api.chat.completions.create(model="bytes", messages=user("hold"), stream=True)
    next(iter(stream))
    stream.close()
    assert model.wait_cancelled(before + 1)
    with pytest.raises(openai.APITimeoutError):
        api.chat.completions.create(model="bytes", messages=user("hold"), n=2, timeout=0.2)
    assert model.wait_cancelled(before + 3)


def test_many_at_once_from_the_asynchronous_client(server: Server) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="unused-key", max_retries=0) as api:

            async def one(i: int) -> str:
                stream = await api.chat.completions.create(model="bytes", messages=user(f"say {i}!"), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(i) for i in range(32)))

    assert asyncio.run(ask()) == [f"{i}!" for i in range(32)]
