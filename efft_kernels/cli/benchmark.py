"""What `vtab`, `fewshot` and `sweep` share: options, running the cells, and the files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .. import use_backend
from ..training.methods import TRAINABLE
from . import parse
from .errors import FAILED, USER_ERROR, fail, input_errors, interruptible
from .options import Amp, Device, check_backend
from .scheduling import SchedulingOptions
from .terminal import bar, note, progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..experiments.benchmark import Choices, Outcome, Plan
    from ..experiments.cell import Cell
    from ..experiments.grid import Grid
    from ..experiments.sweep import SweepPlan


@dataclass(frozen=True)
class BenchmarkOptions:
    """Where a benchmark's images and weights are, which methods run, and how."""

    data: Annotated[Path, typer.Option(help="Folder of the tasks' folders.")]
    methods: Annotated[
        str, typer.Option(help=f"Separated by commas, or all: {', '.join(TRAINABLE)}.")
    ] = "linear,lora,fact_tt,fact_tk,efft1,efft2"
    model: Annotated[
        str | None, typer.Option("--model", help="timm model; default: the papers' ViT-B/16.")
    ] = None
    checkpoint: Annotated[
        Path | None, typer.Option(help="Local weights: .safetensors, .pth, or ViT's .npz.")
    ] = None
    pretrained: Annotated[
        bool, typer.Option(help="Fetch timm's weights where no --checkpoint is given.")
    ] = True
    img_size: Annotated[int | None, typer.Option(help="Pixels; default: 224.")] = None
    epochs: Annotated[int | None, typer.Option(help="Default: the papers' 100.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Default: the papers' 64.")] = None
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate; default: the papers' 1e-3.")
    ] = None
    rank: Annotated[
        str | None, typer.Option(help="Of every method that has one; default: the recipes'.")
    ] = None
    scale: Annotated[
        float | None, typer.Option(help="Factor s of every method; default: the recipes'.")
    ] = None
    test_every: Annotated[
        int, typer.Option(help="Epochs between two measurements on the test images.")
    ] = 10
    report: Annotated[
        str, typer.Option(help="Result to tabulate by task: last, val_chosen or best_on_test.")
    ] = "last"
    amp: Annotated[Amp, typer.Option(help="Autocast dtype.")] = Amp.none
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 2
    device: Device = "auto"
    backend: Annotated[str, typer.Option(help="Kernels: auto, torch, triton, ...")] = "auto"
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be read.")
    ] = False

    def choices(self) -> Choices:
        """What every cell is told.

        Raises:
            ValueError: an option that cannot be parsed or makes no sense.
        """
        from ..experiments.benchmark import Choices, file_digest
        from ..experiments.cell import PROTOCOLS
        from ..training.settings import require, resolve_device

        require("report", self.report in PROTOCOLS, f"one of {', '.join(PROTOCOLS)}", self.report)
        check_backend(self.backend)
        resolve_device(self.device)
        names = TRAINABLE if self.methods.strip() == "all" else self.methods.split(",")
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("model", "checkpoint", "img_size", "epochs", "batch_size", "lr")
            if getattr(self, name) is not None
        }
        for name in ("pretrained", "workers", "device", "backend", "skip_bad_images"):
            given[name] = getattr(self, name)
        given["amp"] = self.amp.value
        options: dict[str, Any] = {}
        if self.rank is not None:
            options["rank"] = parse.rank(self.rank)
        if self.scale is not None:
            options["scale"] = self.scale
        return Choices(
            methods=tuple(name.strip() for name in names),
            given=given,
            options=options,
            test_every=self.test_every,
            checkpoint_sha256=file_digest(self.checkpoint),
        )


def run_and_report(
    options: BenchmarkOptions,
    output: Path,
    make_plan: Callable[[Choices], Plan],
    grids: Callable[[Outcome], list[Grid]],
    figures: Callable[[Outcome], Mapping[str, Figure]],
    lead: Sequence[str] = (),
    scheduling: SchedulingOptions = SchedulingOptions(),  # noqa: B008
) -> None:
    """Run what the ledger in `output` lacks, and write the tables and figures of all that is there.

    Args:
        options: of the command.
        output: the folder.
        make_plan: the cells.
        grids: the tables of what finished.
        figures: by name, likewise.
        lead: paragraphs for the top of the report.
        scheduling: who runs the cells.

    Raises:
        typer.Exit: 2 where nothing can run, 1 where a cell failed.
    """
    from ..experiments import tables

    console = Console()
    with input_errors():
        plan = make_plan(options.choices())
        tell_left_out(options, plan)
    with running(options, scheduling, output, plan.cells, console) as run:
        outcome = run("", plan)
    if outcome.finished:
        files = {
            "cells.csv": tables.cells_csv(outcome),
            "results.json": as_json(tables.to_json(plan, outcome)),
        }
        title = f"{plan.suite}: {', '.join(dict.fromkeys(cell.task for cell in plan.cells))}"
        gone = not_there(plan, outcome.failed)
        made = grids(outcome), figures(outcome)
        write_report(output, title, files, *made, lead, gone, console)
    finish(plan, outcome.failed, len(plan.cells))


def tell_left_out(options: BenchmarkOptions, plan: Plan | SweepPlan) -> None:
    """Name on stderr what cannot run.

    Raises:
        ValueError: nothing can.
    """
    if plan.missing:
        note(f"no folder in {options.data}, so left out: {', '.join(plan.missing)}")
    for what, why in plan.left_out.items():
        note(f"left out {what}: {why}")
    if not plan.cells:
        raise ValueError(f"data must hold a task that can run, got none in {options.data}")


