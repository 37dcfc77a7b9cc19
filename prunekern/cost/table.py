"""A profile as people read it: a table, coloured where rich is installed, plain text elsewhere."""

from __future__ import annotations

import sys
from typing import TextIO

from prunekern.cost.count import Cost, Layer, Profile

COLUMNS = ("layer", "operator", "output", "MACs", "share", "elementwise", "params", "weights", "activations")
LEFT = 3                       # so many columns hold text, all others numbers
Row = tuple[str, ...]


def count(value: float, unit: str = "") -> str:
    """1234567 -> ``1.235 M``; exact below ten thousand."""
    if value >= 1e4:
        value = float(f"{value:.3e}")             # rounded before the prefix is picked: 999999 is 1 M
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(scale, 1e4):
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.0f}{' ' + unit if unit else ''}"


def rows(profile: Profile, full: bool) -> list[Row]:
    """One row per operator with MACs or weights (``full``: for each), the rest in one row, then the total."""
    table, rest = [], []
    for layer in profile.layers:
        if full or layer.cost.macs or layer.cost.weight_bytes:
            table.append(_row(profile, *_names(layer), layer.cost))
        else:
            rest.append(layer.cost)
    if rest:
        table.append(_row(profile, f"{len(rest)} others", "", "", sum(rest, Cost())))
    if profile.unused != Cost():
        table.append(_row(profile, "not read by the forward", "", "", profile.unused))
    return [*table, _row(profile, "total", "", "", profile.total)]


def _names(layer: Layer) -> tuple[str, str, str]:
    return layer.module or layer.name, layer.op.removeprefix("aten."), "x".join(map(str, layer.shape))


def _row(profile: Profile, name: str, op: str, output: str, cost: Cost) -> Row:
    share = f"{100 * cost.macs / profile.total.macs:.1f} %" if profile.total.macs else ""
    return (name, op, output, count(cost.macs), share, count(cost.elementwise), count(cost.params),
            count(cost.weight_bytes, "B"), count(cost.activation_bytes, "B"))


def summary(profile: Profile) -> list[str]:
    """The totals in words, what was not counted, and notes."""
    total, peak = profile.total, profile.peak
    where = f" at {peak.module or peak.node}" if peak.node else ""
    lines = [
        f"batch {profile.batch}: {count(total.macs)} MACs = {count(total.flops)} FLOPs "
        f"(fvcore counts {count(total.fvcore_flops)}), {count(total.elementwise)} elementwise operations",
        f"{count(total.params)} parameters, {count(total.buffers)} values in buffers: "
        f"{count(total.weight_bytes, 'B')}",
        f"activations: {count(total.read_bytes, 'B')} read, {count(total.written_bytes, 'B')} written, "
        f"peak {count(peak.bytes, 'B')}{where}"]
    for item in profile.uncounted:
        more = f" and {len(item.where) - 3} more" if len(item.where) > 3 else ""
        places = ", ".join(item.where[:3]) + more
        lines.append(f"NOT COUNTED: {len(item.where)} x {item.op}: {item.reason}; at {places}")
    return lines + [f"note: {note}" for note in profile.notes]


def text(profile: Profile, full: bool = False) -> str:
    """Aligned plain text."""
    table = [COLUMNS, *rows(profile, full)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]

    def line(row: Row) -> str:
        cells = (cell.ljust(width) if column < LEFT else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    body = [line(row) for row in table]
    return "\n".join([body[0], rule, *body[1:-1], rule, body[-1], "", *summary(profile)])


def _fitting(table: list[Row], width: int) -> list[int]:
    """The columns that fit into ``width``, the least telling ones left out first."""
    shown = list(range(len(COLUMNS)))
    for spare in ("elementwise", "activations", "weights", "output", "operator"):
        if sum(2 + max(len(row[column]) for row in table) for column in shown) <= width:
            break
        shown.remove(COLUMNS.index(spare))
    return shown


def show(profile: Profile, full: bool = False, file: TextIO | None = None) -> None:
    """Print to ``file`` (default: standard output)."""
    file = file or sys.stdout
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(text(profile, full), file=file)
        return
    # Where the output is no terminal there is no width to fit into, and cutting figures would be a loss.
    console = Console(file=file, highlight=False, width=None if file.isatty() else 160)
    body = rows(profile, full)
    shown = _fitting([COLUMNS, *body], console.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in shown:
        table.add_column(COLUMNS[column], justify="left" if column < LEFT else "right", no_wrap=column >= LEFT,
                         overflow="fold")
    for row in body[:-1]:
        table.add_row(*(Text(row[column]) for column in shown))
    table.add_section()
    table.add_row(*(Text(body[-1][column], style="bold") for column in shown))
    console.print(table)
    if len(shown) < len(COLUMNS):
        left = ", ".join(COLUMNS[column] for column in range(len(COLUMNS)) if column not in shown)
        console.print(Text(f"left out for want of width: {left}", style="dim"))
    for line in summary(profile):
        console.print(Text(line, style="bold red" if line.startswith("NOT COUNTED") else ""))
