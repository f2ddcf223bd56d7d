"""Folders of images, one folder per class: reading, checking, splitting and loading them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    create_transform,
    resolve_model_data_config,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, find_classes

Sample = tuple[str, int]  # path of an image, index of its class
Notify = Callable[[str], object]


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded."""


@dataclass(frozen=True)
class ImageSplits:
    """The images of one data folder.

    Attributes:
        root: the folder.
        classes: by name.
        train: (path, class) of the images to train on.
        val: (path, class) of the images to validate on.
        held_out: whether `val` was split off here, and is no folder of its own.
        left_out: relative paths of images that are in neither part.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    held_out: bool
    left_out: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 over the classes and the relative paths of both parts, in their order."""
        parts = [
            [(Path(path).relative_to(self.root).as_posix(), label) for path, label in part]
            for part in (self.train, self.val)
        ]
        return hashlib.sha256(json.dumps([self.classes, parts]).encode()).hexdigest()

    def leaving_out(self, gone: Collection[str]) -> ImageSplits:
        """The same without the images at the paths `gone`.

        Raises:
            ValueError: a class of which nothing would be left.
        """
        names = [*self.left_out, *(Path(path).relative_to(self.root).as_posix() for path in gone)]
        return dataclasses.replace(
            self,
            train=tuple(without(self.train, gone, self.classes)),
            val=tuple(without(self.val, gone, self.classes)),
            left_out=tuple(sorted(names)),
        )


def read_folder(
    root: Path, classes: Sequence[str] | None = None, notify: Notify = warnings.warn
) -> tuple[list[str], list[Sample]]:
    """The classes and images of a folder with one folder per class, sorted by name.

    Links to folders outside are followed. One that leads back into `root`, above it, or where
    another led, is left out: its images count once, where they lie.

    Args:
        root: the folder.
        classes: number the images by these names instead of the folder's own; every folder must be
            one of them, and none needs to exist.
        notify: called with a line on each link that is left out.

    Raises:
        ValueError: a missing folder, no class folder, or a class folder without images.
    """
    if not root.is_dir():
        what = "a file" if root.exists() else "nothing there"
        raise ValueError(
            f"data must be a folder with one folder of images per class, got {root} ({what})"
        )
    try:
        found, _ = find_classes(str(root))
    except FileNotFoundError as error:
        raise ValueError(
            f"data must hold one folder of images per class, got {root} without any folder"
        ) from error
    known = list(found if classes is None else classes)
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ValueError(
            f"data must hold only the classes {_few(known)}, got {root} with {_few(unknown)}"
        )
    class_to_idx = {name: index for index, name in enumerate(known)}
    links = _Links(root, notify)
    samples = [
        (path, class_to_idx[name]) for name in found for path in _image_files(root / name, links)
    ]
    counts = Counter(label for _, label in samples)
    empty = [name for name in found if counts[class_to_idx[name]] == 0]
    if empty:
        raise ValueError(
            f"every class folder of data must hold images ({', '.join(IMG_EXTENSIONS)}),"
            f" got none in {_few([str(root / name) for name in empty])}"
        )
    return known, samples


class _Links:
    """Which folders under `root` are reached by a link to where their images count already."""

    def __init__(self, root: Path, notify: Notify):
        self._root, self._real_root = root, root.resolve()
        self._counted = {self._real_root, *self._real_root.parents}  # and what is above
        self._notify = notify

    def leads_back(self, folder: Path) -> bool:
        real = folder.resolve()
        if real == self._real_root / folder.relative_to(self._root):
            return False  # no link on the way
        if real in self._counted or real.is_relative_to(self._real_root):
            self._notify(
                f"{folder} leads back to {real}: left out, its images count once, where they lie"
            )
            return True
        self._counted |= {real, *real.parents}
        return False


def _image_files(top: Path, links: _Links) -> Iterator[str]:
    """The paths of the images under a class's folder, sorted by folder, then by name."""
    found: list[tuple[str, list[str]]] = []
    if not links.leads_back(top):
        for folder, subfolders, names in os.walk(top, followlinks=True):
            paths = [Path(folder, name) for name in sorted(subfolders)]
            subfolders[:] = [path.name for path in paths if not links.leads_back(path)]
            found.append((folder, names))
    for folder, names in sorted(found):
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS):
                yield os.path.join(folder, name)


