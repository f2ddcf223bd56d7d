"""What commands share: options, groups of options, and the check of a backend's name.

A group is a dataclass whose fields are annotated as typer wants its parameters. A command takes the
group as one parameter, and `with_options` shows typer the fields in its place; so it does with
`MethodOptions`, the methods' fields. A parameter `Given` gets the names of what was on the command
line.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .. import use_backend
from ..ops.dispatch import requested_backend
from . import method_options
from .errors import input_errors
from .method_options import MethodOptions


class Given(frozenset[str]):
    """Names of the parameters that were given by hand; the others have their defaults."""


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """The command that typer is to see: every group's fields as options of their own.

    Args:
        function: a command; a parameter annotated with a dataclass is a group.
    """
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context]
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        group: Any = parameter.annotation
        if group in (Given, MethodOptions):
            groups[parameter.name] = group
            parameters += method_options.parameters() if group is MethodOptions else []
            continue
        if not dataclasses.is_dataclass(group):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        annotations = get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            required = field.default is dataclasses.MISSING
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if required else field.default,
                    annotation=annotations[field.name],
                )
            )

    @functools.wraps(function)
    def command(context: typer.Context, **values: Any) -> None:
        by_hand = Given(name for name in values if _is_by_hand(context, name))
        for name, group in groups.items():
            if group is Given:
                values[name] = by_hand
            elif group is MethodOptions:
                names = [parameter.name for parameter in method_options.parameters()]
                with input_errors():
                    values[name] = method_options.given({n: values.pop(n) for n in names})
            else:
                fields = {field.name: values.pop(field.name) for field in dataclasses.fields(group)}
                values[name] = group(**fields)
        function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _is_by_hand(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


class Amp(str, Enum):
    """Autocast dtype."""

    none = "none"
    float16 = "float16"
    bfloat16 = "bfloat16"


Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


@dataclass(frozen=True)
class DataOptions:
    """What an analysis trains on."""

    data: Annotated[
        list[Path] | None, typer.Option(help="One folder of images per class, or train/ and val/.")
    ] = None
    digits: Annotated[
        bool, typer.Option("--digits", help="The demo's handwritten digits instead.")
    ] = False


@dataclass(frozen=True)
class TaskOptions:
    """How an analysis reads its images, and the backbone that it adapts to them."""

    source_epochs: Annotated[
        int | None, typer.Option(help="With --digits: epochs of training on the digits 0 to 4.")
    ] = None
    model: Annotated[str, typer.Option("--model", help="timm model, with --data.")] = (
        "vit_tiny_patch16_224"
    )
    checkpoint: Annotated[Path | None, typer.Option(help="Local weights of the model.")] = None
    pretrained: Annotated[
        bool, typer.Option(help="Fetch timm's weights where no --checkpoint is.")
    ] = True
    img_size: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None
    val_split: Annotated[float, typer.Option(help="Fraction held out where there is no val/.")] = (
        0.2
    )
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 0
    device: Device = "auto"
    batch_size: Annotated[int | None, typer.Option(help="Default: 64, or 20 with --digits.")] = None


@dataclass(frozen=True)
class BudgetOptions:
    """How long and how fast every run of an analysis trains."""

    epochs: Annotated[int, typer.Option(help="Of every run.")] = 40
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-3
    weight_decay: Annotated[float, typer.Option()] = 1e-4


def check_backend(name: str) -> None:
    """Check that a backend, of the option or the environment, can run here.

    Raises:
        ValueError: it is unknown, or cannot.
    """
    try:
        with use_backend(requested_backend(name)):
            pass
    except RuntimeError as error:
        raise ValueError(str(error)) from error
