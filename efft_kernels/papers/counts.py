"""The papers' parameter counts, made again: by this package's methods, or by a formula.

A count is without the head where the paper's is. KAdaptation's Table 2 counts the mean head of its
data sets, for (10 + 100 + 397)/3 = 169 classes.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..adapters.sites import find_sites
from ..baselines import (
    NOAH,
    SSF,
    AdapterTuning,
    AdaptFormer,
    AttentionTuning,
    Baseline,
    BitFit,
    LePETuning,
    LoRAFix,
    RPBTuning,
    TransformerProbing,
)
from ..methods import EFFT1, EFFT2, METHODS, FacTTK, FacTTT, KAdaptation, LoRA
from ..methods.base import Method
from .recipes import recipe_facts
from .results import table

VIT_B = "vit_base_patch16_224"
_MODELS = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_l": "swin_large_patch4_window7_224",
    "vit_l": "vit_large_patch16_224",
    "vit_h": "vit_huge_patch14_224",
}
_HEAD_CLIP, _HEAD_VIT = 169 * (512 + 1), 169 * (768 + 1)


@dataclass(frozen=True)
class Count:
    """A printed number of parameters and the one counted here.

    Attributes:
        table: key of the paper's table.
        row: of the table.
        column: of the table.
        printed: as the paper has it, in the column's unit.
        counted: parameters.
        formula: how, in the papers' names.
    """

    table: str
    row: str
    column: str
    printed: str
    counted: int
    formula: str

    @property
    def verdict(self) -> str:
        """ "rounded" (or exact), "truncated", or "does not follow"."""
        found = re.fullmatch(r"(\d+)(?:\.(\d+))?([MB]?)", self.printed.replace(",", ""))
        if found is None:
            return "does not follow"
        unit = {"M": 6, "B": 9}.get(found[3], 6 if self.column == "params_m" else 0)
        decimals = len(found[2] or "")
        printed = round(float(f"{found[1]}.{found[2] or 0}") * 10**decimals)
        exact = self.counted / 10 ** (unit - decimals)
        if printed == math.floor(exact + 0.5):
            return "rounded"
        return "truncated" if printed == math.floor(exact) else "does not follow"


@cache
def counts() -> tuple[Count, ...]:
    """Every printed count that a formula gives, or ought to."""
    found: list[Count] = []

    def add(key: str, row: str, column: str, counted: int, formula: str) -> None:
        printed = table(key).cells[row, column]
        found.append(Count(key, row, column, printed, counted, formula))

    on_vit_b: dict[str, tuple[int, str]] = {
        "full": (backbone(VIT_B), "all of ViT-B/16 but the head"),
        "linear": (0, "the head alone"),
        "bitfit": (factors(VIT_B, BitFit()), "all biases"),
        "adapter": (factors(VIT_B, AdapterTuning(hidden=8)), "L(2dh + h + d), h = 8"),
        "adaptformer": (factors(VIT_B, AdaptFormer(hidden=8)), "L(2dh + h + d), h = 8"),
        "noah": (_noah(), "the published subnets, mean over the tasks"),
        "lora_r8": (factors(VIT_B, LoRA(rank=8)), "4Ldr"),
        "ssf": (factors(VIT_B, SSF()), "a scale and a shift for the output of every operation"),
        "fact_tt_r4": (factors(VIT_B, FacTTT(rank=4)), "2dr + 12Lr²"),
        "fact_tk_r8": (factors(VIT_B, FacTTK(rank=8)), "2dr + 12Lr + r³"),
        "fact_tt_le16": (mean_over_tasks("fact_tt"), "2dr + 12Lr², mean over the tasks' r"),
        "fact_tk_le32": (mean_over_tasks("fact_tk"), "2dr + 12Lr + r³, mean over the tasks' r"),
        "efft1_r16": (factors(VIT_B, EFFT1(rank=16)), "5dr + 3Lr²"),
        "efft2_r16": (factors(VIT_B, EFFT2(rank=16)), "7dr + 6Lr²"),
        "efft1_le32": (factors(VIT_B, EFFT1(rank=32)), "5dr + 3Lr² at r = 32"),
        "efft2_le32": (factors(VIT_B, EFFT2(rank=32)), "7dr + 6Lr² at r = 32"),
    }
    for key in ("efft_table_1", "fact_table_1"):
        for row in table(key).rows:
            if row in on_vit_b:
                add(key, row, "params_m", *on_vit_b[row])
    swin_b = _MODELS["swin_b"]
    add("fact_table_2", "full", "params_m", backbone(swin_b), "all of Swin-B but the head")
    add("fact_table_2", "linear", "params_m", 0, "the head alone")
    bias = factors(swin_b, BitFit())
    add("fact_table_2", "bitfit", "params_m", bias, "all biases and position biases")
    fact = factors(swin_b, FacTTT(rank=16))
    add("fact_table_2", "fact_tt_r16", "params_m", fact, "Σ over stages of 2dr + 12Lr²")
    for size, model in _MODELS.items():
        column = f"{size}_params"
        add("efft_table_3", "full", column, backbone(model), "all but the head")
        add("efft_table_3", "linear", column, 0, "the head alone")
        lora, efft2 = _SCALED[size]
        add("efft_table_3", "lora", column, lora(), "4Ldr, on Swin r = k·⌊d/128⌋ by stage")
        add("efft_table_3", "efft2", column, factors(model, efft2), "7dr + 6r² by stage")
    for row, (clip, vit, formula) in _kadaptation().items():
        for column, head, counted in (
            ("clip_params", _HEAD_CLIP, clip),
            ("vit_params", _HEAD_VIT, vit),
        ):
            if counted is not None:
                add("kadaptation_table_2", row, column, head + counted, f"head + {formula}")
    return tuple(found)


def _kadaptation() -> dict[str, tuple[int | None, int | None, str]]:
    """Row → parameters above the head on CLIP and on ViT-B, None where no formula is known."""
    # CLIP is no timm model of one tower: its counts are by formula.
    block_512, block_768 = 12 * 512**2 + 13 * 512, factors(VIT_B, TransformerProbing())
    lora, lora_fix = factors(VIT_B, LoRA(rank=4)), factors(VIT_B, LoRAFix(rank=4))
    attention = factors(VIT_B, AttentionTuning())
    # CLIP's towers: 768 wide for images, 512 wide for texts; LoRA's count is of the latter.
    kron = factors(VIT_B, KAdaptation(products=4, rank=1, matrices=("q", "v")))
    text_attention = 12 * (4 * 512**2 + 4 * 512)
    return {
        "full": (151_277_313, backbone(VIT_B) + 769_000, "all, on ViT its old head too"),
        "linear": (0, 0, "nothing more"),
        "bitfit": (None, factors(VIT_B, BitFit()), "all biases"),
        "lora": (4 * 12 * 512 * 4, lora, "4Ldr, r = 4; on CLIP d = 512"),
        "lora_fix": (2 * 12 * 512 * 4, lora_fix, "2Ldr, r = 4; on CLIP d = 512"),
        "layernorm": (2 * 2 * 768, 2 * 768, "the norms before and after the blocks; the last"),
        "attention": (attention + text_attention, attention, "L(4d² + 4d) of every tower"),
        "transformer_probing": (block_512, block_768, "12d² + 13d"),
        "lepe": (12 * 512 * 10, factors(VIT_B, LePETuning()), "L·d·(3² + 1)"),
        "rpb": (12 * 8 * 13**2, factors(VIT_B, RPBTuning()), "L·heads·(2w - 1)², w = 7 and 14"),
        "kadaptation": (None, kron, "4Ldr + n³ by Eq. 4, q and v, n = 4, r = 1"),
    }


def mean_over_tasks(name: str, **options: Any) -> int:
    """Parameters on ViT-B at the ranks of the released recipes: the mean over groups of tasks.

    Args:
        name: "efft1", "efft2", "fact_tt" or "fact_tk".
        options: of the method, besides its rank.
    """
    tasks = recipe_facts()["tasks"]
    method: Any = METHODS[name]
    return _mean_over_groups(lambda t: method(rank=tasks[t][name]["rank"], **options))


def _noah() -> int:
    return _mean_over_groups(lambda task: NOAH(subnet=task))


def _mean_over_groups(method: Callable[[str], Method | Baseline]) -> int:
    groups = recipe_facts()["groups"].values()
    methods = {task: method(task) for group in groups for task in group}
    counted = {each: factors(VIT_B, each) for each in set(methods.values())}
    means = (statistics.fmean(counted[methods[task]] for task in group) for group in groups)
    return round(statistics.fmean(means))


def backbone(model: str) -> int:
    """All parameters of a timm model without its head."""
    return sum(parameter.numel() for parameter in _on_meta(model).parameters())


def factors(model: str, method: Method | Baseline) -> int:
    """What a method or a baseline trains on a timm model, the head left out."""
    plain = _on_meta(model)
    own: list[str] = []
    with torch.device("meta"), _NoValues():
        parts: Mapping[str, nn.Module]
        if isinstance(method, Baseline):
            own, parts = method.own_parameters(plain, ()), method.build(plain, ())
        else:
            parts = method.build(method.select(find_sites(plain)))
    new = [parameter for part in parts.values() for parameter in part.parameters()]
    trained = [*(p for p in new if p.requires_grad), *map(plain.get_parameter, own)]
    return sum(parameter.numel() for parameter in trained)


@cache
def _on_meta(model: str) -> nn.Module:
    with torch.device("meta"), _NoValues():
        return timm.create_model(model, num_classes=0)


class _NoValues(TorchFunctionMode):
    """Leaves out what initialises: of tensors without values it is most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INITIALISERS:
            return args[0]
        return func(*args, **(kwargs or {}))


