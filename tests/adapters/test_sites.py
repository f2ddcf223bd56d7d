"""Names to roles, blocks and stages, on model families that name their linears differently."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from torch import nn

from efft_kernels.adapters.roles import kind_of, split_name
from efft_kernels.adapters.sites import find_sites, linear_shapes
from efft_kernels.methods.base import Site

NAMES = [
    # timm: ViT, DeiT, BEiT, CLIP tower; Swin; EVA-02 with separate q, k, v and a gated FFN
    ("blocks.11.attn.qkv", "blocks.11", "qkv"),
    ("trunk.blocks.0.attn.proj", "trunk.blocks.0", "o"),
    ("layers.2.blocks.17.mlp.fc1", "layers.2.blocks.17", "fc1"),
    ("blocks.0.mlp.fc2", "blocks.0", "fc2"),
    ("blocks.0.attn.q_proj", "blocks.0", "q"),
    ("blocks.0.mlp.fc1_g", "blocks.0", "gate"),
    ("blocks.0.mlp.fc1_x", "blocks.0", "fc1"),
    # Hugging Face: ViT and DINOv2 before version 5, and since; BERT-like; CLIP
    ("vit.encoder.layer.3.attention.attention.query", "vit.encoder.layer.3", "q"),
    ("vit.encoder.layer.3.attention.attention.key", "vit.encoder.layer.3", "k"),
    ("vit.encoder.layer.3.attention.attention.value", "vit.encoder.layer.3", "v"),
    ("vit.encoder.layer.3.attention.output.dense", "vit.encoder.layer.3", "o"),
    ("vit.encoder.layer.3.intermediate.dense", "vit.encoder.layer.3", "fc1"),
    ("vit.encoder.layer.3.output.dense", "vit.encoder.layer.3", "fc2"),
    ("encoder.layer.0.attention.self.query", "encoder.layer.0", "q"),
    ("vit.layers.0.attention.q_proj", "vit.layers.0", "q"),
    ("vit.layers.0.attention.o_proj", "vit.layers.0", "o"),
    ("encoder.layers.0.self_attn.k_proj", "encoder.layers.0", "k"),
    ("encoder.layers.0.self_attn.v_proj", "encoder.layers.0", "v"),
    ("vision_model.encoder.layers.0.self_attn.out_proj", "vision_model.encoder.layers.0", "o"),
    ("dinov2.encoder.layer.1.mlp.weights_in", "dinov2.encoder.layer.1", "gate_fc1"),
    ("dinov2.encoder.layer.1.mlp.weights_out", "dinov2.encoder.layer.1", "fc2"),
    ("dinov2.encoder.layer.1.mlp.gate_proj", "dinov2.encoder.layer.1", "gate"),
    ("dinov2.encoder.layer.1.mlp.up_proj", "dinov2.encoder.layer.1", "fc1"),
    ("dinov2.encoder.layer.1.mlp.down_proj", "dinov2.encoder.layer.1", "fc2"),
    # torchvision's ViT; open_clip; SAM; torch.nn's encoder
    (
        "encoder.layers.encoder_layer_0.self_attention.in_proj",
        "encoder.layers.encoder_layer_0",
        "qkv",
    ),
    (
        "encoder.layers.encoder_layer_0.self_attention.out_proj",
        "encoder.layers.encoder_layer_0",
        "o",
    ),
    ("encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_0", "fc1"),
    ("encoder.layers.encoder_layer_0.mlp.3", "encoder.layers.encoder_layer_0", "fc2"),
    ("visual.transformer.resblocks.1.attn.in_proj", "visual.transformer.resblocks.1", "qkv"),
    ("visual.transformer.resblocks.1.attn.out_proj", "visual.transformer.resblocks.1", "o"),
    ("visual.transformer.resblocks.1.mlp.c_fc", "visual.transformer.resblocks.1", "fc1"),
    ("visual.transformer.resblocks.1.mlp.c_proj", "visual.transformer.resblocks.1", "fc2"),
    ("vision_encoder.layers.0.attn.qkv", "vision_encoder.layers.0", "qkv"),
    ("vision_encoder.layers.0.mlp.lin1", "vision_encoder.layers.0", "fc1"),
    ("vision_encoder.layers.0.mlp.lin2", "vision_encoder.layers.0", "fc2"),
    ("layers.0.linear1", "layers.0", "fc1"),
    ("layers.0.linear2", "layers.0", "fc2"),
    # Several attentions in one block; other names of q, k, v and of the FFN's
    ("blocks.0.attn.qk", "blocks.0", "qk"),
    ("stages.1.blocks.0.attn.kv", "stages.1.blocks.0", "kv"),
    ("blocks.2.attn_in.v", "blocks.2.inner", "v"),
    ("blocks.2.mlp_in.fc1", "blocks.2.inner", "fc1"),
    ("blocks.2.attn_out.qk", "blocks.2", "qk"),
    ("stages.0.blocks.1.attn_grid.attn.qkv", "stages.0.blocks.1.attn_grid", "qkv"),
    ("stages.0.blocks.1.attn_grid.mlp.fc2", "stages.0.blocks.1.attn_grid", "fc2"),
    ("decoder.layers.3.encoder_attn.q_proj", "decoder.layers.3.encoder_attn", "q"),
    ("decoder.layers.3.cross_attn.in_proj", "decoder.layers.3.cross_attn", "qkv"),
    ("blocks.0.fusion.1.attn.wq", "blocks.0.fusion.1", "q"),
    ("parallel_blocks.0.factoratt_crpe2.qkv", "parallel_blocks.0", "qkv"),
    ("parallel_blocks.0.factoratt_crpe3.qkv", "parallel_blocks.0.factoratt_crpe3", "qkv"),
    ("encoder.layers.0.self_attn.projection", "encoder.layers.0", "o"),
    ("encoder.layers.1.blocks.0.mlp.dense2", "encoder.layers.1.blocks.0", "fc2"),
    ("attn_pool.kv", "attn_pool", "kv"),
    ("trunk.attn_pool.mlp.fc1", "trunk.attn_pool", "fc1"),
    ("vision_model.head.attention.in_proj", "vision_model.head", "qkv"),
    # Nothing to be told
    ("attn.qkv", "", "linear"),
    ("blocks.0.attn.attn", "blocks.0", "linear"),
    ("blocks.0.attn.pos_proj", "blocks.0", "linear"),
    ("head", "", "linear"),
    ("0", "", "linear"),
    ("mlp.fc1", "", "linear"),
    ("head.fc", "", "linear"),
    ("layers.1.downsample.reduction", "layers.1", "linear"),
    ("layers.0.blocks.1.attn.cpb_mlp.0", "layers.0.blocks.1", "linear"),
    ("blocks.0.attn.qkv_norm", "blocks.0", "linear"),
    ("blocks.0.my_mlp.fc1", "blocks.0", "linear"),
    ("blocks.0.cross.attn.qkv", "blocks.0", "linear"),
]


@pytest.mark.parametrize(("name", "block", "role"), NAMES)
def test_split_name(name, block, role):
    assert split_name(name) == (block, role)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.0.attn.qkv", "attention"),
        ("blocks.0.mlp.fc1", "FFN"),
        ("blocks.0.my_attn.mix", "attention"),
        ("blocks.0.my_ffn.mix", "FFN"),
        ("blocks.0.attn.cpb_mlp.0", None),
        ("blocks.0.mix", None),
    ],
)
def test_what_a_linear_is_part_of(name, kind):
    assert kind_of(name) == kind


@functools.cache
def meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


def test_swin_base_has_four_stages_of_the_papers_depths():
    sites = find_sites(meta("swin_base_patch4_window7_224"))
    assert len(sites) == 24 * 4 and {s.role for s in sites} == {"qkv", "o", "fc1", "fc2"}
    for stage, (depth, width) in enumerate(zip((2, 2, 18, 2), (128, 256, 512, 1024), strict=True)):
        mine = [s for s in sites if s.stage == stage]
        assert len(mine) == 4 * depth and {s.width for s in mine} == {width}
        assert all(s.name.startswith(f"layers.{stage}.") for s in mine)
    assert sorted({s.block for s in sites}) == list(range(24))
    by_block = {s.block: s.name for s in sites if s.role == "qkv"}
    assert by_block[4] == "layers.2.blocks.0.attn.qkv"


def test_stages_are_those_of_the_whole_model():
    """The stage of a targeted linear does not depend on what else is targeted."""
    model = meta("swin_tiny_patch4_window7_224")
    sites = find_sites(model, targets="layers.2.*attn.qkv", layers=[5, 7])
    assert [(s.name, s.block, s.stage) for s in sites] == [
        ("layers.2.blocks.1.attn.qkv", 5, 2),
        ("layers.2.blocks.3.attn.qkv", 7, 2),
    ]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (None, 48),
        ("mhsa", 24),
        ("ffn", 24),
        ("qkv", 12),
        (("attn.qkv", "mlp.fc2"), 24),
        ("layers.3.*", 9),
        ("reduction", 3),
        ("*.downsample.reduction", 3),
        ("head.fc", 1),
    ],
)
def test_targets_of_swin(targets, count):
    assert len(find_sites(meta("swin_tiny_patch4_window7_224"), targets)) == count


def test_excluded_modules_are_left_alone():
    model = meta("vit_tiny_patch16_224")
    names = {s.name for s in find_sites(model, "*", exclude=["blocks.1", "head"])}
    assert not any(name.startswith(("blocks.1.", "head")) for name in names)
    assert "blocks.10.attn.qkv" in names and len(names) == 11 * 4


@pytest.mark.parametrize("packed", [True, False])
def test_packed_gates_are_told_by_width(packed):
    """An fc1 of twice fc2's width is gate and fc1 in one."""
    block = nn.ModuleDict({"mlp": nn.ModuleDict()})
    block["mlp"]["fc1"] = nn.Linear(6, 32 if packed else 16)
    block["mlp"]["fc2"] = nn.Linear(16, 6)
    sites = find_sites(nn.ModuleDict({"blocks": nn.ModuleList([block])}))
    assert [s.role for s in sites] == (["gate_fc1", "fc2"] if packed else ["fc1", "fc2"])
    assert find_sites(nn.ModuleDict({"blocks": nn.ModuleList([block])}), "fc1")[0].slices == (
        2 if packed else 1
    )


@pytest.mark.parametrize(
    ("widths", "roles"),
    [
        ({"qkv": (8, 24), "proj": (8, 8)}, ["qkv", "o"]),
        ({"qkv": (8, 24)}, ["qkv"]),
        ({"qkv": (8, 48), "proj": (16, 16)}, ["qkv", "o"]),
        ({"qkv": (8, 16), "proj": (8, 8)}, ["kv", "o"]),
        ({"qkv": (8, 20), "proj": (12, 8)}, ["linear", "linear"]),  # keys narrower than values
        ({"qk": (8, 8), "v": (8, 8), "proj": (8, 8)}, ["qk", "v", "o"]),
    ],
)
def test_fused_projections_are_told_by_width(widths, roles):
    attention = nn.ModuleDict({name: nn.Linear(*shape) for name, shape in widths.items()})
    block = nn.ModuleDict({"attn": attention, "mlp": nn.ModuleDict({"fc1": nn.Linear(8, 32)})})
    sites = find_sites(nn.ModuleDict({"blocks": nn.ModuleList([block])}), "*")
    assert [site.role for site in sites] == [*roles, "fc1"]


def test_gates_of_lettered_ffns_are_told_by_width():
    mlp = {"w0": nn.Linear(6, 16), "w1": nn.Linear(6, 16), "w2": nn.Linear(16, 6)}
    packed = {"w12": nn.Linear(6, 32), "w3": nn.Linear(16, 6)}
    square = {"w1": nn.Linear(6, 6)}
    blocks = [nn.ModuleDict({"mlp": nn.ModuleDict(ffn)}) for ffn in (mlp, packed, square)]
    sites = find_sites(nn.ModuleDict({"blocks": nn.ModuleList(blocks)}))
    assert [site.role for site in sites] == ["gate", "fc1", "fc2", "gate_fc1", "fc2", "fc2"]


def test_without_an_fc2_nothing_is_packed():
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(6, 2)})})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block]), "last": nn.Linear(5, 3)})
    assert linear_shapes(model) == {"blocks.0.mlp.fc1": (6, 2), "last": (5, 3)}
    assert find_sites(model, "*") == [
        Site("blocks.0.mlp.fc1", "fc1", 0, 0, 6, 2),
        Site("last", "linear", 0, 0, 5, 3),  # in no block, and of a width of its own
    ]


def test_an_unnumbered_ffn_counts_beside_an_attention_alone():
    def head(**parts):
        return nn.ModuleDict({"head": nn.ModuleDict(parts), "blocks": block})

    block = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(4, 8)})})])
    mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8)})
    assert [s.name for s in find_sites(head(mlp=mlp))] == ["blocks.0.mlp.fc1"]
    pool = find_sites(head(mlp=mlp, attention=nn.MultiheadAttention(4, 1)))
    assert [(s.role, s.block) for s in pool] == [("fc1", 0), ("qkv", 0), ("o", 0), ("fc1", 1)]


def test_cores_of_two_attentions_in_one_block_are_their_own():
    sites = find_sites(meta("tnt_s_patch16_224"))
    assert {s.width for s in sites if s.block == 0} == {24} and sites[0].stage == 0
    assert {s.width for s in sites if s.block == 1} == {384}
    assert len({s.block for s in sites}) == 24


def test_a_text_tower_beside_a_vision_tower_is_left_alone():
    def tower():
        return nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(4, 8)})})])

    model = nn.ModuleDict({"text_model": tower(), "vision_model": tower()})
    assert [s.name for s in find_sites(model)] == ["vision_model.0.mlp.fc1"]
    assert [s.name for s in find_sites(model, "ffn")] == ["vision_model.0.mlp.fc1"]
    assert len(find_sites(model, "mlp.fc1")) == 2
    assert len(find_sites(nn.ModuleDict({"text_model": tower()}))) == 1


def test_unknown_model_is_numbered_by_its_containers():
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(nn.Linear(2, 4), *blocks)
    sites = find_sites(model, "*")
    assert [s.name for s in sites] == ["0", "1.0", "2.0", "3.0"]
    assert {s.role for s in sites} == {"linear"}


def test_a_whole_name_is_that_linear_alone():
    model = nn.ModuleDict({"fc": nn.Linear(3, 3), "a": nn.ModuleDict({"fc": nn.Linear(3, 3)})})
    model.add_module("ffn", nn.Linear(3, 3))
    assert [s.name for s in find_sites(model, "fc")] == ["fc"]
    assert [s.name for s in find_sites(model, "a.fc")] == ["a.fc"]
    assert [s.name for s in find_sites(model, "ffn")] == ["ffn"]
    assert [s.name for s in find_sites(model, "*fc")] == ["fc", "a.fc"]


def test_a_linear_of_two_names_is_found_by_either():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["c"] = nn.ModuleDict({"also": model["b"]})
    for targets in ("b", "c.also", "also", "c.*"):
        assert [s.name for s in find_sites(model, targets)] == ["b"]
    assert [s.name for s in find_sites(model, "*")] == ["a", "b"]
    for excluded in ("b", "c"):
        assert [s.name for s in find_sites(model, "*", exclude=[excluded])] == ["a"]


def test_linears_outside_the_blocks_are_of_no_layer():
    model = meta("swin_tiny_patch4_window7_224")
    names = {s.name for s in find_sites(model, "*", layers=0)}
    assert names and all(name.startswith("layers.0.blocks.0.") for name in names)
    with pytest.raises(ValueError, match=r"layers \[0\] hold none"):
        find_sites(model, "reduction", layers=0)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"targets": "nope"}, ValueError, "'nope' matches no nn.Linear of VisionTransformer"),
        ({"targets": ["mhsa", "nope"]}, ValueError, "'nope' matches no"),
        ({"targets": []}, TypeError, "targets must be a name"),
        ({"targets": 3}, TypeError, "targets must be a name"),
        ({"layers": 12}, ValueError, r"layers must be within 0\.\.11, got 12"),
        ({"layers": -1}, ValueError, r"layers must be within 0\.\.11, got -1"),
        ({"layers": []}, ValueError, "layers must name at least one block"),
        ({"layers": [True]}, TypeError, "layers must be block indices"),
        ({"layers": "1"}, TypeError, "layers must be block indices"),
        ({"targets": "blocks.2.*", "layers": 3}, ValueError, r"layers \[3\] hold none"),
    ],
)
def test_refused(options, kind, text):
    with pytest.raises(kind, match=text):
        find_sites(meta("vit_tiny_patch16_224"), **options)


def test_a_stacked_projection_is_three_times_as_wide():
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    sites = {
        site.name: site for site in find_sites(nn.ModuleDict({"layers": nn.ModuleList([layer])}))
    }
    joined = sites["layers.0.self_attn.in_proj"]
    assert (joined.role, joined.in_features, joined.out_features) == ("qkv", 12, 36)
    out = sites["layers.0.self_attn.out_proj"]
    assert (out.role, out.in_features, out.out_features) == ("o", 12, 12)
