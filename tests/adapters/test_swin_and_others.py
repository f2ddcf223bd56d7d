"""Every method on timm's families: Swin, Swin V2, DeiT-3, BEiT, EVA-02, CLIP's tower, DINOv2."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from torch import nn

from efft_kernels import (
    EFFT1,
    EFFT2,
    FacTTK,
    FacTTT,
    FusedEFFTLinear,
    KAdaptation,
    LoRA,
    attach,
    load,
)

METHODS = [
    EFFT1(rank=3, scale=0.7),
    EFFT2(rank=(3, 2), scale=0.7, learn_scale=True),
    FacTTT(rank=(2, 3)),
    FacTTK(rank=3, layer_rank=4),
    LoRA(rank=2, scale=0.5),
    KAdaptation(products=2, rank=1),
]
DEPTHS, WIDTHS = (1, 2, 1, 1), (8, 16, 32, 64)  # of the small Swin


def meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


def unsettled(model, seed=5):
    """The model with no parameter at a special value (zero norms would hide every block)."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def small(name, dtype=torch.float64, **options):
    torch.manual_seed(5)
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return unsettled(timm.create_model(name, num_classes=5, **(settings | options)).to(dtype))


def small_swin(name="swin_tiny_patch4_window7_224", dtype=torch.float64):
    torch.manual_seed(5)
    model = timm.create_model(
        name,
        img_size=64,
        window_size=2,
        embed_dim=8,
        depths=DEPTHS,
        num_heads=(2, 2, 4, 4),
        num_classes=5,
    )
    return unsettled(model.to(dtype))


def images(size=8, count=2):
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=torch.float64)


def test_efft2_on_swin_base_reproduces_the_releases_count():
    """Attention: U and V d×r, 4 shared Σ of r². FFN: U 4d×r1, V d×r2, 2 shared Σ of r1·r2.

    Stage 1, d = 128:      1,088 +   2,320        Stage 2, d = 256:    4,352 +   9,280
    Stage 3, d = 512:     17,408 +  37,120        Stage 4, d = 1024:  69,632 + 148,480
    In sum 289,680. The release allocates 16 more slices of 8×16 in stage 3 that no layer reads:
    2,048, together its 291,728.
    """
    rank, ffn_rank = [4, 8, 16, 32], [(4, 2), (8, 4), (16, 8), (32, 16)]
    adapter = attach(
        meta("swin_base_patch4_window7_224"),
        EFFT2(rank=rank, ffn_rank=ffn_rank, cores="shared"),
    )
    by_hand = sum(
        (2 * d * r + 4 * r * r) + (4 * d * r1 + d * r2 + 2 * r1 * r2)
        for d, r, (r1, r2) in zip((128, 256, 512, 1024), rank, ffn_rank, strict=True)
    )
    assert adapter.num_parameters() == by_hand == 289_680
    dead = 16 * (8 * 16)
    assert by_hand + dead == 291_728


