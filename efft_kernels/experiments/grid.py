"""A table of texts, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PADDING = 3  # a column's border and the spaces on its two sides


@dataclass(frozen=True)
class Grid:
    """Rows of texts; the first column names the row.

    Attributes:
        title: one line.
        header: of every column.
        rows: as wide as the header.
        notes: lines below.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def show(self, console: Console) -> None:
        """Print it, in parts where the terminal is narrower, each with the rows' names."""
        console.print(Text(self.title, style="bold"))
        for columns in self._parts(console.width):
            table = Table()
            for index in columns:
                side = "right" if index else "left"
                table.add_column(Text(self.header[index]), justify=side, no_wrap=True)  # type: ignore[arg-type]
            for row in self.rows:
                table.add_row(*(Text(row[index]) for index in columns))
            console.print(table)
        for note in self.notes:
            console.print(Text(note))
        console.print()

    def _parts(self, width: int) -> list[list[int]]:
        widths = [
            max(cell_len(row[index]) for row in (self.header, *self.rows)) + _PADDING
            for index in range(len(self.header))
        ]
        parts: list[list[int]] = [[0]]
        used = widths[0] + 1
        for index in range(1, len(widths)):
            if used + widths[index] > width and len(parts[-1]) > 1:
                parts.append([0])
                used = widths[0] + 1
            parts[-1].append(index)
            used += widths[index]
        return parts

    def markdown(self) -> str:
        """The same as a Markdown table."""
        lines = [f"### {self.title}", "", _line(self.header), _line(["---"] * len(self.header))]
        lines += [_line(row) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
