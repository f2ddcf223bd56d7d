"""The papers' tables from the facts and formulas alone, with what they print wrongly marked."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..papers import results
from ..papers.counts import Count, counts
from ..papers.results import Erratum, Table
from .grid import Grid


def table_grid(table: Table) -> Grid:
    """A paper's table; [1] marks what its first note is about.

    Means that do not follow from the printed cells and counts that do not follow from a formula are
    marked by computing them; the rest are the table's errata.
    """
    notes: list[str] = []
    marks: dict[tuple[str, str | None], list[int]] = {}

    def mark(row: str, column: str | None, text: str) -> None:
        notes.append(f"[{len(notes) + 1}] {text}")
        marks.setdefault((row, column), []).append(len(notes))

    for erratum in table.errata:
        where = table.rows[erratum.row]
        mark(erratum.row, erratum.column, f"{where}: {_erratum(erratum)}")
    for mean in table.means():
        if not mean.follows:
            text = f"{mean.printed:.1f} is printed, the printed cells give {mean.computed:.2f}"
            mark(mean.row, mean.column, f"{table.rows[mean.row]}: {text}.")
    for count in counts():
        known = (count.row, count.column) in marks
        if count.table == table.key and count.verdict == "does not follow" and not known:
            text = f"{count.printed} is printed, {count.formula} gives {count.counted:,}"
            mark(count.row, count.column, f"{table.rows[count.row]}: {text}.")

    def marked(text: str, row: str, column: str | None) -> str:
        return text + "".join(f" [{number}]" for number in marks.get((row, column), ()))

    return Grid(
        f"{table.paper.key.upper()} (arXiv:{table.paper.arxiv}), {table.number}: {table.title};"
        f" {table.backbone}",
        ("", *(column.label for column in table.columns)),
        tuple(
            (
                marked(label, row, None),
                *(marked(table.cells[row, c.key], row, c.key) for c in table.columns),
            )
            for row, label in table.rows.items()
        ),
        tuple(notes),
    )


def _erratum(erratum: Erratum) -> str:
    right = "" if erratum.right is None else f", right is {erratum.right}"
    return f"{erratum.printed} is printed{right}. {erratum.why}"


def count_grid() -> Grid:
    """Every printed number of parameters beside the one counted here."""
    return Grid(
        "Parameters: printed, and counted by this package's methods or the formula",
        ("", "row", "printed", "counted", "", "formula"),
        tuple(
            (
                _place(count),
                results.table(count.table).rows[count.row],
                count.printed,
                f"{count.counted:,}",
                count.verdict,
                count.formula,
            )
            for count in counts()
        ),
    )


def _place(count: Count) -> str:
    table = results.table(count.table)
    column = next(c.label for c in table.columns if c.key == count.column)
    return f"{table.paper.key} {table.number}, {column}"


def claim_grid() -> Grid:
    """What the papers' texts say, checked."""
    return Grid(
        "Claims of the texts",
        ("", "printed", "right"),
        tuple(
            (
                f"[{number}] {claim.paper.key}, {claim.erratum.row}",
                claim.erratum.printed,
                claim.erratum.right or "as printed",
            )
            for number, claim in enumerate(results.claims(), start=1)
        ),
        tuple(
            f"[{number}] {claim.erratum.why}"
            for number, claim in enumerate(results.claims(), start=1)
        ),
    )


def grids() -> list[Grid]:
    """All of them."""
    return [*map(table_grid, results.tables().values()), count_grid(), claim_grid()]


def to_json() -> dict[str, Any]:
    """The same as data."""
    content = {
        "means": [
            {"table": key, **dataclasses.asdict(mean), "follows": mean.follows}
            for key, table in results.tables().items()
            for mean in table.means()
        ],
        "counts": [{**dataclasses.asdict(count), "verdict": count.verdict} for count in counts()],
        "errata": [
            {"table": key, **dataclasses.asdict(erratum)}
            for key, table in results.tables().items()
            for erratum in table.errata
        ],
        "claims": [
            {"paper": claim.paper.key, **dataclasses.asdict(claim.erratum)}
            for claim in results.claims()
        ],
        "figures": [dataclasses.asdict(figure) for figure in results.figures()],
    }
    return json.loads(json.dumps(content))  # type: ignore[no-any-return]