@pytest.mark.parametrize(
    ("method", "per_stage"),
    [
        (FacTTT(rank=16), lambda d, layers: 2 * d * 16 + 12 * layers * 16**2),
        (FacTTK(rank=8), lambda d, layers: 2 * d * 8 + 8**3 + 12 * layers * 8),
        (EFFT1(rank=8), lambda d, layers: 5 * d * 8 + 3 * layers * 8**2),
        (EFFT2(rank=8), lambda d, layers: 7 * d * 8 + 6 * layers * 8**2),
        (EFFT2(rank=8, cores="shared"), lambda d, layers: 7 * d * 8 + 6 * 8**2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_counts_per_stage_on_swin_base(method, per_stage):
    adapter = attach(meta("swin_base_patch4_window7_224"), method)
    found = {}
    for name, group in adapter.bank.named_children():
        stage = int(name.split("_")[0].removeprefix("stage"))
        found[stage] = found.get(stage, 0) + sum(p.numel() for p in group.parameters())
    stages = zip((128, 256, 512, 1024), (2, 2, 18, 2), strict=True)
    assert found == {i: per_stage(*stage) for i, stage in enumerate(stages)}


def test_fact_tt_on_swin_base_is_the_papers_count():
    """Table 2 of arXiv:2212.03145: 0.135 M for FacT-TT16."""
    adapter = attach(meta("swin_base_patch4_window7_224"), FacTTT(rank=16))
    assert adapter.num_parameters() == 135_168


def test_rank_per_stage(randomize):
    adapter = attach(small_swin(), EFFT2(rank=[2, (3, 1), 4, 5], ffn_rank=[1, 2, (3, 4), 6]))
    shapes = {
        name: (tuple(group.U.shape), tuple(group.V.shape))
        for name, group in adapter.bank.named_children()
    }
    assert shapes == {
        "stage0_mhsa": ((8, 2), (8, 2)),
        "stage0_ffn": ((32, 1), (8, 1)),
        "stage1_mhsa": ((16, 3), (16, 1)),
        "stage1_ffn": ((64, 2), (16, 2)),
        "stage2_mhsa": ((32, 4), (32, 4)),
        "stage2_ffn": ((128, 3), (32, 4)),
        "stage3_mhsa": ((64, 5), (64, 5)),
        "stage3_ffn": ((256, 6), (64, 6)),
    }
    with pytest.raises(ValueError, match=r"rank must have one entry per stage \(4\), got 2"):
        attach(small_swin(), FacTTT(rank=[2, 3]))
    two_stages = attach(small_swin(), FacTTT(rank=[2, 3]), layers=[0, 4])
    assert [g.U.shape[1] for g in two_stages.bank.children()] == [2, 3]


def tensor_train(core, u, v, s):
    """ΔW[i, j, k] = s Σ_t1 Σ_t2 Σ[i, t1, t2] U[j, t1] V[k, t2], term by term."""
    total = torch.zeros(len(core), len(u), len(v), dtype=core.dtype)
    for a, b in itertools.product(range(core.shape[1]), range(core.shape[2])):
        total += core[:, a, b, None, None] * u[:, a, None] * v[:, b]
    return s * total


def efft2_slices(bank, stage, position, shared, s):
    """{"qkv", "o", "fc1", "fc2"} → ΔW [N, K] of the stage's layer at `position`."""
    mhsa, ffn = bank.get_submodule(f"stage{stage}_mhsa"), bank.get_submodule(f"stage{stage}_ffn")
    first = 0 if shared else position
    attention = tensor_train(mhsa.core, mhsa.U, mhsa.V, s)[4 * first : 4 * first + 4]
    fc1, fc2 = tensor_train(ffn.core, ffn.U, ffn.V, s)[2 * first : 2 * first + 2]
    q, k, v, o = attention
    return {"qkv": torch.cat([q.T, k.T, v.T]), "o": o.T, "fc1": fc1, "fc2": fc2.T}


def fact_slices(bank, stage, position, shared, s):
    group = bank.get_submodule(f"stage{stage}_all")
    core = group.core
    if "P" in dict(group.named_parameters()):
        core = sum(group.P[:, t, None, None] * group.core[t] for t in range(len(group.core)))
    mine = tensor_train(core, group.U, group.V, s)[12 * position : 12 * position + 12]
    return {
        "qkv": torch.cat([m.T for m in mine[:3]]),
        "o": mine[3].T,
        "fc1": torch.cat(list(mine[4:8]), 1).T,
        "fc2": torch.cat(list(mine[8:]), 0).T,
    }


@pytest.mark.parametrize(
    ("method", "dense"),
    [
        (EFFT2(rank=[2, (3, 2), 4, 5], scale=0.7), efft2_slices),
        (EFFT2(rank=3, ffn_rank=(2, 4), scale=0.7, cores="shared"), efft2_slices),
        (FacTTT(rank=[2, (3, 2), 4, 5], scale=0.7), fact_slices),
        (FacTTK(rank=[2, (3, 2), 4, 5], scale=0.7), fact_slices),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@torch.no_grad()
def test_every_slice_on_swin_is_the_papers(randomize, method, dense):
    adapter = attach(small_swin(), method)
    randomize(adapter)
    found = adapter.delta_weights()
    assert len(found) == 4 * sum(DEPTHS)
    shared = getattr(method, "cores", "") == "shared"
    tails = {"qkv": "attn.qkv", "o": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for stage, depth in enumerate(DEPTHS):
        for position in range(depth):
            for role, delta in dense(adapter.bank, stage, position, shared, 0.7).items():
                assert delta.norm() > 1e-3
                name = f"layers.{stage}.blocks.{position}.{tails[role]}"
                torch.testing.assert_close(found[name], delta, rtol=1e-11, atol=1e-11)


MODELS = {
    "vit": (lambda: small("vit_base_patch16_224"), 8),
    "swin": (small_swin, 64),
    "swin v2": (lambda: small_swin("swinv2_tiny_window8_256"), 64),
    "deit3": (lambda: small("deit3_small_patch16_224"), 8),
    "beit": (lambda: small("beit_base_patch16_224"), 8),
    "beit v2": (lambda: small("beitv2_base_patch16_224"), 8),
    "eva02 fused": (lambda: small("eva02_tiny_patch14_224", embed_dim=24, mlp_ratio=2), 8),
    "eva02": (lambda: small("eva02_base_patch14_224", mlp_ratio=2), 8),
    "clip": (lambda: small("vit_base_patch16_clip_224"), 8),
    "dinov2": (lambda: small("vit_small_patch14_reg4_dinov2"), 8),
    "dinov2 giant": (lambda: giant(), 8),
}


def giant():
    """DINOv2's giant: fc1 holds the gate as well."""
    from timm.layers import SwiGLUPacked

    return small(
        "vit_small_patch14_dinov2",
        embed_dim=24,
        mlp_layer=SwiGLUPacked,
        act_layer=nn.SiLU,
        mlp_ratio=4,
    )


HAS_GATES = ("eva02 fused", "eva02", "dinov2 giant")


def methods_for(name):
    """EFFT1 wants FFN linears of 4d; those of a gate are narrower."""
    return [m for m in METHODS if not (name in HAS_GATES and isinstance(m, EFFT1))]


CASES = [
    pytest.param(name, method, id=f"{name}-{method.name}")
    for name in MODELS
    for method in methods_for(name)
]


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_whole_life_of_an_adapter(randomize, tmp_path, name, method):
    """Attach, first step, delta_weights, merge, unmerge, save, load, detach."""
    make, size = MODELS[name]
    model = make()
    x = images(size)
    before, base, modules = model(x), bits(model), dict(model.named_modules())
    adapter = attach(model, method)
    torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-11)
    assert not any(delta.any() for delta in adapter.delta_weights().values())

    model.train()
    model(x).square().sum().backward()
    model.eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter -= 0.1 * parameter.grad
    for site, delta in adapter.delta_weights().items():
        chosen = method.matrices if isinstance(method, LoRA | KAdaptation) else None
        parts = delta.unflatten(0, (3, -1)) if site.endswith("qkv") else delta[None]
        moved = [bool(part.any()) for part in parts]
        assert moved == [chosen is None or kind in chosen for kind in "qkv"[: len(parts)]] or (
            len(parts) == 1 and moved == [True]
        ), site
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)

    randomize(adapter)
    expected, deltas = model(x), adapter.delta_weights()
    assert (expected - before).abs().max() > 1e-3
    dense = make()
    with torch.no_grad():
        for site, delta in deltas.items():
            dense.get_submodule(site).weight += delta
    torch.testing.assert_close(expected, dense(x), rtol=1e-9, atol=1e-9)

    adapter.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    adapter.unmerge()
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in base.items())

    adapter.save(tmp_path / "a.safetensors")
    twin = make()
    again = load(twin, tmp_path / "a.safetensors")
    assert again.method == method and again.sites == adapter.sites
    assert torch.equal(twin(x), expected)
    again.merge()
    again.detach()
    torch.testing.assert_close(twin(x), expected, rtol=1e-9, atol=1e-9)

    adapter.detach()
    assert torch.equal(model(x), before)
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in modules.items()
    }
    assert bits(model).keys() == base.keys()


@pytest.mark.parametrize("name", MODELS)
def test_each_adapted_linear_takes_effect(randomize, name):
    """With every other increment at zero, each linear alone changes the output."""
    make, size = MODELS[name]
    model, x = make(), images(size)
    before = model(x)
    kinds = ("q", "k", "v", "o", "gate", "fc1", "fc2")
    adapter = attach(model, LoRA(rank=2, matrices=kinds))
    for site in adapter.sites:
        group = adapter.bank.group(site.name)
        for position in range(site.slices):
            with torch.no_grad():
                group.B[position].normal_()
            assert (model(x) - before).abs().max() > 1e-6, (site.name, position)
            with torch.no_grad():
                group.B.zero_()
    torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-11)


ROLES = {
    "vit": {"qkv", "o", "fc1", "fc2"},
    "swin": {"qkv", "o", "fc1", "fc2"},
    "swin v2": {"qkv", "o", "fc1", "fc2"},
    "deit3": {"qkv", "o", "fc1", "fc2"},
    "beit": {"qkv", "o", "fc1", "fc2"},
    "beit v2": {"qkv", "o", "fc1", "fc2"},
    "eva02 fused": {"qkv", "o", "gate_fc1", "fc2"},
    "eva02": {"q", "k", "v", "o", "gate", "fc1", "fc2"},
    "clip": {"qkv", "o", "fc1", "fc2"},
    "dinov2": {"qkv", "o", "fc1", "fc2"},
    "dinov2 giant": {"qkv", "o", "gate_fc1", "fc2"},
}


@pytest.mark.parametrize("name", MODELS)
def test_roles(name):
    adapter = attach(MODELS[name][0](), EFFT2(rank=2))
    assert {site.role for site in adapter.sites} == ROLES[name]
    blocks = 5 if name.startswith("swin") else 2
    assert len(adapter.sites) == blocks * len(ROLES[name])
    assert {site.block for site in adapter.sites} == set(range(blocks))


@pytest.mark.parametrize("name", ["eva02 fused", "eva02", "dinov2 giant"])
def test_gated_ffn_is_one_group(randomize, name):
    """gate, fc1 and fc2, each [hidden, d] as fc1^T and fc2 are, with a core of its own."""
    adapter = attach(MODELS[name][0](), EFFT2(rank=(3, 2), scale=0.7))
    randomize(adapter)
    group = adapter.bank.ffn
    slices = tensor_train(*(p.detach() for p in (group.core, group.U, group.V)), 0.7)
    assert len(slices) == 3 * 2
    gate, fc1, fc2 = slices[3:]
    found = {n: d for n, d in adapter.delta_weights().items() if n.startswith("blocks.1.mlp")}
    expected = (
        {"fc1_g": gate, "fc1_x": fc1, "fc2": fc2.T}
        if name == "eva02"
        else {"fc1": torch.cat([gate, fc1]), "fc2": fc2.T}
    )
    assert found.keys() == {f"blocks.1.mlp.{tail}" for tail in expected}
    for tail, delta in expected.items():
        torch.testing.assert_close(found[f"blocks.1.mlp.{tail}"], delta, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["eva02 fused", "dinov2 giant"])
def test_the_gate_is_the_half_that_the_model_gates_with(randomize, name):
    """silu(gate)·fc1: a gate of -50 closes every unit, where an fc1 of -50 would not."""
    model = MODELS[name][0]()
    mlp = model.blocks[0].mlp
    adapter = attach(model, LoRA(rank=2, matrices=("gate",)))
    randomize(adapter)
    with torch.no_grad():
        rows = adapter.delta_weights()["blocks.0.mlp.fc1"].any(1)
        assert rows.sum() * 2 == len(rows)
        mlp.fc1.weight[rows], mlp.fc1.bias[rows] = 0.0, -50.0
        adapter.bank.get_submodule("blocks_0_mlp_fc1").B.zero_()
        x = torch.randn(2, 3, mlp.fc1.in_features, dtype=torch.float64)
        hidden = []
        mlp.fc2.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        mlp(x)
    assert hidden[0].shape[-1] * 2 == len(rows) and hidden[0].abs().max() < 1e-15


@pytest.mark.parametrize("name", ["beit", "beit v2", "swin v2", "eva02 fused"])
@pytest.mark.parametrize("targets", ["qkv", "proj"])
def test_a_bias_made_in_forward_is_added_apart(randomize, name, targets):
    """Those attentions hand qkv.weight to F.linear, past the layer, unless told not to."""
    make, size = MODELS[name]
    model, x = make(), images(size)
    attentions = [m for m in model.modules() if hasattr(m, "qkv_bias_separate")]
    assert attentions and not any(m.qkv_bias_separate for m in attentions)
    before = model(x)
    adapter = attach(model, EFFT2(rank=2, scale=1.0), targets=targets)
    assert all(m.qkv_bias_separate == (targets == "qkv") for m in attentions)
    torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-11)
    randomize(adapter)
    seen = []
    for layer in adapter.layers().values():
        layer.register_forward_hook(lambda layer, args, y: seen.append(layer))
    after = model(x)
    assert (after - before).abs().max() > 1e-3 and set(seen) == set(adapter.layers().values())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), after)
    adapter.detach()
    assert not any(m.qkv_bias_separate for m in attentions)
    assert torch.equal(model(x), before) and torch.equal(twin(x), after)


