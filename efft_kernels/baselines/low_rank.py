"""LoRA-Fix, and the low-rank part that NOAH's subnets use too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.architectures import find_joined_qkv_bias
from ..adapters.bypassed import why_bypassed
from ..adapters.sites import find_sites
from ..methods.base import Site
from ..methods.lora import LoRA
from .base import Baseline, Part, part_name
from .registry import register_baseline


class LowRank(Part):
    """ΔW of one linear by the project's LoRA, added to the linear's output.

    Args:
        method: its configuration.
        site: the linear.
        fixed: keep A as it was drawn.
    """

    def __init__(self, method: LoRA, site: Site, *, fixed: bool) -> None:
        super().__init__()
        (self.group,) = method.build([site]).values()
        self.site = site.name
        self.group.A.requires_grad_(not fixed)  # type: ignore[union-attr, operator]

    def delta(self) -> tuple[Tensor, Tensor]:
        """(down [K, R], up [N, R]) of ΔW = up·downᵀ."""
        down, _, up = self.group.factors(self.site, False)  # type: ignore[operator]
        return down, up.flatten(0, 1)

    def after(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """The linear's output y + x·ΔWᵀ."""
        if self.folded:
            return y
        down, up = self.delta()
        return y + F.linear(F.linear(self.like(args[0]), down.mT), up).to(y.dtype)


@register_baseline
@dataclass(frozen=True)
class LoRAFix(Baseline):
    """LoRA of q and v with A as it was drawn: only B trains (KAdaptation, section 5.1).

    2L·r·d parameters, half of LoRA's; on ViT-B/16 with r = 4: 73,728. It merges. The file holds A
    as well. Takes every model whose q and v are linears that it calls.

    Attributes:
        rank: r; 4 is KAdaptation's.
        scale: s on ΔW.
    """

    rank: int = 4
    scale: float = 1.0

    name: ClassVar[str] = "lora_fix"

    def __post_init__(self) -> None:
        self._method()

    def _method(self) -> LoRA:
        return LoRA(rank=self.rank, scale=self.scale)

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        method = self._method()
        try:
            sites = method.select(find_sites(model, "mhsa", exclude=outside))
        except ValueError:
            sites = []
        if not sites:
            raise ValueError(
                f"model must have q and v linears for lora_fix, got a {type(model).__name__}"
            )
        for site in sites:
            if reader := _why_uncalled(model, site):
                raise TypeError(
                    f"model must call its linear {site.name!r} for lora_fix, but {reader} uses the"
                    " weight without that"
                )
        return {part_name(site.name): LowRank(method, site, fixed=True) for site in sites}

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        for part in parts.values():
            model.get_submodule(part.site).register_forward_hook(part.after)

    def folded(self, model: nn.Module, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        values = {}
        for part in parts.values():
            down, up = part.delta()
            values[f"{part.site}.weight"] = model.get_submodule(part.site).weight + up @ down.mT
        return values


def _why_uncalled(model: nn.Module, site: Site) -> str | None:
    """What uses the linear's weight without calling it, as far as can be told."""
    attention = model.get_submodule(site.name.rpartition(".")[0])
    if isinstance(attention, nn.MultiheadAttention):
        return "nn.MultiheadAttention"
    if find_joined_qkv_bias(model, [site]):
        return f"{type(attention).__name__} (unless its qkv_bias_separate is set)"
    return why_bypassed(model, site.name)
