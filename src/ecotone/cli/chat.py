"""`ecotone chat`: a conversation in the terminal with a model behind any OpenAI-compatible server.

Ctrl-C stops the answer (and its computation: the connection is closed), not the program; Ctrl-D leaves. What a model
writes is shown as text: its control characters are left out, so it cannot steer the terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ecotone.cli import options
from ecotone.cli.chat_client import Answer, ChatClient
from ecotone.cli.console import err, out
from ecotone.units import EcotoneError

__all__ = ["Chat", "chat", "plain"]

HELP = """\
/help              this
/reset             forget the conversation, keep the system message
/system [TEXT]     set or show the system message
/regen             answer the last question anew
/save FILE         write the conversation to FILE (JSON)
/load FILE         go on with the conversation of FILE
/model [NAME]      talk to another model of the server, or list them
/stats             tokens and times so far
/quit              leave, as Ctrl-D does
A line that ends in \\ goes on in the next; \"\"\" alone on a line begins and ends a text of several lines."""
BLOCK = '"""'


def chat(
    url: Annotated[str, typer.Option(help="The server: http://HOST:PORT/v1 of anything OpenAI-compatible.")] = (
        "http://localhost:8000/v1"
    ),
    model: Annotated[str, options.option("--model", "-m", text="Which model of the server. Default: its first.")] = "",
    key: Annotated[
        str,
        typer.Option(
            "--key",
            envvar="OPENAI_API_KEY",
            show_envvar=False,
            show_default=False,
            help="API key. Better in the variable OPENAI_API_KEY, where no list of processes shows it.",
        ),
    ] = "",
    system: Annotated[str, options.option("--system", "-s", text="System message to begin with.")] = "",
    once: Annotated[
        str, options.option("--once", text="Answer this prompt alone, on standard output, and leave; - reads it from input.")
    ] = "",
    load: Annotated[Path | None, options.option("--load", text="Go on with a conversation that /save wrote.")] = None,
    temperature: Annotated[float | None, options.option("--temperature", text="0 is always the likeliest token.")] = None,
    max_tokens: Annotated[int | None, options.option("--max-tokens", text="Longest answer, in tokens.")] = None,
    seed: Annotated[
        int | None, options.option("--seed", text="Same seed, same answer, where the server knows seeds.")
    ] = None,
) -> None:
    """Talk to a model behind any OpenAI-compatible server, in the terminal.

    ecotone chat --url http://localhost:8000/v1
    ecotone chat --once "Name three rivers."
    """  # fmt: skip
    settings = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    with ChatClient(url, key) as client:
        talk = Chat(client, model, {name: value for name, value in settings.items() if value is not None}, out)
        if load:
            talk.load(load)
        if system:
            talk.system = system
        if once:
            talk.ask(sys.stdin.read() if once == "-" else once)
            sys.stdout.write("\n")
            err.print(f"[dim]{escape(talk.last_line())}")
        else:
            talk.run(_lines())