@contextmanager
def running(
    options: BenchmarkOptions,
    scheduling: SchedulingOptions,
    output: Path,
    cells: Sequence[Cell],
    console: Console,
) -> Iterator[Callable[[str, Plan], Outcome]]:
    """(what for, cells) -> what came of them, within the block; what finishes is kept in `output`.

    Args:
        options, scheduling, output: of the command.
        cells: the first that are to run; the backbone is checked if one of them is not finished.
        console: where they are shown.

    Raises:
        typer.Exit: 2 where nothing can run.
    """
    from ..experiments.benchmark import find_finished, run
    from ..experiments.ledger import Ledger

    with input_errors():
        check_output(output)
        ledger = Ledger(output / "cells", note)
        waiting = [cell for cell in cells if find_finished(ledger, cell) is None]
        if waiting:
            _check_backbone(waiting[0])

    told_of: set[str] = set()

    def once(message: str) -> None:
        if message not in told_of:
            told_of.add(message)
            note(message)

    def run_shown(what: str, plan: Plan) -> Outcome:
        done = sum(find_finished(quiet, cell) is not None for cell in plan.cells)
        told = f"{what}: " if what else ""
        console.print(f"{told}{len(plan.cells)} cells, {done} finished before", highlight=False)
        with progress(console) as shown:
            show_cells, show_epochs = bar(shown, "cells"), bar(shown, "epochs")

            def on_cell(
                index: int, total: int, cell: Cell, result: Mapping[str, Any] | None
            ) -> None:
                show_cells(index, total)
                console.print(f"{cell.title}: {_in_words(result)}", highlight=False, soft_wrap=True)

            return run(
                plan,
                ledger,
                scheduler=scheduler,
                notify=once,
                on_cell=on_cell,
                on_epoch=show_epochs,
            )

    quiet = Ledger(ledger.folder)
    with (
        interruptible(f"interrupted. the same command goes on where {output} ends"),
        use_backend(options.backend),
        scheduling.scheduler(options.device, needed=bool(waiting)) as scheduler,
    ):
        output.mkdir(parents=True, exist_ok=True)
        yield run_shown


def check_output(output: Path) -> None:
    """Raise a ValueError where a file stands in the place of the folder."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")


def finish(plan: Plan | SweepPlan, failed: Mapping[str, str], cells: int) -> None:
    """Name what failed, and exit accordingly.

    Raises:
        typer.Exit: 1 where a cell failed, 2 where lists cannot be used.
    """
    for name, why in failed.items():
        note(f"failed {name}: {why}")
    if failed:
        raise fail(f"{len(failed)} of {cells} cells failed", FAILED)
    if plan.left_out:
        raise fail(f"lists that cannot be used: {', '.join(plan.left_out)}", USER_ERROR)


def _check_backbone(cell: Cell) -> None:
    """Raise before the first cell what every cell would raise."""
    from ..training.backbone import build_backbone

    settings = cell.settings
    settings.method_config()
    build_backbone(
        settings.model,
        num_classes=cell.lists.classes,
        checkpoint=settings.checkpoint,
        pretrained=settings.pretrained,
        img_size=settings.img_size,
        drop_path=settings.drop_path,
    )


def _in_words(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "failed"
    found = [f"{name} {item['top1_percent']:.1f} %" for name, item in result["results"].items()]
    if result["val_top1_percent"] and not found:
        found = [f"val200 {result['val_top1_percent'][-1]:.1f} %"]
    return ", ".join(found) or f"diverged ({result.get('diverged')})"


def not_there(plan: Plan | SweepPlan, failed: Mapping[str, str]) -> list[str]:
    """What a report says is missing, and why."""
    missing = [f"{task}: no folder" for task in plan.missing]
    return missing + [f"{what}: {why}" for what, why in (*plan.left_out.items(), *failed.items())]


def as_json(content: Mapping[str, Any]) -> str:
    """The text of a file."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_report(
    output: Path,
    title: str,
    files: Mapping[str, str],
    grids: Sequence[Grid],
    figures: Mapping[str, Figure],
    lead: Sequence[str],
    not_there: Sequence[str],
    console: Console,
) -> None:
    """Write and show what came of the cells, each file in one step.

    Args:
        output: the folder.
        title: of the page.
        files: name → text, beside the report.
        grids: the tables.
        figures: by name.
        lead: paragraphs on top of the page.
        not_there: what is missing, and why.
        console: where the tables are shown.
    """
    from ..analysis.plots import save
    from ..atomic_files import write_text
    from ..experiments import page

    text = "\n".join(grid.markdown() for grid in grids)
    if not_there:
        text += "\n### Not there\n\n" + "".join(f"- {line}\n" for line in not_there)
    for name, content in {"table.md": text, **files}.items():
        write_text(output / name, content)
    for name, figure in figures.items():
        save(figure, output, name)
    pictures = [f"{name}.svg" for name in figures]
    write_text(output / "report.html", page.html(title, [*lead, *not_there], grids, pictures))
    for grid in grids:
        grid.show(console)
    names = ", ".join(["report.html", "table.md", *files])
    console.print(f"wrote {names} and figures to {output}", highlight=False, soft_wrap=True)
