"""Try every model family small, with random weights, and write the table of supported models.

    python -m tools.survey_models [--only NAME ...] [--output docs/supported_models.md]

For each method: attach, a forward and a backward with random factors, then merge. Checked are that
every adapted linear runs, that every factor gets a gradient, and that merged and unmerged outputs
agree.
"""

from __future__ import annotations

import argparse
import ast
import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels import EFFT2, LoRA, attach
from efft_kernels.adapters.architectures import classifier_names
from efft_kernels.adapters.coverage import coverage
from efft_kernels.methods.base import Method

_SMALL = {"num_classes": 3}
_VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64, **_SMALL}
# Family → timm's model and what makes it small. Models that take no size run as they are.
TIMM: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT, DeiT 3, CLIP, DINO": ("vit_tiny_patch16_224", _VIT, 64),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", _VIT, 64),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", _VIT | {"img_size": 56}, 56),
    "DINOv3": ("vit_small_plus_patch16_dinov3", _VIT, 64),
    "SigLIP": ("vit_base_patch16_siglip_224", _VIT, 64),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", _VIT, 64),
    "SAM": ("samvit_base_patch16", _VIT | {"global_attn_indexes": (1,)}, 64),
    "AIMv2": ("aimv2_large_patch14_224", _VIT | {"img_size": 56}, 56),
    "FlexiViT": ("flexivit_small", _VIT, 64),
    "BEiT": ("beit_base_patch16_224", _VIT, 64),
    "BEiT 3": ("beit3_base_patch16_224", _VIT, 64),
    "EVA-02": ("eva02_tiny_patch14_224", _VIT | {"img_size": 56}, 56),
    "EVA": ("eva_giant_patch14_224", _VIT | {"img_size": 56}, 56),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "img_size": 56, **_SMALL},
        56,
    ),
    "Swin V2": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "img_size": 64, **_SMALL},
        64,
    ),
    "Swin V2 CR": (
        "swinv2_cr_tiny_224",
        {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "img_size": 224, **_SMALL},
        224,
    ),
    "CaiT": ("cait_xxs24_224", _VIT, 64),
    "XCiT": ("xcit_nano_12_p16_224", _VIT, 64),
    "VOLO": ("volo_d1_224", _SMALL, 224),
    "ConViT": ("convit_tiny", _VIT | {"local_up_to_layer": 1}, 64),
    "CoaT": ("coat_tiny", _SMALL, 224),
    "CrossViT": ("crossvit_tiny_240", _SMALL, 240),
    "TNT": ("tnt_s_patch16_224", {"depth": 2, **_SMALL}, 224),
    "Twins": ("twins_svt_small", _SMALL, 224),
    "Twins PCPVT": ("twins_pcpvt_small", _SMALL, 224),
    "PVT v2": ("pvt_v2_b0", _SMALL, 64),
    "PiT": ("pit_ti_224", _SMALL, 224),
    "NesT": ("nest_tiny", _SMALL, 224),
    "DaViT": ("davit_tiny", _SMALL, 64),
    "GCViT": ("gcvit_xxtiny", _SMALL, 224),
    "MaxViT": ("maxvit_pico_rw_256", _SMALL, 256),
    "TinyViT": ("tiny_vit_5m_224", _SMALL, 224),
    "MobileViT": ("mobilevit_xxs", _SMALL, 64),
    "EdgeNeXt": ("edgenext_xx_small", _SMALL, 64),
    "ViTamin": ("vitamin_small_224", _SMALL, 224),
    "NextViT": ("nextvit_small", _SMALL, 64),
    "EfficientFormer": ("efficientformer_l1", _SMALL, 224),
    "CSATv2": ("csatv2", _SMALL, 512),
    "Hiera": ("hiera_tiny_224", _SMALL, 224),
    "HieraDet": ("hieradet_small", _SMALL, 224),
    "MViTv2": ("mvitv2_tiny", _SMALL, 224),
    "LeViT": ("levit_128s", _SMALL, 224),
    "CoAtNet": ("coatnet_pico_rw_224", _SMALL, 224),
    "MobileViT v2": ("mobilevitv2_050", _SMALL, 64),
    "EfficientViT": ("efficientvit_b0", _SMALL, 64),
    "Visformer": ("visformer_tiny", _SMALL, 224),
    "PoolFormer": ("poolformer_s12", _SMALL, 64),
    "FocalNet": ("focalnet_tiny_srf", _SMALL, 64),
    "MLP-Mixer": ("mixer_s32_224", _SMALL, 224),
    "ConvNeXt": ("convnext_atto", _SMALL, 64),
    "ResNet": ("resnet18", _SMALL, 64),
}
_HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
_HF_STAGES = {
    "hidden_sizes": [16, 32, 64, 128],
    "num_attention_heads": [1, 2, 4, 8],
    "image_size": 64,
    "num_labels": 3,
}
# Family → class of transformers and its configuration.
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", _HF),
    "ViT, no head": ("ViTModel", _HF),
    "DeiT, two heads": ("DeiTForImageClassificationWithTeacher", _HF),
    "BEiT": ("BeitForImageClassification", _HF),
    "DINOv2": ("Dinov2ForImageClassification", _HF),
    "DINOv2 with registers": ("Dinov2WithRegistersForImageClassification", _HF),
    "DINOv3, no head": ("DINOv3ViTModel", _HF),
    "ViT-MSN": ("ViTMSNForImageClassification", _HF),
    "I-JEPA": ("IJepaForImageClassification", _HF),
    "SigLIP": ("SiglipVisionModel", _HF),
    "CLIP, vision": ("CLIPVisionModel", _HF),
    "BLIP, vision": ("BlipVisionModel", _HF),
    "DETR": (
        "DetrForObjectDetection",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
            "d_model": 48,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 192,
            "decoder_ffn_dim": 192,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "num_queries": 4,
            "num_labels": 3,
            "image_size": 64,
        },
    ),
    "YOLOS": ("YolosForObjectDetection", _HF | {"image_size": [32, 32]}),
    "VideoMAE": ("VideoMAEForVideoClassification", _HF | {"num_frames": 4, "tubelet_size": 2}),
    "TimeSformer": ("TimesformerForVideoClassification", _HF | {"num_frames": 2}),
    "Swin": (
        "SwinForImageClassification",
        {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "image_size": 56, "num_labels": 3},
    ),
    "Swin V2": (
        "Swinv2ForImageClassification",
        {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "image_size": 56, "num_labels": 3},
    ),
    "SegFormer": ("SegformerForImageClassification", _HF_STAGES),
    "PVT": ("PvtForImageClassification", _HF_STAGES),
    "PVT v2": ("PvtV2ForImageClassification", {"image_size": 64, "num_labels": 3}),
    "CvT": ("CvtForImageClassification", {"num_labels": 3}),
    "MobileViT": ("MobileViTForImageClassification", {"image_size": 256, "num_labels": 3}),
    "Hiera": ("HieraForImageClassification", {"num_labels": 3}),
    "LeViT": ("LevitForImageClassification", {"num_labels": 3}),
    "FocalNet": ("FocalNetForImageClassification", {"image_size": 64, "num_labels": 3}),
    "ConvNeXt V2": ("ConvNextV2ForImageClassification", {"image_size": 64, "num_labels": 3}),
    "ResNet": ("ResNetForImageClassification", {"num_labels": 3}),
}
METHODS: tuple[Method, ...] = (EFFT2(rank=2, dropout=0.0), LoRA(rank=2, matrices=None))
# DETR's queries are zeros before its decoder's first attention, so its values are as well.
_SEES_ZEROS = "decoder_layers_0_self_attn_v_proj"
MAX_MERGE_ERROR = 1e-4  # of the outputs' largest, in float32


