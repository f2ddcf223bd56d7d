"""Who runs the cells: this process, one after the other, or Ray's workers, several at a time.

Ray is a scheduler and no more. What is finished stands in the ledger, which the process that asked
writes; whatever dies, a worker, a machine or that process, loses the cells that were running.
"""

from __future__ import annotations

import os
import site
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from ..training.loop import NonFiniteLossError
from .cell import Cell, Notify, run_cell

OnEpoch = Callable[[int, int], None]


@dataclass(frozen=True)
class Failure:
    """A cell that came to no result.

    Attributes:
        reason: in one line.
    """

    reason: str


Ended = tuple[Cell, dict[str, Any] | Failure]


class Scheduler(Protocol):
    """What runs cells."""

    def run(self, cells: Sequence[Cell], *, notify: Notify, on_epoch: OnEpoch) -> Iterator[Ended]:
        """Each cell with its result or its failure, as they end, in any order.

        Args:
            cells: what to run.
            notify: called with lines for the user.
            on_epoch: called with (epochs done, epochs of the cell) by a scheduler that runs one
                cell at a time.
        """


def attempt(
    cell: Cell, notify: Notify, on_epoch: OnEpoch = lambda done, total: None
) -> dict[str, Any] | Failure:
    """The result of a cell, or why its images, its settings or its memory gave none."""
    try:
        return run_cell(cell, notify=notify, on_epoch=on_epoch)
    except (ValueError, TypeError, NonFiniteLossError, torch.OutOfMemoryError) as error:
        return Failure(_in_one_line(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        return Failure("out of memory")


@dataclass(frozen=True)
class InProcess:
    """Runs the cells here, one after the other."""

    def run(self, cells: Sequence[Cell], *, notify: Notify, on_epoch: OnEpoch) -> Iterator[Ended]:
        """As `Scheduler` has it."""
        for cell in cells:
            yield cell, attempt(cell, notify, on_epoch)


HERE = InProcess()


@dataclass
class OnRay:
    """Runs the cells as Ray's tasks.

    A Ray that already runs in this process is used and left running; else one is started on this
    machine, or the cluster at `address` joined, when the first cell is to run. `close`, or the end
    of a `with` block, leaves it.

    Attributes:
        address: of a cluster, as `ray.init` takes it; None for a Ray of this machine alone.
        cpus_per_cell: reserved for a cell, whose torch has as many threads, at least one.
        gpus_per_cell: likewise; a half puts two cells on one GPU.
        max_retries: how often a cell is run again whose worker died.
    """

    address: str | None = None
    cpus_per_cell: float = 1.0
    gpus_per_cell: float = 0.0
    max_retries: int = 1
    _owned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for name, low in (("cpus_per_cell", 0), ("gpus_per_cell", 0), ("max_retries", 0)):
            value = getattr(self, name)
            if not low <= value < float("inf"):
                raise ValueError(f"{name} must be at least {low} and finite, got {value}")
        if not self.cpus_per_cell and not self.gpus_per_cell:
            raise ValueError(
                "cpus_per_cell must be above 0 where gpus_per_cell is 0: nothing else bounds how"
                " many cells run at a time"
            )
        if self.gpus_per_cell > 1 and self.gpus_per_cell % 1:
            raise ValueError(
                f"gpus_per_cell must be a whole number above 1, got {self.gpus_per_cell}"
            )
        _ = self._ray

    def __enter__(self) -> OnRay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the Ray that was started or joined here."""
        if self._owned:
            self._ray.shutdown()
            self._owned = False

    @cached_property
    def _ray(self) -> Any:
        # Set before Ray is loaded: nobody asked for reports to its makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                "ray must be installed to run cells on it, got none: pip install"
                " 'efft-kernels[sweep]', or leave it out to run them in this process"
            ) from error
        return ray

    def run(self, cells: Sequence[Cell], *, notify: Notify, on_epoch: OnEpoch) -> Iterator[Ended]:
        """As `Scheduler` has it.

        Raises:
            ValueError: no machine has what a cell is to reserve, or no cluster is at the address.
        """
        if not cells:
            return
        ray = self._ray
        slots = self.connect()
        task = ray.remote(_on_worker)
        waiting, tries = deque(cells), Counter[int]()
        running: dict[Any, Cell] = {}
        while waiting or running:
            # No more at a time than fit: their lists are large, and what is running when this
            # process is interrupted is all that a Ray that goes on still does. (No ray.cancel then:
            # Ray 2.60 aborts this process now and then where the task just ends.)
            while waiting and len(running) < slots:
                cell = waiting.popleft()
                tries[id(cell)] += 1
                ref = task.options(**self._options(cell)).remote(cell, self.cpus_per_cell)
                running[ref] = cell
            for ref in ray.wait(list(running), num_returns=1)[0]:
                cell = running.pop(ref)
                try:
                    notes, ended = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    yield cell, Failure(_in_one_line(error.cause or error))
                    continue
                except ray.exceptions.RayError as error:
                    died = f"its worker died ({_died_of(error)})"
                    if tries[id(cell)] <= self.max_retries:
                        notify(f"{cell.title}: {died}; it is run again")
                        waiting.appendleft(cell)
                    else:
                        yield cell, Failure(died)
                    continue
                for note in notes:
                    notify(note)
                yield cell, ended

    def connect(self) -> int:
        """Reach Ray, where that is not done yet; how many cells fit into it now.

        Raises:
            ValueError: as `run`.
        """
        ray = self._ray
        if not ray.is_initialized():
            quiet = {"log_to_driver": False, "logging_level": "ERROR"}
            if self.address is None:
                ray.init(address="local", include_dashboard=False, **quiet)
            else:
                _check_answers(self.address)
                try:
                    ray.init(address=self.address, **quiet)
                except ConnectionError as error:
                    raise ValueError(
                        f"ray_address must be where a cluster runs, got {self.address}; start one"
                        " with ray start --head"
                    ) from error
            self._owned = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = {"CPU": self.cpus_per_cell, "GPU": self.gpus_per_cell}
        for kind, per_cell in wanted.items():
            most = max((node.get(kind, 0.0) for node in nodes), default=0.0)
            if per_cell > most:
                name = f"{kind.lower()}s_per_cell"
                raise ValueError(
                    f"{name} must be at most the {most:g} of a machine, got {per_cell}"
                )
        fit = [
            min(
                int(node.get(kind, 0.0) / per_cell) for kind, per_cell in wanted.items() if per_cell
            )
            for node in nodes
        ]
        return max(1, sum(fit))

    def _options(self, cell: Cell) -> dict[str, Any]:
        environment = {
            name: value for name, value in os.environ.items() if name.startswith("EFFT_KERNELS_")
        }
        if path := _python_path():
            environment["PYTHONPATH"] = path
        return {
            "name": cell.title,
            "num_cpus": self.cpus_per_cell,
            "num_gpus": self.gpus_per_cell,
            "max_retries": 0,  # Ray's own would go on for ever where a cell needs too much memory
            "runtime_env": {"env_vars": environment} if environment else None,
        }


def _check_answers(address: str) -> None:
    """Raise at once what Ray would raise after minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # "auto", or a name that Ray refuses at once
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass
    except (OSError, ValueError) as error:
        raise ValueError(
            f"ray_address must be where a cluster runs, got {address} ({error})"
        ) from None


def _python_path() -> str:
    """Where a worker is to look for packages: as this process does, and in this checkout."""
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    home = str(Path(__file__).resolve().parents[2])
    own = [] if home in site.getsitepackages() else [home]
    return os.pathsep.join(dict.fromkeys([*own, *filter(None, known)]))


def _on_worker(cell: Cell, cpus: float) -> tuple[list[str], dict[str, Any] | Failure]:
    """A cell's notes, and how it ended."""
    torch.set_num_threads(max(1, int(cpus)))
    notes: list[str] = []
    try:
        return notes, attempt(cell, notes.append)
    except OSError as error:  # the worker's disk is not this machine's
        return notes, Failure(_in_one_line(error))


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _died_of(error: Exception) -> str:
    """The first line that Ray has on it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]
