"""From Python to a backend in one step: the C++ entry point, where it takes the call.

csrc/entry/autograd.cpp does there what functional.py and dispatch.py do in Python: the checks,
autocast, the choice of backend and strategy, and the autograd node. It calls the native operators
itself, and the `forward` and `backward` of the backends in Python. It asks for a choice once per
kind of call and remembers the answer, and it leaves whatever is not plain to functional.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

from torch import Tensor

from . import cost_model, dispatch
from .backends import native_library
from .backends.torch_backend import Grads

Forward = Callable[..., tuple[Tensor, Tensor | None]]
Backward = Callable[..., Grads]

# The position of a name is its code in csrc/entry/autograd.cpp's keys.
_BACKENDS = ("auto", *(name for name in dispatch.BACKENDS if name != "reference"))
_STRATEGIES = ("auto", *dispatch.STRATEGIES)
_BACKEND_CODES = {name: code * len(_STRATEGIES) for code, name in enumerate(_BACKENDS)}
_STRATEGY_CODES = {name: code for code, name in enumerate(_STRATEGIES)}


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    backend: str,
    strategy: str,
) -> Tensor | None:
    """The result with its autograd node, or None where functional.py has to take the call."""
    module = native_library.autograd_module()
    base = _BACKEND_CODES.get(backend)
    if module is None or base is None:
        return None
    y: Tensor | None = module.low_rank_linear(
        x, weight, bias, down, core, up, base + _STRATEGY_CODES[strategy], _decide
    )
    return y


def _decide(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    rows: int,
    training: bool,
    asked: int,
) -> tuple[int, int] | tuple[Forward, Backward] | None:
    """(forward, backward): strategies as the native operators number them, or a backend's callables
    where Python is to run; None where functional.py is to take the call.

    Raises:
        RuntimeError, ValueError: as `dispatch.select`.
    """
    backend = _BACKENDS[asked // len(_STRATEGIES)]
    strategy = _STRATEGIES[asked % len(_STRATEGIES)]
    problem = cost_model.Problem.of(x, weight, down, core, up, training=training)
    problem = problem._replace(M=rows)
    module, forward = dispatch.select(backend, strategy, problem, x)
    in_backward = problem._replace(training=True, backward=True)
    other, backward = dispatch.select(backend, strategy, in_backward, x)
    if other is not module:
        return None
    if module.NATIVE and not module.out_of_reach(problem):
        return dispatch.STRATEGIES.index(forward), dispatch.STRATEGIES.index(backward)
    return _callables(module, forward, backward)


@cache  # csrc/entry/autograd.cpp keeps every pair for good
def _callables(
    module: ModuleType, forward_strategy: str, backward_strategy: str
) -> tuple[Forward, Backward]:
    """The backend as csrc/entry/autograd.cpp calls it, with positional arguments alone."""

    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        core: Tensor | None,
        up: Tensor,
        save_p: bool,
    ) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None] = module.forward(
            x, weight, bias, down, core, up, save_p=save_p, strategy=forward_strategy
        )
        return found

    def backward(
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor,
        p: Tensor | None,
        down: Tensor,
        core: Tensor | None,
        up: Tensor,
        needs: tuple[bool, ...],
    ) -> Grads:
        found: Grads = module.backward(
            dy, x, weight, p, down, core, up, needs=needs, strategy=backward_strategy
        )
        return found

    return forward, backward


def forget_choices() -> None:
    """Ask anew from here on: after new measurements, another preference, or where a backend can run
    that could not before."""
    module = native_library.autograd_module()
    if module is not None:
        module.forget_choices()


cost_model.when_measured(forget_choices)