@dataclass(frozen=True)
class Outcome:
    """What a method did to a model.

    Attributes:
        method: its class's name.
        linears: how many it adapts.
        idle: adapted linears that did not run.
        without_gradient: factors whose gradient is missing or zero.
        merge_error: largest difference of the outputs before and after merge, over the largest.
        targets: what the refusal of the default named, and what was tried then.
        refused: the error of attach; None where there was none.
    """

    method: str
    linears: int = 0
    idle: tuple[str, ...] = ()
    without_gradient: tuple[str, ...] = ()
    merge_error: float = 0.0
    targets: str | list[str] | None = None
    refused: str | None = None

    @property
    def sound(self) -> bool:
        """Whether all that is adapted learns, and merges."""
        learns = not self.idle and not self.without_gradient
        return self.refused is None and learns and self.merge_error <= MAX_MERGE_ERROR


@dataclass(frozen=True)
class Row:
    """A model family: what the methods do, what trains whole, and what is left, a line a kind."""

    family: str
    model: str
    outcomes: tuple[Outcome, ...]
    classifier: tuple[str, ...]
    left: tuple[str, ...]


def survey_timm(family: str) -> Row:
    """Try timm's model of a family."""
    import timm

    name, options, size = TIMM[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = timm.create_model(name, pretrained=False, **options)
    images = torch.randn(2, 3, size, size)
    return survey(family, name, model, lambda module: module(images))


def survey_hugging_face(family: str) -> Row:
    """Try a class of transformers."""
    import transformers

    name, options = HUGGING_FACE[family]
    kind: Any = getattr(transformers, name)
    torch.manual_seed(0)
    config = kind.config_class(**options)
    model = kind(config)
    size = options.get("image_size", 224)
    size = size[0] if isinstance(size, list) else size
    frames = options.get("num_frames")
    shape = (2, 3, size, size) if frames is None else (2, frames, 3, size, size)
    images = torch.randn(shape)
    return survey(family, name, model, lambda module: module(pixel_values=images))


def survey(family: str, name: str, model: nn.Module, call: Callable[[nn.Module], Any]) -> Row:
    """Try every method on a copy of a model.

    Args:
        family: for the table.
        name: for the table.
        model: with random weights.
        call: model → its output, which holds floating point tensors.
    """
    _randomise_zeros(model.eval())
    outcomes = tuple(_try(copy.deepcopy(model), method, call) for method in METHODS)
    classifier = classifier_names(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapter = attach(model, METHODS[-1])
            sites = [site.name for site in adapter.sites]
            adapter.detach()
        except ValueError:
            sites = []
    left = coverage(model, sites, classifier).lines()
    return Row(family, name, outcomes, tuple(classifier), tuple(left))


@torch.no_grad()
def _randomise_zeros(model: nn.Module) -> None:
    """Gammas and weights that start at zero hide what comes before them."""
    for parameter in model.parameters():
        if parameter.numel() and float(parameter.abs().max()) < 1e-3:
            parameter.normal_(std=0.1)


def _try(
    model: nn.Module,
    method: Method,
    call: Callable[[nn.Module], Any],
    targets: str | list[str] | None = None,
) -> Outcome:
    name = type(method).__name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapter = attach(model, method, targets=targets)
        except (ValueError, TypeError) as error:
            advice = re.search(rf"(?:{name} takes|e\.g\.) targets=(\[.*?\]|'\w+')", str(error))
            if targets or not advice:
                return Outcome(name, refused=str(error))
            outcome = _try(model, method, call, ast.literal_eval(advice[1]))
            return outcome if outcome.refused is None else Outcome(name, refused=str(error))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.05)
        outputs = list(_floats(call(model)))
        sum((output * torch.randn_like(output)).sum() for output in outputs).backward()  # type: ignore[union-attr]
        calls = adapter.bank.calls.calls or Counter[str]()
        adapter.merge()
        with torch.no_grad():
            merged = list(_floats(call(model)))
    pairs = [(a.detach(), b) for a, b in zip(outputs, merged, strict=True)]
    merge_error = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in pairs)
    return Outcome(
        method=name,
        linears=len(adapter.sites),
        idle=tuple(site.name for site in adapter.sites if not calls[site.name]),
        without_gradient=tuple(
            key
            for key, parameter in adapter.named_parameters()
            if (parameter.grad is None or not bool(parameter.grad.any())) and _SEES_ZEROS not in key
        ),
        merge_error=merge_error,
        targets=targets,
    )


