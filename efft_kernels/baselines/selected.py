"""Baselines that train some of a model's own parameters and add none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..adapters.attachment import is_inside
from ..adapters.sites import find_sites
from ..methods.base import check_choice
from .base import Baseline
from .registry import register_baseline


@register_baseline
@dataclass(frozen=True)
class LinearProbing(Baseline):
    """The head alone: 0 parameters besides it (KAdaptation, section 5.1)."""

    name: ClassVar[str] = "linear"


@register_baseline
@dataclass(frozen=True)
class FullFineTuning(Baseline):
    """Every parameter: 85,798,656 of ViT-B/16 besides the head (KAdaptation, section 5.1)."""

    name: ClassVar[str] = "full"

    def own_parameters(self, model: nn.Module, outside: Sequence[str]) -> list[str]:
        return _parameters(model, outside)


@register_baseline
@dataclass(frozen=True)
class BitFit(Baseline):
    """Every bias (arXiv:2106.10199): 102,912 parameters of ViT-B/16.

    Tables of relative position biases are among them, as the papers' 0.201 M of Swin-B has it.
    """

    name: ClassVar[str] = "bitfit"

    def own_parameters(self, model: nn.Module, outside: Sequence[str]) -> list[str]:
        names = [n for n in _parameters(model, outside) if "bias" in n.rpartition(".")[2]]
        return _found(names, "biases", model, self)


@register_baseline
@dataclass(frozen=True)
class LayerNormTuning(Baseline):
    """Weights and biases of the LayerNorms (KAdaptation, section 5.1): 38,400 of ViT-B/16.

    Attributes:
        norms: "all", or "outer" for those outside the blocks. These are what KAdaptation's Table 2
            counts: 1,536 above the head for its ViT, 3,072 for CLIP's image tower.
    """

    norms: str = "all"

    name: ClassVar[str] = "layernorm"

    def __post_init__(self) -> None:
        check_choice("norms", self.norms, ("all", "outer"))

    def own_parameters(self, model: nn.Module, outside: Sequence[str]) -> list[str]:
        modules = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.LayerNorm)
            and (self.norms == "all" or not any(part.isdigit() for part in name.split(".")))
        ]
        inside = [name for name in _parameters(model, outside) if is_inside(name, modules)]
        return _found(inside, f"LayerNorms (norms={self.norms!r})", model, self)


@register_baseline
@dataclass(frozen=True)
class AttentionTuning(Baseline):
    """The attention layers (KAdaptation, section 5.1): 28,348,416 parameters of ViT-B/16.

    They are the modules that hold q, k, v and o, with all their parameters.
    """

    name: ClassVar[str] = "attention"

    def own_parameters(self, model: nn.Module, outside: Sequence[str]) -> list[str]:
        try:
            sites = find_sites(model, "mhsa", exclude=outside)
        except ValueError:
            sites = []
        layers = {site.name.rpartition(".")[0] for site in sites}
        inside = [name for name in _parameters(model, outside) if is_inside(name, [*layers])]
        return _found(inside, "attention layers", model, self)


def _parameters(model: nn.Module, outside: Sequence[str]) -> list[str]:
    return [name for name, _ in model.named_parameters() if not is_inside(name, outside)]


def _found(names: list[str], what: str, model: nn.Module, baseline: Baseline) -> list[str]:
    if not names:
        raise ValueError(
            f"model must have {what} for {baseline.name}, got a {type(model).__name__} without"
        )
    return names
