"""The C++ entry point: from Python to a backend in one call, where it takes the call.

csrc/entry does what functional.py and dispatch.py do in Python: the checks, autocast, the choice of
backend and strategy, and the autograd node. It calls the native operators itself, and the `forward`
and `backward` of the backends in Python. It asks `_decide` once per kind of call and remembers the
answer. Errors, traces, modes, subclasses and transforms are left to functional.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

from torch import Tensor

from . import cost_model, dispatch
from .backends import native_library
from .backends.torch_backend import Grads
from .recompute import Source
from .schemas import STRATEGY_CODES

Forward = Callable[..., tuple[Tensor, Tensor | None]]
Backward = Callable[..., Grads]

# A call's backend and strategy travel through C++ to `_decide` as one integer.
_BACKENDS = ("auto", *(name for name in dispatch.BACKENDS if name != "reference"))
_STRATEGIES = ("auto", *STRATEGY_CODES)
_BACKEND_CODES = {name: code * len(_STRATEGIES) for code, name in enumerate(_BACKENDS)}


def try_run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    backend: str,
    strategy: str,
    source: Source | None = None,
) -> Tensor | None:
    """y with its autograd node, or None where functional.py has to take the call.

    Args:
        x, weight, bias, down, core, up: as in `low_rank_linear`, not checked yet.
        backend, strategy: names, or 'auto'.
        source: what x can be made from in the backward; None where it is to be kept.

    Raises:
        RuntimeError, ValueError: as `dispatch.select`.
    """
    module = native_library.autograd_module()
    base = _BACKEND_CODES.get(backend)
    if module is None or base is None:
        return None
    y: Tensor | None = module.try_run(
        x, weight, bias, down, core, up, base + _STRATEGIES.index(strategy), _decide, source
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
    requested: int,
) -> tuple[int, int, bool] | tuple[Forward, Backward, bool] | None:
    """What runs this kind of call.

    On a GPU under autocast a wider weight is cast once, and that cast serves both passes, as that
    of a frozen nn.Linear does. `merged` starts from the weight itself instead.

    Returns:
        (forward, backward, cast weight): codes of strategies for the native operators, or functions
        of a backend in Python; whether they are given the weight in x's dtype where it needs no
        gradient. None where the two passes have different backends.

    Raises:
        RuntimeError, ValueError: as `dispatch.select`.
    """
    backend = _BACKENDS[requested // len(_STRATEGIES)]
    strategy = _STRATEGIES[requested % len(_STRATEGIES)]
    problem = cost_model.Problem.of(x, weight, down, core, up, training=training)
    problem = problem._replace(M=rows)
    module, forward = dispatch.select(backend, strategy, problem, x)
    wider = problem.weight_bytes > problem.compute_bytes
    cast_weight = x.is_cuda and wider and forward != "merged"
    in_backward = problem._replace(training=True, backward=True)
    if cast_weight:
        in_backward = in_backward._replace(weight_bytes=problem.compute_bytes)
    other, backward = dispatch.select(backend, strategy, in_backward, x)
    if other is not module:
        return None
    if module.NATIVE and not module.out_of_reach(problem):
        return STRATEGY_CODES[forward], STRATEGY_CODES[backward], cast_weight
    return *_callables(module, forward, backward), cast_weight


@cache  # csrc/entry never frees a pair that it was given
def _callables(
    module: ModuleType, forward_strategy: str, backward_strategy: str
) -> tuple[Forward, Backward]:
    """The backend's two functions as csrc/entry calls them, with positional arguments."""

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
    """Make every choice again: after new measurements, or where another backend can run."""
    module = native_library.autograd_module()
    if module is not None:
        module.forget_choices()


cost_model.when_measured(forget_choices)