def _floats(output: Any) -> Iterable[Tensor]:
    """The floating point tensors in what a model returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _floats(value)


def as_markdown(timm_rows: Iterable[Row], hugging_face_rows: Iterable[Row]) -> str:
    """The document."""
    parts = [_INTRODUCTION]
    for title, rows in (("timm", timm_rows), ("Hugging Face transformers", hugging_face_rows)):
        header = ["family", "tried", *(type(m).__name__ for m in METHODS), "trained whole", "left"]
        lines = [_line(header), _line(["---"] * len(header))]
        for row in rows:
            left = "<br>".join(row.left).replace("*", r"\*") or "nothing"
            whole = ", ".join(row.classifier) or "no classifier"
            cells = [row.family, f"`{row.model}`", *map(_cell, row.outcomes), whole, left]
            lines.append(_line(cells))
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


_INTRODUCTION = """# Supported models

Written by `python -m tools.survey_models`: each family once, small and with random weights, at
`attach`'s defaults. A number is how many linears are adapted; all of them ran, every factor got a
gradient, and merging moved the outputs by less than 1e-4 of their largest. "targets" stands where
the default is refused and these, which the error names, were tried; "no" where nothing is to be
adapted. What is left is told by `attach` too, in one warning; `efft-kernels models NAME` shows it
for any timm model. LoRA was tried with `matrices=None`.
"""


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _cell(outcome: Outcome) -> str:
    if outcome.refused is not None:
        return "no"
    if outcome.sound:
        return f"{outcome.linears}" + (f", targets={outcome.targets}" if outcome.targets else "")
    faults = []
    if outcome.idle:
        faults.append(f"{len(outcome.idle)} do not run")
    if outcome.without_gradient:
        faults.append(f"{len(outcome.without_gradient)} factors without gradient")
    if outcome.merge_error > MAX_MERGE_ERROR:
        faults.append(f"merge error {outcome.merge_error:.0e}")
    return f"{outcome.linears} ({', '.join(faults)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", help="families")
    parser.add_argument("--output", type=Path, help="default: print")
    arguments = parser.parse_args()
    tables: list[list[Row]] = []
    for families, tried in ((TIMM, survey_timm), (HUGGING_FACE, survey_hugging_face)):
        rows = []
        for family in families:
            if arguments.only is None or family in arguments.only:
                row = tried(family)
                print(family, *(o.refused or _cell(o) for o in row.outcomes), sep=": ", flush=True)
                rows.append(row)
        tables.append(rows)
    text = as_markdown(*tables)
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
