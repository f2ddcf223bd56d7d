"""The methods known by name: an adapter file or a command line names one, and finds it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from .base import Method

METHODS: dict[str, type[Method]] = {}

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
    return method


def method_from_config(config: Mapping[str, Any]) -> Method:
    """The method that a `to_config` dictionary describes.

    Raises:
        ValueError: no method of that name, or an unknown field.
    """
    name = config.get("name")
    if name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    return METHODS[name].from_config(config)
