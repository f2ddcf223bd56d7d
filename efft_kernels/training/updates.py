"""What an update is made of: mixed images, smoothed targets, several batches; by timm's parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.nn.functional import cross_entropy

from .rank_batches import IGNORED

Loss = Callable[[Tensor, Tensor], Tensor]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def summed_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The sum over the images; those with the target `IGNORED` are left out."""
    return cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


@dataclass(frozen=True)
class Updates:
    """How a batch becomes a loss, and losses an update.

    Attributes:
        loss: of (logits [B, C], targets), the sum over the images.
        mix: (images [B, C, H, W], targets [B] int64) → (images, targets as `loss` takes them);
            None where the batch stays as it is.
        accumulate: batches to an update, each of the same weight; an epoch's last may have fewer.
        clip_grad: the largest norm of an update's gradient; None for any.
        after: called after each update with the number of updates since training began.
    """

    loss: Loss = summed_cross_entropy
    mix: Mix | None = None
    accumulate: int = 1
    clip_grad: float | None = None
    after: Callable[[int], None] | None = None

    def of_epoch(self, batches: int) -> int:
        """How many updates an epoch of so many batches has."""
        return -(-batches // self.accumulate)

    def clip(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        """Clip the gradient of all that `optimizer` trains."""
        if self.clip_grad is None:
            return
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        dispatch_clip_grad(parameters, self.clip_grad, mode="norm")


PLAIN = Updates()


def make_loss(
    num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Loss, Mix | None]:
    """`loss` and `mix` of `Updates`: cross entropy of mixed images or smoothed targets.

    Args:
        num_classes: C.
        mixup: α of mixup (arXiv:1710.09412); 0 for none.
        cutmix: α of CutMix (arXiv:1905.04899); 0 for none. With both, each batch is mixed by either
            with probability ½.
        label_smoothing: the share of a target that is spread over all classes.
    """
    if not (mixup or cutmix):
        return partial(summed_cross_entropy, label_smoothing=label_smoothing), None
    mixed = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)

    def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # timm mixes an image with the one as far from the other end, so takes an even number only;
        # the last of an odd batch stays as it is.
        even = len(images) - len(images) % 2
        parts = [mixed(images[:even], targets[:even])] if even else []
        if even < len(images):
            ignored = targets[even:] == IGNORED
            alone = mixup_target(targets[even:] * ~ignored, num_classes, 1.0, label_smoothing)
            parts.append((images[even:], alone * ~ignored[:, None]))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    return summed_cross_entropy, mix
