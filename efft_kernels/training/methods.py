"""What a run can train by name: the methods, and the baselines they are compared with."""

from __future__ import annotations

import dataclasses
import os
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.attach import attach, load
from ..baselines import BASELINES, Baseline, attach_baseline, load_baseline
from ..methods import METHODS
from ..methods.base import Method

# A ChainMap iterates over its last map first.
TRAINABLE = cast(
    Mapping[str, type[Method] | type[Baseline]], ChainMap(cast(Any, BASELINES), cast(Any, METHODS))
)


def put_on(
    model: nn.Module,
    method: Method | Baseline,
    *,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> Adapter:
    """Attach a method or a baseline, its head trained along with it.

    Raises:
        ValueError: targets or layers for a baseline, which knows its own; else as `attach` or
            `attach_baseline`.
        TypeError, RuntimeError: as there.
    """
    if isinstance(method, Method):
        return attach(model, method, targets=targets, layers=layers)
    for name, value in (("targets", targets), ("layers", layers)):
        if value is not None:
            raise ValueError(f"{name} must be left out for the baseline {method.name}, got {value}")
    return attach_baseline(model, method)


def has_rank(name: str) -> bool:
    """Whether what `TRAINABLE` knows by this name has a rank."""
    return any(field.name == "rank" for field in dataclasses.fields(TRAINABLE[name]))


def load_trained(model: nn.Module, path: str | os.PathLike[str], name: str) -> Adapter:
    """Attach from a file what was trained under a name.

    Args:
        model: the base model.
        path: the file that `Adapter.save` wrote.
        name: key of `TRAINABLE`.
    """
    return load_baseline(model, path) if name in BASELINES else load(model, path)
