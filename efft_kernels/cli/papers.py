"""`efft-kernels papers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import input_errors


def papers(
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("runs/papers"),
) -> None:
    """The three papers' tables and figures again, with what they print wrongly marked."""
    from ..analysis.plots import save
    from ..atomic_files import write_text
    from ..experiments import figures, paper_tables
    from ..papers import results

    console = Console()
    with input_errors():
        if output.exists() and not output.is_dir():
            raise ValueError(f"output must be a folder, got the file {output}")
        output.mkdir(parents=True, exist_ok=True)
    grids = paper_tables.grids()
    not_drawn = [
        f"{figure.paper.key} {figure.number} ({figure.title}): {figure.why_not}"
        for figure in results.figures()
        if figure.why_not is not None
    ]
    with input_errors():
        missing = "".join(f"- {line}\n" for line in not_drawn)
        text = "\n".join(grid.markdown() for grid in grids)
        write_text(output / "papers.md", f"{text}\n### Not drawn\n\n{missing}")
        content = json.dumps(paper_tables.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(output / "papers.json", content + "\n")
        for name, figure in figures.of_papers().items():
            save(figure, output, name)
    for grid in grids:
        grid.show(console)
    console.print("Not drawn:", *not_drawn, sep="\n  ", markup=False, highlight=False)
    console.print(f"wrote papers.md, papers.json and the figures to {output}", highlight=False)
