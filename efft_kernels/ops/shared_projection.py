"""Linears that share x and down: P = x·down once, and y = x·W^T + bias + P·B^T in each of them.

Separate query, key and value linears of one aggregated group read the same x, where timm has one
fused qkv. The first of them to see x gives the others its down, with the entries that are dropped
in training, and in plain torch it projects x and the others take the result. What is shared lives
only while the attention module's own forward runs: hooks on that module open and close it.
A graph of torch.compile shares nothing: under activation checkpointing it may write to no object
that was there before. Nor does one of torch.export, or what is differentiated forward.

With B = stack_g up[g]·core[g]^T and dY = dL/dy:

    dX = dY·W       dP = dY·B       d_B = dY^T·P, and d_core, d_up from it as in functional.py

Autograd sums dP over the linears and takes d_down = x^T·ΣdP and dX += ΣdP·down^T once.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import functions
from .backends.torch_backend import fold, mm_into, thin_grad, unfold_grads
from .checks import autocast_enabled, to_autocast_dtype, without_autocast
from .dispatch import requested_backend, why_not
from .recompute import Source, down_grad


class _Shared:
    """What the linears share between an `open` and its `close`. Another thread's `open` makes
    another, so that none takes what this one's linears leave here.

    Attributes:
        surroundings: where `open` was called.
        down, p: (x, what else has to be the same, what is shared), once there is any.
    """

    def __init__(self) -> None:
        self.surroundings = _surroundings()
        self.down: tuple[Tensor, tuple[object, ...], Tensor] | None = None
        self.p: tuple[Tensor, Tensor, tuple[object, ...], Tensor] | None = None  # with P's down


class SharedInput:
    """down and P = x·down of the linears of one attention module, between `open` and `close`."""

    def __init__(self) -> None:
        self._now: _Shared | None = None

    @property
    def active(self) -> bool:
        """Whether it is open."""
        return self._now is not None

    def open(self, module: torch.nn.Module, args: Any) -> None:
        """Forward pre-hook of the attention module."""
        if not torch.compiler.is_dynamo_compiling():
            self._now = _Shared()

    def close(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the attention module; runs after an exception too."""
        if not torch.compiler.is_dynamo_compiling():
            self._now = None

    def serves(self, x: Tensor, backend: str, strategy: str) -> bool:
        """Whether a linear should take P from here: only in plain torch, since a fused kernel
        computes P along with its own product, for less than a second pass over y takes.

        Args:
            x: the linear's input.
            backend, strategy: as the linear's owner set them.
        """
        if strategy != "auto" or self._of(x) is None:
            return False
        backend = requested_backend(backend)
        if backend == "auto" and x.device.type == "cpu" and why_not("cpp") is not None:
            return True
        return backend == "torch"

    def _of(self, x: Tensor) -> _Shared | None:
        """What is open, where it can be told here that another linear reads the same x."""
        if (
            # torch.export counts nothing that is written in place.
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or torch.jit.is_tracing()
            # Nor does anybody in inference mode.
            or x.is_inference()
        ):
            return None
        now = self._now
        return None if now is None or now.surroundings != _surroundings() else now

    def down_for(self, x: Tensor, down: Tensor, training: bool, group: torch.nn.Module) -> Tensor:
        """The `down` of the first linear that read x, for all that do: one mask of dropped entries,
        as of one fused qkv. Any backend takes it.

        Args:
            x: the linear's input.
            down: the linear's own.
            training: whether the linear is, and so has dropped some of it.
            group: holds what `down` is made from; what is written to it since makes another down.
        """
        now = self._of(x)
        if now is None:
            return down
        # By their table where no other module of the group holds any: a third of the time.
        parameters = group.parameters() if group._modules else group._parameters.values()
        given = [p for p in parameters if p is not None]
        if any(p.is_inference() for p in given):
            return down
        written = [p._version for p in given]
        state = (*_circumstances(x), training, *written)
        if now.down is not None and now.down[0] is x and now.down[1] == state:
            return now.down[2]
        now.down = x, state, down
        return down

    def projection(self, x: Tensor, down: Tensor, source: Source | None = None) -> Tensor:
        """P of x: the one at hand where x and down are the very tensors it was made from, under the
        same circumstances, else a new one."""
        now = self._of(x)
        if now is None or down.is_inference():
            return project(x, down, source)
        state = (*_circumstances(x), down._version)
        if now.p is not None:
            made_from, times, state_then, p = now.p
            if made_from is x and times is down and state_then == state:
                return p
        p = project(x, down, source)
        now.p = x, down, state, p
        return p