def test_a_bias_that_was_apart_stays_apart():
    model = small("beit_base_patch16_224")
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    attach(model, EFFT2(rank=2)).detach()
    assert all(block.attn.qkv_bias_separate for block in model.blocks)


def test_a_refused_attach_leaves_the_bias_where_it_was():
    model = small("beit_base_patch16_224")
    with pytest.raises(ValueError, match="rank must be at most"):
        attach(model, EFFT2(rank=17))
    assert not any(block.attn.qkv_bias_separate for block in model.blocks)
    assert not any(isinstance(m, FusedEFFTLinear) for m in model.modules())


def test_separate_q_k_v_of_eva02_share_a_group(randomize):
    adapter = attach(MODELS["eva02"][0](), EFFT2(rank=(3, 2), scale=0.7), targets="mhsa")
    randomize(adapter)
    group = adapter.bank.mhsa
    slices = tensor_train(*(p.detach() for p in (group.core, group.U, group.V)), 0.7)
    found = adapter.delta_weights()
    for block in range(2):
        for position, tail in enumerate(("q_proj", "k_proj", "v_proj", "proj")):
            delta = slices[4 * block + position].T
            torch.testing.assert_close(found[f"blocks.{block}.attn.{tail}"], delta)


@pytest.mark.parametrize("kind", [EFFT1, EFFT2, FacTTT])
def test_attention_of_another_width_is_refused(kind):
    """q, k, v of 12 and o from 12 in a model of 16: no d×d matrices."""
    model = small("eva02_tiny_patch14_224", mlp_ratio=4, swiglu_mlp=False)
    for block in model.blocks:
        block.attn.qkv = nn.Linear(16, 36, bias=False).double()
        block.attn.proj = nn.Linear(12, 16).double()
    with pytest.raises(ValueError, match=r"d×d matrices \(d=16\), got 'blocks.0.attn.qkv'"):
        attach(model, kind(rank=2))
    assert not any(isinstance(m, FusedEFFTLinear) for m in model.modules())
    adapter = attach(model, LoRA(rank=2, matrices=("q", "o")))
    assert adapter.num_parameters() == 2 * 2 * (16 + 12) * 2


def test_efft1_refuses_a_narrow_ffn():
    with pytest.raises(ValueError, match=r"EFFT1 needs FFN linears with 4d=64.*use EFFT2"):
        attach(MODELS["eva02"][0](), EFFT1(rank=2))


def test_swin_head_and_downsampling_are_as_they_were():
    model = small_swin()
    adapter = attach(model, EFFT2(rank=2))
    assert adapter.modules_to_train == ("head.fc",)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "factor" not in n}
    assert trained == {"head.fc.weight", "head.fc.bias"}
    assert type(model.layers[1].downsample.reduction) is nn.Linear
