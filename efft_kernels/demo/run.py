"""The main job on real images, without a GPU: adapt a frozen vision transformer to new classes.

A small timm ViT learns the handwritten digits 0 to 4 that come with scikit-learn. Frozen, it is
then adapted to the digits 5 to 9 with 20 images a class, all others being the test set, in four
ways: `linear` (the head alone), `full` (everything), `efft1` and `efft2` (factors and head). Each
seed draws its own training images; images, augmentation, batch size, epochs and schedule are the
same for every method.

The learning rates, ranks and scales in `RECIPES` were chosen by `search`, which never sees a digit
from 5 to 9: it pretends that some of the digits 0 to 4 are the new ones.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from .. import EFFT1, EFFT2, Adapter, attach, load
from ..atomic_files import replacing
from ..methods.base import Method
from ..training.loop import evaluate, saved_for_backward_mib, seed_everything, train_one_epoch
from .picture import Point, draw

SOURCE_CLASSES = (0, 1, 2, 3, 4)
TARGET_CLASSES = (5, 6, 7, 8, 9)
TRAIN_PER_CLASS = 20
SOURCE_TRAIN_SHARE = 0.8
SOURCE_TOP1_NEEDED = 95.0
DEVICE = "cpu"
# Steps this small gain little from a second thread, and lose much when it has to be waited for.
THREADS = 1


@dataclass(frozen=True)
class Recipe:
    """How one method is trained: learning rate, factors if any, and whether the backbone learns."""

    lr: float
    method: Method | None = None
    backbone: bool = False


# The winners of `search`, where they reached 77.0%, 94.7%, 92.3% and 93.3%.
RECIPES = {
    "linear": Recipe(lr=1.0),
    "full": Recipe(lr=1e-3, backbone=True),
    "efft1": Recipe(lr=3e-2, method=EFFT1(rank=8, scale=0.1)),
    "efft2": Recipe(lr=3e-2, method=EFFT2(rank=16, scale=0.1)),
}


@dataclass(frozen=True)
class Settings:
    """How long the demo trains and measures."""

    source_epochs: int = 15
    epochs: int = 30
    batch_size: int = 20
    timing_rounds: int = 20
    weight_decay: float = 0.05
    source_lr: float = 2e-3
    source_batch_size: int = 36


QUICK = Settings(source_epochs=1, epochs=1, timing_rounds=3)

# What the columns mean, for readers of the report.
COLUMNS = {
    "trainable_params": "without the head, which every method trains; full: the whole backbone",
    "top1_mean": "percent of the test images, mean over the seeds",
    "top1_std": "sample standard deviation over the seeds, 0 for a single one",
    "step_ms_p50": "median milliseconds of a training step, the methods taking turns",
    "saved_mib": "MiB that autograd keeps for the backward of one such step, parameters left out",
}


@dataclass(frozen=True)
class Row:
    """One method's line of the table; `COLUMNS` says what the numbers are."""

    method: str
    trainable_params: int
    top1_mean: float
    top1_std: float
    step_ms_p50: float
    saved_mib: float


class Digits(Dataset[tuple[Tensor, int]]):
    """Images [1, 8, 8] in [-1, 1] and labels counted from 0; `augment` shifts by up to a pixel."""

    def __init__(self, images: Tensor, labels: Tensor, *, augment: bool) -> None:
        self.images = images  # [n, 1, 8, 8]
        self.labels = labels  # [n]
        self._augment = v2.RandomCrop(8, padding=1, fill=-1) if augment else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return self._augment(image) if self._augment else image, int(self.labels[index])


