"""The steps of `chain.TorchKernels` as Triton launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from efft_kernels.ops.backends.triton.act import ActConfig, launch_act_bwd, launch_act_fwd
from efft_kernels.ops.backends.triton.configs import PassConfig
from efft_kernels.ops.backends.triton.gather import launch_gather
from efft_kernels.ops.backends.triton.launch_cache import CallCache
from efft_kernels.ops.backends.triton.merge_stack import launch_merge_stack
from efft_kernels.ops.backends.triton.norm import (
    Branch,
    NormConfig,
    launch_norm_bwd,
    launch_norm_down_grad,
    launch_norm_fwd,
)
from efft_kernels.ops.backends.triton.reduce import launch_reduce
from efft_kernels.ops.backends.triton.thin import launch_tall_grad, launch_thin

from .chain import Norm, Normed, Sum, TorchKernels, aten


class Configs(NamedTuple):
    """Block shapes of a ViT-B's launches."""

    norm: NormConfig = NormConfig(16, 256, True, 4)
    norm_grad: NormConfig = NormConfig(4, 256, True, 4)
    norm_down_grad: PassConfig = PassConfig(64, 128, 44, 4, 3)
    gather: PassConfig = PassConfig(64, 128, 15, 4, 3)
    gelu: ActConfig | None = None  # None: torch's activation and passes of their own
    gelu_grad: ActConfig | None = None


# By field, the block shapes that are tried; the first is the default.
CANDIDATES: dict[str, list[Any]] = {
    "norm": [
        NormConfig(16, 256, True, 4),
        NormConfig(16, 128, True, 8),
        NormConfig(16, 256, True, 8, max_registers=128),
        NormConfig(32, 128, False, 8, max_registers=128),
        NormConfig(16, 64, False, 4),
    ],
    "norm_grad": [
        NormConfig(4, 256, True, 4),
        NormConfig(2, 256, True, 2),
        NormConfig(1, 1024, True, 4),
        NormConfig(4, 1024, True, 8),
    ],
    "norm_down_grad": [
        PassConfig(64, 128, 44, 4, 3),
        PassConfig(32, 64, 44, 4, 3),
        PassConfig(32, 128, 66, 4, 3),
        PassConfig(64, 128, 44, 8, 3),
    ],
    "gather": [
        PassConfig(64, 128, 15, 4, 3),
        PassConfig(64, 128, 29, 4, 3),
        PassConfig(64, 256, 44, 8, 2),
        PassConfig(32, 256, 29, 4, 3),
    ],
    "gelu": [
        None,
        ActConfig(64, 32, 5, 4, 2),
        ActConfig(64, 32, 8, 4, 3),
        ActConfig(32, 64, 4, 4, 3),
        ActConfig(64, 64, 4, 4, 2),
    ],
    "gelu_grad": [
        None,
        ActConfig(64, 64, 8, 4, 2),
        ActConfig(64, 64, 8, 4, 3),
        ActConfig(32, 64, 13, 4, 3),
        ActConfig(32, 128, 11, 8, 2),
        ActConfig(64, 128, 11, 8, 2),
    ],
}

# Several tiles in every direction at the sizes that the interpreter can do.
INTERPRETER = Configs(
    norm=NormConfig(16, 16, True, 4),
    norm_grad=NormConfig(4, 16, True, 4),
    norm_down_grad=PassConfig(32, 16, 2, 4, 1),
    gather=PassConfig(32, 16, 2, 4, 1),
    gelu=ActConfig(32, 32, 2, 4, 1),
    gelu_grad=ActConfig(32, 32, 2, 4, 1),
)


class Partial(NamedTuple):
    """A gradient's partial sums and its size."""

    sums: Tensor  # [parts, rows, padded columns] float32, any number of axes
    rows: int
    columns: int


