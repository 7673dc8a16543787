"""`ecotone serve` on a language model, as a user types it, with the official client; and what it says of bad input."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from commands import Ended
from test_run_and_serve import line_with, started

import ecotone

pytest.importorskip("transformers", reason="the extra `llm` is not installed")
pytestmark = [pytest.mark.loopback, pytest.mark.timeout(280)]

TINY = Path(ecotone.__file__).parent / "assets" / "tiny-llm"
HOUSE = """
schema = "ecotone.cluster"
version = 1
name = "house"
source = "laptop"
emulate = true

[[device]]
name = "laptop"
memory = "{laptop}"

[[device]]
name = "mini"
memory = "10 MB"

[[link]]
source = "laptop"
target = "mini"
latency = "1 ms"
bandwidth = "500 Mbit/s"
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[openai.OpenAI, str]]:
    """The bundled model over two machines, neither of which holds it; the client, and what the command said."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "house.toml").write_text(HOUSE.format(laptop="10 MB"))
    (folder / "keys").write_text("a-long-secret\n")
    options = ("--cluster", "house.toml", "--precision", "fp32", "--context", "512", "--slots", "4", "--token-file", "keys")
    with started(
        folder, "serve", str(TINY), "--listen", "127.0.0.1:0", "--draft", str(TINY.parent / "tiny-drafter"), *options,
        ECOTONE_CACHE=str(folder / "cache"),
    ) as process:  # fmt: skip
        line = line_with(process, "serving")
        address = line.split(" at ")[1].strip()
        yield openai.OpenAI(base_url=address, api_key="a-long-secret", max_retries=0, timeout=60), line
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_model_that_no_machine_holds_answers(served: tuple[openai.OpenAI, str]) -> None:
    client, _ = served
    assert [model.id for model in client.models.list()] == ["tiny-llm"]
    messages = [{"role": "user", "content": "What news of the king?"}]
    asked = {"model": "tiny-llm", "messages": messages, "temperature": 0, "max_tokens": 60}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    pieces = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert len(text) > 10


def test_the_plan_spans_both_machines_and_the_prefix_is_reused(served: tuple[openai.OpenAI, str]) -> None:
    client, line = served
    place = line.split(" at ")[1].strip().removesuffix("/v1")
    status = httpx.get(f"{place}/status", headers={"authorization": "Bearer a-long-secret"}).json()["engine"]
    assert "laptop" in status["plan"]
    assert "mini" in status["plan"]
    prompt = "ROMEO:\n" + "But soft, what light through yonder window breaks?\n" * 8
    first, second = (
        client.completions.create(model="tiny-llm", prompt=prompt + end, max_tokens=4, temperature=0) for end in ("It", "My")
    )
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= 64  # type: ignore[operator]


def test_answers_keep_to_a_schema(served: tuple[openai.OpenAI, str]) -> None:
    client, _ = served
    schema = {"type": "object", "properties": {"king": {"enum": ["Lear", "Henry"]}}, "required": ["king"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "k", "schema": schema | {"additionalProperties": False}}}
    made = client.chat.completions.create(
        model="tiny-llm", messages=[{"role": "user", "content": "Who?"}], response_format=wanted, max_tokens=80, seed=3  # type: ignore[arg-type]
    )  # fmt: skip
    assert json.loads(made.choices[0].message.content or "")["king"] in ("Lear", "Henry")


def test_refusals_are_those_that_clients_know(served: tuple[openai.OpenAI, str]) -> None:
    client, _ = served
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny-llm", prompt="word " * 2000, max_tokens=4)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="word", max_tokens=4)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another-secret").completions.create(model="tiny-llm", prompt="word", max_tokens=4)
    assert client.completions.create(model="tiny-llm", prompt="word", max_tokens=4).choices[0].text


def test_a_model_that_fits_nowhere_says_by_how_much(folder: Path, ecotone: Callable[..., Ended]) -> None:
    (folder / "house.toml").write_text(HOUSE.format(laptop="2 MB").replace("10 MB", "2 MB"))
    ended = ecotone("serve", TINY, "--cluster", "house.toml", "--precision", "int8", "--listen", "127.0.0.1:0")
    assert ended.code == 2
    assert "needs" in ended.err
    assert "MB" in ended.err


def test_broken_directories_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ecotone: Callable[..., Ended]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: 1 << 20])
    ended = ecotone("serve", "./model", "--listen", "127.0.0.1:0")
    assert ended.code == 2
    assert "download it again" in ended.err
