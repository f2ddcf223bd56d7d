"""Which backend and which strategy run: the user's choice, what `auto` picks, and why not another.

An explicit choice never falls back: it raises with what is missing and how to get it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cost_model, schemas
from .backends import REGISTRY, Implementation
from .checks import autocast_enabled
from .schemas import STRATEGIES

ENVIRONMENT_VARIABLE = "EFFT_KERNELS_BACKEND"
BACKENDS = ("reference", *REGISTRY)

_override: str | None = None


@cache
def _load(name: str) -> tuple[Implementation | None, str | None]:
    """(module, None), or (None, why it cannot run here). Remembered: the answer does not change."""
    try:
        module = REGISTRY[name].load()
    except ImportError as error:
        return None, f"{REGISTRY[name].module} cannot be imported: {error}"
    reason = module.unavailable()
    return (module, None) if reason is None else (None, reason)


def why_not(name: str) -> str | None:
    """Why the backend cannot run here; None where it can."""
    return _load(name)[1]


def available_backends() -> dict[str, str | None]:
    """Every backend's name with None where it can run here, else the reason why not."""
    return {name: None if name == "reference" else why_not(name) for name in BACKENDS}


def _check_name(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be 'auto' or one of {BACKENDS}, got {name!r}")
    return name


def requested_backend(backend: str) -> str:
    """The name asked for: the argument, else `use_backend`, else the environment variable, else
    'auto'."""
    if backend != "auto":
        return _check_name(backend, "backend")
    if _override is not None:
        return _override
    return _check_name(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def check_strategy(strategy: str) -> None:
    """Raise ValueError unless `strategy` is 'auto' or a strategy's name."""
    if strategy != "auto" and strategy not in STRATEGIES:
        raise ValueError(f"strategy must be 'auto' or one of {STRATEGIES}, got {strategy!r}")


def require_backend(name: str) -> Implementation:
    """The named backend's module.

    Raises:
        RuntimeError: it cannot run here; the message says what is missing.
    """
    module, reason = _load(name)
    if module is None:
        raise RuntimeError(f"backend {name!r} was asked for but cannot run here: {reason}")
    return module


def use_backend(name: str) -> AbstractContextManager[None]:
    """`with use_backend(name):` every call with backend='auto' uses `name`; 'auto' is the default.

    The setting is the process's, not the thread's.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run here.
    """
    _check_name(name, "name")
    if name not in ("auto", "reference"):
        require_backend(name)
    return _overriding(name)


@contextmanager
def _overriding(name: str) -> Iterator[None]:
    global _override
    previous = _override
    _override = None if name == "auto" else name
    try:
        yield
    finally:
        _override = previous


def select(
    backend: str, strategy: str, problem: cost_model.Problem, x: Tensor
) -> tuple[Implementation, str]:
    """The backend's module and the strategy that run this call.

    Raises:
        RuntimeError: an explicitly chosen backend cannot run here or cannot take x.
        ValueError: the backend has no such strategy.
    """
    module = _select_backend(backend, x, problem)
    if strategy == "auto":
        return module, cost_model.choose(problem, module)
    if strategy not in module.STRATEGIES:
        raise ValueError(
            f"strategy must be one of {module.STRATEGIES} for backend {module.NAME!r}, got"
            f" {strategy!r}"
        )
    return module, strategy


def _select_backend(backend: str, x: Tensor, problem: cost_model.Problem) -> Implementation:
    if backend != "auto":
        module = require_backend(backend)
        reason = module.rejects(x)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} was asked for but cannot take x: {reason}")
        return module
    for candidate in reversed(REGISTRY.values()):
        if candidate.devices is None or x.device.type in candidate.devices:
            found, _ = _load(candidate.name)
            if found is not None and found.preferred(problem) and found.rejects(x) is None:
                return found
    raise AssertionError("the torch backend takes every input")


_NULL_CONTEXT: AbstractContextManager[Any] = nullcontext()


def launch_context(device: torch.device) -> AbstractContextManager[Any]:
    """What a backend is called in: without autocast, as every cast is written out, and with x's
    own device as the current one, on which Triton launches.
    """
    autocast = autocast_enabled(device.type)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    if not (autocast or elsewhere):
        return _NULL_CONTEXT
    stack = ExitStack()
    if autocast:
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device(device))
    return stack


def without_tangents(backend: str, operands: tuple[Tensor | None, ...]) -> str:
    """The backend, or 'torch' in the place of 'auto' where an operand carries a forward-mode
    tangent, which a kernel would drop.
    """
    if forward_ad._current_level < 0 or backend in ("torch", "reference"):
        return backend
    if all(t is None or forward_ad.unpack_dual(t).tangent is None for t in operands):
        return backend
    if backend != "auto":
        raise RuntimeError(
            f"backend {backend!r} does not support forward-mode derivatives; use backend='torch'"
        )
    return "torch"


def has_tangent(dy: Tensor) -> bool:
    """Whether a gradient may carry a forward-mode derivative, which only torch's own operators take
    on: forward over reverse."""
    if torch._C._are_functorch_transforms_active():
        return True
    return torch.autograd.forward_ad.unpack_dual(dy).tangent is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether a vmap is at work on it, the one of autograd's batched gradients included."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def _empty_if_none(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty((0,)) if grad is None else grad


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    save_p: bool,
    backend: str,
    strategy: str,
) -> tuple[Tensor, Tensor]:
    backend = without_tangents(backend, (x, weight, bias, down, core, up))
    problem = cost_model.Problem.of(x, weight, down, core, up, training=save_p)
    module, strategy = select(backend, strategy, problem, x)
    with launch_context(x.device):
        y, p = module.forward(x, weight, bias, down, core, up, save_p=save_p, strategy=strategy)
    return y, _empty_if_none(p, x)


def _bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    p: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    needs: list[bool],
    backend: str,
    strategy: str,
) -> tuple[Tensor, ...]:
    problem = cost_model.Problem.of(dy, weight, down, core, up, training=True, backward=True)
    module, strategy = select(backend, strategy, problem, dy)
    with launch_context(dy.device):
        dx, d_weight, d_bias, d_down, d_core, d_up = module.backward(
            dy, x, weight, p, down, core, up, needs=tuple(needs), strategy=strategy
        )
    return (
        _empty_if_none(dx, dy),
        _empty_if_none(d_weight, weight),
        _empty_if_none(d_bias, weight),
        _empty_if_none(d_down, down),
        _empty_if_none(d_core, up),
        _empty_if_none(d_up, up),
    )


schemas.LIBRARY.impl("low_rank_linear_fwd", _fwd, "CompositeExplicitAutograd")
schemas.LIBRARY.impl("low_rank_linear_bwd", _bwd, "CompositeExplicitAutograd")
