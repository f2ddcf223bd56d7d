"""The adapter file: one safetensors file of factors, trained modules and a header of strings.

docs/adapter_format.md describes the format. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic_files import replacing
from ..methods import method_from_config
from ..methods.base import Method

FORMAT = "efft-kernels.adapter"
FORMAT_VERSION = 1

_FACTORS = "factors."
_MODULES = "modules."
_BUFFERS = "buffers."
_CHECKSUM = "sha256"

# What json and the checks of a method or a baseline raise on a header that is another text.
UNREADABLE = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def factor_key(name: str) -> str:
    """The key of a factor, from its name in the bank."""
    return _FACTORS + name


def module_key(module: str, name: str) -> str:
    """The key of a trained module's tensor, from the tensor's name in the module."""
    return f"{_MODULES}{module}.{name}"


def buffer_key(name: str) -> str:
    """The key of a frozen module's buffer, from its name in the model."""
    return _BUFFERS + name


def buffers_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The frozen modules' buffers in a state, by their names in the model."""
    return {k.removeprefix(_BUFFERS): v for k, v in state.items() if k.startswith(_BUFFERS)}


def trained_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained modules' tensors in a state, by their names in the model."""
    return {k.removeprefix(_MODULES): v for k, v in state.items() if k.startswith(_MODULES)}


def modules_with_tensors(modules: Sequence[str], state: Mapping[str, Tensor]) -> list[str]:
    """Those of the trained modules that a state has tensors of: a head that was replaced by none,
    nn.Identity say, has nothing to train."""
    return [m for m in modules if any(key.startswith(module_key(m, "")) for key in state)]


def is_factor(key: str) -> bool:
    """Whether a state's key is a factor's."""
    return key.startswith(_FACTORS)


def factors_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors in a state, by their names in the bank."""
    return {k.removeprefix(_FACTORS): v for k, v in state.items() if is_factor(k)}


@dataclass(frozen=True)
class Header:
    """What an adapter file says besides its tensors.

    Attributes:
        method: the method's configuration.
        targets: names of the adapted linears, in the model's order.
        modules_to_train: names of the modules saved whole.
        base_shapes: parameter name → shape of the plain model.
    """

    method: Method
    targets: list[str]
    modules_to_train: list[str]
    base_shapes: dict[str, tuple[int, ...]]

    def to_metadata(self) -> dict[str, str]:
        """The header as safetensors' metadata, JSON in strings."""
        return {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "method": json.dumps(self.method.to_config()),
            "targets": json.dumps(self.targets),
            "modules_to_train": json.dumps(self.modules_to_train),
            "base_shapes": json.dumps(self.base_shapes),
        }


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors' names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_header(
    metadata: Mapping[str, str], path: str | os.PathLike[str], argument: str = "path"
) -> Header:
    """The header in a file's metadata, as `read_adapter_file` returns it.

    Args:
        metadata: safetensors' strings.
        path: the file, for the error's text.
        argument: the name of the caller's argument, for the error's text.

    Raises:
        ValueError: a key is missing or its JSON is not what the format says.
    """
    try:
        shapes = json.loads(metadata["base_shapes"])
        return Header(
            method=method_from_config(json.loads(metadata["method"])),
            targets=_names(metadata["targets"], at_least=1),
            modules_to_train=_names(metadata["modules_to_train"]),
            base_shapes={name: tuple(map(int, shape)) for name, shape in shapes.items()},
        )
    except UNREADABLE as error:
        raise ValueError(
            f"{argument} must be an adapter file with a readable header, got {path}:"
            f" {' '.join(str(error).splitlines())}"
        ) from None


def _names(text: str, at_least: int = 0) -> list[str]:
    names = json.loads(text)
    is_list = isinstance(names, list) and len(names) >= at_least
    if not is_list or not all(isinstance(name, str) for name in names):
        raise TypeError(f"expected a list of module names, got {text}")
    return names


def read_adapter_file(
    path: str | os.PathLike[str], *, formats: Sequence[str] = (FORMAT,)
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of an adapter file of a version that this release knows.

    Args:
        path: the file.
        formats: which its header may name; a baseline's file has a format of its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, no safetensors file, no adapter, an unknown version, or tensors that
            differ from the header's checksum (files of older releases have none).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be an adapter file, found none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # safetensors raises KeyError and others on dtypes torch lacks
        reason = " ".join(str(error).splitlines())
        raise ValueError(f"path must be a whole safetensors file, got {path}: {reason}") from None
    if metadata.get("format") not in formats:
        known = " or ".join(map(repr, formats))
        raise ValueError(
            f"path must be a file written by Adapter.save (format {known}), got {path} with"
            f" format {metadata.get('format')!r}"
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} must have format_version {FORMAT_VERSION}, got"
            f" {metadata.get('format_version')!r}: it needs another release of efft-kernels"
        )
    expected = metadata.get(_CHECKSUM)
    if expected is not None and expected != (found := checksum(tensors)):
        raise ValueError(
            f"path must hold the tensors that were saved, got {path}, damaged or changed: their"
            f" {_CHECKSUM} is {found}, not {expected} (a header without it is taken as it is)"
        )
    return metadata, tensors


def write_adapter_file(
    path: str | os.PathLike[str],
    header: Header,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write an adapter file; `path` holds either the old or the new content, never a part.

    Args:
        path: where to write.
        header: the format's own strings.
        state: tensors as `Adapter.state_dict` names them.
        metadata: the user's further strings.

    Raises:
        TypeError: metadata that is not text.
        ValueError: a metadata key that the format uses; tensors without storage (meta).
        OSError: the folder does not exist or cannot be written.
    """
    check_has_numbers(state)
    own = header.to_metadata()
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map str to str, got {key!r}: {value!r}")
    if clash := sorted({*own, _CHECKSUM} & set(metadata)):
        raise ValueError(f"metadata keys must not be the format's own, got {clash}")
    # A copy of its own for each tensor: safetensors refuses those that share memory.
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    own[_CHECKSUM] = checksum(tensors)
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={**metadata, **own})


def check_has_numbers(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors without storage (meta), of which there is nothing to save."""
    if meta := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(
            f"the adapter must have numbers to be saved, got {shorten(meta)} on the meta device"
        )


@contextmanager
def errors_about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put a ValueError or TypeError of the block into one line that names the file or folder."""
    try:
        yield
    except (ValueError, TypeError) as error:
        line = " ".join(str(error).splitlines())
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(line if os.fspath(path) in line else f"{line} (in {path})") from None


def shorten(items: list[str]) -> str:
    """The first three of `items` and how many more there are, for an error's text."""
    return "; ".join(items[:3]) + ("" if len(items) <= 3 else f"; and {len(items) - 3} more")
