"""Local intrinsic dimension: how small a random subspace of one module's parameters learns a task.

For growing d, Θ = Θ0 + P·θ is trained in θ [d] alone (with the head), until the accuracy reaches a
fraction of the full one: that d is d_t. A low d_t marks a module worth adapting.

Source: KAdaptation (arXiv:2203.16329), sections 3.2.1 and 4.3; Li et al. (arXiv:1804.08838).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..adapters.attach import resolve_modules_to_train
from ..training.reproducible import seed_everything
from .fastfood import random_subspace
from .task import Budget, Task, top1_after_training, without_nan

DEFAULT_DIMS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
REFERENCES = ("model", "module")
# Times `equal_step_lr`. On the demo's digits (attention of block 0, d = 1000, 20 epochs) top-1 was
# 59 % at 1, 78 % at 3, 83 % at 10 and 85 % at 30.
DEFAULT_LR_FACTORS = (1.0, 10.0)


@dataclass(frozen=True)
class Settings:
    """How intrinsic dimensions are measured.

    Attributes:
        dims: the d to try, in rising order; 0 trains the head alone; those from D on are left out.
        fraction: of the full accuracy that counts as solved; 0.9 as in the papers.
        reference: the full accuracy is that of the whole "model" trained (one yardstick for all
            modules), or of the "module" alone.
        theta_lrs: learning rates of θ, of which each d keeps the best by its accuracy; None for
            `DEFAULT_LR_FACTORS` times `equal_step_lr`.
        head_lr: of `modules_to_train`, in all runs; None for the budget's.
        modules_to_train: trained whole in every run, together with θ; () for none.
        exhaustive: try every d, for the whole curve; else stop at d_t.
        seed: of P, the order of the images and dropout.

    Raises:
        ValueError: dims that do not rise, a fraction outside (0, 1], an unknown reference, a
            learning rate that is not above 0.
    """

    dims: tuple[int, ...] = DEFAULT_DIMS
    fraction: float = 0.9
    reference: str = "model"
    theta_lrs: tuple[float, ...] | None = None
    head_lr: float | None = None
    modules_to_train: str | tuple[str, ...] = ("head",)
    exhaustive: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in itertools.pairwise(self.dims))
        if not self.dims or self.dims[0] < 0 or not rising:
            raise ValueError(f"dims must be at least 0 and rise, got {list(self.dims)}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be within (0, 1], got {self.fraction}")
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {REFERENCES}, got {self.reference!r}")
        rates = (1.0,) if self.theta_lrs is None else self.theta_lrs
        head = 1.0 if self.head_lr is None else self.head_lr
        if not rates or not all(0 < rate < math.inf for rate in (*rates, head)):
            raise ValueError(f"theta_lrs and head_lr must be above 0, got {rates} and {head}")


@dataclass(frozen=True)
class Point:
    """One d: top-1 in percent (NaN where all runs diverged) and the rate of θ that gave it."""

    dim: int
    top1_percent: float
    theta_lr: float | None


@dataclass(frozen=True)
class IntrinsicDimension:
    """One module's result.

    Attributes:
        module: dotted name.
        parameters: D.
        reference: what the full accuracy is of, "model" or "module".
        full_top1_percent: with everything of it trained.
        fraction: of the full accuracy that counts as solved.
        curve: every d tried, rising.
        dimension: d_t, the first d that reached fraction·full; None where none did.
    """

    module: str
    parameters: int
    reference: str
    full_top1_percent: float
    fraction: float
    curve: tuple[Point, ...]
    dimension: int | None

    @property
    def threshold_top1_percent(self) -> float:
        """The accuracy that counts as solved."""
        return self.fraction * self.full_top1_percent

    def to_json(self) -> dict[str, Any]:
        """The fields and the threshold in JSON's own types; null for NaN."""
        fields = asdict(self) | {"threshold_top1_percent": self.threshold_top1_percent}
        return without_nan(fields)  # type: ignore[no-any-return]


OnResult = Callable[[str, int | None, float], None]


def equal_step_lr(lr: float, parameters: int, dim: int) -> float:
    """The learning rate of θ whose Adam steps move Θ as far as steps of `lr` on Θ itself would.

    A step of lr' on each of d coordinates is lr'·√d long, and P keeps lengths; a step of lr on each
    of D is lr·√D long. So lr' = lr·√(D/d).
    """
    return lr * math.sqrt(parameters / dim)


