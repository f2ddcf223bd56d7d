"""The handle on an attached method: its parameters, merging, detaching, and its state."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..methods.base import Method, Site
from ..nn import FusedEFFTLinear
from ..ops.checks import FLOAT_DTYPES
from .adapter_file import Header, factor_key, module_key, shorten, write_adapter_file
from .architectures import set_qkv_bias_separate, unshare_inputs
from .attachment import BANK_NAME, Attachment, find_bank
from .chained import find_chain, unchain
from .description import Description
from .swapping import take_out
from .torch_attention import allow_fast_paths


class Adapter:
    """An attached method, as `attach` and `load` return it; `Adapter(model)` finds it again.

    Args:
        model: the model that carries it.

    Raises:
        ValueError: the model carries no adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        bank = find_bank(model)
        if bank is None:
            raise ValueError(
                f"model must carry an adapter, got a {type(model).__name__} without one"
            )
        self.model = model
        self.bank = bank

    @property
    def _attachment(self) -> Attachment:
        if find_bank(self.model) is not self.bank:
            raise RuntimeError("this adapter was detached from its model")
        return self.bank.attachment

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
        names = [site.name for site in self.sites]
        return {name: cast(FusedEFFTLinear, self.model.get_submodule(name)) for name in names}

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
        """Add each ΔW to its weight, in at least float32 and rounded once; again, nothing happens.

        Raises:
            RuntimeError: within `AdapterSet.tasks`.
        """
        if self.bank.tasks is not None:
            raise RuntimeError("merge() must not be called within AdapterSet.tasks()")
        for layer in self.layers().values():
            layer.merge()

    def unmerge(self) -> None:
        """Put the base weights back: the very tensors from before `merge`."""
        for layer in self.layers().values():
            layer.unmerge()

    def detach(self) -> nn.Module:
        """Remove the adapter: the linears are plain nn.Linear again, merged ones stay merged.

        Each parameter's requires_grad is as it was before `attach`; the head keeps what it learnt.

        Returns:
            The model.

        Raises:
            RuntimeError: it was detached before.
        """
        attachment = self._attachment
        unchain(self.model)
        take_out(self.model, self.layers())
        unshare_inputs(self.model)
        allow_fast_paths(self.model, attachment.without_nested_tensors)
        self.bank.unwatch(self.model)
        set_qkv_bias_separate(self.model, attachment.separated_bias, False)
        delattr(self.model, BANK_NAME)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(attachment.required_grad.get(name, parameter.requires_grad))
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        """Factors under "factors.", trained modules under "modules."; in the model's storage."""
        state = {factor_key(name): tensor for name, tensor in self.bank.state_dict().items()}
        for module in self.modules_to_train:
            for name, tensor in self.model.get_submodule(module).state_dict().items():
                state[module_key(module, name)] = tensor
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the factors and the trained modules, if all of it fits.

        Args:
            state: tensors as `state_dict` names them, of any floating dtype.

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
        """Write one safetensors file of the factors, the trained modules and what `load` checks.

        `path` holds either the old or the new content, never a part.

        Args:
            path: where to write.
            metadata: further strings for the file's header.

        Raises:
            ValueError: a metadata key that the format uses.
            TypeError: metadata that is not text.
            OSError: the folder does not exist or cannot be written.
            RuntimeError: the adapter was detached.
        """
        attachment = self._attachment
        header = Header(
            method=attachment.method,
            targets=[site.name for site in attachment.sites],
            modules_to_train=list(attachment.modules_to_train),
            base_shapes=attachment.base_shapes,
        )
        write_adapter_file(path, header, self.state_dict(), metadata or {})

    def describe(self) -> Description:
        """What was grouped with what: one row a linear, and each group's parameters.

        Returns:
            `rows` and `groups` as plain data, and which linears may run in a chain; printed with
            rich it is a table.
        """
        calls = self.bank.calls.calls
        chained = find_chain(self.model)
        sites = chained.sites() if chained else self.bank.unchained or "blocks were replaced"
        alone, sites = (sites, frozenset[str]()) if isinstance(sites, str) else (None, sites)
        rows = [
            {
                "name": site.name,
                "role": site.role,
                "block": site.block,
                "stage": site.stage,
                "in_features": site.in_features,
                "out_features": site.out_features,
                "group": self.bank.group_of[site.name],
                "rank": self.bank.group(site.name).factors(site.name, False).down.shape[1],
                "fused": "chain" if site.name in sites else "alone",
                "calls": None if calls is None else calls[site.name],
            }
            for site in self.sites
        ]
        groups = {
            name: {key: list(parameter.shape) for key, parameter in group.named_parameters()}
            for name, group in self.bank.named_children()
        }
        return Description(str(self.method), rows, groups, alone)

    def __repr__(self) -> str:
        return (
            f"Adapter({self.method}, {len(self.sites)} linears of {type(self.model).__name__},"
            f" {self.num_parameters():,} parameters)"
        )
