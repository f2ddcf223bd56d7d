"""The factorisation methods, by name. Each is a small file; they know torch and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import FactorGroup, Factors, Method, Site
from .efft import EFFT1, EFFT2

METHODS: dict[str, type[Method]] = {method.name: method for method in (EFFT1, EFFT2)}


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
    "FactorGroup",
    "Factors",
    "Method",
    "Site",
    "method_from_config",
]
