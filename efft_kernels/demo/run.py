"""The main job on real images, without a GPU: adapt a frozen vision transformer to new classes.

A small timm ViT learns the handwritten digits 0 to 4. Frozen, it is then adapted to the digits 5 to
9 with 20 images a class, all others being the test set, in four ways: `linear` (the head alone),
`full` (everything), `efft1` and `efft2` (factors and head). Each seed draws its own training
images; images, augmentation, batch size, epochs and schedule are the same for every method.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import load
from ..atomic_files import replacing
from ..training import digits
from ..training.loop import saved_for_backward_mib, train_one_epoch, trained_parameters
from ..training.reproducible import deterministic
from . import report
from .recipes import QUICK, RECIPES, THREADS, Recipe, Settings, prepare, transfer


class NothingLearntError(RuntimeError):
    """The backbone did not learn its source digits, so there is nothing to adapt."""


def run(
    output: Path = Path("runs/demo"),
    seeds: int = 3,
    quick: bool = False,
    console: Console | None = None,
) -> list[report.Row]:
    """Run the demo, print its table, and write its files under `output`.

    The files are `report.json`, `accuracy.png`, `backbone.safetensors` and one adapter per factor
    method and seed in `adapters/`; each is replaced in one step. The same seeds give the same
    accuracies on the same machine; the milliseconds vary.

    Args:
        output: folder to write to, made if missing.
        seeds: how many seeds, counted from 0; each draws its own training images.
        quick: one seed and one epoch, to see that everything works; the accuracies mean nothing.
        console: where to print; by default the terminal.

    Returns:
        The table's rows.

    Raises:
        ValueError: seeds below 1.
        NothingLearntError: the backbone did not learn its source digits.
        NonFiniteLossError: a training diverged.
        OSError: the folder cannot be written.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    settings = QUICK if quick else Settings()
    seeds = 1 if quick else seeds
    console = console or Console()
    adapters = output / "adapters"
    adapters.mkdir(parents=True, exist_ok=True)
    for left_over in adapters.glob("efft?-seed*.safetensors"):  # of an earlier run's backbone
        left_over.unlink()

    with deterministic(digits.DEVICE, threads=THREADS), _progress(console) as progress:
        on_epoch = _bar(progress, "pre-training on the digits 0 to 4", settings.source_epochs)
        backbone, source_top1 = digits.pretrain(epochs=settings.source_epochs, on_epoch=on_epoch)
        if source_top1 <= report.SOURCE_TOP1_NEEDED and not quick:
            raise NothingLearntError(
                f"the backbone must reach {report.SOURCE_TOP1_NEEDED}% on held-out digits 0 to 4,"
                f" got {source_top1:.1f}%"
            )
        backbone_file = output / "backbone.safetensors"
        with replacing(backbone_file) as path:
            save_file(backbone.state_dict(), path)

        top1: dict[str, list[float]] = {}
        for name, recipe in RECIPES.items():
            on_epoch = _bar(progress, f"{name} on the digits 5 to 9", seeds * settings.epochs)
            top1[name] = []
            for seed in range(seeds):
                adapter, accuracy = transfer(
                    backbone, recipe, digits.TARGET_CLASSES, seed, settings, on_epoch
                )
                top1[name].append(accuracy)
                if adapter is not None:
                    adapter.save(adapters / f"{name}-seed{seed}.safetensors")

        on_round = _bar(progress, "milliseconds per step", settings.timing_rounds)
        step_ms, saved_mib = measure_steps(backbone, settings, on_round)
        reload = reload_and_merge(backbone_file, adapters / "efft2-seed0.safetensors", seed=0)

    result = report.Result(
        settings=settings,
        quick=quick,
        source_top1=source_top1,
        top1=top1,
        trainable_params={n: _trainable_params(backbone, recipe) for n, recipe in RECIPES.items()},
        head_params=_count(backbone.head),
        step_ms=step_ms,
        saved_mib=saved_mib,
        reload=reload,
    )
    report.write(result, output)
    report.show(result, output, console)
    return result.rows()


def measure_steps(
    backbone: VisionTransformer, settings: Settings, on_round: Callable[[], None] = lambda: None
) -> tuple[dict[str, float], dict[str, float]]:
    """Time and memory of a training step, by method.

    The methods take turns, one step each, so that what else the machine does falls on all of them.

    Args:
        backbone: stays as it is.
        settings: the batch size, and how many steps each method makes.
        on_round: called after a step of every method.

    Returns:
        (method → median milliseconds, method → MiB kept for the backward).
    """
    train, _ = digits.split_digits(digits.TARGET_CLASSES, digits.TRAIN_PER_CLASS, seed=0)
    batch = next(iter(DataLoader(train, settings.batch_size)))
    steps: dict[str, Callable[[], float]] = {}
    saved_mib: dict[str, float] = {}
    for name, recipe in RECIPES.items():
        model, _ = prepare(backbone, recipe, len(digits.TARGET_CLASSES))
        saved_mib[name] = saved_for_backward_mib(model, *batch)
        steps[name] = _stepper(model, batch, recipe.lr)
    for step in steps.values():
        for _ in range(3):  # warm caches and optimizer states
            step()
    step_ms: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(settings.timing_rounds):
        for name, step in steps.items():
            step_ms[name].append(step())
        on_round()
    return {name: statistics.median(times) for name, times in step_ms.items()}, saved_mib


def _stepper(model: nn.Module, batch: tuple[Tensor, Tensor], lr: float) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(
        trained_parameters(model), lr=lr, weight_decay=digits.WEIGHT_DECAY
    )
    return lambda: train_one_epoch(model, [batch], optimizer, device=digits.DEVICE).step_ms[0]


@torch.no_grad()
def reload_and_merge(backbone_file: Path, adapter_file: Path, seed: int) -> dict[str, Any]:
    """Load backbone and adapter from disk; compare the adapted model with the plain one it becomes.

    Args:
        backbone_file: weights of the backbone.
        adapter_file: an adapter of it.
        seed: of the test images that both predict.

    Returns:
        What the report says of it; `max_abs_logit_diff` is over the logits of all test images.
    """
    model = digits.build_backbone(len(digits.SOURCE_CLASSES))
    model.load_state_dict(load_file(backbone_file))
    model.reset_classifier(len(digits.TARGET_CLASSES))
    adapter = load(model, adapter_file)
    _, test = digits.split_digits(digits.TARGET_CLASSES, digits.TRAIN_PER_CLASS, seed)
    model.eval()
    adapted = model(test.images)
    adapter.merge()
    plain = adapter.detach()
    merged = plain(test.images)
    predicted = merged.argmax(1)
    return {
        "adapter": adapter_file.name,
        "plain_linears": all(
            type(module) is nn.Linear for module in plain.modules() if isinstance(module, nn.Linear)
        ),
        "images": len(test),
        "equal_predictions": int((adapted.argmax(1) == predicted).sum()),
        "max_abs_logit_diff": float((adapted - merged).abs().max()),
        "top1": 100 * float((predicted == test.labels).float().mean()),
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trained_parameters(module))


def _trainable_params(backbone: VisionTransformer, recipe: Recipe) -> int:
    model, adapter = prepare(backbone, recipe, len(digits.TARGET_CLASSES))
    return adapter.num_parameters() if adapter else _count(model) - _count(model.head)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _bar(progress: Progress, description: str, total: int) -> Callable[[], None]:
    """Show a bar; each call of what is returned moves it on by one."""
    task = progress.add_task(description, total=total)
    return lambda: progress.advance(task)
