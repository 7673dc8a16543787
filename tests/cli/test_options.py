"""The options of all commands together: each says what it does, and one name means one kind of thing everywhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import typer

from ecotone.cli import options
from ecotone.cli.main import app


def commands(command: Any, name: str = "ecotone") -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for inner, one in command.commands.items():
            yield from commands(one, f"{name} {inner}")
    else:
        yield name, command


ALL = dict(commands(typer.main.get_command(app)))
OPTIONS = [(name, p) for name, command in ALL.items() for p in command.params if p.param_type_name == "option"]


def test_every_command_and_option_has_a_help_text() -> None:
    assert not [name for name, command in ALL.items() if not command.help]
    assert not [f"{name} {p.opts[0]}" for name, p in OPTIONS if not p.help]


def test_one_name_means_one_kind_of_thing() -> None:
    """A flag that takes a file here and a word there, or is spelled as a number here and with its unit there, misleads."""
    kinds: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    for _, p in OPTIONS:
        kinds[p.opts[0]].add((p.type_descriptor.annotation.__name__, p.multiple))
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def test_options_of_a_plan_stand_in_groups() -> None:
    groups = {p.opts[0]: getattr(p, "rich_help_panel", None) for p in ALL["ecotone plan"].params}
    assert groups["--require"] == options.ASKED
    assert groups["--samples"] == groups["--exits"] == groups["--bottleneck"] == options.KNOWN
    assert groups["--what-if"] == groups["--pareto"] == options.TOLD
    assert groups["--workload"] == options.USERS
    assert groups["--cluster"] is None
