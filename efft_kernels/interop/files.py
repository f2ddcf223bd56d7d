"""What the formats share: tensors read without running code, checks, a folder written whole."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_file import factor_key, module_key, shorten


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: not a whole safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"path must be a whole safetensors file, got {path}: {error}") from None


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors in a file of torch.save, on the CPU; no other object is made.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or anything but a dictionary of dense tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of torch.save, found none at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"path must be a whole file of tensors, got {path}: {reason}") from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(
            f"path must hold a dictionary of named tensors, got {path} with"
            f" {type(content).__name__}"
        )
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor in {path}, got {type(tensor)}")
    return {name: tensor.detach() for name, tensor in content.items()}


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
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"path must not exist or be an empty folder, got {path}")
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    )
