"""The classes of images that nobody has labelled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from .images import ImageList, UnreadableImageError
from .loop import NonFiniteLossError
from .settings import AMP_DTYPES, require
from .trained import Trained


@dataclass(frozen=True)
class Prediction:
    """What an image shows.

    Attributes:
        path: of the image.
        classes: names, the most probable first; none where the image cannot be read.
        probabilities: of these.
        unreadable: the reason why it cannot be read; "" where it can.
    """

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    unreadable: str = ""


def find_images(sources: Sequence[Path]) -> list[str]:
    """The paths of images.

    Args:
        sources: images; folders, of which every image below counts, sorted by path; and lists,
            text files (.txt) with a path on each line.

    Raises:
        ValueError: a source that is not there, a folder or list without an image.
    """
    paths: list[str] = []
    for source in sources:
        require("images", source.exists(), "images, folders or lists", f"{source} (nothing there)")
        if source.is_dir():
            found = sorted(
                os.path.join(folder, name)
                for folder, _, names in os.walk(source, followlinks=True)
                for name in names
                if name.lower().endswith(IMG_EXTENSIONS)
            )
        elif source.suffix == ".txt":
            lines = source.read_text(encoding="utf-8").splitlines()
            found = [line.strip() for line in lines if line.strip()]
        else:
            found = [str(source)]
        require("images", bool(found), "at least one image", f"none in {source}")
        paths += found
    return paths


class _Images(Dataset[Any]):
    """(index, tensor or the reason why there is none)."""

    def __init__(self, paths: Sequence[str], transform: Any) -> None:
        self._images = ImageList([(path, 0) for path in paths], transform)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self._images[index][0]
        except UnreadableImageError as error:
            return index, str(error)


@torch.inference_mode()
def predict(
    trained: Trained,
    paths: Sequence[str],
    *,
    top_k: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    amp: str = "none",
) -> Iterator[Prediction]:
    """What each image shows, in the order of `paths`.

    Args:
        trained: the model.
        paths: of images.
        top_k: classes of each; None for 5, or all where they are fewer.
        batch_size: images per batch.
        workers: processes that load images.
        amp: autocast dtype, "none", "float16" or "bfloat16".

    Raises:
        ValueError: a number that makes no sense; it names it.
        NonFiniteLossError: a logit is NaN or +∞.
    """
    classes = trained.classes
    fits = top_k is None or 1 <= top_k <= len(classes)
    require("top_k", fits, f"within 1..{len(classes)}, the number of classes", top_k)
    require("batch_size", batch_size >= 1, "at least 1", batch_size)
    require("workers", workers >= 0, "at least 0", workers)
    require("amp", amp in AMP_DTYPES, f"one of {', '.join(AMP_DTYPES)}", amp)
    k = min(5, len(classes)) if top_k is None else top_k
    loader: DataLoader[Any] = DataLoader(
        _Images(paths, trained.transform),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        pin_memory=trained.device.type == "cuda",
    )
    dtype = AMP_DTYPES[amp]
    for batch in loader:
        found = {index: image for index, image in batch if isinstance(image, Tensor)}
        best: dict[int, tuple[list[float], list[int]]] = {}
        if found:
            stacked = torch.stack(list(found.values())).to(trained.device, non_blocking=True)
            with torch.autocast(trained.device.type, dtype=dtype, enabled=dtype is not None):
                logits = trained.model(stacked)
            if (logits.isnan() | logits.isposinf()).any():
                raise NonFiniteLossError("the model's logits are not finite")
            top = logits.float().softmax(-1).topk(k)
            values, indices = top.values.tolist(), top.indices.tolist()
            best = dict(zip(found, zip(values, indices, strict=True), strict=True))
        for index, image in batch:
            if index in best:
                values, indices = best[index]
                names = tuple(classes[number] for number in indices)
                yield Prediction(paths[index], names, tuple(values))
            else:
                yield Prediction(paths[index], unreadable=image)
