"""`efft-kernels sweep`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from . import method_options, parse
from .benchmark import (
    BenchmarkOptions,
    as_json,
    check_output,
    finish,
    not_there,
    running,
    tell_left_out,
    write_report,
)
from .errors import FAILED, fail, input_errors
from .options import Given, with_options
from .scheduling import SchedulingOptions
from .terminal import note
from .vtab import vtab_figures

if TYPE_CHECKING:
    from ..experiments.sweep import Search, SweepPlan


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """What a sweep tries, and how it chooses."""

    ranks: Annotated[str | None, typer.Option(help="To try, separated by commas.")] = None
    scales: Annotated[str | None, typer.Option(help="Factors s to try.")] = None
    lrs: Annotated[str | None, typer.Option(help="Peak learning rates to try.")] = None
    weight_decays: Annotated[str | None, typer.Option(help="Weight decays to try.")] = None
    axis: Annotated[
        list[str] | None,
        typer.Option(
            metavar='"NAME=VALUE VALUE ..."',
            help="Another setting of the training, or option of a method, to try; may be repeated.",
        ),
    ] = None
    protocol: Annotated[
        str | None,
        typer.Option(help="A published search, where no option says otherwise: kadaptation."),
    ] = None
    search_epochs: Annotated[
        int | None, typer.Option(help="Of the trainings that choose; default: as of the others.")
    ] = None
    select: Annotated[
        str, typer.Option(help="Images to choose on: val200, or test, which is optimistic.")
    ] = "val200"
    by: Annotated[
        str | None, typer.Option(help="Choose by the last epoch, or by the best. Default: last.")
    ] = None

    def search(self) -> tuple[Search, dict[str, Any]]:
        """The search, and settings of its protocol.

        Raises:
            ValueError: an option that cannot be parsed or makes no sense.
        """
        from ..experiments.sweep import PROTOCOL_GRIDS, Search
        from ..training.settings import require

        axes = self.own_axes()
        names = ", ".join(PROTOCOL_GRIDS)
        known = self.protocol is None or self.protocol in PROTOCOL_GRIDS
        require("protocol", known, f"one of {names}", repr(self.protocol))
        require("axes", bool(axes or self.protocol), "given, as --ranks 8,16 or --protocol", "none")
        found = Search(axes)
        given: dict[str, Any] = {}
        if self.protocol is not None:
            found, given = PROTOCOL_GRIDS[self.protocol]()
            ladder = found.ladder
            found = dataclasses.replace(
                found,
                axes={**found.axes, **axes},
                ladder=None if ladder is None or ladder.name in axes else ladder,
                given={name: value for name, value in found.given.items() if name not in axes},
            )
            given = {name: value for name, value in given.items() if name not in axes}
        changes: dict[str, Any] = {"select": self.select}
        if self.search_epochs is not None:
            changes["given"] = {**found.given, "epochs": self.search_epochs}
        elif self.select != "val200":
            changes["given"] = {}
        if self.by is not None:
            changes["by"] = self.by
        return dataclasses.replace(found, **changes), given

    def own_axes(self) -> dict[str, tuple[Any, ...]]:
        """The axes that the options name, without a protocol's.

        Raises:
            ValueError: one that cannot be parsed or makes no sense.
        """
        from ..experiments.sweep import SETTINGS

        axes: dict[str, tuple[Any, ...]] = {}
        if self.ranks is not None:
            axes["rank"] = parse.integers(self.ranks, "ranks")
        for name, text in {
            "scale": self.scales,
            "lr": self.lrs,
            "weight_decay": self.weight_decays,
        }.items():
            if text is not None:
                axes[name] = parse.floats(text, f"{name}s")
        for text in self.axis or ():
            name, equals, values = text.partition("=")
            name = name.strip().removeprefix("--").replace("-", "_")
            if not equals or not values.split():
                raise ValueError(f"axis must be 'NAME=VALUE VALUE ...', got {text!r}")
            if name in axes:
                raise ValueError(f"axis must name {name} once, got it twice")
            axes[name] = tuple(
                parse.setting(value, SETTINGS[name], name)
                if name in SETTINGS
                else method_options.parse_one(name, value)
                for value in values.split()
            )
        return axes


@with_options
def sweep(
    options: BenchmarkOptions,
    searched: SearchOptions,
    scheduling: SchedulingOptions,
    given: Given,
    tasks: Annotated[
        str, typer.Option(help="Names or aliases separated by commas, or all 19.")
    ] = "all",
    seeds: Annotated[str, typer.Option(help="Separated by commas; the papers' is 42.")] = "42",
    output: Annotated[Path, typer.Option(help="Folder for the cells, tables and figures.")] = Path(
        "runs/sweep"
    ),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and what is known of each; run none.")
    ] = False,
) -> None:
    """Try ranks, scales, rates on val200; train and test the best for each task and method."""
    from ..experiments import tables
    from ..experiments.sweep import run_sweep, sweep_grids, to_json, tried_csv

    console = Console()
    with input_errors():
        check_output(output)
        if searched.protocol is not None:
            seeds = seeds if "seeds" in given else "0,1,2"
            if "methods" not in given:
                options = dataclasses.replace(options, methods=searched.protocol)
        plan = make_plan(options, searched, tasks, seeds)
        tell_left_out(options, plan)
    if dry_run:
        _list(plan, output, console)
        return
    with running(options, scheduling, output, plan.cells, console) as run:
        outcome = run_sweep(plan, run)
    lead = [f"Chosen on {plan.search.select} by the {plan.search.by} epoch's top-1."]
    if plan.search.select == "test":
        lead.append("These are the images that the results are of: every number is optimistic.")
    files = {
        "tried.csv": tried_csv(outcome),
        "cells.csv": tables.cells_csv(outcome.final),
        "results.json": as_json(to_json(plan, outcome)),
    }
    figures = vtab_figures(outcome.final, options.report) if outcome.final.finished else {}
    grids = sweep_grids(outcome, options.report)
    names = dict.fromkeys(item.task for item in plan.candidates)
    gone = not_there(plan, {**outcome.failed, **outcome.unchosen})
    write_report(output, f"sweep: {', '.join(names)}", files, grids, figures, lead, gone, console)
    cells = [cell for item in outcome.tried for cell in item.candidate.tries]
    cells += [cell for item in outcome.chosen for cell in item.candidate.finals]
    for name, why in outcome.unchosen.items():
        note(f"{name}: {why}")
    finish(plan, outcome.failed, len(set(map(id, cells))))
    if outcome.unchosen:
        raise fail(f"nothing was chosen for {'; '.join(outcome.unchosen)}", FAILED)


def make_plan(
    options: BenchmarkOptions, searched: SearchOptions, tasks: str, seeds: str
) -> SweepPlan:
    """What the options of the command ask for.

    Raises:
        ValueError: an option that cannot be parsed or makes no sense.
    """
    from ..experiments.sweep import plan_sweep
    from ..experiments.tasks import choose

    search, settings = searched.search()
    choices = options.choices()
    if searched.protocol is not None:  # one value that is given wins over the protocol's axis
        own = searched.own_axes()
        fixed = {name for name in (*choices.given, *choices.options) if name not in own}
        ladder = search.ladder
        search = dataclasses.replace(
            search,
            axes={name: values for name, values in search.axes.items() if name not in fixed},
            ladder=None if ladder is None or ladder.name in fixed else ladder,
        )
    choices = dataclasses.replace(choices, given={**settings, **choices.given})
    numbers = parse.integers(seeds, "seeds")
    return plan_sweep(
        options.data, choose(tasks.split(","), "vtab"), numbers, choices, search, note
    )


def _list(plan: SweepPlan, output: Path, console: Console) -> None:
    from ..experiments.benchmark import find_finished
    from ..experiments.ledger import Ledger

    ledger = Ledger(output / "cells", note)
    for cell in plan.cells:
        done = find_finished(ledger, cell) is not None
        failure = ledger.failure(cell)
        state = "finished" if done else f"failed: {failure}" if failure else "not run"
        console.print(f"{cell.title}: {state}", highlight=False, soft_wrap=True, markup=False)
