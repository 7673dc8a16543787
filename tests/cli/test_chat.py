"""The terminal chat over httpx with answers made here: commands, several lines, interruption, errors, what is shown."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from ecotone.cli.chat import Chat, messages, plain
from ecotone.cli.chat_client import ChatClient, events
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure


class Parts(httpx.SyncByteStream):
    def __init__(self, parts: list[bytes | BaseException]):
        self.parts, self.is_closed = parts, False

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            if isinstance(part, BaseException):
                raise part
            yield part

    def close(self) -> None:
        self.is_closed = True


def event(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
    document = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]} | more
    return b"data: " + json.dumps(document).encode() + b"\n\n"


USAGE = {"completion_tokens": 2, "prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
GOOD: list[bytes | BaseException] = [
    b": waiting\n\n", event({"role": "assistant", "content": ""}), event({"content": "Hel\x1b[2J"}),
    event({"content": "lo"}), event({}, "stop", usage=USAGE), b"data: [DONE]\n\n",
]  # fmt: skip


class Server:
    """Answers each question with the next of `streams`, and remembers what was asked."""

    def __init__(self, *streams: list[bytes | BaseException] | httpx.Response):
        self.streams, self.asked, self.given = list(streams), [], []  # type: ignore[var-annotated]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}, {"id": "large"}]})
        assert request.url.path == "/v1/chat/completions"
        self.asked.append(json.loads(request.content))
        stream = self.streams.pop(0)
        if isinstance(stream, httpx.Response):
            return stream
        self.given.append(Parts(stream))
        return httpx.Response(200, stream=self.given[-1])


def talk(server: Server, *lines: str) -> tuple[Chat, str]:
    shown = io.StringIO()
    client = ChatClient("http://here/v1", "a-key", httpx.MockTransport(server))
    chat = Chat(client, "", {"temperature": 0.0}, Console(file=shown, width=200))
    chat.run(iter(lines))
    return chat, shown.getvalue()


def test_a_conversation_and_its_commands(tmp_path: Path) -> None:
    server, file = Server(GOOD, GOOD, GOOD), tmp_path / "talk.json"
    chat, shown = talk(
        server, "/system be brief", "hi", "and\\", "more", "/regen", "/stats", f"/save {file}", "/reset", "/what",
        "/model large", "/model none", "/save", "/help", "/quit", "never asked",
    )  # fmt: skip
    system, user = {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}
    said = {"role": "assistant", "content": "Hel\x1b[2Jlo"}
    assert [asked["messages"] for asked in server.asked] == [
        [system, user],
        [system, user, said, {"role": "user", "content": "and\nmore"}],
        [system, user, said, {"role": "user", "content": "and\nmore"}],
    ]
    assert all((a["model"], a["temperature"], a["stream"]) == ("tiny", 0.0, True) for a in server.asked)
    assert "Hel[2Jlo" in shown  # shown without what would clear the screen
    assert "2 tokens" in shown
    assert "prompt 9 tokens (4 cached)" in shown
    for text in ("3 answers, 6 tokens", "there is no /what", "there is no model none", "write /save FILE", "/regen  "):
        assert text in shown
    assert (chat.turns, chat.model) == ([], "large")
    again, _ = talk(Server(), f"/load {file}")
    assert (again.system, len(again.turns)) == ("be brief", 4)
    file.write_text("{}")
    assert "is not a conversation" in talk(Server(), f"/load {file}")[1]
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_an_interruption_stops_the_answer_and_not_the_program() -> None:
    server = Server([event({"content": "part"}), KeyboardInterrupt()], GOOD)
    chat, shown = talk(server, "one", "two")
    assert server.given[0].is_closed  # which cancels it at the server
    assert "stopped" in shown
    assert [turn["content"] for turn in chat.turns] == ["one", "part", "two", "Hel\x1b[2Jlo"]


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        ([event({"content": "par"}), b'data: {"error": {"message": "stage lost"}}\n\n'], "stage lost"),
        ([event({"content": "par"})], "cut off"),
        ([event({"content": "par"}), b"data: [DONE]\n\n"], "cut off"),
        ([b"data: nonsense\n\n"], "not JSON"),
        ([event({"content": "par"}), httpx.ReadError("reset")], "the connection failed"),
        (httpx.Response(401, json={"error": {"message": "no key"}}), "the server answered 401: no key"),
        (httpx.Response(502, text="bad gateway"), "502: bad gateway"),
    ],
)
def test_errors_are_said_and_the_question_is_taken_back(stream: Any, text: str) -> None:
    chat, shown = talk(Server(stream, GOOD), "one", "two")
    assert text in shown
    assert [turn["content"] for turn in chat.turns] == ["two", "Hel\x1b[2Jlo"]


def test_what_is_one_text_of_several_lines() -> None:
    assert list(messages(iter(["a", "", '"""', "b", "", "c", '"""', "d\\", "e", " /help ", "/x"]))) == [
        "a", "b\n\nc", "d\ne", "/help", "/x",
    ]  # fmt: skip
    assert list(messages(iter(['"""', "open"]))) == ["open"]
    assert plain("a\x00\x1b[1m\tb\x9bc\n\x7f") == "a[1m\tbc\n"


def test_events_of_a_stream() -> None:
    lines = [
        "event: x",
        'data: {"a":',
        "data: 1}",
        "",
        ": note",
        "",
        "data: 5",
        "",
        "data: [DONE]",
        "",
        'data: {"b": 2}',
        "",
    ]
    assert list(events(lines)) == [{"a": 1}]


def test_a_server_that_is_not_there_ends_in_one_line(ecotone: Any) -> None:
    ended = ecotone("chat", "--once", "x", "--url", "http://127.0.0.1:9/v1")
    assert ended.code == 2
    assert "cannot be reached" in ended.err
    assert ecotone("chat", "--once", "x", "--url", "localhost").code == 2
    with pytest.raises(EcotoneError, match="header"):
        ChatClient("http://here/v1", "schl\u00fcssel")
