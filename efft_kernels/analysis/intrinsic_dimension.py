"""Local intrinsic dimension: how small a random subspace of one module's parameters learns a task.

For growing d, Θ = Θ0 + P·θ is trained in θ [d] alone (with the head), until the accuracy reaches a
fraction of the full one: that d is d_t (KAdaptation, arXiv:2203.16329, sections 3.2.1 and 4.3; Li et
al., arXiv:1804.08838). A low d_t marks a module worth adapting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..attach import resolve_modules_to_train
from ..engine import seed_everything
from .fastfood import random_subspace
from .task import Budget, Task, top1_after_training

DEFAULT_DIMS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
REFERENCES = ("model", "module")


@dataclass(frozen=True)
class IntrinsicDimension:
    """One module's result.

    Attributes:
        module: dotted name.
        parameters: D.
        reference: what the full accuracy is of, "model" or "module".
        full_top1_percent: with everything of it trained.
        fraction: of the full accuracy that counts as solved.
        curve: (d, top-1 in percent) for every d tried, rising; NaN where training diverged.
        dimension: d_t, the first d that reached fraction·full; None where none did.
    """

    module: str
    parameters: int
    reference: str
    full_top1_percent: float
    fraction: float
    curve: tuple[tuple[int, float], ...]
    dimension: int | None

    @property
    def threshold_top1_percent(self) -> float:
        """The accuracy that counts as solved."""
        return self.fraction * self.full_top1_percent

    def to_json(self) -> dict[str, Any]:
        """The fields and the threshold in JSON's own types; null for NaN."""
        curve = [{"d": d, "top1_percent": None if math.isnan(y) else y} for d, y in self.curve]
        return asdict(self) | {
            "curve": curve,
            "threshold_top1_percent": self.threshold_top1_percent,
        }


def subspace_lr(lr: float, parameters: int, dim: int) -> float:
    """The learning rate of θ whose Adam steps move Θ as far as steps of `lr` on Θ itself would.

    A step of lr' on each of d coordinates is lr'·√d long, and P keeps lengths; a step of lr on each
    of D is lr·√D long. So lr' = lr·√(D/d).
    """
    return lr * math.sqrt(parameters / dim)


def intrinsic_dimension(
    task: Task,
    module: str,
    budget: Budget,
    *,
    dims: Sequence[int] = DEFAULT_DIMS,
    fraction: float = 0.9,
    reference: str = "model",
    full_top1_percent: float | None = None,
    theta_lr: float | None = None,
    modules_to_train: str | Sequence[str] = ("head",),
    exhaustive: bool = False,
    seed: int = 0,
    on_result: Callable[[str, int | None, float], None] = lambda module, dim, top1: None,
) -> IntrinsicDimension:
    """d_t of one module of the task's model, which stays as it is.

    Args:
        task: the data set and the backbone.
        module: dotted name, e.g. "blocks.0.attn".
        budget: of every run; its lr is the head's and the full training's.
        dims: the d to try, in rising order; 0 trains the head alone; those from D on are left out.
        fraction: of the full accuracy that counts as solved; 0.9 as in the papers.
        reference: the full accuracy is that of the whole "model" trained (one yardstick for all
            modules), or of the "module" alone.
        full_top1_percent: that accuracy, if it is known, as `full_accuracy` returns it.
        theta_lr: learning rate of θ; None for `subspace_lr`.
        modules_to_train: trained whole in every run beside θ; () for none.
        exhaustive: try every d, for the whole curve; else stop at d_t.
        seed: of P, the order of the images and dropout.
        on_result: called with (module, d or None for the full training, top-1 percent).

    Raises:
        ValueError: a module the model does not have, one that holds or is held by a module that
            is trained whole, dims that do not rise, fraction outside (0, 1], or a full training that
            diverged.
    """
    dims = _checked_dims(dims)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be within (0, 1], got {fraction}")
    trained = resolve_modules_to_train(task.model, modules_to_train)
    parameters = _count(task.model, module, trained)
    if full_top1_percent is None:
        full_top1_percent = full_accuracy(
            task, budget, reference=reference, module=module, modules_to_train=trained, seed=seed
        )
        on_result(module, None, full_top1_percent)
    curve: list[tuple[int, float]] = []
    dimension: int | None = None
    for dim in dims:
        if dim >= parameters:
            break
        lr = theta_lr
        if lr is None:
            lr = subspace_lr(budget.lr, parameters, max(dim, 1))
        top1 = _train_in_subspace(task, module, trained, budget, dim, lr, seed)
        curve.append((dim, top1))
        on_result(module, dim, top1)
        if dimension is None and top1 >= fraction * full_top1_percent:
            dimension = dim
            if not exhaustive:
                break
    return IntrinsicDimension(
        module, parameters, reference, full_top1_percent, fraction, tuple(curve), dimension
    )


def full_accuracy(
    task: Task,
    budget: Budget,
    *,
    reference: str = "model",
    module: str = "",
    modules_to_train: str | Sequence[str] = ("head",),
    seed: int = 0,
) -> float:
    """Top-1 percent with the whole model trained, or with one module and `modules_to_train`.

    Raises:
        ValueError: an unknown reference, or the training diverged.
    """
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {REFERENCES}, got {reference!r}")
    model = task.copy_of_model()
    whole = reference == "model"
    model.requires_grad_(whole)
    if not whole:
        for name in (module, *resolve_modules_to_train(model, modules_to_train)):
            model.get_submodule(name).requires_grad_(True)
    seed_everything(seed)
    top1 = top1_after_training(model, task, budget, seed)
    if math.isnan(top1):
        raise ValueError(f"lr must be low enough for the full training, which diverged at {budget.lr}")
    return top1


def _train_in_subspace(
    task: Task,
    module: str,
    trained: Sequence[str],
    budget: Budget,
    dim: int,
    theta_lr: float,
    seed: int,
) -> float:
    model = task.copy_of_model()
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    seed_everything(seed)
    if dim == 0:
        return top1_after_training(model, task, budget, seed, groups)
    with random_subspace(model.get_submodule(module), dim, seed) as theta:
        groups.append({"params": [theta], "lr": theta_lr, "weight_decay": 0.0})
        return top1_after_training(model, task, budget, seed, groups)


def _checked_dims(dims: Sequence[int]) -> tuple[int, ...]:
    dims = tuple(dims)
    rising = all(a < b for a, b in zip(dims, dims[1:], strict=False))
    if not dims or dims[0] < 0 or not rising:
        raise ValueError(f"dims must be at least 0 and rise, got {list(dims)}")
    return dims


def _count(model: nn.Module, module: str, trained: Sequence[str]) -> int:
    """D of the module, after checking that it can be measured."""
    modules = dict(model.named_modules())
    if not module or module not in modules:
        examples = [name for name in modules if name.endswith(("attn", "mlp"))][:4]
        hint = f", such as {', '.join(examples)}" if examples else ""
        raise ValueError(f"module must name a module of {type(model).__name__}{hint}, got {module!r}")
    for name in trained:
        if f"{name}.".startswith(f"{module}.") or f"{module}.".startswith(f"{name}."):
            raise ValueError(f"module must be apart from {name!r}, trained whole, got {module!r}")
    count = sum(parameter.numel() for parameter in modules[module].parameters())
    if count == 0:
        raise ValueError(f"module must have parameters, got {module!r} without")
    return count
