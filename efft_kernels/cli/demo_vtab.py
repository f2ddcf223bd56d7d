"""`efft-kernels demo-vtab`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .benchmark import BenchmarkOptions, run_and_report
from .errors import input_errors
from .terminal import bar, note, progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..experiments.benchmark import Choices, Outcome, Plan
    from ..experiments.grid import Grid


def demo_vtab(
    output: Annotated[Path, typer.Option(help="Folder for images, cells and report.")] = Path(
        "runs/demo-vtab"
    ),
    methods: Annotated[
        str | None, typer.Option(help="As for vtab; default: all but noah, which needs 12 blocks.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of every training.")] = 6,
    source_epochs: Annotated[int, typer.Option(min=1, help="Of the backbone's training.")] = 20,
) -> None:
    """vtab with every method on two small tasks of real photographs, in some minutes."""
    from ..experiments import photographs
    from ..training.methods import TRAINABLE

    console = Console()
    start = time.perf_counter()
    weights = output / "backbone" / "backbone.safetensors"
    with input_errors(), progress(console) as shown:
        photographs.write_tasks(output / "data")
        if not weights.is_file():
            show = bar(shown, "training a backbone on crops of other photographs")
            _, top1 = photographs.train_backbone(output / "backbone", source_epochs, show)
            console.print(
                f"backbone: {top1:.1f} % of unseen crops of its own photographs", highlight=False
            )
    options = BenchmarkOptions(
        data=output / "data",
        methods=methods or ",".join(name for name in TRAINABLE if name != "noah"),
        model=photographs.MODEL,
        checkpoint=weights,
        img_size=photographs.SIZE,
        epochs=epochs,
        batch_size=16,
        lr=2e-3,  # of 1e-3 the few updates gain little
        rank="4",
        test_every=3,
        workers=0,
        device="cpu",
    )

    def make_plan(choices: Choices) -> Plan:
        from ..experiments.benchmark import plan_vtab

        return plan_vtab(options.data, photographs.TASKS, [42], choices, note)

    def grids(outcome: Outcome) -> list[Grid]:
        from ..experiments.tables import vtab_grids

        return vtab_grids(outcome, options.report)

    def figures(outcome: Outcome) -> dict[str, Figure]:
        from ..experiments.figures import group_bars, scatter
        from ..experiments.tables import tasks_run, vtab_scores

        ran, scores = tasks_run(outcome), vtab_scores(outcome, options.report)
        title = "Small tasks of photographs, last"
        return {
            "groups": group_bars(scores, ran, title),
            "parameters": scatter(scores, ran, title),
        }

    run_and_report(options, output, make_plan, grids, figures, lead=[" ".join(_ABOUT.split())])
    console.print(f"{time.perf_counter() - start:.0f} s in all", highlight=False)


_ABOUT = """
Two small tasks of photographs that scikit-image ships: faces (80 images to train on, 120 to test)
and textures (128 and 96), and a ViT of half a million parameters trained here on crops of six
other photographs. They show that everything runs and learns; which method is best on VTAB-1K they
do not show.
"""
