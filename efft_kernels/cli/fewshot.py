"""`efft-kernels fewshot`."""

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
def fewshot(
    options: BenchmarkOptions,
    scheduling: SchedulingOptions,
    tasks: Annotated[
        str, typer.Option(help="Sets or aliases separated by commas, or all five.")
    ] = "all",
    shots: Annotated[str, typer.Option(help="Images a class.")] = "1,2,4,8,16",
    seeds: Annotated[
        str, typer.Option(help="Of the lists, and of the training with each.")
    ] = "0,1,2",
    output: Annotated[Path, typer.Option(help="Folder for the cells, tables and figures.")] = Path(
        "runs/fewshot"
    ),
) -> None:
    """Fine-grained few-shot sets × shots × methods × seeds, in the layout of NOAH's lists."""

    def make_plan(choices: Choices) -> Plan:
        from ..experiments.benchmark import plan_fewshot
        from ..experiments.cell import VAL_CHOSEN
        from ..experiments.tasks import choose
        from ..training.settings import require

        report = options.report
        require("report", report != VAL_CHOSEN, "last or best_on_test for few-shot sets", report)

        chosen = choose(tasks.split(","), "fewshot")
        counts, numbers = parse.integers(shots, "shots"), parse.integers(seeds, "seeds")
        return plan_fewshot(options.data, chosen, counts, numbers, choices, note)

    def grids(outcome: Outcome) -> list[Grid]:
        from ..experiments.tables import fewshot_grids

        return fewshot_grids(outcome, options.report)

    def figures(outcome: Outcome) -> dict[str, Figure]:
        from ..experiments.figures import shots_lines
        from ..experiments.tables import fewshot_panels

        panels = fewshot_panels(outcome, options.report)
        return {"shots": shots_lines(panels, "top-1 accuracy (%)")} if panels else {}

    run_and_report(options, output, make_plan, grids, figures, scheduling=scheduling)
