"""The steps of `backends/chain_steps.py` as launches.

GELU is torch's own: a kernel that carries the thin products of both linears along is bound by its
arithmetic, 1.6 ms a step slower on an H100 (ViT-B, 64 images) than these passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..chain_steps import Norm, Normed, TorchSteps
from ..fallback import padded_rank
from . import tuning
from .configs import PassConfig
from .device import multiprocessors
from .gather import launch_gather
from .launch_cache import CallCache, cache_of
from .merge_stack import launch_merge_stack
from .norm import Branch, NormConfig, launch_norm_bwd, launch_norm_down_grad, launch_norm_fwd
from .reduce import launch_reduce
from .thin import launch_tall_grad, launch_thin

MAX_WIDTH = 2048  # of the stream: the norm's kernels go over a row in one unrolled loop


class Configs(NamedTuple):
    """Block shapes."""

    norm: NormConfig
    norm_grad: NormConfig
    norm_down_grad: PassConfig
    gather: PassConfig


@cache
def configs_for(k: int, rank: int, index: int | None) -> Configs:
    """The block shapes for a stream of K columns.

    Args:
        k: K.
        rank: the largest of the chain's linears.
        index: the CUDA device.
    """
    wide = padded_rank(rank) > 32
    block_c = 64 if wide else 128

    def parts(columns: int) -> int:
        """Of the rows, so that there are two programs for each multiprocessor."""
        return tuning.cdiv(2 * multiprocessors(index), columns)

    tiles = tuning.cdiv(k, block_c)
    return Configs(
        NormConfig(16, 128 if wide else 256, True, 8 if wide or k > 768 else 4),
        NormConfig(4, 256, True, 4),
        PassConfig(64, block_c, parts(tiles), 4, 3),
        PassConfig(64, block_c, parts(3 * tiles), 4, 3),
    )


class TritonSteps(TorchSteps):
    """The steps as launches on the current device.

    Args:
        configs: block shapes.
    """

    def __init__(self, configs: Configs) -> None:
        self.configs = configs

    def _cache(self, name: str, *tensors: Tensor | None) -> CallCache:
        return cache_of(tensors, "chain", name, self.configs)

    def merge(self, weights: Sequence[Tensor], b: Tensor, down: Tensor) -> Tensor:
        return launch_merge_stack(weights, b, down, self._cache("merge", weights[0], b))

    def norm(
        self, z: Tensor, y: Tensor | None, norm: Norm, down: Tensor, dtype: torch.dtype
    ) -> Normed:
        got = launch_norm_fwd(
            z,
            None if y is None else Branch(y),
            norm.weight,
            norm.bias,
            down,
            eps=norm.eps,
            dtype=dtype,
            config=self.configs.norm,
            cache=self._cache(f"norm {norm.eps}", z, y, down),
        )
        assert got.mean is not None and got.p is not None
        return Normed(got.z, got.out, got.p, got.mean, got.rstd)

    def norm_grad(
        self, dout: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        got = launch_norm_bwd(
            dout,
            z,
            mean,
            rstd,
            norm.weight,
            norm.bias,
            None,
            None,
            residual,
            branch_grad=True,
            config=self.configs.norm_grad,
            cache=self._cache("norm_grad", dout, z),
        )
        assert got.dy is not None
        return got.dz, got.dy

    def norm_down_grad(
        self, z: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, s: Tensor
    ) -> Tensor:
        cache = self._cache("norm_down_grad", z, s)
        config = self.configs.norm_down_grad
        partial = launch_norm_down_grad(
            z, mean, rstd, norm.weight, norm.bias, s, config=config, cache=cache
        )
        d_down = _gradient(z, z.shape[1], s.shape[1])
        launch_reduce(((None, None), (None, None), (partial, d_down)), cache)
        return d_down

    def thin(self, x: Tensor, down: Tensor) -> Tensor:
        p = x.new_empty(x.shape[0], down.shape[1])
        launch_thin(x, down, None, p, None, cache=self._cache("thin", x, down))
        return p

    def thin_grad(self, dy: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        cache = self._cache("thin_grad", dy, b)
        s, d_b = torch.empty_like(p), _gradient(dy, *b.shape)
        partial, _ = launch_thin(dy, b, None, s, p, cache=cache)
        launch_reduce(((partial, d_b), (None, None), (None, None)), cache)
        return s, d_b

    def tall_grad(self, x: Tensor, s: Tensor) -> Tensor:
        cache = self._cache("tall_grad", x, s)
        partial = launch_tall_grad(x, s, cache=cache)
        found = _gradient(x, x.shape[1], s.shape[1])
        launch_reduce(((None, None), (None, None), (partial, found)), cache)
        return found

    def gather_grad(
        self, parts: Sequence[Tensor], b: Tensor, p: Tensor, copy: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        cache = self._cache("gather" if copy else "gather, no copy", parts[0], b)
        first, second, third = parts
        whole, s_partial, d_b_partial = launch_gather(
            (first, second, third), b, p, copy=copy, config=self.configs.gather, cache=cache
        )
        s, d_b = torch.empty_like(p), _gradient(b, *b.shape)
        launch_reduce(((d_b_partial, d_b), (s_partial, s), (None, None)), cache)
        return whole, s, d_b


def _gradient(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float32)
