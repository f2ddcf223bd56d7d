"""A report of what a baseline trains, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class BaselineDescription:
    """What `AttachedBaseline.describe` returns.

    Attributes:
        baseline: the configuration as text.
        rows: one per trained tensor, the head's last: name, shape, parameters.
    """

    baseline: str
    rows: list[dict[str, Any]]

    def __rich__(self) -> Table:
        total = sum(row["parameters"] for row in self.rows)
        table = Table(title=self.baseline, caption=f"{total:,} parameters, the head's included")
        for header in ("trained", "tensors", "shape", "parameters"):
            table.add_column(header, justify="left" if header in ("trained", "shape") else "right")
        alike: dict[tuple[str, str], list[int]] = {}
        for row in self.rows:
            key = _pattern(row["name"]), str(row["shape"])
            alike.setdefault(key, []).append(row["parameters"])
        for (name, shape), counts in alike.items():
            table.add_row(name, str(len(counts)), shape, f"{sum(counts):,}")
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(width=120, file=text, force_jupyter=False, force_terminal=False).print(self)
        return text.getvalue()


def _pattern(name: str) -> str:
    """The name with its block numbers as *."""
    parts = [
        "_".join("*" if word.isdigit() else word for word in part.split("_"))
        for part in name.split(".")
    ]
    return ".".join(parts)
