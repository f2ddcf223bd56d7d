"""Where a benchmark's cells run: in this process, or on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import input_errors

if TYPE_CHECKING:
    from ..experiments.scheduler import Scheduler

_RAY = partial(typer.Option, rich_help_panel="Ray")


@dataclass(frozen=True)
class SchedulingOptions:
    """Whether Ray runs the cells, and what it reserves for each."""

    ray: Annotated[
        bool, _RAY("--ray", help="Run several cells at a time, as Ray's tasks on this machine.")
    ] = False
    ray_address: Annotated[
        str | None, _RAY(help="Or on the cluster there: auto, or HOST:PORT.")
    ] = None
    cpus_per_cell: Annotated[float, _RAY(help="CPUs for each, and threads of its torch.")] = 1.0
    gpus_per_cell: Annotated[
        float | None, _RAY(help="GPUs for each, 0.5 for two on one; default: 1 where there is one.")
    ] = None
    max_retries: Annotated[int, _RAY(help="How often a cell is run again whose worker died.")] = 1

    @contextmanager
    def scheduler(self, device: str, *, needed: bool) -> Iterator[Scheduler]:
        """What runs the cells, within the block.

        Args:
            device: of the cells.
            needed: whether there is something to run; without, Ray is not started.

        Raises:
            typer.Exit: 2 where Ray is asked for and cannot be had.
        """
        from ..experiments.scheduler import HERE, OnRay

        if not self.ray and self.ray_address is None:
            yield HERE
            return
        with input_errors():
            on_ray = OnRay(
                self.ray_address, self.cpus_per_cell, self._gpus(device), self.max_retries
            )
        with on_ray:
            if needed:
                with input_errors():
                    on_ray.connect()
            yield on_ray

    def _gpus(self, device: str) -> float:
        from torch import cuda

        from ..training.settings import require

        whole = device in ("auto", "cpu", "cuda")
        require("device", whole, "auto, cpu or cuda with Ray, which deals out the GPUs", device)
        if self.gpus_per_cell is not None:
            fits = device != "cuda" or self.gpus_per_cell > 0
            require("gpus_per_cell", fits, "above 0 for --device cuda", self.gpus_per_cell)
            return self.gpus_per_cell
        return 1.0 if device == "cuda" or (device == "auto" and cuda.is_available()) else 0.0
