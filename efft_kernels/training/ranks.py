"""The processes that train one model together, as torchrun starts them.

Each computes its part of every batch. What they agree on goes through `Ranks`; only the first, of
rank 0, talks to the user and writes files. Where one fails, it alone tells why: the others find it
in the store that the processes share, and end without a word.
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .settings import require, resolve_device

T = TypeVar("T")

_VARIABLES = frozenset({"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
# What gloo and NCCL say in a process whose peer is gone; they have no error of their own for it.
_PEER_IS_GONE = re.compile(r"gloo/transport|[Cc]onnection (closed|reset|refused)|Broken pipe|NCCL")


class OtherRankError(RuntimeError):
    """Another process failed, and this one cannot go on without it."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from this one; by default it is alone.

    Attributes:
        rank: this process's number, from 0.
        world: how many there are.
        local_rank: this process's number among those of its machine.
        fsdp: each holds its part of the weights (FSDP2), instead of all of them (DDP).
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    fsdp: bool = False

    @property
    def first(self) -> bool:
        """Whether this process talks to the user and writes the files."""
        return self.rank == 0

    @property
    def together(self) -> bool:
        """Whether there is a group of processes, be it of one."""
        return self.world > 1 or self.fsdp

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor, in its place."""
        if self.together:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if not self.together:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, which alone calls it; the others wait."""
        if not self.together:
            return make()
        value: list[Any] = [make() if self.first else None]
        dist.broadcast_object_list(value)
        return value[0]  # type: ignore[no-any-return]

    def device(self, name: str) -> torch.device:
        """The device that `name` stands for in this process: of CUDA, the GPU of its local rank.

        Raises:
            ValueError: torch has no such device here, or a GPU was chosen for all processes.
        """
        if self.world == 1:
            return resolve_device(name)
        gpus = torch.cuda.device_count() if name.startswith(("auto", "cuda")) else 0
        if gpus:
            numbered = re.fullmatch(r"cuda:\d+", name)
            require("device", not numbered, "cuda: every process takes a GPU of its own", name)
            expected = "one with a GPU for each process of a machine"
            found = f"{gpus} for {self.local_rank + 1} processes"
            require("device", self.local_rank < gpus, expected, found)
            torch.cuda.set_device(self.local_rank)  # before anything is put on GPU 0
        device = resolve_device(name)
        return torch.device("cuda", self.local_rank) if device.type == "cuda" else device


ALONE = Ranks()


@dataclass
class _Session:
    ranks: Ranks
    store: Any
    key: str


_session: _Session | None = None
_sessions = itertools.count()


@contextmanager
def session(*, fsdp: bool = False) -> Iterator[Ranks]:
    """The processes of this torchrun, connected within the block; without torchrun, this one.

    Args:
        fsdp: train with FSDP2 instead of DDP.

    Raises:
        ValueError: fsdp without torchrun.
        OtherRankError: in place of what this process met because another had failed.
    """
    global _session
    under_torchrun = _VARIABLES.issubset(os.environ)
    if not under_torchrun or (os.environ["WORLD_SIZE"] == "1" and not fsdp):
        require("fsdp", not fsdp, "left out without torchrun", fsdp)
        yield ALONE
        return
    store, rank, world = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    ranks = Ranks(rank, world, int(os.environ.get("LOCAL_RANK", rank)), fsdp)
    _session = _Session(ranks, store, f"efft_kernels/error/{next(_sessions)}")
    try:
        with warnings.catch_warnings():
            # Of DDP, about a parameter with an axis of length 1; nothing depends on it.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            yield ranks
        dist.barrier()
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and _PEER_IS_GONE.search(str(error))
        silent = "another process ended without a word, killed or out of memory"
        mine, text = _tell_first(_session, silent if lost else str(error))
        if lost or not mine:
            raise OtherRankError(silent if mine else text) from error
        raise
    else:
        _session = None
    finally:
        dist.destroy_process_group()


def first_to_fail(message: str) -> str | None:
    """The text for the user where this process is the first to fail, with its rank.

    Args:
        message: what went wrong.

    Returns:
        None where another process has told the user of its own error.
    """
    if _session is None:
        return message
    mine, _ = _tell_first(_session, message)
    return f"rank {_session.ranks.rank}: {message}" if mine else None


def _tell_first(at: _Session, message: str) -> tuple[bool, str]:
    """Whether this process is the first to fail, and what the first told."""
    own = f"rank {at.ranks.rank}: "
    try:
        first = at.store.compare_set(at.key, "", own + message).decode()
    except RuntimeError:  # the store went with the process that held it
        return True, own + message
    return first.startswith(own), first
