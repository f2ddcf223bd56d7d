"""A baseline's file: a safetensors file like an adapter's, under a format of its own.

Tensors are "parts.NAME" (new parameters), "own.NAME" (the model's own that were trained), and
"modules.…" and "buffers.…" as in docs/adapter_format.md, whose header and checksum it has too.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from ..adapters.adapter_file import UNREADABLE, Header, read_adapter_file
from .base import Baseline
from .registry import baseline_from_config

BASELINE_FORMAT = "efft-kernels.baseline"


@dataclass(frozen=True)
class BaselineHeader(Header):
    """What the file says besides its tensors; `method` is the baseline, `targets` is empty."""

    @property
    def baseline(self) -> Baseline:
        """The baseline's configuration."""
        return cast(Baseline, self.method)

    def to_metadata(self) -> dict[str, str]:
        return {**super().to_metadata(), "format": BASELINE_FORMAT}


def read_baseline_file(
    path: str | os.PathLike[str],
) -> tuple[BaselineHeader, dict[str, Tensor]]:
    """(header, tensors) of a baseline's file of a version that this release knows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another format or version, or with an unreadable header.
    """
    metadata, tensors = read_adapter_file(path, formats=(BASELINE_FORMAT,))
    try:
        names = json.loads(metadata["modules_to_train"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"modules_to_train must be module names, got {names}")
        baseline: Any = baseline_from_config(json.loads(metadata["method"]))
        shapes = json.loads(metadata["base_shapes"])
        shapes = {name: tuple(map(int, shape)) for name, shape in shapes.items()}
    except UNREADABLE as error:
        raise ValueError(
            f"path must be a baseline's file with a readable header, got {path}:"
            f" {' '.join(str(error).splitlines())}"
        ) from None
    return BaselineHeader(baseline, [], names, shapes), tensors
