"""What the formats share: tensors read without running code, checks, a folder written whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_file import factor_key, module_key, shorten
from ..atomic_files import follow_link, os_errors_about, temporary_beside

MOST_JSON_BYTES = 2**24


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: no JSON object, or of more than `MOST_JSON_BYTES`.
    """
    if (size := path.stat().st_size) > MOST_JSON_BYTES:
        raise ValueError(f"{path} must be JSON of at most {MOST_JSON_BYTES:,} bytes, got {size:,}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {_reason(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: not a whole safetensors file.
    """
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises KeyError and others on dtypes torch lacks
        raise ValueError(
            f"path must be a whole safetensors file, got {path}: {_reason(error)}"
        ) from None


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors in a file of torch.save, on the CPU; no other object is made.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, anything but a dictionary of dense tensors, or a tensor of more
            numbers than the file holds of it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of torch.save, found none at {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(item.file_size for item in archive.infolist())
            if unpacked > path.stat().st_size:
                raise ValueError(f"compressed, {unpacked:,} bytes when unpacked")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch raise a dozen types on damaged files
        raise ValueError(
            f"path must be a whole file of tensors, got {path}: {_reason(error)}"
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(
            f"path must hold a dictionary of named tensors, got {path} with"
            f" {type(content).__name__}"
        )
    for name, tensor in content.items():
        dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.is_cpu
        if not dense:
            raise ValueError(f"{name} must be a dense tensor in {path}, got {type(tensor)}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name} must be stored whole in {path}, got {list(tensor.shape)} of"
                f" {tensor.untyped_storage().nbytes():,} bytes"
            )
    return {name: tensor.detach() for name, tensor in content.items()}


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], symbols: str = "") -> None:
    """Raise ValueError unless `tensor` has the expected shape, written "[r, K]" in symbols."""
    if tuple(tensor.shape) != expected:
        shape = f"{symbols}={list(expected)}" if symbols else str(list(expected))
        raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is floating."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating, got {tensor.dtype}")


def check_trained(
    model: nn.Module, trained: Sequence[str], tensors: Mapping[str, Tensor], source: Path
) -> None:
    """Raise ValueError unless `tensors` are the whole state of the `trained` modules of `model`."""
    expected = {
        f"{module}.{name}": tensor
        for module in trained
        for name, tensor in model.get_submodule(module).state_dict().items()
    }
    if unknown := sorted(set(tensors) - set(expected)):
        raise ValueError(
            f"path must hold factors and modules trained whole ({', '.join(trained) or 'none'}),"
            f" got {source} with {shorten(unknown)}"
        )
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"path must hold {shorten(missing)}, got {source} without")
    for name, tensor in tensors.items():
        check_shape(name, tensor, tuple(expected[name].shape))


@contextlib.contextmanager
def detached_on_error(adapter: Adapter) -> Iterator[None]:
    """Take the adapter off its model again if the block fails."""
    try:
        yield
    except BaseException:
        adapter.detach()
        raise


def fill(adapter: Adapter, factors: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Load factors, by their names in the bank, and the trained modules' tensors, by the model's.

    Raises:
        ValueError: a tensor that has no place or another shape.
    """
    state = adapter.state_dict()
    state |= {factor_key(name): tensor for name, tensor in factors.items()}
    for name, tensor in trained.items():
        owner = next((m for m in adapter.modules_to_train if name.startswith(m + ".")), None)
        if owner is None:
            raise ValueError(
                f"modules_to_train must hold {name}, got {', '.join(adapter.modules_to_train)}"
            )
        state[module_key(owner, name.removeprefix(owner + "."))] = tensor
    adapter.load_state_dict(state)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, renamed to `path` at the end or removed on an error.

    Raises:
        FileExistsError: something is at `path`, other than an empty folder.
        OSError: the folder cannot be written, or the disk is full; it names the folder.
    """
    target = follow_link(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"path must not exist or be an empty folder, got {path}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path must be in an existing folder, got {path}")
    temporary = temporary_beside(target)
    with os_errors_about(path, temporary):
        try:
            temporary.mkdir()
            yield temporary
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max
