"""From Python to the native kernels in one step: the C++ entry point, where it takes the call.

csrc/autograd.cpp does there what functional.py and dispatch.py do in Python: the checks, autocast,
the choice of backend and strategy, and the autograd node. It asks Python for a choice once per kind
of call and remembers the answer, and it leaves whatever is not plain to functional.py.
"""

from __future__ import annotations

from torch import Tensor

from . import cost_model, dispatch, native

# The position of a name is its code in csrc/autograd.cpp's keys.
_BACKENDS = ("auto", "cpp", "cuda")
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
    module = native.autograd_module()
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
) -> tuple[int, int] | None:
    """(forward, backward) strategies as the native operators number them, or None where another
    backend is to run.

    Raises:
        RuntimeError, ValueError: as `dispatch.select`.
    """
    backend = _BACKENDS[asked // len(_STRATEGIES)]
    strategy = _STRATEGIES[asked % len(_STRATEGIES)]
    problem = cost_model.Problem.of(x, weight, down, core, up, training=training)
    problem = problem._replace(M=rows)
    module, forward = dispatch.select(backend, strategy, problem, x)
    if not dispatch.is_native(module) or module.out_of_reach(problem):
        return None
    problem = problem._replace(training=True, backward=True)
    _, backward = dispatch.select(backend, strategy, problem, x)
    return dispatch.STRATEGIES.index(forward), dispatch.STRATEGIES.index(backward)


def forget_choices() -> None:
    """Ask anew from here on: after new measurements, or another preference."""
    module = native.autograd_module()
    if module is not None:
        module.forget_choices()


cost_model.when_measured(forget_choices)
