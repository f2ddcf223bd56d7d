"""The commands by name. What a command needs is loaded when it is called, and no earlier."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from . import ended_by_interrupt
from .errors import USER_ERROR, fail, in_one_line

# Options that name what must be there → what it must be. A wrong one is told before torch loads.
_PATHS = {
    "--checkpoint": "a file of weights",
    "--adapter": "a file",
    "--config": "a file",
}
_PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False}


@dataclass(frozen=True)
class Command:
    """Where a command lies.

    Attributes:
        module: file in this folder.
        name: of the function there, or of a `typer.Typer` with commands of its own.
        help: one line, for the list of commands; the first of the function's docstring.
        data: what --data must be.
        source: what the first argument names, for commands that have one: a file or folder that
            must be there.
        together: whether processes that torchrun starts share its work.
    """

    module: str
    name: str
    help: str
    data: str = "a folder of images"
    source: str | None = None
    together: bool = False

    def load(self, called: str) -> Any:
        """The command, as click has it, under the name `called`."""
        with ended_by_interrupt():
            importlib.import_module("torch")
            target = getattr(importlib.import_module(f".{self.module}", __package__), self.name)
        if isinstance(target, typer.Typer):
            return typer.main.get_command(target)
        alone = typer.Typer(**_PLAIN)
        alone.command(called)(in_one_line(target))
        return typer.main.get_command(alone)

    def check_processes(self, called: str) -> None:
        """Exit with code 2 where torchrun started several processes, which would each do all the
        work and write the same files; the first of them tells."""
        world = os.environ.get("WORLD_SIZE", "1")
        if self.together or world == "1" or not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
            return
        if os.environ["RANK"] != "0":
            raise typer.Exit(USER_ERROR)
        raise fail(
            f"{called} works in one process, got {world} of torchrun: efft-kernels {called} ...",
            USER_ERROR,
        )

    def check_paths(self, arguments: Sequence[str]) -> None:
        """Exit with code 2 where a path among the arguments leads to nothing."""
        if "--help" in arguments or "RANK" in os.environ:  # of torchrun: one of many tells
            return
        if self.source and arguments and not arguments[0].startswith("-"):
            _check(self.source, "a file or a folder", arguments[0])
        paths = _PATHS | {"--data": self.data}
        for option, following in zip(arguments, [*arguments[1:], ""], strict=False):
            option, assigned, value = option.partition("=")
            if option in paths:
                _check(option[2:], paths[option], value if assigned else following)


def _check(name: str, what: str, path: str) -> None:
    if not Path(path).exists():
        raise fail(f"{name} must be {what}, got {path} (nothing there)", USER_ERROR)


COMMANDS = {
    "bench": Command(
        "bench",
        "bench",
        "Time the operator against the frozen nn.Linear, layer by layer, on this machine.",
    ),
    "demo": Command(
        "demo", "demo", "Adapt a small transformer to handwritten digits and show what it cost."
    ),
    "demo-vtab": Command(
        "demo_vtab",
        "demo_vtab",
        "vtab with every method on two small tasks of real photographs, in some minutes.",
    ),
    "train": Command(
        "train",
        "train",
        "Adapt a timm model to a folder of images; stop it at any time and --resume.",
        together=True,
    ),
    "eval": Command(
        "evaluate",
        "evaluate",
        "Measure an adapter that train wrote: top-1 on held-out or new images.",
    ),
    "models": Command(
        "models",
        "models",
        "Show what each method adapts of a timm model, and what it leaves; no weights are read.",
    ),
    "predict": Command(
        "predict",
        "predict",
        "Name the classes of images: a CSV of path, top-k classes and their probabilities.",
        source="source",
    ),
    "merge": Command(
        "merge",
        "merge",
        "Fold what was trained into the backbone: a plain model that needs no efft-kernels.",
        source="source",
    ),
    "export": Command(
        "export",
        "export",
        "Write the merged model for others: safetensors, torch.export, ONNX.",
        source="source",
    ),
    "doctor": Command(
        "doctor", "doctor", "Show versions, devices, and which backends run here, or why not."
    ),
    "vtab": Command(
        "vtab",
        "vtab",
        "VTAB-1K: tasks × methods × seeds beside the published numbers; finished cells are kept.",
        data="a folder of tasks' folders",
    ),
    "fewshot": Command(
        "fewshot",
        "fewshot",
        "Fine-grained few-shot sets × shots × methods × seeds, in the layout of NOAH's lists.",
        data="a folder of tasks' folders",
    ),
    "sweep": Command(
        "sweep",
        "sweep",
        "Try ranks, scales, rates on val200; train and test the best for each task and method.",
        data="a folder of tasks' folders",
    ),
    "papers": Command(
        "papers",
        "papers",
        "The three papers' tables and figures again, with what they print wrongly marked.",
    ),
    "analyse": Command(
        "analyse",
        "app",
        "The analyses the papers ran: subspaces, intrinsic dimension, layers, scales.",
    ),
}


class _Group(TyperGroup):
    """Loads a command when it is called; what is listed before are names and their help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] in COMMANDS:  # typer's own parsing takes a quarter of a second
            COMMANDS[args[0]].check_processes(args[0])
            COMMANDS[args[0]].check_paths(args[1:])
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, COMMANDS[name].load(name) if name in COMMANDS else command, rest


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="Adapt vision transformers with factor-tuning (EFFT) on fused kernels.",
    **_PLAIN,
)
for _name, _command in COMMANDS.items():
    app.command(_name, help=_command.help)(lambda: None)


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
