"""What an adapted linear computes in one forward: which of the operators takes the call."""

from __future__ import annotations

from torch import Tensor

from .dropout import low_rank_linear_with_dropout
from .functional import run
from .mixed_batch import tasks_linear
from .recompute import Source
from .shared_projection import SharedInput, linear_plus_projected


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    *,
    dropout: float,
    shared_input: SharedInput | None,
    task_of_row: Tensor | None,
    source: Source | None,
    backend: str,
    strategy: str,
) -> Tensor:
    """y = x·weight^T + bias + x·down·core[g]·up[g]^T, by the operator that fits the call.

    Args:
        x: [..., K]; it, weight, bias, down, core and up are as in `low_rank_linear`.
        dropout: probability of dropping an entry of the rank-r activation x·down·core[g].
        shared_input: where x·down is kept for the linears that read the same x.
        task_of_row: [B], int64: the task of each row of the batch. `down` is then [tasks, K, Ra],
            `core` None, `up` [tasks, N, Ra], and there is no dropout.
        source: what the backward makes x from; None where it keeps x.
        backend, strategy: as in `low_rank_linear`.

    Returns:
        [..., N] in x's dtype (the ambient one under autocast).

    Raises:
        TypeError, RuntimeError: as in `low_rank_linear`.
        ValueError: as there; or x's leading dim is no multiple of B.
    """
    if task_of_row is not None:
        return tasks_linear(x, weight, bias, down, up, task_of_row, backend=backend)
    if dropout:
        return low_rank_linear_with_dropout(
            x, weight, bias, down, core, up, dropout, backend=backend, source=source
        )
    if shared_input is not None and shared_input.serves(x, backend, strategy):
        p = shared_input.projection(x, down, source)
        return linear_plus_projected(x, weight, bias, p, core, up)
    return run(x, weight, bias, down, core, up, backend=backend, strategy=strategy, source=source)
