"""The report of an experiment as one page for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .grid import Grid

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 0.5em 0; }
th, td { border-bottom: 1px solid #ccc; padding: 0.25em 0.7em; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
img { max-width: 100%; }
"""


def html(title: str, lead: Sequence[str], grids: Sequence[Grid], pictures: Sequence[str]) -> str:
    """A page of paragraphs, tables and pictures.

    Args:
        title: of the page.
        lead: paragraphs on top.
        grids: the tables.
        pictures: files beside the page.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for text in lead)]
    parts += [f'<p><img src="{escape(name)}" alt="{escape(name)}"></p>' for name in pictures]
    parts += [_table(grid) for grid in grids]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>{head}</head>
<body>
{body}
</body>
</html>
"""


def _table(grid: Grid) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in grid.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in grid.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in grid.notes)
    table = f"<table>\n<tr>{head}</tr>\n{rows}</table>"
    return f"<h2>{escape(grid.title)}</h2>\n{table}" + (f"\n<ul>{notes}</ul>" if notes else "")
