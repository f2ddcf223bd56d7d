"""`efft-kernels bench`: what the operator costs on this machine beside the frozen nn.Linear."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import typer
from rich.console import Console

from .errors import input_errors

_CLONE = Path(__file__).resolve().parents[2]


def _load(name: str) -> ModuleType:
    """A module of the repository's benchmarks, which an installed package does not carry.

    Raises:
        FileNotFoundError: this is no clone of the repository.
    """
    if not (_CLONE / "benchmarks" / "operators.py").is_file():
        raise FileNotFoundError(
            f"the benchmarks are part of the repository, and {_CLONE} is no clone of it:"
            " clone it and run `make setup`, then `make bench`"
        )
    if str(_CLONE) not in sys.path:
        sys.path.insert(0, str(_CLONE))
    return importlib.import_module(f"benchmarks.{name}")


def bench(
    model: Annotated[
        list[str] | None, typer.Option(help="ViT-Ti/16, ViT-S/16, ViT-B/16, ...; may be repeated.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="r of the factors.")] = 16,
    images: Annotated[int, typer.Option(min=1, help="Images that a layer's rows stand for.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of measuring, for all layers.")] = 30.0,
    save: Annotated[bool, typer.Option(help="Append the rows to benchmarks/results.")] = False,
) -> None:
    """Time the operator against the frozen nn.Linear, layer by layer, on this machine."""
    with input_errors():
        operators, tables = _load("operators"), _load("tables")
        known = list(operators.models(1))
        models = model or ["ViT-S/16"]
        if unknown := [name for name in models if name not in known]:
            raise ValueError(f"model must be one of {', '.join(known)}, got {unknown[0]!r}")
    cuda = torch.cuda.is_available()
    console = Console()
    with console.status("measuring the peaks") as status:
        rows = operators.run(
            models,
            [rank],
            images=images,
            seconds=seconds,
            device="cuda" if cuda else "cpu",
            dtype=torch.bfloat16 if cuda else torch.float32,
            impls=("triton:auto", "torch:auto", "peft") if cuda else operators.CPU_IMPLS,
            modes=("fwd", "fwd+bwd"),
            out=operators.OPERATORS_CSV if save else None,
            progress=status.update,
        )
    console.print(tables.operator_table(rows))
