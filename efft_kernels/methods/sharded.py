"""Tensors that FSDP2 has sharded over processes, DTensors: gathered, and written to.

What gathers is a collective: every process has to call it. Tensors of one process pass unchanged,
and torch.distributed is not imported for them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import FactorGroup, Factors


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this process holds only its part of the tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of whole tensors."""
    return {name: whole(tensor) for name, tensor in state.items()}


def stored_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of whole tensors as files hold them: a group's scale without dimensions, which FSDP2
    would take for no parameter."""
    own = re.compile(r"factors\..*\.scale")
    return {
        name: tensor.reshape(()) if own.fullmatch(name) else tensor
        for name, tensor in whole_state(state).items()
    }


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy `source` into `target`; either may be sharded, and neither needs its gradient."""
    with torch.no_grad():
        if is_sharded(target):
            from torch.distributed.tensor import distribute_tensor

            own: Any = target
            source = whole(source).to(target.device, target.dtype)
            # Every process has the whole of it: none has to send it to the others.
            source = distribute_tensor(source, own.device_mesh, own.placements, src_data_rank=None)
        else:
            source = whole(source)
        target.copy_(source)


def factors_of(group: FactorGroup, site: str, dropout: bool) -> Factors:
    """The operands of a site from whole parameters, also outside a forward, when FSDP2 has them
    sharded.

    Args:
        group: the site's group.
        site: the site's name.
        dropout: apply the method's dropout (training).
    """
    parameters = dict(group.named_parameters())
    if not any(map(is_sharded, parameters.values())):
        return group.factors(site, dropout)
    found: Factors = torch.func.functional_call(group, whole_state(parameters), (site, dropout))
    return found


def reshard(model: nn.Module) -> None:
    """Make all parameters sharded ones: what is written to those that FSDP2 gathered is lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def check_not_sharded(model: nn.Module, failing: str) -> None:
    """Check that no process holds only parts of `model`.

    Args:
        model: the model.
        failing: what cannot be done with it otherwise and what to do instead, for the error's text.

    Raises:
        RuntimeError: FSDP2 has sharded it.
    """
    reshard(model)  # after a forward FSDP2 may have some whole: the root's
    if sharded := [name for name, p in model.named_parameters() if is_sharded(p)]:
        raise RuntimeError(
            f"a model that fully_shard has divided among processes cannot {failing}; got"
            f" {len(sharded)} such parameters, {sharded[0]} for one"
        )
