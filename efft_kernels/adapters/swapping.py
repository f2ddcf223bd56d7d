"""Exchanging a model's linears for adapted ones and back, under every name that they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..nn import FactorBank, FusedEFFTLinear, _module_state, check_class_is_own
from .torch_attention import (
    IN_PROJ,
    InProjection,
    call_projections,
    in_projection,
    restore_attention,
)


def parent_of(model: nn.Module, name: str) -> Any:
    """The module that holds the one of that dotted name."""
    return model.get_submodule(name.rpartition(".")[0])


def linear_at(model: nn.Module, name: str) -> nn.Module:
    """The module of a site, or an nn.Linear that stands for an attention's projection."""
    parent = parent_of(model, name)
    if not isinstance(parent, nn.MultiheadAttention):
        return model.get_submodule(name)
    if _is_in_proj(name):
        return in_projection(parent)
    linear = model.get_submodule(name)
    if type(linear) is NonDynamicallyQuantizableLinear:
        plain = nn.Linear.__new__(nn.Linear)
        plain.__dict__ = _module_state(linear)
        return plain
    return linear


def adapted_layer(model: nn.Module, name: str, linear: nn.Linear, bank: FactorBank) -> Any:
    """The adapted layer for a site; the model stays as it is."""
    parent = parent_of(model, name)
    if isinstance(parent, nn.MultiheadAttention) and _is_in_proj(name):
        return InProjection.of(parent, linear, bank, name)
    return FusedEFFTLinear.from_linear(linear, bank=bank, site=name)


def put_in(model: nn.Module, layers: Mapping[str, FusedEFFTLinear]) -> None:
    """Exchange the linears of those names for `layers`."""
    exchanged: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        parent = parent_of(model, name)
        if isinstance(parent, nn.MultiheadAttention):
            call_projections(parent)
        if isinstance(layer, InProjection):
            parent.add_module(IN_PROJ, layer)
        else:
            exchanged[model.get_submodule(name)] = layer
    _exchange(model, exchanged)


def check_can_be_taken_out(model: nn.Module, layers: Mapping[str, FusedEFFTLinear]) -> None:
    """Check, before anything has changed, that `take_out` will not fail.

    Raises:
        RuntimeError: a layer, or the attention around it, was parametrized since.
    """
    for name, layer in layers.items():
        layer.to_linear()
        parent = parent_of(model, name)
        if isinstance(parent, nn.MultiheadAttention):
            check_class_is_own(parent)


def take_out(model: nn.Module, layers: Mapping[str, FusedEFFTLinear]) -> None:
    """Put plain linears back in the places of `layers`."""
    exchanged: dict[nn.Module, nn.Module] = {
        layer: layer.to_linear() for layer in layers.values() if not isinstance(layer, InProjection)
    }
    _exchange(model, exchanged)
    for name in layers:
        restore_attention(parent_of(model, name))


def _exchange(model: nn.Module, exchanged: Mapping[nn.Module, nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in exchanged:
                module._modules[name] = exchanged[child]


def _is_in_proj(name: str) -> bool:
    return name.rpartition(".")[2] == IN_PROJ
