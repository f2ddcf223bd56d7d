"""The baselines known by name: a file or a command line names one, and finds it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from .base import Baseline

BASELINES: dict[str, type[Baseline]] = {}

B = TypeVar("B", bound=type[Baseline])


def register_baseline(baseline: B) -> B:
    """Make a baseline known by its `name`.

    Args:
        baseline: the class; this can decorate it.

    Returns:
        The same class.

    Raises:
        ValueError: the name is taken by another baseline.
    """
    if BASELINES.setdefault(baseline.name, baseline) is not baseline:
        raise ValueError(f"name must be new among {sorted(BASELINES)}, got {baseline.name!r}")
    return baseline


def baseline_from_config(config: Mapping[str, Any]) -> Baseline:
    """The baseline that a `to_config` dictionary describes.

    Raises:
        ValueError: no baseline of that name, or an unknown field.
    """
    name = config.get("name")
    if name not in BASELINES:
        raise ValueError(f"baseline must be one of {sorted(BASELINES)}, got {name!r}")
    return BASELINES[name].from_config(config)