def split_digits(
    classes: Sequence[int], train_per_class: int | float, seed: int
) -> tuple[Digits, Digits]:
    """(train, test) of these digits: so many, or this share, of each class for training."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    digits = torch.from_numpy(bunch.target)
    generator = torch.Generator().manual_seed(seed)
    chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for digit in classes:
        index = torch.nonzero(digits == digit).flatten()
        index = index[torch.randperm(len(index), generator=generator)]
        count = train_per_class
        if isinstance(count, float):
            count = round(count * len(index))
        chosen[0].append(index[:count])
        chosen[1].append(index[count:])
    label_of = torch.full((10,), -1)
    label_of[list(classes)] = torch.arange(len(classes))
    train, test = (torch.cat(part) for part in chosen)
    return (
        Digits(images[train], label_of[digits[train]], augment=True),
        Digits(images[test], label_of[digits[test]], augment=False),
    )


def build_backbone(num_classes: int) -> VisionTransformer:
    """A small timm ViT for 8×8 images: 16 patches of 2×2 pixels, average pooling.

    timm starts `pos_embed` at a standard deviation of 0.02, which is lost beside the embedding of
    so small a patch: 15 epochs on the digits 0 to 4 then end at 50% to 91%, against 97% with 0.5.
    """
    model: Any = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        in_chans=1,
        embed_dim=96,
        depth=6,
        num_heads=6,
        num_classes=num_classes,
        class_token=False,
        global_pool="avg",
        weight_init="moco",
    )
    nn.init.trunc_normal_(model.pos_embed, std=0.5)
    return model


def prepare(
    backbone: VisionTransformer, recipe: Recipe, num_classes: int
) -> tuple[VisionTransformer, Adapter | None]:
    """A copy of the backbone with a new head, of which the right part requires grad."""
    model = copy.deepcopy(backbone)
    model.reset_classifier(num_classes)
    if recipe.method is not None:
        return model, attach(model, recipe.method)
    model.requires_grad_(recipe.backbone)
    model.head.requires_grad_(True)
    return model, None


def fit(
    model: nn.Module,
    data: Digits,
    settings: Settings,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train what requires grad: AdamW, and a cosine schedule whose first tenth warms up."""
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)
    optimizer = _optimizer(model, lr, settings)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        warmup_epochs=max(1, epochs // 10),
        warmup_lr=lr / 10,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    for epoch in range(epochs):
        train_one_epoch(model, loader, optimizer, device=DEVICE, scheduler=scheduler, epoch=epoch)
        on_epoch()


def pretrain(
    classes: Sequence[int], settings: Settings, on_epoch: Callable[[], None] = lambda: None
) -> tuple[VisionTransformer, float]:
    """(backbone trained on these digits, its top-1 percent on the images of them held out)."""
    seed_everything(0)
    train, test = split_digits(classes, SOURCE_TRAIN_SHARE, seed=0)
    model = build_backbone(len(classes))
    fit(
        model,
        train,
        settings,
        lr=settings.source_lr,
        epochs=settings.source_epochs,
        batch_size=settings.source_batch_size,
        on_epoch=on_epoch,
    )
    return model, _top1(model, test)


def transfer(
    backbone: VisionTransformer,
    recipe: Recipe,
    classes: Sequence[int],
    seed: int,
    settings: Settings,
    on_epoch: Callable[[], None] = lambda: None,
) -> tuple[Adapter | None, float]:
    """(adapter if the recipe has one, top-1 percent on the test images) of the new digits."""
    train, test = split_digits(classes, TRAIN_PER_CLASS, seed)
    seed_everything(seed)
    model, adapter = prepare(backbone, recipe, len(classes))
    fit(
        model,
        train,
        settings,
        lr=recipe.lr,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        on_epoch=on_epoch,
    )
    return adapter, _top1(model, test)


def search(console: Console | None = None) -> None:
    """Print every candidate recipe's mean accuracy over transfers within the digits 0 to 4.

    Two of these digits play the source and the other three the target, in four ways, with the
    demo's epochs and images a class. `RECIPES` holds the winners. Takes some ten minutes.
    """
    console = console or Console()
    settings = Settings()
    candidates = {
        "linear": [Recipe(lr) for lr in (3e-2, 1e-1, 3e-1, 1.0, 3.0)],
        "full": [Recipe(lr, backbone=True) for lr in (1e-3, 2e-3, 3e-3)],
    }
    for name, kind in (("efft1", EFFT1), ("efft2", EFFT2)):
        candidates[name] = [
            Recipe(lr, kind(rank=rank, scale=scale))
            for rank, scale, lr in (
                (8, 0.1, 1e-2),
                (8, 0.1, 3e-2),
                (8, 1.0, 3e-3),
                (8, 1.0, 1e-2),
                (8, 10.0, 3e-3),
                (16, 0.1, 3e-2),
            )
        ]
    with _reproducible():
        sources = ((0, 1), (2, 3), (1, 4), (0, 4))
        backbones = {source: pretrain(source, settings)[0] for source in sources}
        for name, recipes in candidates.items():
            for recipe in recipes:
                top1 = []
                for source, backbone in backbones.items():
                    target = [digit for digit in SOURCE_CLASSES if digit not in source]
                    top1.append(transfer(backbone, recipe, target, 100, settings)[1])
                console.print(f"{statistics.fmean(top1):.2f}% {name} {recipe}")


def run(
    output: Path = Path("runs/demo"),
    seeds: int = 3,
    quick: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Run the demo, print its table, and write its files under `output`.

    The files are `report.json`, `accuracy.png`, `backbone.safetensors` and one adapter per factor
    method and seed in `adapters/`; each is written beside and renamed. The same seeds give the same
    accuracies on the same machine; the milliseconds vary.

    Args:
        output: folder to write to, made if missing.
        seeds: how many seeds, counted from 0; each draws its own training images.
        quick: one seed and one epoch, to see that everything works; the accuracies mean nothing.
        console: where to print; by default the terminal.

    Raises:
        ValueError: seeds below 1.
        RuntimeError: the backbone did not learn its source digits, so there is nothing to adapt.
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

    with _reproducible(), _progress(console) as progress:
        on_epoch = _task(progress, "pre-training on the digits 0 to 4", settings.source_epochs)
        backbone, source_top1 = pretrain(SOURCE_CLASSES, settings, on_epoch)
        if source_top1 <= SOURCE_TOP1_NEEDED and not quick:
            raise RuntimeError(
                f"the backbone must reach {SOURCE_TOP1_NEEDED}% on held-out digits 0 to 4,"
                f" got {source_top1:.1f}%"
            )
        backbone_file = output / "backbone.safetensors"
        with replacing(backbone_file) as beside:
            save_file(backbone.state_dict(), beside)

        top1: dict[str, list[float]] = {}
        for name, recipe in RECIPES.items():
            on_epoch = _task(progress, f"{name} on the digits 5 to 9", seeds * settings.epochs)
            top1[name] = []
            for seed in range(seeds):
                adapter, accuracy = transfer(
                    backbone, recipe, TARGET_CLASSES, seed, settings, on_epoch
                )
                top1[name].append(accuracy)
                if adapter is not None:
                    adapter.save(adapters / f"{name}-seed{seed}.safetensors")

        on_round = _task(progress, "milliseconds per step", settings.timing_rounds)
        step_ms, saved_mib = measure_steps(backbone, settings, on_round)
        reload = reload_and_merge(backbone_file, adapters / "efft2-seed0.safetensors", seed=0)

    head_params = _count(backbone.head)
    rows = [
        Row(
            method=name,
            trainable_params=_trainable_params(backbone, recipe),
            top1_mean=statistics.fmean(top1[name]),
            top1_std=statistics.stdev(top1[name]) if seeds > 1 else 0.0,
            step_ms_p50=step_ms[name],
            saved_mib=saved_mib[name],
        )
        for name, recipe in RECIPES.items()
    ]
    report = {
        "rows": [asdict(row) for row in rows],
        "columns": COLUMNS,
        "head_params": head_params,
        "source_top1": source_top1,
        "top1_per_seed": top1,
        "reload": reload,
        "quick": quick,
        "seeds": list(range(seeds)),
        "settings": asdict(settings),
        "recipes": {
            name: {
                "lr": recipe.lr,
                "method": recipe.method.to_config() if recipe.method else None,
            }
            for name, recipe in RECIPES.items()
        },
        "train_images": TRAIN_PER_CLASS * len(TARGET_CLASSES),
        "test_images": reload["images"],
        "threads": THREADS,
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("efft-kernels", "torch", "timm", "scikit-learn")},
        },
    }
    with replacing(output / "report.json") as beside:
        beside.write_text(json.dumps(report, indent=2) + "\n")
    picture = output / "accuracy.png"
    points = [
        Point(
            row.method,
            row.trainable_params + head_params,
            row.top1_mean,
            row.top1_std,
            top1[row.method],
        )
        for row in rows
    ]
    title = f"Digits 5 to 9 from {TRAIN_PER_CLASS} images a class, {_seeds(seeds)} (mean ± std)"
    with replacing(picture) as beside:
        draw(points, title, beside)
    _print(console, rows, report, output)
    return rows