def _surroundings() -> object:
    """What has to be the same where the attention module is called and where its linears are. A
    checkpointed part of it runs without gradients, or under hooks that take what it saves, and is
    run again in backward, where nothing is open: its linears must do the same both times."""
    return (
        threading.get_ident(),
        torch.is_grad_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._current_graph_task_id(),
    )


def _circumstances(x: Tensor) -> tuple[object, ...]:
    """How often x was written in place, and whether P has a graph, and is of autocast's dtype:
    linears of one attention may differ in both."""
    device_type = x.device.type
    cast = torch.get_autocast_dtype(device_type) if autocast_enabled(device_type) else None
    return x._version, torch.is_grad_enabled(), cast


def project(x: Tensor, down: Tensor, source: Source | None = None) -> Tensor:
    """P = x·down, [..., Ra], in x's dtype (autocast's under autocast); differentiable in both.

    Args:
        x: [..., K].
        down: [K, Ra].
        source: what the backward makes x from; None where it keeps x.

    Raises:
        TypeError: x is not floating.
    """
    x = to_autocast_dtype(x)
    if source is None:
        return torch.matmul(x, down.to(x.dtype))
    p: Tensor = functions.apply(_Projection, x.reshape(-1, x.shape[-1]), down, source)
    return p.view(*x.shape[:-1], down.shape[1])


class _Projection(torch.autograd.Function):
    """P = x·down without x kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        down: Tensor,  # [K, Ra]
        source: Source,
    ) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(down, *source.kept)
        with without_autocast(x.device):
            return torch.mm(x, down.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        down, *kept = ctx.saved_tensors
        need_x, need_down, _ = ctx.needs_input_grad
        with without_autocast(dp.device):
            dx = torch.mm(dp, down.to(dp.dtype).t()) if need_x else None
            d_down = down_grad(kept, ctx.source, dp, down.dtype) if need_down else None
        return dx, d_down, None


def linear_plus_projected(
    x: Tensor, weight: Tensor, bias: Tensor | None, p: Tensor, core: Tensor | None, up: Tensor
) -> Tensor:
    """y = x·weight^T + bias + p·core[g]·up[g]^T for every output slice g.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        p: [..., Ra], from `project`; its dtype is y's.
        core: [G, Ra, Rb] or None.
        up: [1 or G, N/G, Rb].

    Returns:
        [..., N] in p's dtype.
    """
    flat = x.reshape(-1, x.shape[-1]).to(p.dtype)
    y = functions.apply(
        _LinearPlusProjected, flat, weight, bias, p.reshape(-1, p.shape[-1]), core, up
    )
    return y.reshape(*x.shape[:-1], y.shape[1])


class _LinearPlusProjected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        p: Tensor,  # [M, Ra]
        core: Tensor | None,  # [G, Ra, Rb]
        up: Tensor,  # [1 or G, N/G, Rb]
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, p, core, up)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with without_autocast(x.device):
            b = fold(core, up, p.dtype).to(p.dtype)
            y = F.linear(x, weight.to(p.dtype), None if bias is None else bias.to(p.dtype))
            # A mode may have kept y, as selective activation checkpointing does.
            if torch._C._len_torch_dispatch_stack():
                return torch.addmm(y, p, b.t())
            return y.addmm_(p, b.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, p, core, up = ctx.saved_tensors
        need_x, need_weight, need_bias, need_p, need_core, need_up = ctx.needs_input_grad
        with without_autocast(dy.device):
            dx = torch.mm(dy, weight.to(dy.dtype)) if need_x else None
            d_weight = mm_into(dy.t(), x, weight.dtype) if need_weight else None
            d_bias = dy.sum(0).to(ctx.bias_dtype) if need_bias else None
            dp = torch.mm(dy, fold(core, up, dy.dtype).to(dy.dtype)) if need_p else None
            d_core = d_up = None
            if need_core or need_up:
                d_b = thin_grad(dy, p, torch.promote_types(up.dtype, dy.dtype))
                d_core, d_up = unfold_grads(d_b, core, up, need_core, need_up)
        return dx, d_weight, d_bias, dp, d_core, d_up
