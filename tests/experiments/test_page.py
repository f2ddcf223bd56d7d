"""Tables of texts: on a narrow terminal, as Markdown, and on the page for a browser."""

from __future__ import annotations

import io

from rich.console import Console

from efft_kernels.experiments.grid import Grid
from efft_kernels.experiments.page import html

GRID = Grid(
    "A title",
    ("", *(f"column {n}" for n in range(8))),
    tuple((f"row {r}", *(f"{r}.{n}" for n in range(8))) for r in "ab"),
    ("[1] a note on [x]",),
)


def test_a_narrow_terminal_gets_the_columns_in_parts() -> None:
    text = io.StringIO()
    GRID.show(Console(file=text, width=50))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 50
    assert sum("row a" in line for line in lines) == 3
    for n in range(8):
        assert sum(f"column {n}" in line for line in lines) == 1
        assert sum(f"b.{n}" in line for line in lines) == 1
    assert "[1] a note on [x]" in lines


def test_markdown() -> None:
    grid = Grid("T", ("", "a|b"), (("x", "1"),))
    assert grid.markdown() == "### T\n\n|  | a\\|b |\n| --- | --- |\n| x | 1 |\n"


def test_the_page_escapes_what_it_shows() -> None:
    grid = Grid("<T>", ("", "a&b"), (("<x>", "1"),), ("n < 2",))
    page = html("vtab: <faces>", ["left out <dtd>"], [grid], ["radar.svg"])
    for part in (
        "<h1>vtab: &lt;faces&gt;</h1>",
        "<p>left out &lt;dtd&gt;</p>",
        "<h2>&lt;T&gt;</h2>",
        "<th>a&amp;b</th>",
        "<td>&lt;x&gt;</td>",
        "<li>n &lt; 2</li>",
        '<img src="radar.svg"',
    ):
        assert part in page
