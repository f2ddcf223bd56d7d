"""What each process gets of a loader's batches, and which device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from efft_kernels.training import ranks as module
from efft_kernels.training.rank_batches import IGNORED, _seed_worker, part_of_batches
from efft_kernels.training.ranks import ALONE, Ranks, session


def batches(world: int, *, seed: int, **options: Any) -> list[list[list[int]]]:
    """The images of every batch, by process; None for those that do not count."""
    data = TensorDataset(torch.arange(11), torch.arange(11))
    parts = []
    for rank in range(world):
        loader = DataLoader(data, 4, generator=torch.Generator(), **options)
        loader = part_of_batches(loader, Ranks(rank, world))
        assert loader.generator is not None
        loader.generator.manual_seed(seed)
        found = [
            [int(image) for image, target in zip(*batch, strict=True) if target != IGNORED]
            for batch in loader
        ]
        assert len(found) == len(loader)
        parts.append(found)
    return parts


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True}])
def test_the_parts_of_all_processes_are_the_batch_of_one(
    world: int, options: dict[str, Any]
) -> None:
    (whole,) = batches(1, seed=3, **options)
    parts = batches(world, seed=3, **options)
    together = [[i for part in batch for i in part] for batch in zip(*parts, strict=True)]
    assert together == whole
    sizes = [[len(part) for part in batch] for batch in zip(*parts, strict=True)]
    assert all(max(batch) - min(batch) <= 1 for batch in sizes)
    if options:
        assert batches(1, seed=4, **options) != [whole]


def test_every_process_runs_the_model_on_every_batch() -> None:
    """On an image that does not count where it has none."""
    data = TensorDataset(torch.arange(5), torch.zeros(5, dtype=torch.long))
    loaders = [part_of_batches(DataLoader(data, 4), Ranks(rank, 2)) for rank in range(2)]
    last = [list(loader)[-1] for loader in loaders]
    assert [images.tolist() for images, _ in last] == [[4], [4]]
    assert sorted(targets.item() for _, targets in last) == [IGNORED, 0]


def test_workers_of_different_processes_draw_different_numbers() -> None:
    drawn = []
    with torch.random.fork_rng():
        for rank in (1, 2, 1):
            torch.manual_seed(2**63 + 5)
            _seed_worker(rank, 0)
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[2] != drawn[1]


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(module, "resolve_device", lambda name: torch.device("cuda"))
    second = Ranks(rank=5, world=8, local_rank=1)
    assert [second.device(name) for name in ("cuda", "auto")] == [torch.device("cuda:1")] * 2
    assert taken == [1, 1]
    with pytest.raises(ValueError, match=r"cuda: every process takes a GPU .* got cuda:0"):
        second.device("cuda:0")
    with pytest.raises(ValueError, match=r"a GPU for each process .* got 2 for 3 processes"):
        Ranks(rank=2, world=3, local_rank=2).device("cuda")


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with session() as ranks:
        assert ranks is ALONE
    with (
        pytest.raises(ValueError, match="fsdp must be left out without torchrun"),
        session(fsdp=True),
    ):
        pass