class TritonKernels(TorchKernels):
    """Launches in place of torch's operators, for one model: sizes and dtypes alone tell its calls
    apart.

    Args:
        configs: block shapes.
        copy_gradient: as the class attribute says.
    """

    def __init__(self, configs: Configs, *, copy_gradient: bool = True) -> None:
        self.configs = configs
        self.copy_gradient = copy_gradient
        self._caches: dict[tuple[Any, ...], CallCache] = {}

    def _cache(self, name: str, x: Tensor, other: Any = None) -> CallCache:
        key = name, x.shape, x.dtype, other
        cache = self._caches.get(key)
        if cache is None:
            cache = self._caches[key] = {}
        return cache

    def finish(self, *sums: Partial) -> tuple[Tensor, ...]:
        """Three at most."""
        found = [s.sums.new_empty(s.rows, s.columns) for s in sums]
        pairs = [(s.sums, out) for s, out in zip(sums, found, strict=True)]
        pairs += [(None, None)] * (3 - len(pairs))
        key = tuple((s.rows, s.columns, s.sums.shape) for s in sums)
        launch_reduce(tuple(pairs), self._cache("finish", sums[0].sums, key))
        return tuple(found)

    def merge(self, weight: Tensor, b: Tensor, down: Tensor) -> Tensor:
        return launch_merge_stack(weight, b, down, self._cache("merge", weight))

    def norm(
        self, z: Tensor, y: Tensor | None, norm: Norm, down: Tensor | None, dtype: Any
    ) -> Normed:
        cache = self._cache("norm", z, (y is None, down is None, norm.eps))
        branch = None if y is None else Branch(y)
        got = launch_norm_fwd(
            z, branch, norm.weight, norm.bias, down, eps=norm.eps, dtype=dtype,
            config=self.configs.norm, cache=cache,
        )  # fmt: skip
        assert got.mean is not None
        return Normed(got.z, got.out, got.p, got.mean, got.rstd)

    def norm_grad(
        self,
        dout: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm: Norm,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        got = launch_norm_bwd(
            dout, z, mean, rstd, norm.weight, norm.bias, None, None, residual, branch_grad=True,
            config=self.configs.norm_grad, cache=self._cache("norm_grad", dout, residual is None),
        )  # fmt: skip
        assert got.dy is not None
        return got.dz, got.dy

    def norm_down_grad(
        self, z: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, s: Tensor
    ) -> Partial:
        partial = launch_norm_down_grad(
            z, mean, rstd, norm.weight, norm.bias, s, config=self.configs.norm_down_grad,
            cache=self._cache("norm_down_grad", z),
        )  # fmt: skip
        return Partial(partial, z.shape[1], s.shape[1])

    def thin(self, x: Tensor, down: Tensor) -> Tensor:
        p = x.new_empty(x.shape[0], down.shape[1])
        launch_thin(x, down, None, p, None, cache=self._cache("thin", x))
        return p

    def thin_grad(self, dy: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Partial]:
        s = torch.empty_like(p)
        partial, _ = launch_thin(dy, b, None, s, p, cache=self._cache("thin_grad", dy))
        assert partial is not None
        return s, Partial(partial, *b.shape)

    def tall_grad(self, x: Tensor, s: Tensor) -> Partial:
        partial = launch_tall_grad(x, s, cache=self._cache("tall_grad", x))
        return Partial(partial, x.shape[1], s.shape[1])

    def gather_grad(
        self, parts: Sequence[Tensor], b: Tensor, p: Tensor, copy: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        cache = self._cache("gather", parts[0], copy)
        whole, s_partial, d_b_partial = launch_gather(
            tuple(parts), b, p, copy=copy, config=self.configs.gather, cache=cache
        )
        s, d_b = torch.empty_like(p), _gradient(b, *b.shape)
        launch_reduce(((d_b_partial, d_b), (s_partial, s), (None, None)), cache)
        return whole, s, d_b

    def gelu(self, h: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        config = self.configs.gelu
        if config is None:
            a = F.gelu(h)
            return a, self.thin(a, down)
        cache = self._cache("gelu", h)
        got = launch_act_fwd(h, None, None, None, down, config=config, cache=cache)
        partial = got.p
        assert partial is not None
        if partial.dim() == 2:
            return got.a, partial
        p = h.new_empty(h.shape[0], down.shape[1])
        launch_reduce(((None, None), (None, None), (partial, p)), cache)
        return got.a, p

    def gelu_grad(
        self, da: Tensor, h: Tensor, s: Tensor, b: Tensor, p: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config = self.configs.gelu_grad
        if config is None:
            d_down = self.tall_grad(F.gelu(h), s)
            dh = aten.gelu_backward(da, h)
            s_in, d_b = self.thin_grad(dh, b, p)
            return dh, s_in, *self.finish(d_b, d_down)
        cache = self._cache("gelu_grad", h)
        got = launch_act_bwd(da, h, s, None, p, b, in_place=True, config=config, cache=cache)
        s_in, d_b = torch.empty_like(p), _gradient(h, *b.shape)
        d_down = _gradient(h, h.shape[1], s.shape[1])
        launch_reduce(((got.d_up, d_b), (got.q, s_in), (got.d_down, d_down)), cache)
        return got.dh, s_in, d_b, d_down


def _gradient(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float32)


class Shape(NamedTuple):
    """Rows, width, hidden width, rank, layers."""

    M: int
    K: int
    C: int
    r: int
    L: int


def steps(
    kernels: TorchKernels, shape: Shape, device: str, dtype: Any
) -> dict[str, Callable[[], Any]]:
    """Every launch of a step at a model's sizes, on random operands or the meta device's.

    A name's first word is the field of `Configs` that the launch depends on, if it is one.
    """
    M, K, C, r, L = shape

    def make(*size: int, like: Any = dtype) -> Tensor:
        if device == "meta":
            return torch.empty(size, dtype=like, device=device)
        return torch.randn(size, device=device).to(like)

    def finished(s: Tensor, d_b: Sum) -> tuple[Tensor, ...]:
        return s, *kernels.finish(d_b)

    z, x, y, p = make(M, K, like=torch.float32), make(M, K), make(M, K), make(M, r)
    h, da = make(M, C), make(M, C)
    mean, rstd = make(M, like=torch.float32), make(M, like=torch.float32)
    norm = Norm(make(K, like=torch.float32), make(K, like=torch.float32), 1e-6)
    down, wide_down, b_qkv = make(K, r), make(C, r), make(3 * K, r)
    found: dict[str, Callable[[], Any]] = {
        "norm first": lambda: kernels.norm(z, None, norm, down, dtype),
        "norm": lambda: kernels.norm(z, y, norm, down, dtype),
        "norm last": lambda: kernels.norm(z, y, norm, None, dtype),
        "norm_grad": lambda: kernels.norm_grad(x, z, mean, rstd, norm, z),
        "norm_grad last": lambda: kernels.norm_grad(x, z, mean, rstd, norm, None),
        "norm_down_grad": lambda: kernels.finish(kernels.norm_down_grad(z, mean, rstd, norm, p)),
        "thin proj": lambda: kernels.thin(x, down),
        "thin_grad proj, fc2": lambda: finished(*kernels.thin_grad(y, down, p)),
        "tall_grad proj": lambda: kernels.finish(kernels.tall_grad(x, p)),
        "gather": lambda: kernels.gather_grad((x, y, x), b_qkv, p, True),
        "gather (no copy)": lambda: kernels.gather_grad((x, y, x), b_qkv, p, False),
        "gelu": lambda: kernels.gelu(h, wide_down),
        "gelu_grad": lambda: kernels.gelu_grad(da, h, p, wide_down, p),
    }
    for name, (n, k) in {"qkv": (3 * K, K), "proj": (K, K), "fc1": (C, K), "fc2": (K, C)}.items():
        stacks = make(L, n, k), make(L, n, r), make(L, k, r)
        found[f"merge {name}"] = functools.partial(kernels.merge, *stacks)
    return found
