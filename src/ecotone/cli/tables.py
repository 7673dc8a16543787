"""Plans, profiles and simulations as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.markup import escape
from rich.table import Table

from ecotone.accuracy import NOWHERE, AccuracyTable, Cell
from ecotone.cost import PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.profile import Profile
from ecotone.profiling.ladders import is_exact, value_codec
from ecotone.units import format_quantity

__all__ = ["accuracy_tables", "listing", "plan_table", "profile_table", "seconds"]


def listing(*left: str, right: Iterable[str] = ()) -> Table:
    """An empty table in the style of all tables of the command line; the columns `right` are of numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def seconds(value: float) -> str:
    """Milliseconds with sense: 12.3 ms."""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def plan_table(plan: Plan, cost: PlanCost, graph: Graph) -> Table:
    """One row per transfer and stage, in the order in which a request meets them."""
    table = listing("what", "where", "how", "size", right=("time",))
    for index, transfer in enumerate(cost.transfers):
        if transfer.source != transfer.target:
            where = f"{transfer.source} -> {transfer.target}"
            what = f"send cut {transfer.position}"
            size = format_quantity(transfer.size_bytes, "bytes")
            share = f" for {transfer.share:.0%}" if transfer.share < 1 else ""
            table.add_row(what, where, f"{transfer.codec}{share}", size, seconds(transfer.total_s), style="cyan")
        if index < len(cost.stages):
            stage = cost.stages[index]
            total = graph.segment_flop(0, graph.num_blocks) or 1.0
            share = f"{graph.segment_flop(stage.start, stage.stop) / total:.0%} of the work"
            name = escape(f"blocks [{stage.start}, {stage.stop})")
            reach = f" for {stage.share:.0%}" if stage.share < 1 else ""
            table.add_row(name, stage.device, f"{stage.executor}{reach}", share, seconds(stage.compute_s))
            _add_exit(table, plan, cost, index)
    table.add_section()
    means = "mean over requests" if cost.exit_transfers else "sum"
    table.add_row("latency", "", means, format_quantity(cost.size_bytes, "bytes"), seconds(cost.latency_s), style="bold")
    table.add_row("throughput", "", "1 / slowest part", "", f"{cost.throughput_per_s:.3g} /s", style="bold")
    if cost.energy_joule > 0:
        table.add_row("energy", "", "modelled", "", format_quantity(cost.energy_joule, "joule"), style="bold")
    if cost.server_s > 0:
        table.add_row("servers busy", "", "per request", "", seconds(cost.server_s), style="bold")
    if cost.money > 0:
        table.add_row("money", "", "per request", "", f"{cost.money:.3g}", style="bold")
    sure = f", at most {cost.sure_points:.2g}" if cost.loss_points <= cost.sure_points < 100 else ""
    table.add_row("accuracy loss", "", "predicted", "", f"{cost.accuracy_loss_points:.2g} points{sure}", style="bold")
    return table


def _add_exit(table: Table, plan: Plan, cost: PlanCost, index: int) -> None:
    """The exit at the end of a stage, where there is one: who leaves, and how the result gets home."""
    edge = plan.exit_edge(index)
    if edge is None:
        return
    stage, home = cost.stages[index], cost.edges[edge]
    where = stage.device if home.source == home.target else f"{home.source} -> {home.target}"
    how = f"from {plan.stages[index].threshold:.3f}"
    table.add_row(f"exit {stage.exit}", where, how, f"{stage.leaves:.0%} leave", seconds(home.total_s), style="green")


def profile_table(profile: Profile) -> Table:
    """The whole model by executor and device: time, spread, memory, error; and what failed."""
    table = listing("device", "executor", right=("whole model", "spread", "memory", "error"))
    for s in sorted(profile.segments, key=lambda s: (s.device, s.median_s)):
        if (s.start, s.stop) == (0, profile.num_blocks):
            memory = format_quantity(s.memory_bytes, "bytes")
            table.add_row(s.device, s.executor, seconds(s.median_s), seconds(s.spread_s), memory, f"{s.relative_error:.1e}")
    for failure in profile.failures:
        table.add_row(failure.device, failure.executor, f"[yellow]passed over: {failure.reason[:90]}[/]")
    return table


def accuracy_tables(table: AccuracyTable) -> Iterator[Table | str]:
    """Points lost by cut and codec, what exits and variants lose, and whole plans beside the sum of their crossings."""
    of = f"{table.reference_points:.4g} % right" if table.is_labelled else "agreement with itself"
    cells = [c for c in table.cells if c.position != NOWHERE and not c.policy and not c.variant and not is_exact(c.codec)]
    decisions = max((c.num_decisions for c in table.cells), default=0)
    on = f"{table.num_samples} samples, {decisions} decisions"
    yield f"points lost of {of}, fitted<upper end at {table.confidence:.0%}; {on}"
    everywhere = {value_codec(c.codec) for c in cells if c.position > 0}
    shown = listing(right=("cut",))
    for codec in (names := [c for c in dict.fromkeys(value_codec(c.codec) for c in cells) if c in everywhere]):
        shown.add_column(codec, justify="right", no_wrap=True)
    losses = {(c.position, value_codec(c.codec)): _loss(c) for c in cells}
    for position in sorted({c.position for c in cells}):
        shown.add_row(str(position), *(losses.get((position, codec), "") for codec in names))
    yield shown
    pictures = [f"{codec} {loss}" for (_, codec), loss in losses.items() if codec not in everywhere]
    if pictures:
        yield f"the input as a picture: {', '.join(pictures)}"
    for policy in table.policies:
        shares = ", ".join(f"{share:.0%} at {name}" for name, share in zip(policy.exits, policy.shares, strict=True))
        loss = f"{policy.loss_points:.1f}<{policy.high_points:.1f}"
        yield f"exits {escape(policy.name)}: {shares} leave, {loss} points lost"
    for cell in table.cells:
        if cell.position == NOWHERE and cell.variant:
            yield f"variant {cell.variant[:12]}: {_loss(cell)} points lost"
    if table.compositions:
        yield ""
        yield _compositions(table)


def _compositions(table: AccuracyTable) -> Table:
    shown = listing("crossings of a whole plan", right=("sum", "measured", "interval", "the sum is"))
    for c in table.compositions:
        mark = "[red]too low[/]" if c.is_refuted else "safe" if c.is_safe else "within the interval"
        interval = f"{c.low_points:.2f} to {c.high_points:.2f}"
        shown.add_row(escape(str(c)), f"{c.predicted_points:.2f}", f"{c.loss_points:.2f}", interval, mark)
    return shown


def _loss(cell: Cell) -> str:
    return f"{cell.fitted_points:.1f}<{cell.high_points:.1f}"