def measure_steps(
    backbone: VisionTransformer, settings: Settings, on_round: Callable[[], None] = lambda: None
) -> tuple[dict[str, float], dict[str, float]]:
    """(median milliseconds, saved MiB) of a training step, by method.

    The methods take turns, one step each, so that what else the machine does falls on all of them.
    """
    train, _ = split_digits(TARGET_CLASSES, TRAIN_PER_CLASS, seed=0)
    batch = next(iter(DataLoader(train, settings.batch_size)))
    steps: dict[str, Callable[[], float]] = {}
    saved_mib: dict[str, float] = {}
    for name, recipe in RECIPES.items():
        model, _ = prepare(backbone, recipe, len(TARGET_CLASSES))
        saved_mib[name] = saved_for_backward_mib(model, *batch)
        optimizer = _optimizer(model, recipe.lr, settings)
        steps[name] = _stepper(model, batch, optimizer)
    for step in steps.values():
        for _ in range(3):  # warm caches and optimizer states
            step()
    step_ms: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(settings.timing_rounds):
        for name, step in steps.items():
            step_ms[name].append(step())
        on_round()
    return {name: statistics.median(times) for name, times in step_ms.items()}, saved_mib


def _stepper(
    model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[], float]:
    return lambda: train_one_epoch(model, [batch], optimizer, device=DEVICE).step_ms[0]


