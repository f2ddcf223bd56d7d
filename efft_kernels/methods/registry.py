"""The methods known by name: an adapter file or a command line names one, and finds it here."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from .base import Method

METHODS: dict[str, type[Method]] = {}
_SPELT_ELSEWHERE = {
    "r": "rank=",
    "alpha": "scale=",  # divided by the rank
    "lora_alpha": "scale=",
    "lora_dropout": "dropout=",
    "target_modules": "attach(..., targets=",
    "targets": "attach(..., targets=",
    "layers": "attach(..., layers=",
    "modules_to_save": "attach(..., modules_to_train=",
    "modules_to_train": "attach(..., modules_to_train=",
}

M = TypeVar("M", bound=type[Method])


def register_method(method: M) -> M:
    """Make a method known by its `name`, so that its adapter files can be loaded.

    Args:
        method: the class; this can decorate it.

    Returns:
        The same class.

    Raises:
        ValueError: the name is taken by another method.
    """
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"name must be new among {sorted(METHODS)}, got {method.name!r}")
    _tell_names(method)
    return method


def _tell_names(method: type[Method]) -> None:
    """Let a call with an argument of another library's name say what it is called here."""
    kind: Any = method
    init = kind.__init__
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(self: Method, *args: Any, **kwargs: Any) -> None:
        if unknown := [name for name in kwargs if name not in known]:
            raise TypeError(_unknown(method.__name__, known, unknown[0], kwargs[unknown[0]]))
        init(self, *args, **kwargs)

    kind.__init__ = checked


def _unknown(kind: str, known: Sequence[str], name: str, value: object) -> str:
    """The error's text for an argument that a method does not take."""
    near = difflib.get_close_matches(name, known)
    way = _SPELT_ELSEWHERE.get(name, f"{near[0]}=" if near else None)
    if name == "lora_alpha" and "alpha" in known:
        way = "alpha="
    advice = ""
    if way:
        end = ")" if "(" in way else " / rank" if way == "scale=" else ""
        advice = f": pass {way}{value!r}{end}"
    return f"{kind} has no argument {name!r}{advice}; it takes {', '.join(known)}"


def method_from_config(config: Mapping[str, Any]) -> Method:
    """The method that a `to_config` dictionary describes.

    Raises:
        ValueError: no method of that name, or an unknown field.
    """
    name = config.get("name")
    if name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    return METHODS[name].from_config(config)
