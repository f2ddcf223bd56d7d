"""The command line, `efft-kernels`.

A command is a thin function in a file of its own, registered here. It imports what it needs when it
runs: timm, torchvision, torchmetrics and matplotlib take seconds to load, and --help needs none.

options.py    options and groups of options that commands share
benchmark.py  what vtab and fewshot share
parse.py      the text of an option as numbers
errors.py     exit codes, and how an error becomes one line
terminal.py   progress bars and notes
"""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import (
    analyse,
    bench,
    demo,
    demo_vtab,
    doctor,
    evaluate,
    fewshot,
    models,
    papers,
    train,
    vtab,
)
from .errors import in_one_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt vision transformers with factor-tuning (EFFT) on fused kernels.",
)
app.command()(in_one_line(bench.bench))
app.command()(in_one_line(demo.demo))
app.command()(in_one_line(demo_vtab.demo_vtab))
app.command()(in_one_line(train.train))
app.command("eval")(in_one_line(evaluate.evaluate))
app.command()(in_one_line(models.models))
app.command()(in_one_line(doctor.doctor))
app.command()(in_one_line(vtab.vtab))
app.command()(in_one_line(fewshot.fewshot))
app.command()(in_one_line(papers.papers))
app.add_typer(analyse.app, name="analyse")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"efft-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass
