"""What is left of a model is told: by attach in one warning, by describe, with what to pass."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import warnings

import pytest
import timm
import torch
from torch import nn

from efft_kernels import EFFT1, EFFT2, Adapter, KAdaptation, LoRA, attach
from efft_kernels.adapters.architectures import _is_head, classifier_names
from efft_kernels.adapters.coverage import Coverage, _highest_rank, coverage
from efft_kernels.adapters.hints import listed, none_known, none_matches
from efft_kernels.adapters.sites import find_sites
from efft_kernels.adapters.towers import FUSION, TEXT
from efft_kernels.methods.base import Site


@functools.cache
def meta(name):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name)


def attach_quietly(model, method, **options):
    """attach, where a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return attach(model, method, **options)


class Partial(nn.Module):
    """A block known by name and one that is not."""

    def __init__(self, unknown: nn.Module) -> None:
        super().__init__()
        mlp = nn.ModuleDict({"fc1": nn.Linear(4, 16), "fc2": nn.Linear(16, 4)})
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": mlp, "my_attn": unknown})])
        self.fc = nn.Linear(4, 2)


def projections():
    return nn.ModuleDict({"left": nn.Linear(4, 4), "right": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    "method", [EFFT2(rank=1), LoRA(rank=1, matrices=None), LoRA(rank=4, matrices=None)]
)
def test_one_warning_with_counts_and_the_way_out(method):
    model = Partial(projections())
    with pytest.warns(UserWarning) as caught:
        adapter = attach(model, method)
    assert len(caught) == 1 and caught[0].filename == __file__
    text = str(caught[0].message)
    assert "2 of 4 attention and FFN layers of Partial" in text
    assert "attention: 1 blocks.*.my_attn.left, 1 blocks.*.my_attn.right" in text
    assert ("LoRA(matrices=None), which takes any linear" in text) == isinstance(method, EFFT2)
    assert adapter.describe().left == {
        "blocks.0.my_attn.left": "attention",
        "blocks.0.my_attn.right": "attention",
    }
    assert "left as they are, attention: 2: blocks.*.my_attn.left" in " ".join(
        str(adapter.describe()).split()
    )
    adapter.detach()
    for advice in (["ffn", "my_attn.left", "my_attn.right"], ["ffn"]):
        assert f"targets={advice}" in text
        attach_quietly(model, LoRA(rank=1, matrices=None), targets=advice).detach()


@pytest.mark.parametrize(
    ("method", "targets", "expected"),
    [
        (LoRA(), ["qkv", "fc1"], (12, 24, "LoRA's matrices (q, v): 12 blocks.*.mlp.fc1.")),
        (LoRA(), ["mhsa", "ffn"], (12, 48, "(q, v): 12 blocks.*.attn.proj, 12 blocks.*.mlp.fc1, ")),
        (KAdaptation(), "*", (24, 48, "(q, k, v, o): 12 blocks.*.mlp.fc1, 12 blocks.*.mlp.fc2.")),
    ],
)
def test_targets_that_are_none_of_a_methods_matrices_are_told(method, targets, expected):
    model = meta("vit_tiny_patch16_224")
    adapted, named, kinds = expected
    with pytest.warns(UserWarning, match=f"^{adapted} of {named} linears that targets") as caught:
        assert len(attach(model, method, targets=targets).sites) == adapted
    Adapter(model).detach()
    text = str(caught[0].message)
    assert len(caught) == 1 and kinds in text and "Pass matrices=None to adapt" in text
    # Both ways out are silent, as is the method's own default.
    meant = ast.literal_eval(text.partition("targets=")[2].partition(" if")[0])
    assert len(attach_quietly(model, method, targets=meant).sites) == adapted
    Adapter(model).detach()
    whole = dataclasses.replace(method, matrices=None, rank=1)
    assert len(attach_quietly(model, whole, targets=targets).sites) == named
    Adapter(model).detach()
    attach_quietly(model, method).detach()


@pytest.mark.parametrize(
    ("name", "method", "counts", "further"),
    [
        ("volo_d1_224", LoRA(rank=4), (22, 86), 26),
        ("csatv2", LoRA(rank=4), (4, 86), 32),  # the others of its spatial attention have a 1
        ("csatv2", LoRA(rank=4, matrices=None), (16, 86), 44),
        ("efficientformer_l1", EFFT2(rank=4), (2, 32), 4),
    ],
)
def test_what_a_warning_proposes_is_taken(name, method, counts, further):
    model = meta(name)
    with pytest.warns(UserWarning, match="{} of {} attention".format(*counts)) as caught:
        assert len(attach(model, method).sites) == counts[0]
    Adapter(model).detach()
    text = str(caught[0].message)
    assert ("; not of LoRA's matrices (q, v): " in text) == (method == LoRA(rank=4))
    more, meant = map(ast.literal_eval, re.findall(r"targets=(\[.*?\])", text))
    assert len(attach_quietly(model, method, targets=meant).sites) == counts[0]
    Adapter(model).detach()
    if "LoRA(matrices=None)" in text:
        method = LoRA(matrices=None)
    assert len(attach_quietly(model, method, targets=more).sites) == further
    Adapter(model).detach()


def test_whole_models_and_chosen_layers_do_not_warn():
    attach_quietly(meta("swinv2_tiny_window8_256"), EFFT2(rank=1)).detach()
    attach_quietly(meta("cait_xxs24_224"), LoRA(rank=1)).detach()
    model = Partial(projections())
    attach_quietly(model, LoRA(rank=1, matrices=None), layers=0).detach()


def test_what_no_method_takes_is_told_as_such():
    conv = nn.ModuleDict({"qkv": nn.Conv2d(4, 12, 1), "local": nn.Conv2d(4, 4, 3)})
    with pytest.warns(UserWarning, match=r"2 of 3 .* nn\.Conv2d, which no method takes: 1 blocks"):
        attach(Partial(conv), EFFT2(rank=1))
    attention = nn.MultiheadAttention(4, 1, kdim=3)
    left = coverage(Partial(attention), ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"], ["fc"])
    assert "kdim" in left.out_of_reach["blocks.0.my_attn.in_proj"]
    for model, trained in (
        (Partial(attention), ["blocks.0.my_attn"]),
        (Partial(conv), ["blocks.0.my_attn"]),
        (Partial(conv), ["head", "blocks.0.my_attn.qkv"]),
    ):
        assert coverage(model, (), trained).out_of_reach == {}


def test_what_a_method_leaves_is_in_its_description():
    adapter = attach_quietly(meta("vit_tiny_patch16_224"), LoRA(rank=1))
    left = adapter.describe().left
    adapter.detach()
    assert len(left) == 36 and set(left.values()) == {"attention", "FFN"}


@pytest.mark.parametrize("name", ["gcvit_xxtiny", "convit_tiny", "pvt_v2_b0", "twins_svt_small"])
def test_families_that_were_partly_adapted_are_whole(name):
    for method in (EFFT2(rank=1), LoRA(rank=1)):
        adapter = attach_quietly(meta(name), method)
        if isinstance(method, EFFT2):
            assert not adapter.describe().left
        adapter.detach()


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        (
            "hiera_tiny_224",
            EFFT2(rank=1),
            ["(matrices=None) takes all", "EFFT2 takes targets='ffn'"],
        ),
        ("mvitv2_tiny", EFFT1(rank=1), ["takes all of MultiScaleVit", "targets='ffn'"]),
        ("efficientvit_b0", LoRA(), ["has no nn.Linear besides head.classifier.4", "BitFit"]),
        ("resnet18", LoRA(), ["ResNet has no nn.Linear besides fc", "BitFit"]),
        ("mixer_s32_224", EFFT2(rank=1), ["LoRA", "'mlp_tokens.fc1'", "'mlp_channels.fc2'"]),
        ("levit_128s", LoRA(), ["'attn.qkv.linear'", "'mlp.ln1.linear'"]),
    ],
)
def test_refusals_name_the_models_own(name, method, words):
    with pytest.raises(ValueError) as error:
        attach(meta(name), method)
    for word in words:
        assert word in str(error.value)


def test_a_rank_that_does_not_fit_is_no_matter_of_the_model():
    with pytest.raises(ValueError, match=r"rank must be at most .*got 999$"):
        attach(meta("vit_tiny_patch16_224"), EFFT2(rank=999))


@pytest.mark.parametrize(
    ("name", "pattern", "words"),
    [
        ("resnet18", "conv1", ["it is a Conv2d; ResNet has no nn.Linear besides fc"]),
        ("resnet18", "fc", ["besides those trained whole (fc)"]),
        ("vit_tiny_patch16_224", "atn.qkv", ["it has attn.qkv, "]),
        ("levit_128s", "qkv", ["it has attn.qkv.linear, ", ", ..."]),
    ],
)
def test_patterns_that_match_nothing(name, pattern, words):
    with pytest.raises(ValueError, match="matches no") as error:
        attach(meta(name), LoRA(rank=1), targets=pattern)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("vit_tiny_patch16_224", ["head"]),
        ("swin_tiny_patch4_window7_224", ["head.fc"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ("crossvit_tiny_240", ["head"]),
        ("resnet18", ["fc"]),
        ("vit_base_patch16_siglip_224", []),
        ("samvit_base_patch16", []),
    ],
)
def test_classifiers_of_timm(name, heads):
    assert classifier_names(meta(name)) == heads


def test_what_follows_a_base_model_is_a_head_unless_it_is_a_norm_or_a_transformer():
    attention = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12)})})
    assert _is_head(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))
    for part in (nn.LayerNorm(4), nn.Dropout(), attention):
        assert not _is_head(part)


def test_a_classifier_that_was_deleted_is_none(make_vit):
    model = make_vit()
    del model.head
    assert classifier_names(model) == []


def test_of_several_usual_names_the_first_is_the_classifier():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("fc", "classifier", "head_dist")})
    assert classifier_names(model) == ["classifier", "head_dist"]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("ViTForImageClassification", ["classifier"]),
        ("ViTModel", []),
        ("DeiTForImageClassificationWithTeacher", ["cls_classifier", "distillation_classifier"]),
        ("YolosForObjectDetection", ["class_labels_classifier", "bbox_predictor"]),
        ("SiglipForImageClassification", ["classifier"]),
        ("SiglipVisionModel", []),
        ("CvtForImageClassification", ["classifier"]),
        ("ViTMAEForPreTraining", []),
    ],
)
def test_classifiers_of_hugging_face(name, heads):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    with torch.device("meta"):
        assert classifier_names(kind(kind.config_class())) == heads


SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 32}
SMALL |= {"num_attention_heads": 2}


@pytest.mark.parametrize(
    ("name", "config", "adapted", "left"),
    [
        ("BlipModel", {}, "vision_model", {"text tower": "text_model"}),
        ("BlipForConditionalGeneration", {}, "vision_model", {"text tower": "text_decoder"}),
        ("VisionTextDualEncoderModel", {}, "vision_model", {"text tower": "text_model"}),
        ("VisionEncoderDecoderModel", {}, "encoder", {"text tower": "decoder"}),
        ("GitModel", SMALL, "image_encoder", {"text tower": "encoder"}),
        (
            "FlavaModel",
            {"multimodal_config": SMALL},
            "image_model",
            {"text tower": "text_model", "fusion of text and image": "multimodal_model"},
        ),
        ("ViltModel", SMALL, "encoder", {}),  # reads both at once
        ("BertModel", SMALL, "encoder", {}),  # no vision tower that it could be beside
    ],
)
def test_of_a_model_that_reads_text_the_vision_tower_is_adapted(name, config, adapted, left):
    transformers = pytest.importorskip("transformers")
    vit, bert = transformers.ViTConfig(**SMALL), transformers.BertConfig(**SMALL)
    if name == "VisionTextDualEncoderModel":
        made = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vit, bert)
    elif name == "VisionEncoderDecoderModel":
        bert = transformers.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
        made = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, bert)
    else:
        towers = ("vision_config", "text_config", "image_config")
        kind = getattr(transformers, name).config_class
        config = {tower: SMALL for tower in towers if tower in kind.sub_configs} | config
        made = kind(**config)
    with torch.device("meta"):
        model = getattr(transformers, name)(made)
    sites = [site.name for site in find_sites(model)]
    assert {site.partition(".")[0] for site in sites} == {adapted}
    found = coverage(model, sites).left
    assert {kind: name.partition(".")[0] for name, kind in found.items()} == left


@pytest.mark.parametrize("kinds", [(TEXT,), (FUSION,), (TEXT, FUSION)])
def test_towers_that_read_text_are_offered_as_they_are(kinds):
    site = Site("vision.0.attn.q", "q", 0, 0, 4, 4)
    left = {f"tower{i}.0.attn.q": kind for i, kind in enumerate(kinds)}
    found = Coverage("Model", (site.name,), left, {}, dict.fromkeys(left, 1))
    assert "to adapt them as well" in found.warning(LoRA(rank=2), [site])


def test_linears_narrower_than_the_rank_are_not_offered():
    site = Site("0.attn.q", "q", 0, 0, 4, 4)
    left = dict.fromkeys(["0.attn.wide", "0.attn.narrow"], "attention")
    method = LoRA(rank=4, matrices=None)

    def advice(narrowest):
        sizes = dict(zip(left, (4, narrowest), strict=True))
        text = Coverage("Model", (site.name,), left, {}, sizes).warning(method, [site])
        return text.partition(" Pass ")[2]

    assert "narrow" in advice(4) and "(without" not in advice(4)
    named = "(without 1 *.attn.narrow, which are narrower than rank=4)"
    assert named in advice(3) and "narrow'" not in advice(3)


@pytest.mark.parametrize(
    ("method", "offered"),
    [
        (LoRA(rank=2), ["attn.q", "mix"]),
        (LoRA(rank=2, matrices=None), ["attn.q", "attn.proj", "mix"]),
        (EFFT2(rank=2), ["attn.q", "attn.proj"]),
    ],
)
def test_of_a_text_tower_what_the_method_takes_is_offered(method, offered):
    site = Site("vision.0.attn.q", "q", 0, 0, 4, 4)
    left = dict.fromkeys(["text.0.attn.q", "text.0.attn.proj", "text.0.mix"], TEXT)
    found = Coverage("Model", (site.name,), left, {}, dict.fromkeys(left, 4))
    assert f"Pass targets={offered} to adapt them as well" in found.warning(method, [site])


@pytest.mark.parametrize(
    ("method", "highest"),
    [(LoRA(rank=[0, 3, 2]), 3), (EFFT2(rank=[2, (3, 5)]), 5), (EFFT2(rank=(6, 1)), 6), (None, 1)],
)
def test_the_highest_rank_of_a_method(method, highest):
    assert _highest_rank(method) == highest


def test_clips_text_tower():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig())
    with pytest.warns(UserWarning, match=r"72 of 144 .*text tower: 12 text_model") as caught:
        adapter = attach(model, EFFT2(rank=1))
    assert all(site.name.startswith("vision_model.") for site in adapter.sites)
    assert adapter.modules_to_train == ()
    adapter.detach()
    advice = str(caught[0].message).partition("targets=[")[2].partition("]")[0]
    targets = [part.strip("' ") for part in advice.split(",")]
    assert len(attach_quietly(model, EFFT2(rank=1), targets=targets).sites) == 144


def test_patterns_are_listed_up_to_six():
    names = [f"{letter}.{i}.fc" for letter in "abcdefg" for i in range(2)]
    six = ", ".join(f"2 {letter}.*.fc" for letter in "abcdef")
    assert listed(names[:12]) == six
    assert listed(names) == f"{six}, and 1 patterns more"


def test_what_a_head_has_besides_its_classifier_is_not_offered():
    named = ["stem.mix", "head.mix.fc", "body.mix.out"]
    text = none_known(nn.ModuleList(), named, ["stem.last", "head.last"])
    assert text.endswith("targets=['stem.mix', 'body.mix.out']")
    assert "none in ModuleList" in text
    text = none_known(nn.ModuleList([nn.Conv2d(1, 1, 1)]), ["head.mix"], ["head.last"])
    assert "has no nn.Linear besides head.last, which is trained whole; its layers are" in text


def test_six_endings_of_a_model_are_named_the_close_ones_first():
    names = [f"blocks.0.{name}" for name in ("one", "two", "three", "four", "five", "six")]
    text = none_matches(nn.ModuleList(), "fivee", names, [])
    assert text.endswith("it has five, one, two, three, four, six")
    text = none_matches(nn.ModuleList(), "fivee", [*names, "blocks.0.seven"], [])
    assert text.endswith("it has five, one, two, three, four, six, ...")
    text = none_matches(nn.ModuleList(), "attn.qkvv", ["mlp", "attn.k", "attn.qk", "attn.qkv"], [])
    assert text.endswith("it has attn.qkv, attn.qk, mlp, attn.k")
