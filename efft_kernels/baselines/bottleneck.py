"""Bottlenecks after or beside the FFN: Adapter, AdapterDrop, AdaptFormer, Compacter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.base import check_choice, check_number, constant_float
from .base import Baseline, Part, check_count
from .registry import register_baseline
from .vision_transformer import vit_blocks


class Bottleneck(Part):
    """s·W_up·φ(W_down·x), with biases: 2dh + h + d parameters.

    Args:
        down: d to h.
        up: h to d.
        activation: φ.
        scale: s.
        rate: dropout after φ, in training.
    """

    scale, rate = constant_float("scale"), constant_float("rate")

    def __init__(
        self,
        down: nn.Module,
        up: nn.Module,
        activation: nn.Module,
        scale: float = 1.0,
        rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.down, self.up, self.activation = down, up, activation
        self.scale, self.rate = scale, rate
        self.waiting: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # [B, T, d]
        hidden = self.activation(self.down(self.like(x)))
        hidden = F.dropout(hidden, self.rate, self.training)
        return (self.up(hidden) * self.scale).to(x.dtype)

    def after(self, module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        """x + this(x), where `module` puts out x."""
        return x + self(x)

    def start(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Where the FFN's branch begins: this(x) of its input x, kept until the branch ends."""
        self.waiting = self(args[0])

    def end(self, module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        """Where the FFN's branch ends: what was kept is added."""
        waiting, self.waiting = self.waiting, None
        return x if waiting is None else x + waiting


def houlsby_bottleneck(d: int, hidden: int, activation: nn.Module) -> Bottleneck:
    """A bottleneck near zero at the start: weights N(0, 0.01²) cut at 2σ, biases 0."""
    part = Bottleneck(nn.Linear(d, hidden), nn.Linear(hidden, d), activation)
    for linear in (part.down, part.up):
        nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
    return part


def connect_after(model: nn.Module, parts: Mapping[str, Any]) -> None:
    """Each part after the branch it is named for: the block's residual is added afterwards."""
    for name, part in parts.items():
        _, block, branch = name.split("_")
        after = {"attn": "drop_path1", "mlp": "drop_path2"}[branch]
        model.get_submodule(f"blocks.{block}.{after}").register_forward_hook(part.after)


def _branches(after: str) -> tuple[str, ...]:
    return ("mlp",) if after == "ffn" else ("attn", "mlp")


@register_baseline
@dataclass(frozen=True)
class AdapterTuning(Baseline):
    """X + W_up·φ(W_down·X), X the FFN's output (arXiv:1902.00751, as FacT writes it).

    L·(2dh + h + d) parameters; on ViT-B/16 with h = 8: 156,768. φ is GELU. It starts near identity,
    as Houlsby et al. have it: weights N(0, 0.01²), cut at two standard deviations.

    Attributes:
        hidden: h, the width between the two matrices.
        after: "ffn", or "both" for one after the attention too. KAdaptation describes two.
    """

    hidden: int = 8
    after: str = "ffn"

    name: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        check_count("hidden", self.hidden)
        check_choice("after", self.after, ("ffn", "both"))

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        blocks, d = vit_blocks(model, self.name), cast(int, model.embed_dim)
        return {
            f"blocks_{i}_{branch}": houlsby_bottleneck(d, self.hidden, nn.GELU())
            for i, _ in enumerate(blocks)
            for branch in _branches(self.after)
        }

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        connect_after(model, parts)


@register_baseline
@dataclass(frozen=True)
class AdapterDrop(Baseline):
    """Adapters in the last blocks only (arXiv:2010.11918; KAdaptation, section 5.1).

    kept·(2dh + h + d) parameters; on ViT-B/16 with h = 8: 13,064, a twelfth of Adapter's.

    Attributes:
        hidden: h, the width between the two matrices.
        kept: how many of the last blocks have one. KAdaptation keeps the last block's alone.
    """

    hidden: int = 8
    kept: int = 1

    name: ClassVar[str] = "adapterdrop"

    def __post_init__(self) -> None:
        check_count("hidden", self.hidden)
        check_count("kept", self.kept)

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        depth = len(vit_blocks(model, self.name))
        if self.kept > depth:
            raise ValueError(f"kept must be at most the model's {depth} blocks, got {self.kept}")
        d = cast(int, model.embed_dim)
        return {
            f"blocks_{i}_mlp": houlsby_bottleneck(d, self.hidden, nn.GELU())
            for i in range(depth - self.kept, depth)
        }

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        connect_after(model, parts)


@register_baseline
@dataclass(frozen=True)
class AdaptFormer(Baseline):
    """X + FFN(X) + s·W_up·ReLU(W_down·X), X the FFN's input (arXiv:2205.13535, as FacT writes it).

    L·(2dh + h + d) parameters; on ViT-B/16 with h = 8: 156,768. As in the release W_down reads X
    before its norm, and starts with kaiming_uniform_(a=√5), all else at zero; s and the dropout are
    the release's too.

    Attributes:
        hidden: h, the width between the two matrices.
        scale: s.
        dropout: after the ReLU, in training.
    """

    hidden: int = 8
    scale: float = 0.1
    dropout: float = 0.1

    name: ClassVar[str] = "adaptformer"

    def __post_init__(self) -> None:
        check_count("hidden", self.hidden)
        check_number("scale", self.scale)
        check_number("dropout", self.dropout, low=0, below=1)

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        blocks, d = vit_blocks(model, self.name), cast(int, model.embed_dim)
        return {f"blocks_{i}": self._part(d) for i, _ in enumerate(blocks)}

    def _part(self, d: int) -> Bottleneck:
        down, up = nn.Linear(d, self.hidden), nn.Linear(self.hidden, d)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        return Bottleneck(down, up, nn.ReLU(), self.scale, self.dropout)

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        blocks: Any = model.blocks
        for block, part in zip(blocks, parts.values(), strict=True):
            block.norm2.register_forward_hook(part.start)
            block.drop_path2.register_forward_hook(part.end)


class KroneckerLinear(nn.Module):
    """x·Σ_i A_i ⊗ (u_i·v_iᵀ) + b: K + 2N parameters, and n³ in A, which all of them share.

    Args:
        in_features: K, a multiple of n.
        out_features: N, a multiple of n.
        shared: A [n, n, n].
    """

    def __init__(self, in_features: int, out_features: int, shared: nn.Parameter) -> None:
        super().__init__()
        n = len(shared)
        self.A = shared
        self.u = nn.Parameter(torch.empty(n, in_features // n, 1))
        self.v = nn.Parameter(torch.empty(n, 1, out_features // n))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for factor in (*self.u, *self.v):
            nn.init.xavier_uniform_(factor, gain=math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("iac,ikr,irp->akcp", self.A, self.u, self.v)
        return F.linear(x, weight.flatten(2).flatten(0, 1).mT, self.bias)


@register_baseline
@dataclass(frozen=True)
class Compacter(Baseline):
    """Adapters whose matrices are Σ_i A_i ⊗ (u_i·v_iᵀ), A shared by all (arXiv:2106.04647).

    3·L·a·(d + h) + n³ parameters with a adapters a block, a third of the first term biases; on
    ViT-B/16 by default 59,968. KAdaptation's Table 1 leaves out a factor n, and the biases. A
    starts with N(0, 0.01²), near identity, u and v with Xavier's (gain √2).

    Attributes:
        hidden: h, the width between the two matrices, a multiple of n.
        products: n, the number of the A_i and their size; 4 is KAdaptation's.
        after: "ffn", or "both" for one after the attention too, a = 2. KAdaptation describes two.
    """

    hidden: int = 64
    products: int = 4
    after: str = "both"

    name: ClassVar[str] = "compacter"

    def __post_init__(self) -> None:
        check_count("hidden", self.hidden)
        check_count("products", self.products)
        check_choice("after", self.after, ("ffn", "both"))

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        blocks, d, h = vit_blocks(model, self.name), cast(int, model.embed_dim), self.hidden
        n = self.products
        if d % n or h % n:
            raise ValueError(f"products must divide d={d} and hidden={h}, got {n}")
        shared = nn.Parameter(torch.randn(n, n, n) * 0.01)
        return {
            f"blocks_{i}_{branch}": Bottleneck(
                KroneckerLinear(d, h, shared), KroneckerLinear(h, d, shared), nn.GELU()
            )
            for i, _ in enumerate(blocks)
            for branch in _branches(self.after)
        }

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        connect_after(model, parts)
