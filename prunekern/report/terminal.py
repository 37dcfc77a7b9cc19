"""The report in a terminal: coloured tables where rich is installed, plain text elsewhere."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, TextIO

from prunekern.report import units
from prunekern.report.model import Report
from prunekern.report.tables import Grid, grids

if TYPE_CHECKING:
    from rich.table import Table

_ASCII = {"→": "->", "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "≤": "<=", "≥": ">=", "×": "x", "µ": "u"}
_ASCII |= {units.NBSP: " ", "\N{RIGHT SINGLE QUOTATION MARK}": "'"}
_STYLES = {"": "", "good": "green", "bad": "bold red", "strong": "bold", "dim": "dim"}


def show(report: Report, *, full: bool = False, file: TextIO | None = None) -> None:
    """Prints the report to `file` (standard output if None).

    Long sections are cut to their telling rows, and say so; `full=True` prints all, with the environment.
    """
    stream = file or sys.stdout
    unicode = (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
    try:
        import rich  # noqa: F401
    except ImportError:
        unicode = False
    if unicode:
        _show_rich(report, full, stream)
    else:
        _show_plain(report, full, stream)


def _headline(report: Report) -> list[tuple[str, str, str]]:
    return [
        tuple(units.printable(text) for text in (f.label, units.joined(f.value, f.unit), f.detail))  # type: ignore[misc]
        for f in report.headline
    ]


def _verdict(report: Report) -> tuple[bool, str]:
    assert report.proof is not None
    proof = report.proof
    if proof.passed:
        return True, f"Verified: all {len(proof.judged)} checks within their limits."
    if not proof.judged:
        return False, "NOT VERIFIED: no check was judged."
    return False, f"NOT VERIFIED: {len(proof.failed)} of {len(proof.judged)} checks missed their limit."


def _rich_table(grid: Grid) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = Text(grid.title, style="bold")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, padding=0)
    table.caption = Text(grid.caption) if grid.caption else None
    table.caption_justify = "left"
    for index, column in enumerate(grid.columns):
        number = index in grid.numbers
        table.add_column(Text(column), justify="right" if number else "left", overflow="fold")
    for cells, style in zip(grid.rows, grid.styles, strict=True):
        table.add_row(*(Text(cell) for cell in cells), style=_STYLES[style])
    return table


def _show_rich(report: Report, full: bool, file: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Where the output is no terminal there is no width to fit into, and cutting figures would be a loss.
    width = None if file.isatty() else max(160, shutil.get_terminal_size().columns)
    console = Console(file=file, highlight=False, width=width)
    console.print(Text(units.printable(report.title), style="bold"))
    if report.subtitle:
        console.print(Text(units.printable(report.subtitle), style="dim"))
    if report.headline:
        cards = Table(box=None, show_header=False, pad_edge=False)
        for label, value, detail in _headline(report):
            number = Text(value, style="bold cyan", justify="right")
            cards.add_row(Text(label), number, Text(detail, style="dim"))
        console.print()
        console.print(cards)
    if report.proof:
        good, text = _verdict(report)
        console.print(Text(text, style="bold green" if good else "bold red"))
    for grid in grids(report, full=full):
        console.print()
        console.print(_rich_table(grid))
    for line in _closing(report, full):
        console.print(Text(line))


def _show_plain(report: Report, full: bool, file: TextIO) -> None:
    lines = [units.printable(report.title)]
    if report.subtitle:
        lines.append(units.printable(report.subtitle))
    headline = _headline(report)
    if headline:
        width = max(len(label) for label, _, _ in headline)
        lines += ["", *(f"{label:<{width}}  {value}  {detail}".rstrip() for label, value, detail in headline)]
    if report.proof:
        lines.append(_verdict(report)[1])
    for grid in grids(report, full=full):
        lines += ["", *_plain_table(grid)]
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = "\n".join(lines + _closing(report, full))
    print("".join(_encodable(character, encoding) for character in text), file=file)


def _encodable(character: str, encoding: str) -> str:
    """The character, or what stands for it where the stream cannot show it; a minus must not become a "?"."""
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return _ASCII.get(character, "?")
    return character


def _plain_table(grid: Grid) -> list[str]:
    everything = (grid.columns, *grid.rows)
    widths = [max(len(row[index]) for row in everything) for index in range(len(grid.columns))]

    def line(cells: tuple[str, ...]) -> str:
        padded = (
            cell.rjust(width) if index in grid.numbers else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    caption = [f"({grid.caption})"] if grid.caption else []
    return [grid.title, line(grid.columns), rule, *(line(row) for row in grid.rows), *caption]


def _closing(report: Report, full: bool) -> list[str]:
    lines = [f"- {units.printable(note)}" for note in report.notes]
    if lines:
        lines = ["", "Notes", *lines]
    if full and report.environment:
        facts = (f"{name}: {value}" for name, value in report.environment.items())
        lines += ["", "Environment", *(units.printable(fact) for fact in facts)]
    return lines
