"""The digits: which images train, which test, and how they are augmented."""

from __future__ import annotations

from collections import Counter

import torch

from efft_kernels.training.digits import TARGET_CLASSES, split_digits


def test_split_draws_training_images_by_the_seed() -> None:
    train, test = split_digits(TARGET_CLASSES, 20, seed=0)
    assert Counter(train.labels.tolist()) == dict.fromkeys(range(5), 20)
    assert len(train) + len(test) == 896
    assert train.images.aminmax() == (-1, 1)
    drawn = [{image.numpy().tobytes() for image in split.images} for split in (train, test)]
    assert drawn[0].isdisjoint(drawn[1])
    same, _ = split_digits(TARGET_CLASSES, 20, seed=0)
    other, _ = split_digits(TARGET_CLASSES, 20, seed=1)
    assert torch.equal(train.images, same.images)
    assert not torch.equal(train.images, other.images)


def test_only_training_images_are_augmented() -> None:
    train, test = split_digits(TARGET_CLASSES, 20, seed=0)
    torch.manual_seed(0)
    views = {train[0][0].numpy().tobytes() for _ in range(30)}
    assert 1 < len(views) <= 9
    assert torch.equal(test[0][0], test.images[0])
