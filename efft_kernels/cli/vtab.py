"""`efft-kernels vtab`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import parse
from .benchmark import BenchmarkOptions, run_and_report
from .options import with_options
from .scheduling import SchedulingOptions
from .terminal import note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..experiments.benchmark import Choices, Outcome, Plan
    from ..experiments.grid import Grid


@with_options
def vtab(
    options: BenchmarkOptions,
    scheduling: SchedulingOptions,
    tasks: Annotated[
        str, typer.Option(help="Names or aliases separated by commas, or all 19.")
    ] = "all",
    seeds: Annotated[str, typer.Option(help="Separated by commas; the papers' is 42.")] = "42",
    output: Annotated[Path, typer.Option(help="Folder for the cells, tables and figures.")] = Path(
        "runs/vtab"
    ),
) -> None:
    """VTAB-1K: tasks × methods × seeds beside the published numbers; finished cells are kept."""

    def make_plan(choices: Choices) -> Plan:
        from ..experiments.benchmark import plan_vtab
        from ..experiments.tasks import choose

        chosen = choose(tasks.split(","), "vtab")
        return plan_vtab(options.data, chosen, parse.integers(seeds, "seeds"), choices, note)

    def grids(outcome: Outcome) -> list[Grid]:
        from ..experiments.tables import vtab_grids

        return vtab_grids(outcome, options.report)

    def figures(outcome: Outcome) -> dict[str, Figure]:
        return vtab_figures(outcome, options.report)

    run_and_report(options, output, make_plan, grids, figures, scheduling=scheduling)


def vtab_figures(outcome: Outcome, report: str) -> dict[str, Figure]:
    """Bars by group, accuracy against parameters, and with three tasks a radar.

    Args:
        outcome: of a benchmark.
        report: the result to draw.
    """
    from ..experiments.cell import BEST_ON_TEST
    from ..experiments.figures import group_bars, radar, scatter
    from ..experiments.tables import tasks_run, vtab_scores, with_published

    ran = tasks_run(outcome)
    scores = with_published(vtab_scores(outcome, report), ran)
    if not scores:  # no cell has this result
        return {}
    title = f"VTAB-1K, {report}"
    if report == BEST_ON_TEST:
        title += " (optimistic)"
    found = {
        "groups": group_bars(scores, ran, title),
        "parameters": scatter(scores, ran, title),
    }
    if len(ran) > 2:
        found["radar"] = radar(scores, ran, title)
    return found