@dataclass(slots=True)
class Chat:
    """A conversation; `run` it over lines of input, or `ask`. Without a `model` the server's first is taken."""

    client: ChatClient
    model: str
    settings: dict[str, Any]
    console: Console
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def run(self, lines: Iterator[str]) -> None:
        """Answer until the lines end or one says /quit; errors of the server are shown and the conversation goes on."""
        self._choose()
        self.console.print(f"[dim]talking to {escape(self.model)}; /help lists commands, Ctrl-D leaves", highlight=False)
        for text in messages(lines):
            if text.startswith("/"):
                if not self._command(text):
                    return
                continue
            self._answer(text)

    def ask(self, text: str) -> None:
        """One question, its answer streamed to the console; raises EcotoneError, and KeyboardInterrupt as it came."""
        self._choose()
        self.turns.append({"role": "user", "content": text})
        answer = Answer()
        head = [{"role": "system", "content": self.system}] if self.system else []
        stream = self.client.stream(self.model, [*head, *self.turns], answer, self.settings)
        try:
            for part in stream:
                self.console.print(plain(part), end="", markup=False, highlight=False, soft_wrap=True)
                self.console.file.flush()
        except EcotoneError:
            self.turns.pop()
            raise
        except KeyboardInterrupt:
            self._keep(answer)
            raise
        finally:
            stream.close()  # type: ignore[attr-defined]
        for call in answer.tool_calls:
            self.console.print(plain(call), markup=False, highlight=False, soft_wrap=True)
        self._keep(answer)

    def _keep(self, answer: Answer) -> None:
        """The conversation goes on from what was said, be it a part; without any of it the question is taken back."""
        if answer.text or answer.finish_reason:
            self.turns.append({"role": "assistant", "content": answer.text})
            self.answers.append(answer)
        else:
            self.turns.pop()

    def last_line(self) -> str:
        """Tokens and times of the last answer."""
        if not self.answers:
            return "no answer yet"
        last = self.answers[-1]
        cached = f" ({last.cached_tokens} cached)" if last.cached_tokens else ""
        text = f"{last.tokens} tokens, {last.tokens_per_s:.1f} tokens/s, first after {last.first_s:.2f} s"
        end = "" if last.finish_reason == "stop" else f", ended: {last.finish_reason or 'stopped'}"
        prompt = f", prompt {last.prompt_tokens} tokens{cached}" if last.prompt_tokens else ""
        return f"{text}{prompt}{end}"

    def save(self, file: Path) -> None:
        """Write the conversation aside, then into place."""
        document = {"model": self.model, "system": self.system, "messages": self.turns}
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            aside.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
            aside.replace(file)
        except OSError as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise EcotoneError(f"{file}: cannot be written: {error.strerror or error}") from None

    def load(self, file: Path) -> None:
        """Take over a conversation that `save` wrote."""
        try:
            document = json.loads(file.read_text("utf-8"))
            system, turns = document["system"], document["messages"]
            is_good = isinstance(system, str) and all(
                t["role"] in ("user", "assistant") and isinstance(t["content"], str) for t in turns
            )
        except OSError as error:
            raise EcotoneError(f"{file}: cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            is_good = False
        if not is_good:
            raise EcotoneError(f"{file}: is not a conversation that /save wrote")
        self.system = system
        self.turns = [{"role": t["role"], "content": t["content"]} for t in turns]

    def _choose(self) -> None:
        if not self.model:
            names = self.client.models()
            if not names:
                raise EcotoneError("the server has no model; give --model")
            self.model = names[0]

    def _answer(self, text: str) -> None:
        try:
            self.ask(text)
        except KeyboardInterrupt:
            self.console.print("\n[dim]stopped")
        except EcotoneError as error:
            self.console.print(f"\n[red]error:[/] {escape(' '.join(str(error).split()))}", highlight=False, soft_wrap=True)
            return
        else:
            self.console.print()
        self.console.print(f"[dim]{escape(self.last_line())}", highlight=False, soft_wrap=True)

    def _command(self, line: str) -> bool:
        """Carry out a line that begins with /; False where it says to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP), "/reset": self._reset, "/system": self._system, "/regen": self._regen,
            "/save": self._save, "/load": self._load, "/model": self._model, "/stats": self._stats,
        }  # fmt: skip
        if name in ("/quit", "/exit"):
            return False
        try:
            if name not in commands:
                raise EcotoneError(f"there is no {name}; /help lists the commands")
            commands[name](rest)
        except EcotoneError as error:
            self._say(f"error: {error}")
        return True

    def _reset(self, _: str) -> None:
        self.turns.clear()
        self._say("the conversation is forgotten")

    def _system(self, text: str) -> None:
        self.system = text or self.system
        self._say(f"system: {self.system or '(none)'}")

    def _regen(self, _: str) -> None:
        asked = [index for index, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not asked:
            raise EcotoneError("nothing was asked yet")
        kept, text = self.turns[: asked[-1]], self.turns[asked[-1]]["content"]
        before, self.turns = self.turns, kept
        self._answer(text)
        if len(self.turns) <= asked[-1]:  # it failed: the former answer stays
            self.turns = before

    def _save(self, name: str) -> None:
        self.save(_file(name, "/save"))
        self._say(f"wrote {name}")

    def _load(self, name: str) -> None:
        self.load(_file(name, "/load"))
        self._say(f"{len(self.turns)} messages")

    def _model(self, name: str) -> None:
        names = self.client.models()
        if name and name not in names:
            raise EcotoneError(f"there is no model {name}; there are {', '.join(names)}")
        self.model = name or self.model
        self._say("\n".join(f"{'*' if each == self.model else ' '} {each}" for each in names))

    def _stats(self, _: str) -> None:
        tokens = sum(answer.tokens for answer in self.answers)
        self._say(f"{len(self.answers)} answers, {tokens} tokens; the last: {self.last_line()}")

    def _say(self, text: str) -> None:
        self.console.print(plain(text), markup=False, highlight=False, style="dim", soft_wrap=True)


def plain(text: str) -> str:
    """`text` without control characters, except ends of lines and tabs."""
    return "".join(c for c in text if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f"))


def messages(lines: Iterator[str]) -> Iterator[str]:
    """What was meant as one text, from lines: continued by \\ at the end, or between two lines of three quotes."""
    for line in lines:
        if line.strip() == BLOCK:
            parts = []
            for inner in lines:
                if inner.strip() == BLOCK:
                    break
                parts.append(inner)
            text = "\n".join(parts)
        else:
            parts = []
            while line.endswith("\\"):
                parts.append(line[:-1])
                line = next(lines, "")
            text = "\n".join([*parts, line])
        if text.strip():
            yield text.strip() if text.lstrip().startswith("/") else text


def _lines() -> Iterator[str]:
    """Lines from the terminal, with its editing where there is one; Ctrl-C drops the line that is being written."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() its editing and history)
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            yield input("> " if is_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            out.print("\n[dim]Ctrl-D or /quit leaves")


def _file(name: str, command: str) -> Path:
    if not name:
        raise EcotoneError(f"write {command} FILE")
    return Path(name).expanduser()