_INITIALISERS = {
    getattr(Tensor, name)
    for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
}


def _lora_on_swin(width: int, depths: tuple[int, ...], k: int) -> Callable[[], int]:
    widths = [width * 2**stage for stage in range(4)]
    return lambda: sum(
        4 * depth * d * (d // 128 * k) for d, depth in zip(widths, depths, strict=True)
    )


def _efft2_on_swin(a: int) -> EFFT2:
    ranks = [a * 2**stage for stage in range(4)]
    return EFFT2(rank=[*ranks], ffn_rank=[(2 * r, r) for r in ranks], cores="shared")


# The ranks are the release's, on ViT-L and ViT-H found by search: the paper prints none.
_SCALED: dict[str, tuple[Callable[[], int], EFFT2]] = {
    "swin_t": (_lora_on_swin(96, (2, 2, 6, 2), 4), _efft2_on_swin(3)),
    "swin_s": (_lora_on_swin(96, (2, 2, 18, 2), 3), _efft2_on_swin(4)),
    "swin_b": (_lora_on_swin(128, (2, 2, 18, 2), 2), _efft2_on_swin(4)),
    "swin_l": (_lora_on_swin(192, (2, 2, 18, 2), 3), _efft2_on_swin(8)),
    "vit_l": (
        lambda: factors(_MODELS["vit_l"], LoRA(rank=4)),
        EFFT2(rank=48, cores="shared"),
    ),
    "vit_h": (
        lambda: factors(_MODELS["vit_h"], LoRA(rank=4)),
        EFFT2(rank=64, cores="shared"),
    ),
}
