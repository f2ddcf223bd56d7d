"""Computing x·down once where separate query, key and value linears read the same x.

Hugging Face's attention has three linears where timm has one qkv. Their factors share `down`, so
the first of them to see x projects it and the others take the result. What is shared lives only
while the attention module's own forward runs: hooks on that module open and close it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Site
from ..nn import FactorBank, FusedEFFTLinear
from ..ops.shared_projection import project

_SHARING_ROLES = ("q", "k", "v")


class SharedInput:
    """P = x·down of the linears of one attention module, between `open` and `close`."""

    def __init__(self) -> None:
        self.active = False
        self._held: tuple[Tensor, int, Tensor] | None = None  # x, its version, P

    def open(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the attention module."""
        self.active, self._held = True, None

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the attention module; runs after an exception too."""
        self.active, self._held = False, None

    def projection(self, x: Tensor, down: Tensor) -> Tensor:
        """P of x: the one at hand where x is the very tensor it was made from, else a new one."""
        held, version = self._held, _version(x)
        if held is None or held[0] is not x or held[1] != version:
            self._held = held = (x, version, project(x, down))
        return held[2]


def _version(x: Tensor) -> int:
    """How often x was written in place; inference tensors and compiled graphs do not count."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version


def share_inputs(model: nn.Module, bank: FactorBank, sites: Iterable[Site]) -> None:
    """Let the q, k and v linears of each attention module share x·down where their factors allow
    it."""
    by_parent: dict[tuple[str, object], list[str]] = {}
    for site in sites:
        key = bank.group(site.name).down_key(site.name)
        if site.role in _SHARING_ROLES and key is not None:
            parent = site.name.rpartition(".")[0]
            by_parent.setdefault((parent, (bank.group_of[site.name], key)), []).append(site.name)
    for (parent, _), names in by_parent.items():
        if len(names) < 2:
            continue
        shared = SharedInput()
        module = model.get_submodule(parent)
        module.register_forward_pre_hook(shared.open)
        module.register_forward_hook(shared.close, always_call=True)
        for name in names:
            layer: Any = model.get_submodule(name)
            assert isinstance(layer, FusedEFFTLinear)
            layer.shared_input = (shared,)


def unshare_inputs(model: nn.Module) -> None:
    """Remove every hook that `share_inputs` registered."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), SharedInput):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
