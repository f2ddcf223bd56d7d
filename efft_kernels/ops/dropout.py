"""`low_rank_linear` with dropout on the rank-r activation, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch


def low_rank_linear_with_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    p: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """`low_rank_linear` with dropout on the rank-r activation, x·down·core[g], as FacT trains.

    A mask of M·G·Rb entries stands between the two thin products, so this is composed from torch's
    own operators; the masks come from torch's generator and are replayed under checkpointing.

    Args:
        x: [..., K]; the other tensors, their dtypes and what is raised are as in `low_rank_linear`.
        p: probability of dropping an entry; the others are scaled by 1 / (1 - p).
        backend: 'auto', 'torch' or 'reference', which all mean plain torch here.

    Returns:
        [..., N]. Source: FacT (arXiv:2212.03145), its released training code.

    Raises:
        RuntimeError: a compiled backend was asked for by name.
    """
    backend = dispatch.requested_backend(backend)
    if backend not in ("auto", "torch", "reference"):
        raise RuntimeError(
            f"backend {backend!r} was asked for but has no kernel with dropout on the rank-r"
            " activation; train with dropout=0.0 or with backend='auto'"
        )
    x = checks.to_autocast_dtype(x)
    checks.check_operands(x, weight, bias, down, core, up)
    dtype = x.dtype
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    slices = up.shape[0] if core is None else core.shape[0]
    activation = torch.matmul(x, down.to(dtype))  # [..., Ra]
    if core is not None:
        wide = core.to(dtype).transpose(0, 1).flatten(1)  # [Ra, G·Rb]
        activation = torch.matmul(activation, wide).unflatten(-1, (slices, -1))
    else:
        activation = activation.unsqueeze(-2)  # [..., 1, Ra]: the slices share its mask
    activation = F.dropout(activation, p).expand(*x.shape[:-1], slices, -1)
    low_rank = torch.einsum("...gb,gnb->...gn", activation, up.to(dtype).expand(slices, -1, -1))
    return y + low_rank.flatten(-2)
