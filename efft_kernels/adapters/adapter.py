"""The handle on an attached method: its parameters, merging, detaching, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic_files import replacing
from ..methods.base import Method, Site
from ..nn import FactorBank, FusedEFFTLinear
from ..ops.functional import FLOAT_DTYPES
from .description import Description
from .shared_input import unshare_inputs

BANK_NAME = "factor_bank"
FORMAT = "efft-kernels.adapter"
FORMAT_VERSION = 1

_FACTORS = "factors."
_MODULES = "modules."


@dataclass(frozen=True)
class Attachment:
    """What `attach` did, kept on the bank so that it travels with deepcopy and pickle.

    Attributes:
        method: the method's configuration.
        sites: the adapted linears, in the model's order.
        modules_to_train: names of the modules trained whole.
        base_shapes: parameter name → shape of the model before attaching, the fingerprint a file
            carries.
        required_grad: parameter name → requires_grad before attaching.
        separated_bias: modules whose `qkv_bias_separate` was switched on.
    """

    method: Method
    sites: tuple[Site, ...]
    modules_to_train: tuple[str, ...]
    base_shapes: dict[str, tuple[int, ...]]
    required_grad: dict[str, bool]
    separated_bias: tuple[str, ...] = ()


def is_attached(model: nn.Module) -> bool:
    """Whether `model` carries an adapter."""
    return isinstance(getattr(model, BANK_NAME, None), FactorBank)


class Adapter:
    """An attached method. Made by `attach` and `load`; `Adapter(model)` finds the one a model
    carries.

    Raises:
        ValueError: the model carries no adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        if not is_attached(model):
            raise ValueError(
                f"model must carry an adapter, got a {type(model).__name__} without one"
            )
        self.model = model
        self.bank: FactorBank = getattr(model, BANK_NAME)

    @property
    def _attachment(self) -> Attachment:
        attachment: Any = self.bank.attachment
        if not is_attached(self.model) or getattr(self.model, BANK_NAME) is not self.bank:
            raise RuntimeError("this adapter was detached from its model")
        return attachment  # type: ignore[no-any-return]

    @property
    def method(self) -> Method:
        """The method's configuration."""
        return self._attachment.method

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapted linears, in the model's order."""
        return self._attachment.sites

    @property
    def modules_to_train(self) -> tuple[str, ...]:
        """Names of the modules that are trained whole and saved with the factors."""
        return self._attachment.modules_to_train

    def layers(self) -> dict[str, FusedEFFTLinear]:
        """Module name → adapted layer."""
        modules: Any = {site.name: self.model.get_submodule(site.name) for site in self.sites}
        return modules  # type: ignore[no-any-return]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The factors, each once; the head's parameters are the model's."""
        return self.bank.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The factors with their names in the bank."""
        return self.bank.named_parameters()

    def num_parameters(self) -> int:
        """How many numbers the factors hold, the head excluded."""
        return sum(parameter.numel() for parameter in self.parameters())

    def delta_weights(self) -> dict[str, Tensor]:
        """Module name → ΔW [N, K], detached, float32 (float64 where the factors are)."""
        return {name: layer.delta_weight() for name, layer in self.layers().items()}

    @property
    def merged(self) -> bool:
        """Whether ΔW is at present part of the weights."""
        return any(layer.merged for layer in self.layers().values())

    def merge(self) -> None:
        """Add each ΔW to its weight, in at least float32 and rounded once. Nothing happens if
        merged."""
        if self.bank.tasks is not None:
            raise RuntimeError("merge() must not be called within AdapterSet.tasks()")
        for layer in self.layers().values():
            layer.merge()

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit: they are the very tensors from before `merge`."""
        for layer in self.layers().values():
            layer.unmerge()

    def detach(self) -> nn.Module:
        """Remove the adapter: plain nn.Linear again, with the base weights, or after `merge` the
        merged ones.

        Each parameter's requires_grad is as it was before `attach`; the head keeps what it learnt.

        Returns:
            The model.
        """
        attachment = self._attachment
        for name, layer in self.layers().items():
            self.model.set_submodule(name, layer.to_linear())
        unshare_inputs(self.model)
        for module in attachment.separated_bias:
            attention: Any = self.model.get_submodule(module)
            attention.qkv_bias_separate = False
        delattr(self.model, BANK_NAME)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(attachment.required_grad.get(name, parameter.requires_grad))
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        """Factors under "factors.", trained modules under "modules."; detached, sharing storage
        with the model."""
        state = {_FACTORS + name: tensor for name, tensor in self.bank.state_dict().items()}
        for module in self.modules_to_train:
            for name, tensor in self.model.get_submodule(module).state_dict().items():
                state[f"{_MODULES}{module}.{name}"] = tensor
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the factors and the trained modules; nothing is copied unless
        everything fits.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or no float; or the adapter
                is merged.
        """
        if self.merged:
            raise ValueError(
                "the adapter must not be merged when a state is loaded: call unmerge() first"
            )
        own = self.state_dict()
        if missing := sorted(set(own) - set(state)):
            raise ValueError(f"state must hold {len(own)} tensors, missing {shorten(missing)}")
        if unknown := sorted(set(state) - set(own)):
            raise ValueError(f"state must hold {len(own)} tensors, got unknown {shorten(unknown)}")
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{name} must be {list(own[name].shape)}, got {list(tensor.shape)}"
                )
            if tensor.dtype not in FLOAT_DTYPES and tensor.dtype != own[name].dtype:
                raise ValueError(
                    f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}"
                )
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file: factors once, trained modules, and what `load` needs to check
        the model.

        The file is written beside and renamed, so `path` holds either the old or the new content.

        Args:
            path: where to write.
            metadata: further strings for the file's header; keys of the format itself are refused.

        Raises:
            ValueError: a metadata key the format uses.
            TypeError: metadata that is not text.
            OSError: the folder does not exist or cannot be written.
        """
        attachment = self._attachment
        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "method": json.dumps(attachment.method.to_config()),
            "targets": json.dumps([site.name for site in attachment.sites]),
            "modules_to_train": json.dumps(attachment.modules_to_train),
            "base_shapes": json.dumps(attachment.base_shapes),
        }
        for key, value in (metadata or {}).items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"metadata must map str to str, got {key!r}: {value!r}")
        if clash := sorted(set(header) & set(metadata or {})):
            raise ValueError(f"metadata keys must not be the format's own, got {clash}")
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.state_dict().items()
        }
        with replacing(Path(path)) as beside:
            save_file(tensors, beside, metadata={**(metadata or {}), **header})

    def describe(self) -> Description:
        """What was grouped with what: one row a linear, and each group's parameters.

        Printed with rich it is a table; `rows` and `groups` are plain data.
        """
        rows = [
            {
                "name": site.name,
                "role": site.role,
                "block": site.block,
                "stage": site.stage,
                "in_features": site.in_features,
                "out_features": site.out_features,
                "group": self.bank.group_of[site.name],
                "rank": self.layers()[site.name].current_factors().down.shape[1],
            }
            for site in self.sites
        ]
        groups = {
            name: {key: list(parameter.shape) for key, parameter in group.named_parameters()}
            for name, group in self.bank.named_children()
        }
        return Description(str(self.method), rows, groups)

    def __repr__(self) -> str:
        return (
            f"Adapter({self.method}, {len(self.sites)} linears of {type(self.model).__name__},"
            f" {self.num_parameters():,} parameters)"
        )


def read_adapter_file(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of an adapter file, checked to be one of a version this release knows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, no safetensors file, no adapter, or an unknown version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be an adapter file, found none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path must be a whole safetensors file, got {path}: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path must be a file written by Adapter.save (format {FORMAT!r}), got {path} with"
            f" format {metadata.get('format')!r}"
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} must have format_version {FORMAT_VERSION}, got"
            f" {metadata.get('format_version')!r}: it needs another release of efft-kernels"
        )
    return metadata, tensors


def shorten(items: list[str]) -> str:
    """The first three of `items` and how many more there are, for an error's text."""
    return "; ".join(items[:3]) + ("" if len(items) <= 3 else f"; and {len(items) - 3} more")
