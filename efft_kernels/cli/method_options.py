"""The fields of methods and baselines as options of the command line: what one declares is one."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from ..baselines import Baseline
from ..methods.base import Method
from ..training.methods import TRAINABLE
from . import parse

_RANKS, _NAMES = "R|R1,R2|R:R:...", "NAME,NAME|all"


class MethodOptions(dict[str, Any]):
    """A method's fields that were given by hand; as a command's parameter, all methods' fields."""


def parameters() -> list[inspect.Parameter]:
    """An option for every field of every method, None where it is not given."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_option_type(name) | None, _describe(name)],
        )
        for name in _fields()
    ]


def given(values: Mapping[str, Any]) -> MethodOptions:
    """The fields that were given, their texts parsed.

    Args:
        values: every field's option.

    Raises:
        ValueError: a text that cannot be parsed; it names the option.
    """
    return MethodOptions(
        {name: _parse(name, value) for name, value in values.items() if value is not None}
    )


def parse_one(name: str, text: str) -> Any:
    """A field's value from its text, as its option would have it.

    Raises:
        ValueError: no method has the field, or the text cannot be parsed.
    """
    if name not in _fields():
        from ..experiments.sweep import SETTINGS

        raise ValueError(
            f"axis must name an option of a method, or one of {', '.join(SETTINGS)}, got {name!r}"
        )
    kind = _option_type(name)
    value = text if kind is str else parse.setting(text, kind, name)
    return _parse(name, value)


def _fields() -> dict[str, list[type[Method] | type[Baseline]]]:
    """Field → the methods that have it, "rank" first."""
    fields: dict[str, list[type[Method] | type[Baseline]]] = {}
    for method in TRAINABLE.values():
        for field in dataclasses.fields(method):
            fields.setdefault(field.name, []).append(method)
    return fields


def _types(name: str) -> set[Any]:
    """The plain types that a field may have, in any method: tuple for tuple[str, ...]."""
    found: set[Any] = set()

    def collect(hint: Any) -> None:
        if get_origin(hint) in (Union, UnionType):
            for part in get_args(hint):
                collect(part)
        else:
            found.add(tuple if get_args(hint) == (str, ...) else get_origin(hint) or hint)

    for method in _fields()[name]:
        collect(get_type_hints(method)[name])
    return found


def _option_type(name: str) -> Any:
    """What typer reads: ranks and names are text, parsed here."""
    types = _types(name)
    if types <= {int, type(None)}:
        return int
    return next((kind for kind in (bool, float) if kind in types), str)


def _is_number(name: str) -> bool:
    return int in _types(name) and _option_type(name) is str


def _parse(name: str, value: Any) -> Any:
    if _is_number(name):
        return parse.rank(value, name)
    if tuple in _types(name):
        return None if value == "all" else tuple(value.split(","))
    return value


def _describe(name: str) -> Any:
    methods = _fields()[name]
    texts = (_documented(method).get(name) for method in methods)
    text = next((text for text in texts if text), "")
    names = ", ".join(method.name for method in methods)
    names = f" ({names})" if len(methods) < len(TRAINABLE) else ""
    metavar = _RANKS if _is_number(name) else _NAMES if tuple in _types(name) else None
    flag = f"--{name.replace('_', '-')}"
    return typer.Option(
        f"{flag}/--no-{flag[2:]}" if _option_type(name) is bool else flag,
        help=escape(f"{text}{names}."),
        metavar=metavar,
        rich_help_panel="Method",
        show_default=False,
    )


def _documented(method: type[Method] | type[Baseline]) -> dict[str, str]:
    """Field → the first sentence on it in the docstrings' Attributes, the method's own first."""
    found: dict[str, str] = {}
    for part in method.__mro__:
        if not part.__dict__.get("__doc__"):
            continue
        _, _, attributes = inspect.cleandoc(part.__doc__ or "").partition("\nAttributes:\n")
        for name, text in re.findall(
            r"^    (\w+): (.*(?:\n        .*)*)", attributes, re.MULTILINE
        ):
            sentence = re.split(r"(?<=\.)\s", " ".join(text.split()))[0]
            found.setdefault(name, sentence.rstrip("."))
    return found
