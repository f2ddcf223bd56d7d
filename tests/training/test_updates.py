"""What makes an update: mixed and smoothed targets, several batches, a clipped gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn.functional import cross_entropy

from efft_kernels import LoRA, attach
from efft_kernels.training.averaging import Average, copy_state, lent
from efft_kernels.training.loop import train_one_epoch
from efft_kernels.training.rank_batches import IGNORED
from efft_kernels.training.reproducible import seed_everything
from efft_kernels.training.updates import Updates, make_loss


class Steps:
    """A scheduler that notes what it was stepped with."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def step_update(self, num_updates: int) -> None:
        self.steps.append(num_updates)


def batches(sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def trained(
    loader: list[tuple[torch.Tensor, torch.Tensor]],
    updates: Updates,
    epoch: int = 0,
    **options: Any,
) -> tuple[nn.Linear, Steps]:
    torch.manual_seed(1)
    model, steps = nn.Linear(5, 3), Steps()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    options |= {"scheduler": steps, "epoch": epoch, "updates": updates}
    train_one_epoch(model, loader, optimizer, device="cpu", **options)
    return model, steps


def test_batches_of_an_update_are_one_larger_batch() -> None:
    small = batches([4, 4, 4, 4, 4])
    groups = [small[:2], small[2:4], small[4:]]
    large = [tuple(torch.cat(part) for part in zip(*group, strict=True)) for group in groups]
    done: list[int] = []
    model, steps = trained(small, Updates(accumulate=2, after=done.append), epoch=2)
    expected, _ = trained(large, Updates())  # type: ignore[arg-type]
    torch.testing.assert_close(model.weight, expected.weight)
    assert steps.steps == done == [7, 8, 9]
    for counting in (Updates(accumulate=2), Updates(after=done.append)):
        with pytest.raises(TypeError, match="loader must have a length"):
            trained(iter(small), counting)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_gradient_is_clipped_to_its_norm(scale: float | None) -> None:
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    torch.manual_seed(1)
    before = nn.Linear(5, 3)
    model, _ = trained(batches([8]), Updates(clip_grad=0.01), scaler=scaler)
    moved = [p - q for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    assert nn.utils.get_total_norm(moved).item() == pytest.approx(0.5 * 0.01, rel=1e-4)


def test_smoothed_targets_are_timms() -> None:
    loss, mix = make_loss(3, label_smoothing=0.2)
    logits, targets = batches([7])[0][0][:, :3], batches([7])[0][1]
    assert mix is None
    torch.testing.assert_close(
        loss(logits, targets) / 7, LabelSmoothingCrossEntropy(0.2)(logits, targets)
    )
    torch.testing.assert_close(make_loss(3)[0](logits, targets) / 7, cross_entropy(logits, targets))


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
@pytest.mark.parametrize("count", [6, 5, 1])
def test_images_and_targets_are_mixed_alike(alphas: dict[str, float], count: int) -> None:
    """Every image is its class's one-hot at each pixel, so the mean pixel is the mixed target."""
    loss, mix = make_loss(4, **alphas)
    assert mix is not None
    targets = torch.arange(count) % 4
    one_hot = nn.functional.one_hot(targets, 4).float()
    changed = 0
    for seed in range(8):
        seed_everything(seed)
        images, mixed = mix(one_hot[:, :, None, None].repeat(1, 1, 8, 8), targets)
        torch.testing.assert_close(images.mean((2, 3)), mixed)
        changed += not torch.equal(mixed, one_hot)
        if count % 2:
            assert torch.equal(mixed[-1], one_hot[-1])
    assert changed == 0 if count == 1 else changed >= 6
    logits = torch.randn(count, 4)
    expected = SoftTargetCrossEntropy()(logits, mixed)
    torch.testing.assert_close(loss(logits, mixed) / count, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_an_image_that_does_not_count_has_no_loss(mixup: float, smoothing: float) -> None:
    loss, mix = make_loss(4, mixup=mixup, label_smoothing=smoothing)
    images, targets = torch.ones(1, 3, 8, 8), torch.tensor([IGNORED])
    if mix is not None:
        images, targets = mix(images, targets)
    assert loss(torch.randn(1, 4), targets) == 0


def test_the_average_is_timms_and_only_of_what_trains() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    average = Average(model, 0.5)
    assert len(average.state_dict()) == 1
    expected = torch.zeros(1, 2)
    for step, value in enumerate((1.0, 3.0, 4.0), start=1):
        model.weight.data.fill_(value)
        average.update(step)
        decay = min(0.5, 1 - step ** (-2 / 3))
        expected = decay * expected + (1 - decay) * value
    again = Average(model, 0.5)
    again.load_state_dict(average.state_dict())
    for each in (average, again):
        with each.in_place():
            torch.testing.assert_close(model.weight.data, expected)
        assert model.weight.data.unique() == 4.0


def test_an_adapter_is_lent_another_state(make_vit: Any, randomize: Any) -> None:
    adapter = attach(make_vit(), LoRA(rank=1))
    first = copy_state(adapter)
    randomize(adapter)
    own = copy_state(adapter)

    def has(state: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(t, state[name]) for name, t in adapter.state_dict().items())

    with pytest.raises(KeyError), lent(adapter, first):
        assert has(first) and not has(own)
        raise KeyError
    with lent(adapter, None):
        assert has(own)
    assert has(own)
