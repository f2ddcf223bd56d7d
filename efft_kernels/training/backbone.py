"""timm models for `efft-kernels train`: built, given their weights, and recognised again."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import get_pretrained_cfg, is_model, load_state_dict, split_model_name_tag
from torch import nn

from ..adapters.adapter_file import checksum

TORCH_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")

MAY_UNPACK = 256 << 20  # bytes, of however small a file
PACKED_AT_MOST = 16  # times smaller than the weights; float32 ones shrink by a tenth

LARGEST_TRIED = 1024  # pixels; one image beyond takes long on a CPU

Notify = Callable[[str], None]


def build_backbone(
    name: str,
    *,
    num_classes: int,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
    drop_path: float = 0.0,
    notify: Notify = lambda message: None,
) -> nn.Module:
    """A timm model with a head for `num_classes`.

    Its weights come from the checkpoint, else from timm, else they are random. A head with another
    number of classes is dropped.

    Args:
        name: of a timm model.
        num_classes: outputs of the head.
        checkpoint: .safetensors, .pth, or the original .npz of ViT.
        pretrained: whether timm's weights are fetched where there is no checkpoint.
        img_size: pixels; None for the model's own. A model that takes none may be given its own.
        drop_path: probability, stochastic depth.
        notify: called with a line on anything the user should know.

    Raises:
        ValueError: an unknown model, an option it does not take, an image size it cannot run on, a
            checkpoint that is missing, unreadable or of another architecture, pretrained weights
            that cannot be had.
    """
    check_model_name(name)
    options: dict[str, Any] = {"img_size": img_size, "drop_path_rate": drop_path or None}
    model = _build(name, num_classes, checkpoint, pretrained, options, notify)
    if img_size is not None and img_size <= LARGEST_TRIED:
        _try_size(model, name, img_size)
    return model


def _build(
    name: str,
    num_classes: int,
    checkpoint: Path | None,
    pretrained: bool,
    options: dict[str, Any],
    notify: Notify,
) -> nn.Module:
    if checkpoint is not None:
        if not checkpoint.is_file():
            what = "a folder" if checkpoint.is_dir() else "nothing there"
            raise ValueError(f"checkpoint must be a file of weights, got {checkpoint} ({what})")
        _check_packed(checkpoint)
        if checkpoint.suffix == ".npz":
            return _from_npz(name, checkpoint, num_classes, options, notify)
        if checkpoint.suffix in TORCH_SUFFIXES:
            return _from_state_dict(name, checkpoint, num_classes, options, notify)
        raise ValueError(
            f"checkpoint must end in .npz or one of {', '.join(TORCH_SUFFIXES)}, got {checkpoint}"
        )
    if pretrained:
        notify(f"loading timm's pretrained weights of {name}, from the network unless cached")
        return _from_hub(name, num_classes, options)
    notify(
        "the backbone's weights are random: expect poor accuracy; pass --pretrained or --checkpoint"
    )
    return _create(name, num_classes=num_classes, **options)


def _check_packed(path: Path) -> None:
    """Raise ValueError for a zip file, .npz or torch's, that would fill the memory: weights hardly
    shrink when they are packed."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(member.file_size for member in packed.infolist())
    except zipfile.BadZipFile:  # what reads it says so
        return
    if size > max(MAY_UNPACK, PACKED_AT_MOST * path.stat().st_size):
        raise ValueError(
            f"checkpoint must hold weights, got {path} of {path.stat().st_size:,} bytes that unpack"
            f" to {size:,}"
        )


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> str:
    """SHA-256 over names, dtypes, shapes and bits of the state outside the modules `exclude`."""
    outside = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{module}.") for module in exclude)
    }
    return checksum(outside)


def check_model_name(name: str) -> None:
    """Check that timm has a model of that name.

    Raises:
        ValueError: it has none; the error names the closest.
    """
    if ":" in name:  # "hf-hub:..." and "local-dir:...", which timm resolves and checks itself
        return
    architecture, _ = split_model_name_tag(name)
    if is_model(architecture):
        return
    close = _closest(architecture)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise ValueError(f"model must be the name of a timm model, got {name!r}{hint}")


def _closest(name: str, most: int = 3) -> list[str]:
    """timm's names that are the most like one, in whole or in their beginnings."""
    matcher = difflib.SequenceMatcher(b=name)

    def likeness(known: str) -> float:
        ratios = []
        for text in (known, known[: len(name)]):
            matcher.set_seq1(text)
            ratios.append(matcher.ratio())
        return max(ratios)

    scores = {known: likeness(known) for known in timm.list_models()}
    close = [known for known, score in scores.items() if score > 0.6]
    return sorted(close, key=lambda known: (-scores[known], len(known)))[:most]


