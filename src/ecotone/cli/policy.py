"""`ecotone policy train` and `ecotone policy show`: a learned policy for a model on a cluster, and what a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ecotone import schema
from ecotone.cli import options
from ecotone.cli.console import err, out, print_json, progress_bar
from ecotone.cli.tables import listing
from ecotone.cli.workflow import load_work, make_profile, open_nodes
from ecotone.policies.discrete_sac import SacSettings
from ecotone.policies.learned import Trained, load_trained, save_trained
from ecotone.policies.training import Asked, train_policy
from ecotone.units import EcotoneError, format_quantity, parse_quantity

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Train a policy that chooses the plan of each request, and look at one.")
RIVALS = ("policy", "best_static", "resolving", "oracle")
SLOWEST, FASTEST = 1 / 32, 2.0  # of the stated rate of the link, where none is given


@app.command()
def train(
    model: options.Model,
    out_file: Annotated[Path, options.option("--out", "-o", text="Where to write the policy (safetensors).")],
    deadline: Annotated[str, options.option("--deadline", text="Deadlines to train for: 20ms,50ms,100ms.")],
    cluster: options.ClusterFile = None,
    profile_file: options.ProfileFile = None,
    samples: options.Samples = "",
    labels: options.Labels = None,
    exits: options.Exits = "",
    bottleneck: options.Bottlenecks = None,
    input_shape: options.InputShape = "",
    rates: Annotated[
        str, options.option("--rates", text="Slowest and fastest link: 1Mbit/s,40Mbit/s. Default: around the stated rate.")
    ] = "",
    period: Annotated[str, options.option("--period", text="Time between requests. Default: four deadlines.")] = "",
    plans: Annotated[int, options.trained("Plans to choose among, all resident.", min=2, max=64)] = 8,
    updates: Annotated[int, options.trained("Gradient steps; 6000 take a few minutes.", min=1, max=10_000_000)] = 6000,
    seed: Annotated[int, options.trained("Seed of the training.")] = 0,
    json_output: options.Json = False,
) -> None:
    """Train a policy (SAC-d) in a simulated world with the times, bytes and accuracies measured of this model.

    It prints what the policy is worth on conditions that it was not trained on, beside the best static plan in hindsight,
    solving again before each request, and an oracle. Where it is no better than these, use --adapt without it.
    With --exits it chooses among early exits as well; run and serve then need the same --exits beside --policy.

      ecotone policy train net.py:model --cluster home.toml --samples photos/ --deadline 30ms,60ms --out p.safetensors
    """
    deadlines = tuple(parse_quantity(text.strip(), "s", "--deadline") for text in deadline.split(","))
    if min(deadlines) <= 0:
        raise EcotoneError(f"--deadline {deadline}: must be above zero")
    wanted = _rates(rates) if rates else None
    work = load_work(
        model, cluster, input_shape=input_shape, samples=samples, labels=labels, exits=exits, bottlenecks=bottleneck,
        quiet=json_output,
    )  # fmt: skip
    with open_nodes(work) as nodes:
        profile = make_profile(work, nodes, path=profile_file)
    stated = [k.bandwidth_bytes_per_s for k in work.cluster.links if k.source == work.cluster.source]
    if not stated:
        raise EcotoneError("the cluster has no link from its source; a policy needs a device and a server to choose between")
    asked = Asked(
        rates_bytes_per_s=wanted or (min(stated) * SLOWEST, max(stated) * FASTEST),
        deadlines_s=tuple(sorted(set(deadlines))), most_plans=plans,
        period_s=parse_quantity(period, "s", "--period") if period else 0.0,
        settings=SacSettings(updates=updates, seed=seed),
    )  # fmt: skip
    codecs = sorted({"fp32", *(payload.codec for payload in profile.payloads)})
    with progress_bar("training", quiet=json_output) as report:
        found = train_policy(out_file.stem, work.captured.graph, work.cluster, profile, asked, codecs, report)
    save_trained(out_file, found.network, found.about)
    _print(found, json_output)
    err.print(f"[dim]wrote {out_file}")


def _rates(text: str) -> tuple[float, float]:
    values = [parse_quantity(part.strip(), "bytes_per_s", "--rates") for part in text.split(",")]
    if len(values) != 2 or not 0 < values[0] < values[1]:
        raise EcotoneError(f"--rates {text}: write the slowest and the fastest, for example 1Mbit/s,40Mbit/s")
    return values[0], values[1]


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A policy that `ecotone policy train` wrote.", show_default=False)],
    json_output: options.Json = False,
) -> None:
    """Say what a policy chooses among, where it was trained, and what it was worth there."""
    _print(load_trained(file), json_output)


def _print(trained: Trained, json_output: bool) -> None:
    about = trained.about
    if json_output:
        print_json(json.loads(schema.dump_json(about, "ecotone.policy.ondemand", 1)))
        return
    low, high = (format_quantity(rate, "bytes_per_s") for rate in about.ranges.rate_bytes_per_s)
    first, last = (format_quantity(seconds, "s") for seconds in about.ranges.deadline_s)
    out.print(f"{about.name}: {about.device} and {about.server}, {len(about.plans)} plans, {', '.join(about.scenarios)}")
    out.print(f"trained for {low} to {high}, deadlines {first} to {last}, seed {about.seed}", highlight=False)
    for plan in about.plans:
        out.print(f"[dim]{plan}", soft_wrap=True, highlight=False)
    if not all(f"{name}_reward" in about.measured for name in RIVALS):
        return
    table = listing("on other conditions", "reward", "in time")
    for name in RIVALS:
        reward, in_time = about.measured[f"{name}_reward"], about.measured.get(f"{name}_in_time", 0.0)
        table.add_row(name.replace("_", " "), f"{reward:.4f}", f"{in_time:.1%}")
    out.print(table)
    best = max(about.measured["best_static_reward"], about.measured["resolving_reward"])
    gain = about.measured["policy_reward"] - best
    verdict = (
        f"better than both by {gain:.4f}" if gain > 0 else f"no better than the best of them ({gain:.4f}): --adapt does"
    )
    out.print(f"beside the best static plan and solving again it is {verdict}", highlight=False)
