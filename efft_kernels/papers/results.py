"""What the papers print: their tables as data, and what in them is wrong.

`results.json` holds every cell as the paper prints it. What it should be, where that is known, and
why, stands beside it.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "%": 1.0}
_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)([KMB%]?)")


@dataclass(frozen=True)
class Paper:
    """One of the papers."""

    key: str
    title: str
    arxiv: str


@dataclass(frozen=True)
class Column:
    """A table's column; `mean_of`: it is the mean over these groups of columns of their means."""

    key: str
    label: str
    mean_of: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Erratum:
    """Something printed that is wrong, or that reads as something it is not.

    Attributes:
        row: the row's key; for a claim of the text, the place where it stands.
        column: the column's key; None for the row's name, or a claim.
        printed: what the paper prints.
        right: what it should be; None where nothing better is known, or nothing is wrong.
        why: how that is known.
    """

    row: str
    column: str | None
    printed: str
    right: str | None
    why: str


@dataclass(frozen=True)
class Mean:
    """A column of means in one row.

    Attributes:
        printed: as the paper has it.
        computed: from the cells that the paper prints.
    """

    row: str
    column: str
    printed: float
    computed: float

    @property
    def follows(self) -> bool:
        """Whether the printed number is the computed one rounded."""
        return abs(self.printed - self.computed) <= 0.05 + 1e-9


@dataclass(frozen=True)
class Table:
    """One table of a paper; `cells` maps (row, column) to the text that is printed."""

    key: str
    paper: Paper
    number: str
    title: str
    backbone: str
    columns: tuple[Column, ...]
    rows: Mapping[str, str]  # key -> label, in the paper's order
    cells: Mapping[tuple[str, str], str]
    errata: tuple[Erratum, ...]

    def value(self, row: str, column: str) -> float | None:
        """The cell as a number, M and B resolved; None where it is none."""
        found = _NUMBER.fullmatch(self.cells[row, column].replace(",", ""))
        return None if found is None else round(float(found[1]) * _UNITS[found[2]], 6)

    def values(self, row: str, columns: tuple[str, ...]) -> dict[str, float]:
        """The row's numbers in some columns.

        Raises:
            ValueError: a cell that is no number.
        """
        found = {column: self.value(row, column) for column in columns}
        if missing := [column for column, value in found.items() if value is None]:
            raise ValueError(f"{self.key} must have numbers in row {row!r}, not so in {missing}")
        return {column: value for column, value in found.items() if value is not None}

    def means(self) -> list[Mean]:
        """Every mean that the table prints, beside the one that its cells give."""
        found = []
        for column in self.columns:
            for row in self.rows if column.mean_of else ():
                groups = [self.values(row, group).values() for group in column.mean_of]
                computed = statistics.fmean(statistics.fmean(group) for group in groups)
                printed = self.value(row, column.key)
                if printed is not None:
                    found.append(Mean(row, column.key, printed, computed))
        return found


@dataclass(frozen=True)
class Claim:
    """A number in a paper's text, as an `Erratum` of no table."""

    paper: Paper
    erratum: Erratum


@dataclass(frozen=True)
class Figure:
    """A figure of a paper; `why_not` says what is missing where its numbers are not printed."""

    paper: Paper
    number: str
    title: str
    why_not: str | None


def table(key: str) -> Table:
    """One table, such as "efft_table_1".

    Raises:
        ValueError: there is none of that name.
    """
    if key not in tables():
        raise ValueError(f"table must be one of {', '.join(tables())}, got {key!r}")
    return tables()[key]


@cache
def tables() -> Mapping[str, Table]:
    """Every table of the three papers that holds results or counts."""
    papers = _papers()
    return MappingProxyType(
        {
            key: Table(
                key=key,
                paper=papers[item["paper"]],
                number=item["number"],
                title=item["title"],
                backbone=item["backbone"],
                columns=tuple(_column(column) for column in item["columns"]),
                rows=MappingProxyType({row["key"]: row["label"] for row in item["rows"]}),
                cells=MappingProxyType(
                    {
                        (row["key"], column["key"]): cell
                        for row in item["rows"]
                        for column, cell in zip(item["columns"], row["cells"], strict=True)
                    }
                ),
                errata=tuple(Erratum(**erratum) for erratum in item["errata"]),
            )
            for key, item in _read()["tables"].items()
        }
    )


@cache
def claims() -> tuple[Claim, ...]:
    """What the texts say of their results and counts, checked."""
    return tuple(
        Claim(
            _papers()[item["paper"]],
            Erratum(item["where"], None, item["printed"], item["right"], item["why"]),
        )
        for item in _read()["claims"]
    )


@cache
def figures() -> tuple[Figure, ...]:
    """The figures of results."""
    return tuple(
        Figure(_papers()[item["paper"]], item["number"], item["title"], item.get("why"))
        for item in _read()["figures"]
    )


def _column(item: Mapping[str, Any]) -> Column:
    groups = tuple(tuple(group) for group in item.get("mean_of", ()))
    return Column(item["key"], item["label"], groups)


@cache
def _papers() -> Mapping[str, Paper]:
    return {key: Paper(key, **item) for key, item in _read()["papers"].items()}


@cache
def _read() -> dict[str, Any]:
    text = (files(__package__) / "results.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]
