"""Options from a file: `--config FILE`, where every option may stand under its name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr
from typing import Annotated, Any

import typer

from .errors import input_errors

SUFFIXES = (".yaml", ".yml", ".toml", ".json")


def _take(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command's options."""
    if path is not None:
        with input_errors():
            names = {str(each.name) for each in context.command.params} - {"config", "help"}
            context.default_map = as_options(read(path), names, path)
    return path


# Read before the other options, whose defaults it gives.
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_take,
        help=f"Options from a file ({', '.join(SUFFIXES)}); those of the command line win.",
    ),
]


def read(path: Path) -> Mapping[str, Any]:
    """What a file of options holds.

    Raises:
        ValueError: it is missing or unreadable, or holds no table of names.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"config must end in {', '.join(SUFFIXES)}, got {path}")
    if not path.is_file():
        raise ValueError(f"config must be a file, got {path} (nothing there)")
    try:
        content = _parse(path)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config must be readable, got {path} ({error})") from error
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"config must hold options by name, got {path} with none")
    return content


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".toml":
        try:
            import tomllib
        except ImportError:  # Python 3.10
            raise ValueError("TOML needs Python 3.11: write YAML or JSON") from None
        return tomllib.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def as_options(content: Mapping[str, Any], names: set[str], path: Path) -> dict[str, Any]:
    """The file's values by parameter, as the command line would write them.

    Args:
        content: option → value, with - or _ in the names. A list stands for its parts with commas
            between; an empty value for an option that is not given.
        names: the command's parameters.
        path: the file, for errors.

    Raises:
        ValueError: an unknown option, one given twice, or a value that no option has.
    """
    options: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            unknown.append(key + (f" (did you mean {near[0]}?)" if near else ""))
            continue
        if name in options:
            raise ValueError(f"config must name {name} once, got it twice in {path}")
        if isinstance(value, list) and all(isinstance(item, str | int) for item in value):
            value = ",".join(str(item) for item in value)
        if not isinstance(value, str | int | float | None):
            raise ValueError(
                f"{name} must be a text, a number or a list of these, got {repr(value)}"
            )
        if value is not None:
            options[name] = value
    if unknown:
        raise ValueError(f"config must hold options of the command, got {', '.join(unknown)}")
    return options
