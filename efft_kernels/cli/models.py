"""`efft-kernels models`."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import for_command_line, input_errors

if TYPE_CHECKING:
    from torch import nn

    from ..methods.base import Method


@dataclass(frozen=True)
class Adapted:
    """What a method does to a model by default.

    Attributes:
        method: its name.
        linears: how many it adapts.
        parameters: how many it trains, the classifier's aside.
        refused: why it takes the model only with other options, or not; None where it does.
    """

    method: str
    linears: int = 0
    parameters: int = 0
    refused: str | None = None


@dataclass(frozen=True)
class ModelReport:
    """What is adapted of a model by default, and what is left.

    Attributes:
        name: timm's.
        kind: its class.
        parameters: how many it has.
        classifier: the modules that are trained whole.
        methods: one for each method.
        left: what is left of attention and FFN, one line a kind.
    """

    name: str
    kind: str
    parameters: int
    classifier: list[str]
    methods: list[Adapted]
    left: list[str]


def models(
    name: Annotated[str, typer.Argument(help="timm model, or a pattern such as 'swin*'.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what each method adapts of a timm model, and what it leaves; no weights are read."""
    with input_errors():
        if any(sign in name for sign in "*?["):
            _print_names(name, as_json)
            return
        report = report_on(name)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
        return
    table = Table("method", "linears", "parameters", title=f"{report.name}, a {report.kind}")
    alike: dict[str, list[str]] = {}  # a refusal of several methods stands once
    for each in report.methods:
        if each.refused:
            alike.setdefault(for_command_line(each.refused), []).append(each.method)
        else:
            table.add_row(each.method, f"{each.linears:,}", f"{each.parameters:,}")
    for refused, methods in alike.items():
        table.add_row("\n".join(methods), refused, "")
    console = Console()
    console.print(table)
    lines = [f"left as they are, {line}" for line in report.left]
    whole = ", ".join(report.classifier) or "nothing, there is no classifier"
    for line in (f"parameters: {report.parameters:,}", f"trained whole: {whole}", *lines):
        console.print(line, highlight=False, soft_wrap=True)


def _print_names(pattern: str, as_json: bool) -> None:
    import timm

    names = timm.list_models(pattern)
    if not names:
        raise ValueError(f"name must be a timm model or a pattern of some, got {pattern!r}")
    typer.echo(json.dumps(names) if as_json else "\n".join(names))


def report_on(name: str) -> ModelReport:
    """What each method, at its own settings, does to a timm model without weights.

    Raises:
        ValueError: timm has no such model.
    """
    import timm
    import torch

    from ..adapters.architectures import classifier_names
    from ..adapters.coverage import coverage
    from ..adapters.sites import find_sites
    from ..methods import METHODS
    from ..training.backbone import check_model_name

    check_model_name(name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = timm.create_model(name, pretrained=False)
    classifier = classifier_names(model)
    try:
        known = [site.name for site in find_sites(model, exclude=classifier)]
    except ValueError:
        known = []
    return ModelReport(
        name=name,
        kind=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classifier=classifier,
        methods=[_adapted(model, method()) for method in METHODS.values()],
        left=coverage(model, known, classifier).lines(),
    )


def _adapted(model: nn.Module, method: Method) -> Adapted:
    from ..adapters.attach import attach

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = attach(model, method)
    except (ValueError, TypeError) as error:
        return Adapted(method.name, refused=str(error))
    linears, parameters = len(adapter.sites), adapter.num_parameters()
    adapter.detach()
    return Adapted(method.name, linears, parameters)
