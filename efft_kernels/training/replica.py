"""One model over several processes, as DDP's copies or FSDP2's parts, and its state."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import distribute_tensor
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from ..methods.sharded import is_sharded, whole
from .ranks import Ranks


def replicate(model: nn.Module, ranks: Ranks) -> nn.Module:
    """What training has to call in the place of `model`; evaluation may call `model` itself.

    Gradients are means over the processes. With FSDP2 the parameters of `model` become parts of
    them, so that an optimizer has to be made afterwards.

    Args:
        model: on its device, with all that is to train.
        ranks: the processes.
    """
    if ranks.fsdp:
        return _shard(model, ranks)
    if ranks.world == 1:
        return model
    # A static graph: what trains but takes no part in the loss has no gradient, as without DDP.
    return DistributedDataParallel(model, static_graph=True)


def _shard(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Shard the blocks of a model, which are gathered one after the other, and the rest."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.world,))
    for holder in reversed(list(model.modules())):
        children = list(holder.children())
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        if isinstance(holder, nn.Sequential | nn.ModuleList) and alike:
            for child in children:
                if any(True for _ in child.children()) and any(True for _ in child.parameters()):
                    fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Give every process the first one's buffers."""
    if ranks.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def finite(parameter: Tensor) -> bool:
    """Whether all of this process's part of a parameter is finite."""
    own: Any = parameter
    return bool(torch.isfinite(own.to_local() if is_sharded(parameter) else parameter).all())


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with whole tensors; every process has to call it."""
    state = optimizer.state_dict()
    state["state"] = {
        index: {n: whole(value) if is_sharded(value) else value for n, value in values.items()}
        for index, values in state["state"].items()
    }
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state of whole tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        index: {name: _like(parameters[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": own})


def _like(parameter: Any, value: Any) -> Any:
    """A value of the optimizer's, sharded as its parameter is."""
    if not is_sharded(parameter) or not isinstance(value, Tensor) or not value.ndim:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def synced_batch_norm(
    model: nn.Module, ranks: Ranks, *, counts: bool = True
) -> AbstractContextManager[Any]:
    """Within the block BatchNorm in training takes its statistics from the images of all processes.

    torch's SyncBatchNorm does so on GPUs alone, and takes the place of the model's own modules.

    Args:
        model: whose forward runs in the block.
        ranks: the processes.
        counts: whether the images of this process count.
    """
    if ranks.world == 1 or not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return nullcontext()
    return _SyncedBatchNorm(counts)


class _SyncedBatchNorm(TorchFunctionMode):
    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = float(counts)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is batch_norm:
            return self._batch_norm(*args, **kwargs)
        return function(*args, **kwargs)

    def _batch_norm(
        self,
        x: Tensor,  # [B, C, ...]
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        others = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = wide.new_tensor(x.numel() / x.shape[1] * self.counts)
        dist.all_reduce(count)
        if x.numel() <= x.shape[1] and count < 2:  # others have no need to ask the device
            raise ValueError(
                "batches must have more than one value per channel for BatchNorm to train, got"
                f" {list(x.shape)} in all processes together"
            )
        mean = all_reduce(wide.sum(others) * self.counts) / count
        centered = wide - mean.view(shape)
        variance = all_reduce(centered.square().sum(others) * self.counts) / count
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                unbiased = variance * (count / (count - 1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        y = centered * (variance + eps).rsqrt().view(shape)
        if weight is not None:
            y = y * weight.view(shape)
        if bias is not None:
            y = y + bias.view(shape)
        return y.to(x.dtype)
