"""NOAH's published subnets: prompts, LoRA and adapters of other sizes in every block."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, cast

from torch import nn

from ..adapters.sites import find_sites
from ..methods.base import check_choice, check_number
from ..methods.lora import LoRA
from .base import Baseline, Part
from .bottleneck import connect_after, houlsby_bottleneck
from .low_rank import LowRank
from .prompts import Prompts, connect_prompts
from .registry import register_baseline
from .vision_transformer import vit_blocks


@cache
def noah_subnets() -> dict[str, dict[str, list[int]]]:
    """Task of VTAB-1k → sizes in each block: "prompts" l, "ranks" r, "hidden" h."""
    text = files(__package__).joinpath("noah_subnets.json").read_text(encoding="utf-8")
    tables = json.loads(text)
    return {task: sizes for task, sizes in tables.items() if not task.startswith("_")}


@register_baseline
@dataclass(frozen=True)
class NOAH(Baseline):
    """The subnet that NOAH's search chose for a task of VTAB-1k (arXiv:2206.04673).

    In block i: l_i prompts as in VPT-deep, LoRA of rank r_i on the whole qkv, an adapter of width
    h_i after the FFN: Σ_i l_i·d + 4·r_i·d + 2·d·h_i + h_i + d parameters, a mean over the groups of
    361,531 (printed: 0.361 M). The search itself is not here, and where the release initialises its
    adapters by Xavier, these start as `AdapterTuning`'s. Takes ViT-B-like models of 12 blocks.

    Attributes:
        subnet: a task of VTAB-1k, "cifar" to "smallnorb_ele".
        dropout: on the prompts, in training.
    """

    subnet: str = "cifar"
    dropout: float = 0.1

    name: ClassVar[str] = "noah"

    def __post_init__(self) -> None:
        check_choice("subnet", self.subnet, noah_subnets())
        check_number("dropout", self.dropout, low=0, below=1)

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        blocks, sizes = vit_blocks(model, self.name, attention=True), noah_subnets()[self.subnet]
        if len(blocks) != len(sizes["hidden"]):
            raise ValueError(
                f"model must have {len(sizes['hidden'])} blocks for noah, got {len(blocks)}"
            )
        sites = find_sites(model, "qkv", exclude=outside)
        d, parts = cast(int, model.embed_dim), dict[str, Part]()
        before = [0, *sizes["prompts"]]
        for i, site in enumerate(sites):
            parts[f"prompts_{i}"] = Prompts(model, sizes["prompts"][i], before[i], self.dropout)
            lora = LoRA(rank=sizes["ranks"][i], matrices=None)
            parts[f"lora_{i}"] = LowRank(lora, site, fixed=False)
            parts[f"blocks_{i}_mlp"] = houlsby_bottleneck(d, sizes["hidden"][i], nn.GELU())
        return parts

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        of = {
            kind: {name: part for name, part in parts.items() if name.startswith(kind)}
            for kind in ("prompts", "lora", "blocks")
        }
        connect_prompts(list(model.blocks), list(of["prompts"].values()))  # type: ignore[arg-type]
        connect_after(model, of["blocks"])
        for part in of["lora"].values():
            model.get_submodule(part.site).register_forward_hook(part.after)