@torch.no_grad()
def reload_and_merge(backbone_file: Path, adapter_file: Path, seed: int) -> dict[str, Any]:
    """Load backbone and adapter from disk; compare the adapted model with the plain one it becomes.

    Both predict the seed's test images; `max_abs_logit_diff` is over all of their logits.
    """
    model = build_backbone(len(SOURCE_CLASSES))
    model.load_state_dict(load_file(backbone_file))
    model.reset_classifier(len(TARGET_CLASSES))
    adapter = load(model, adapter_file)
    _, test = split_digits(TARGET_CLASSES, TRAIN_PER_CLASS, seed)
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


def _optimizer(model: nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=settings.weight_decay)


def _top1(model: nn.Module, data: Digits) -> float:
    classes = int(data.labels.max()) + 1
    return evaluate(model, DataLoader(data, batch_size=256), device=DEVICE, num_classes=classes)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _trainable_params(backbone: VisionTransformer, recipe: Recipe) -> int:
    model, adapter = prepare(backbone, recipe, len(TARGET_CLASSES))
    return adapter.num_parameters() if adapter else _count(model) - _count(model.head)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Deterministic algorithms and THREADS threads inside, the caller's choices afterwards."""
    threads = torch.get_num_threads()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # it would count as step time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _task(progress: Progress, description: str, total: int) -> Callable[[], None]:
    """Show a bar; each call of what is returned moves it on by one."""
    task = progress.add_task(description, total=total)
    return lambda: progress.advance(task)


def _print(console: Console, rows: Sequence[Row], report: Mapping[str, Any], output: Path) -> None:
    seeds, reload = len(report["seeds"]), report["reload"]
    settings = report["settings"]
    table = Table(
        title=(
            f"digits 5 to 9: {report['train_images']} training images,"
            f" {report['test_images']} test images"
        ),
        caption=(
            f"Trainable parameters are without the head ({report['head_params']} for every method)."
            f" top-1: mean ± standard deviation over {_seeds(seeds)}."
            f" ms per step: median of {settings['timing_rounds']} steps of"
            f" {settings['batch_size']} images, the methods taking turns on {report['threads']} CPU"
            " thread; it varies from run to run."
            " Activations: what autograd keeps for the backward of one such step, at most."
        ),
    )
    table.add_column("method")
    for heading in ("trainable parameters", "top-1 %", "ms per step", "activations, MiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            f"{row.trainable_params:,}",
            f"{row.top1_mean:.1f} ± {row.top1_std:.1f}",
            f"{row.step_ms_p50:.1f}",
            f"{row.saved_mib:.2f}",
        )
    console.print(
        f"source task, digits 0 to 4: {report['source_top1']:.1f}% of the held-out images"
        f" (needed: above {SOURCE_TOP1_NEEDED:g}%{', not asked of a quick run' * report['quick']})"
    )
    console.print(table)
    console.print(
        f"{reload['adapter']} loaded from disk, merged and detached into a plain timm model:"
        f" the same prediction on {reload['equal_predictions']} of {reload['images']} test images,"
        f" logits within {reload['max_abs_logit_diff']:.1e}, top-1 {reload['top1']:.1f}%"
    )
    console.print(f"wrote report.json, accuracy.png, backbone.safetensors, adapters/ to {output}")


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
