"""Small tasks to analyse."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from efft_kernels.analysis.task import Task


def task_of(model: nn.Module, images: Tensor, targets: Tensor, classes: int, batch: int) -> Task:
    """The same images to train and to validate."""
    data: TensorDataset = TensorDataset(images, targets)
    generator = torch.Generator()
    train: DataLoader = DataLoader(data, batch, shuffle=True, generator=generator)
    return Task("tiny", model, train, DataLoader(data, batch), classes, torch.device("cpu"))


def colour_task(model: nn.Module, images_per_class: int = 8) -> Task:
    """Images [3, 8, 8] of noise, each with one brighter channel: the class."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(3).repeat_interleave(images_per_class)
    images = torch.randn(len(targets), 3, 8, 8, generator=generator) * 0.3
    images[torch.arange(len(targets)), targets] += 1.0
    return task_of(model, images, targets, 5, 8)
