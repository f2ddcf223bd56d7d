"""A loader's batches divided among the processes that train together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .ranks import Ranks
from .reproducible import epoch_seed, seed_everything

# The target of an image that does not count; torch's cross_entropy leaves it out.
IGNORED = -100


def part_of_batches(loader: DataLoader[Any], ranks: Ranks) -> DataLoader[Any]:
    """A loader of this process's part of every batch, with as many batches.

    The batches are those of `loader` alone: the processes must seed its generator alike before an
    epoch. A batch of fewer images than processes leaves some without one. They get its first, so
    that all of them run the model, with the target `IGNORED`.

    Args:
        loader: yields (image, target) in batches, in an order that its own generator decides.
        ranks: the processes.
    """
    if ranks.world == 1:
        return loader
    batches: Any = _Part(loader.batch_sampler, ranks)  # type: ignore[arg-type]
    return DataLoader(
        _Marked(loader.dataset),
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
        worker_init_fn=partial(_seed_worker, ranks.rank),
    )


class _Part(Sampler[list[int]]):
    """Of every batch of indices this process's part: ~index, below 0, for one that is ignored."""

    def __init__(self, batches: Iterable[list[int]], ranks: Ranks) -> None:
        self.batches = batches
        self.ranks = ranks

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            start, stop = (
                len(batch) * rank // self.ranks.world
                for rank in (self.ranks.rank, self.ranks.rank + 1)
            )
            yield list(batch[start:stop]) or [~batch[0]]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


class _Marked(Dataset[Any]):
    """A dataset whose item ~i is item i with the target `IGNORED`."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        if index >= 0:
            return self.dataset[index]
        image, _ = self.dataset[~index]
        return image, IGNORED


def _seed_worker(rank: int, worker: int) -> None:
    # The loaders' generators are alike, and so would be the random numbers of their workers.
    seed_everything(epoch_seed(torch.initial_seed(), rank))
