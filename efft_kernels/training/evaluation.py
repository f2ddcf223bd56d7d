"""Measuring a trained adapter: the model is rebuilt from what training wrote into its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from ..adapters.attach import resolve_modules_to_train
from . import images, run_folder
from .backbone import Notify, build_backbone, fingerprint
from .loop import evaluate
from .methods import load_trained
from .reproducible import epoch_seed, seed_everything
from .settings import AMP_DTYPES, require, resolve_device


@dataclass(frozen=True)
class EvalResult:
    """How good an adapter is.

    Attributes:
        top1_percent: of the images.
        images: how many they are.
        images_from: which they are, in words.
    """

    top1_percent: float
    images: int
    images_from: str


def evaluate_adapter(
    data_root: Path,
    adapter_path: Path,
    *,
    split: str = "val",
    checkpoint: Path | None = None,
    pretrained: bool | None = None,
    merge: bool = False,
    batch_size: int | None = None,
    workers: int = 0,
    device: str = "auto",
    amp: str | None = None,
    skip_bad_images: bool = False,
    notify: Notify = lambda message: None,
    on_batch: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Rebuild the model an adapter was trained on, load the adapter, and measure its top-1.

    Args:
        data_root: folder of images.
        adapter_path: the adapter that training wrote.
        split: "val" for data_root/val, or the images that training held out of data_root; "all"
            for every image of data_root, one folder per class.
        checkpoint: file of the backbone's weights; None for what training used, as for pretrained,
            batch_size and amp.
        pretrained: fetch timm's weights where no checkpoint is given.
        merge: fold the adapter into the weights and evaluate the plain model.
        batch_size: images per batch.
        workers: processes that load images.
        device: "auto" is CUDA where there is one.
        amp: autocast dtype, "none", "float16" or "bfloat16".
        skip_bad_images: leave out images that cannot be decoded.
        notify: called with lines for the user.
        on_batch: called with (batches done, all batches).

    Raises:
        ValueError: the adapter, the images or the backbone do not fit; it names what.
    """
    require("split", split in ("val", "all"), "val or all", split)
    require("amp", amp is None or amp in AMP_DTYPES, f"one of {', '.join(AMP_DTYPES)}", amp)
    require("batch_size", batch_size is None or batch_size >= 1, "at least 1", batch_size)
    require("workers", workers >= 0, "at least 0", workers)
    recorded = run_folder.read_adapter_header(adapter_path)
    settings, identity = recorded["settings"], recorded["identity"]
    classes = tuple(identity["classes"])
    torch_device = resolve_device(device)

    samples, images_from = _choose_images(data_root, split, recorded, notify)
    unreadable = images.find_unreadable(samples, workers=workers)
    images.refuse_or_report(unreadable, skip=skip_bad_images, notify=notify)
    samples = images.without(samples, unreadable, classes)

    if checkpoint is None and pretrained is None and settings["checkpoint"] is not None:
        checkpoint = Path(settings["checkpoint"])
        there = checkpoint.is_file()
        require("checkpoint", there, f"given, as {checkpoint} is no longer there", "none")
    seed_everything(epoch_seed(settings["seed"], 0))
    model = build_backbone(
        settings["model"],
        num_classes=len(classes),
        checkpoint=checkpoint,
        pretrained=settings["pretrained"] if pretrained is None else pretrained,
        img_size=settings["img_size"],
        drop_path=settings["drop_path"],
    )
    if fingerprint(model, resolve_modules_to_train(model, "head")) != identity["backbone"]:
        notify(
            "the backbone's weights differ from those the adapter was trained on:"
            " the accuracy may mean nothing"
        )
    adapter = load_trained(model, adapter_path, settings["method"])
    model.to(torch_device)
    if merge:
        adapter.merge()
        adapter.detach()

    _, transform = images.make_transforms(
        model, img_size=settings["img_size"], normalize=settings["normalize"]
    )
    loader = images.make_loader(
        samples,
        transform,
        batch_size=batch_size or settings["batch_size"],
        workers=workers,
        shuffle=False,
        pin_memory=torch_device.type == "cuda",
    )
    top1_percent = evaluate(
        model,
        _counted(loader, on_batch),
        device=torch_device,
        num_classes=len(classes),
        autocast_dtype=AMP_DTYPES[amp or settings["amp"]],
    )
    return EvalResult(top1_percent, len(samples), images_from)


def _choose_images(
    root: Path, split: str, recorded: Mapping[str, Any], notify: Notify
) -> tuple[list[images.Sample], str]:
    if split == "all" or (root / "val").is_dir():
        root = root if split == "all" else root / "val"
        _, samples = images.read_folder(root, recorded["identity"]["classes"], notify)
        return samples, f"all of {root}"
    settings = recorded["settings"]
    skipped = {str(root / name) for name in run_folder.left_out(recorded)}
    splits = images.open_splits(
        root,
        val_split=settings["val_split"],
        seed=settings["seed"],
        leave_out=lambda samples: skipped & {path for path, _ in samples},
        notify=notify,
    )
    if splits.fingerprint() != recorded["identity"]["data"]:
        raise ValueError(
            f"data must hold the very images the adapter was trained with, got others in {root}:"
            " pass --split all to evaluate on every image there"
        )
    return list(splits.val), f"held out of {root} by training"


def _counted(
    loader: DataLoader[tuple[Tensor, Tensor]], on_batch: Callable[[int, int], None] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    for done, batch in enumerate(loader, start=1):
        yield batch
        if on_batch is not None:
            on_batch(done, len(loader))
