"""The factorisation methods, by name. Each is a small file; they know torch and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import FactorGroup, Factors, Method, Site
from .efft import EFFT1, EFFT2
from .fact import FacTTK, FacTTT
from .kadaptation import KAdaptation
from .lora import LoRA

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (EFFT1, EFFT2, FacTTT, FacTTK, LoRA, KAdaptation)
}


def register_method(method: type[Method]) -> type[Method]:
    """Make a method of your own known by its `name`, so that its adapter files can be loaded.

    Raises:
        ValueError: the name is taken by another method.
    """
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"name must be new among {sorted(METHODS)}, got {method.name!r}")
    return method


def method_from_config(config: Mapping[str, Any]) -> Method:
    """The method a `to_config` dictionary describes.

    Raises:
        ValueError: no method of that name, or an unknown field.
    """
    name = config.get("name")
    if name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    return METHODS[name].from_config(config)


__all__ = [
    "EFFT1",
    "EFFT2",
    "METHODS",
    "FacTTK",
    "FacTTT",
    "FactorGroup",
    "Factors",
    "KAdaptation",
    "LoRA",
    "Method",
    "Site",
    "method_from_config",
    "register_method",
]