def open_splits(
    data: Path,
    *,
    val_split: float,
    seed: int,
    leave_out: Callable[[Sequence[Sample]], Collection[str]] = lambda samples: (),
    notify: Notify = warnings.warn,
) -> ImageSplits:
    """Training and validation images of `data`.

    Where data/train and data/val exist they are taken as they are; else some are held out, of the
    images that are not left out: the split is the one of a folder without these.

    Args:
        data: the folder.
        val_split: fraction of the images to hold out, stratified by class.
        seed: of what is held out.
        leave_out: asked once, for the paths of those of all images that are to be in neither part.
        notify: as for `read_folder`.

    Raises:
        ValueError: what `read_folder` refuses, fewer than two classes, different classes in train
            and val, a class of which all is left out, or too few images to hold some out.
    """
    train_root, val_root = data / "train", data / "val"
    held_out = not (train_root.is_dir() and val_root.is_dir())
    if held_out:
        for alone, other in ((train_root, "val"), (val_root, "train")):
            if alone.is_dir() and any(child.is_dir() for child in alone.iterdir()):
                raise ValueError(
                    f"data must hold 'train' and 'val' or one folder per class, got {data} with"
                    f" '{alone.name}' but no '{other}'; to split one folder, pass --data {alone}"
                )
        classes, train = read_folder(data, notify=notify)
        _require_two(classes, data)
        val: list[Sample] = []
    else:
        classes, train = read_folder(train_root, notify=notify)
        _require_two(classes, train_root)
        val_classes, val = read_folder(val_root, notify=notify)
        if val_classes != classes:
            different = sorted(set(classes) ^ set(val_classes))
            raise ValueError(
                f"{val_root} must hold the classes of {train_root},"
                f" got a difference in {_few(different)}"
            )
    splits = ImageSplits(data, tuple(classes), tuple(train), tuple(val), held_out)
    splits = splits.leaving_out(leave_out([*train, *val]))
    if held_out:
        train, val = _hold_out(classes, splits.train, val_split, seed)
        splits = dataclasses.replace(splits, train=tuple(train), val=tuple(val))
    return splits


def _require_two(classes: Sequence[str], root: Path) -> None:
    if len(classes) < 2:
        raise ValueError(f"data must have at least 2 classes, got 1 in {root} ({classes[0]})")