def _create(name: str, **options: Any) -> nn.Module:
    try:
        return timm.create_model(name, **options)
    except TypeError as error:
        config = get_pretrained_cfg(name) if ":" not in name else None
        size = options.get("img_size")
        if "'img_size'" in str(error) and config is not None and config.input_size[-1] == size:
            return _create(name, **options | {"img_size": None})
        for option, advice in (
            ("img_size", "leave --img-size out"),
            ("drop_path_rate", "pass --drop-path 0"),
        ):
            if f"'{option}'" in str(error):
                raise ValueError(f"model {name} takes no {option}: {advice}") from error
        raise
    except Exception:
        if (size := options.get("img_size")) is not None:
            try:
                timm.create_model(name, img_size=size)
            except Exception as error:
                raise _wrong_size(name, size, error) from error
        raise


@torch.no_grad()
def _try_size(model: nn.Module, name: str, size: int) -> None:
    """Raise ValueError unless the model runs on an image of the size it was built for.

    timm checks it nowhere: a ViT is built for an image smaller than its patches, and fails later.
    """
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:  # each architecture trips over something else
        raise _wrong_size(name, size, error) from error
    finally:
        model.train(was_training)


def _wrong_size(name: str, size: int, error: Exception) -> ValueError:
    return ValueError(
        f"img_size must be a number of pixels that {name} can cut up, got {size}"
        f" ({_first_line(error)}): pass another --img-size, or leave it out"
    )


def _from_hub(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    try:
        return _create(name, pretrained=True, num_classes=num_classes, **options)
    except ValueError:
        raise
    except Exception as error:  # the hub's client, its HTTP library and timm share no base class
        raise ValueError(
            f"the pretrained weights of {name} could not be had ({_first_line(error)}); pass"
            " --checkpoint FILE with local weights, or --no-pretrained to start from random ones"
        ) from error


def _from_npz(
    name: str, path: Path, num_classes: int, options: dict[str, Any], notify: Notify
) -> nn.Module:
    model = _create(name, num_classes=num_classes, **options)
    load_pretrained: Any = getattr(model, "load_pretrained", None)
    if load_pretrained is None:
        raise ValueError(f"checkpoint must not be an .npz file for {name}, got {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            heads = [arrays[key].shape[-1] for key in arrays.files if key.endswith("head/bias")]
        load_pretrained(str(path))
    except Exception as error:  # NumPy, zipfile and timm's loader share no base class
        raise ValueError(
            f"checkpoint must hold the original .npz weights of {name}, got {path}"
            f" ({type(error).__name__}: {_first_line(error)})"
        ) from error
    _tell_about_head(heads[0] if heads else 0, num_classes, path, notify)
    return model


def _from_state_dict(
    name: str, path: Path, num_classes: int, options: dict[str, Any], notify: Notify
) -> nn.Module:
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile, torch and safetensors share no base class
        raise ValueError(
            f"checkpoint must be a file of plain tensors, got {path}"
            f" ({type(error).__name__}: {_first_line(error)})"
        ) from error
    file_classes = _head_rows(name, state)
    # With the file's own head, or none, timm loads strictly, so that a wrong architecture shows.
    overlay = {
        "state_dict": state,
        "num_classes": file_classes,
        "custom_load": False,
        "label_offset": None,
    }
    try:
        model = _create(
            name,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            num_classes=file_classes,
            **options,
        )
    except ValueError:
        raise
    except Exception as error:  # timm's remapping of foreign keys raises whatever it trips over
        raise ValueError(
            f"checkpoint must hold weights of {name}, got {path} ({_first_line(error)})"
        ) from error
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    config.pop("state_dict")
    if file_classes != num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    _tell_about_head(file_classes, num_classes, path, notify)
    return model


def _head_rows(name: str, state: dict[str, torch.Tensor]) -> int:
    """How many classes the head in a state dict has; 0 where there is none."""
    config = get_pretrained_cfg(name) if ":" not in name else None
    classifier = config.classifier if config is not None else "head"
    first = classifier if isinstance(classifier, str) else next(iter(classifier or ("head",)))
    for key in (f"{first}.weight", f"{first.split('.')[0]}.weight"):
        if key in state:
            return int(state[key].shape[0])
    return 0


def _tell_about_head(file_classes: int, num_classes: int, path: Path, notify: Notify) -> None:
    if file_classes != num_classes:
        found = f"a head for {file_classes} classes" if file_classes else "no head"
        notify(f"{path} has {found}, data has {num_classes}: the head starts anew")


def _first_line(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + "..."