def intrinsic_dimensions(
    task: Task,
    modules: Sequence[str],
    budget: Budget,
    settings: Settings | None = None,
    *,
    on_result: OnResult = lambda module, dim, top1: None,
) -> list[IntrinsicDimension]:
    """d_t of some modules of the task's model, which stays as it is.

    Args:
        task: the data set and the backbone.
        modules: dotted names, e.g. "blocks.0.attn".
        budget: of every run; its lr is the full training's.
        settings: by default the papers' fraction and the whole model's accuracy.
        on_result: called with (module, d or None for the full training, top-1 percent).

    Raises:
        ValueError: a module the model does not have, or one that holds or is held by a module
            trained whole, or a full training that diverged.
    """
    settings = settings or Settings()
    trained = resolve_modules_to_train(task.model, settings.modules_to_train)
    counts = {module: _count(task.model, module, trained) for module in modules}
    full: float | None = None
    results = []
    for module, parameters in counts.items():
        if full is None or settings.reference == "module":
            full = _full_accuracy(task, module, trained, budget, settings)
            on_result(module, None, full)
        results.append(
            _measure(task, module, parameters, trained, full, budget, settings, on_result)
        )
    return results


def _measure(
    task: Task,
    module: str,
    parameters: int,
    trained: Sequence[str],
    full: float,
    budget: Budget,
    settings: Settings,
    on_result: OnResult,
) -> IntrinsicDimension:
    curve: list[Point] = []
    dimension: int | None = None
    for dim in settings.dims:
        if dim >= parameters:
            break
        rates: Sequence[float | None] = [None]
        if dim > 0:
            equal = equal_step_lr(budget.lr, parameters, dim)
            rates = settings.theta_lrs or [factor * equal for factor in DEFAULT_LR_FACTORS]
        points = [
            Point(dim, _train_in_subspace(task, module, trained, budget, settings, dim, rate), rate)
            for rate in rates
        ]
        best = max(points, key=lambda p: -1.0 if math.isnan(p.top1_percent) else p.top1_percent)
        curve.append(best)
        on_result(module, dim, best.top1_percent)
        if dimension is None and best.top1_percent >= settings.fraction * full:
            dimension = dim
            if not settings.exhaustive:
                break
    return IntrinsicDimension(
        module, parameters, settings.reference, full, settings.fraction, tuple(curve), dimension
    )


def _full_accuracy(
    task: Task, module: str, trained: Sequence[str], budget: Budget, settings: Settings
) -> float:
    """Top-1 percent with the whole model trained, or with one module and the trained ones."""
    model = task.copy_of_model()
    model.requires_grad_(settings.reference == "model")
    for name in (module, *trained):
        model.get_submodule(name).requires_grad_(True)
    seed_everything(settings.seed)
    groups = _groups(model, trained, settings)
    top1 = top1_after_training(model, task, budget, settings.seed, groups)
    if math.isnan(top1):
        raise ValueError(f"lr must be low enough for the full training, diverged at {budget.lr}")
    return top1


def _groups(model: nn.Module, trained: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """The optimizer's: the modules trained whole, and whatever else requires grad."""
    whole = {id(p) for name in trained for p in model.get_submodule(name).parameters()}
    learning = [p for p in model.parameters() if p.requires_grad]
    head: dict[str, Any] = {"params": [p for p in learning if id(p) in whole]}
    if settings.head_lr is not None:
        head["lr"] = settings.head_lr
    return [head, {"params": [p for p in learning if id(p) not in whole]}]


def _train_in_subspace(
    task: Task,
    module: str,
    trained: Sequence[str],
    budget: Budget,
    settings: Settings,
    dim: int,
    theta_lr: float | None,
) -> float:
    model = task.copy_of_model()
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    groups = _groups(model, trained, settings)
    seed = settings.seed
    seed_everything(seed)
    if dim == 0:
        return top1_after_training(model, task, budget, seed, groups)
    with random_subspace(model.get_submodule(module), dim, seed) as theta:
        groups.append({"params": [theta], "lr": theta_lr, "weight_decay": 0.0})
        return top1_after_training(model, task, budget, seed, groups)


def _count(model: nn.Module, module: str, trained: Sequence[str]) -> int:
    """D of the module, after checking that it can be measured."""
    modules = dict(model.named_modules())
    if not module or module not in modules:
        examples = [name for name in modules if name.endswith(("attn", "mlp"))][:4]
        hint = f", such as {', '.join(examples)}" if examples else ""
        raise ValueError(
            f"module must name a module of {type(model).__name__}{hint}, got {module!r}"
        )
    for name in trained:
        if f"{name}.".startswith(f"{module}.") or f"{module}.".startswith(f"{name}."):
            raise ValueError(f"module must be apart from {name!r}, trained whole, got {module!r}")
    count = sum(parameter.numel() for parameter in modules[module].parameters())
    if count == 0:
        raise ValueError(f"module must have parameters, got {module!r} without")
    return count