def _hold_out(
    classes: Sequence[str], samples: Sequence[Sample], val_split: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    counts = Counter(label for _, label in samples)
    single = [classes[label] for label, count in counts.items() if count < 2]
    if single:
        raise ValueError(
            "every class must have at least 2 images to hold some out for validation,"
            f" got 1 in {_few(single)}; add images, or give data/train and data/val"
        )
    labels = [label for _, label in samples]
    try:
        train, val = train_test_split(
            range(len(samples)), test_size=val_split, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise ValueError(
            f"val_split must leave an image of each of the {len(classes)} classes on both sides,"
            f" got {val_split} of {len(samples)} images; change --val-split"
        ) from error
    return [samples[i] for i in sorted(train)], [samples[i] for i in sorted(val)]


class ImageList(Dataset[tuple[Tensor, int]]):
    """Images by path, with their class.

    Raises:
        UnreadableImageError: on reading an image that cannot be decoded; it names the file.
    """

    def __init__(self, samples: Sequence[Sample], transform: Callable[[Image.Image], Tensor]):
        self.samples = list(samples)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(_decode(path)), label


class _DecodeCheck(Dataset[str]):
    """For each image "" or the reason why it cannot be decoded."""

    def __init__(self, samples: Sequence[Sample]):
        self.paths = [path for path, _ in samples]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        try:
            _decode(self.paths[index])
        except UnreadableImageError as error:
            return str(error)
        return ""


def _decode(path: str) -> Image.Image:
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("no regular file")  # opening a pipe would wait for ever
        return default_loader(path)
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types on damaged files
        # Pillow names a file that it was given open by the object's repr.
        reason = re.sub(r"<_io\.\w+ name=(.*?)>", r"\1", str(error)).replace(repr(path), "the file")
        reason = reason.replace(path, "the file").strip() or "no reason given"
        raise UnreadableImageError(
            f"cannot read image {path} ({type(error).__name__}: {reason})"
        ) from error


def find_unreadable(
    samples: Sequence[Sample],
    *,
    workers: int = 0,
    on_check: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Decode every image once.

    Args:
        samples: the images.
        workers: processes that decode; 0 for this one.
        on_check: called with (images checked, all images).

    Returns:
        Path → reason, of those that cannot be decoded.
    """
    loader = DataLoader(_DecodeCheck(samples), batch_size=16, num_workers=workers, collate_fn=list)
    reasons: list[str] = []
    for batch in loader:
        reasons += batch
        if on_check is not None:
            on_check(len(reasons), len(samples))
    return {path: reason for (path, _), reason in zip(samples, reasons, strict=True) if reason}


def refuse_or_report(
    unreadable: dict[str, str], *, skip: bool, notify: Notify, limit: int = 5
) -> None:
    """Name the unreadable images.

    Args:
        unreadable: path → reason.
        skip: whether they are left out; then `notify` gets a line.
        notify: called with that line.
        limit: how many are named.

    Raises:
        UnreadableImageError: there are some, and they are not to be skipped.
    """
    if not unreadable:
        return
    reasons = list(unreadable.values())
    named = "; ".join(reasons[:limit])
    if len(reasons) > limit:
        named += f"; and {len(reasons) - limit} more"
    if not skip:
        raise UnreadableImageError(
            f"data must hold readable images, got {len(reasons)} unreadable: {named};"
            " pass --skip-bad-images to leave them out"
        )
    notify(f"skipped {len(reasons)} unreadable images: {named}")


def without(
    samples: Sequence[Sample], unreadable: Collection[str], classes: Sequence[str]
) -> list[Sample]:
    """The samples whose paths are not in `unreadable`.

    Raises:
        ValueError: a class that had images has none left.
    """
    kept = [sample for sample in samples if sample[0] not in unreadable]
    lost = {label for _, label in samples} - {label for _, label in kept}
    if lost:
        raise ValueError(
            "every class must keep a readable image,"
            f" got none in {_few([classes[label] for label in sorted(lost)])}"
        )
    return kept


def data_config(model: nn.Module, img_size: int | None, normalize: str) -> dict[str, Any]:
    """The preprocessing of evaluation, in timm's words; the arguments are `make_transforms`'."""
    config: dict[str, Any] = resolve_model_data_config(
        model, args=None if img_size is None else {"img_size": img_size}
    )
    config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    if normalize == "imagenet":
        config |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return config


def make_transforms(
    model: nn.Module,
    *,
    img_size: int | None = None,
    augment: bool = False,
    normalize: str = "model",
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Image.Image], Tensor]]:
    """timm's transforms for the model's own data config.

    Args:
        model: a timm model.
        img_size: pixels; None for the model's own.
        augment: train with timm's random crops, flips and colour jitter.
        normalize: by the "model"'s own mean and deviation, or by those of "imagenet", which the
            EFFT and FacT releases (their vtab.py) use on every model. ViTs have 0.5 and 0.5.

    Returns:
        (training, evaluation). Evaluation, and training without `augment`, resize the whole image
        to the input size with no crop, as the VTAB-1k recipe does.
    """
    config = data_config(model, img_size, normalize)
    evaluation = create_transform(**config, is_training=False)
    if not augment:
        return evaluation, evaluation
    return create_transform(**config, is_training=True), evaluation


def make_loader(
    samples: Sequence[Sample],
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int,
    workers: int,
    shuffle: bool,
    drop_last: bool = False,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of (images [B, 3, H, W], targets [B] int64).

    The order and the workers' random numbers come from `loader.generator`: seed it before an epoch
    and that epoch's batches are fixed.

    Args:
        samples: the images.
        transform: of one image.
        batch_size: images per batch.
        workers: processes that load; 0 for this one.
        shuffle: whether the order is random.
        drop_last: leave out the last batch where it is smaller; with `shuffle`, other images each
            epoch.
        pin_memory: for a CUDA device.
    """
    images: Dataset[Any] = ImageList(samples, transform)
    return DataLoader(
        images,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


def _few(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
