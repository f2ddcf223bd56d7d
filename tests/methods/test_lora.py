"""LoRA, one pair of factors per matrix, against ΔW = s·(A·B)^T written out."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call

from efft_kernels import KAdaptation, LoRA, attach, load, reference
from efft_kernels.methods.base import Site
from efft_kernels.methods.lora import chosen_slices, stack_matrices

D = 12  # of the small model
PER_SITE = {
    "attn.qkv": ("q", "k", "v"),
    "attn.proj": ("o",),
    "mlp.fc1": ("fc1",),
    "mlp.fc2": ("fc2",),
}


def meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


COUNTS = [
    (LoRA(rank=8), 294_912),  # q and v: 12·2·(768 + 768)·8
    (LoRA(rank=8, matrices=("q",)), 12 * 1536 * 8),
    (LoRA(rank=4, matrices=("q", "k", "v", "o")), 12 * 4 * 1536 * 4),
    (LoRA(rank=4, matrices=("fc1", "fc2")), 12 * 2 * (768 + 3072) * 4),
    # A fused qkv as one 768×2304 matrix beside proj, fc1 and fc2.
    (LoRA(rank=4, matrices=None), 12 * 4 * (768 + 2304 + 2 * 768 + 2 * (768 + 3072))),
]


@pytest.mark.parametrize(("method", "expected"), COUNTS, ids=str)
def test_parameter_counts_on_vit_base(method, expected):
    assert attach(meta("vit_base_patch16_224"), method).num_parameters() == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vit_large_patch16_224", 393_216), ("vit_huge_patch14_224", 655_360)],
)
def test_parameter_counts_on_larger_vits(name, expected):
    """E's Table 3: 0.39 and 0.65 million."""
    assert attach(meta(name), LoRA(rank=4)).num_parameters() == expected


def leaves_of(adapter):
    return {
        site: {
            key: p.detach().double().clone().requires_grad_()
            for key, p in adapter.bank.group(site).named_parameters()
        }
        for site in adapter.layers()
    }


def dense(site, tensors, matrices, s):
    """ΔW [N, K]: each chosen matrix s·(A·B)^T with A [K, r], B [r, N/G]; zero for the others."""
    if matrices is None:
        (a,), (b,) = tensors["A"], tensors["B"]
        return s * (a.T @ b.T).T
    kinds = PER_SITE[site.split(".", 2)[2]]
    pairs = iter(zip(tensors["A"], tensors["B"], strict=True))
    width = tensors["B"].shape[1]
    parts = []
    for kind in kinds:
        if kind in matrices:
            a, b = next(pairs)
            parts.append(s * torch.matmul(a.T, b.T).T)
        else:
            parts.append(torch.zeros(width, tensors["A"].shape[2], dtype=torch.float64))
    assert next(pairs, None) is None
    return torch.cat(parts)


CASES = [
    ("q", "v"),
    ("v", "q"),
    ("k",),
    ("q", "k", "v", "o"),
    ("o", "fc1"),
    ("fc2",),
    ("q", "k", "v", "o", "fc1", "fc2"),
    None,
]


@pytest.mark.parametrize("matrices", CASES, ids=str)
def test_every_slice_and_a_training_step_are_the_dense_models(make_vit, randomize, matrices):
    plain, model = make_vit(dtype=torch.float64), make_vit(dtype=torch.float64)
    adapter = attach(model, LoRA(rank=3, scale=2.5, matrices=matrices))
    randomize(adapter)
    groups = leaves_of(adapter)
    deltas = {site: dense(site, tensors, matrices, 2.5) for site, tensors in groups.items()}
    found = adapter.delta_weights()
    for site, delta in deltas.items():
        assert delta.norm() > 1e-3
        torch.testing.assert_close(found[site], delta.detach(), rtol=1e-11, atol=1e-11)
    expected_sites = {
        f"blocks.{i}.{tail}"
        for i in range(2)
        for tail, kinds in PER_SITE.items()
        if matrices is None or set(kinds) & set(matrices)
    }
    assert found.keys() == expected_sites

    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    model.train()(x).square().sum().backward()
    weights = {f"{n}.weight": plain.get_submodule(n).weight.detach() + d for n, d in deltas.items()}
    functional_call(plain.train(), weights, (y,)).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    for site, tensors in groups.items():
        for key, parameter in adapter.bank.group(site).named_parameters():
            assert tensors[key].grad.norm() > 1e-6
            torch.testing.assert_close(parameter.grad, tensors[key].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("matrices", [("q", "v"), ("k",)], ids=str)
def test_other_slices_outputs_are_untouched_to_the_bit(
    make_vit, randomize, matrices, training, dtype
):
    model = make_vit(dtype=dtype)
    layer = model.blocks[0].attn.qkv
    x = torch.randn(2, 5, D, dtype=dtype)
    plain = layer(x)
    adapter = attach(model, LoRA(rank=3, matrices=matrices))
    adapted = model.train(training).blocks[0].attn.qkv
    before = adapted(x).unflatten(-1, (3, D))  # ΔW is zero still
    torch.testing.assert_close(before.flatten(-2), plain)
    randomize(adapter)
    after = adapted(x).unflatten(-1, (3, D))
    for position, kind in enumerate(("q", "k", "v")):
        same = torch.equal(after[..., position, :], before[..., position, :])
        assert same == (kind not in matrices)
    adapter.merge()
    merged = model.blocks[0].attn.qkv.weight.unflatten(0, (3, D))
    adapter.unmerge()
    base = model.blocks[0].attn.qkv.weight.unflatten(0, (3, D))
    for position, kind in enumerate(("q", "k", "v")):
        assert torch.equal(merged[position], base[position]) == (kind not in matrices)


def test_starts_at_exactly_zero_and_leaves_it_with_the_first_step(make_vit):
    torch.manual_seed(0)
    model = make_vit(embed_dim=48)
    adapter = attach(model, LoRA(rank=8, matrices=("q", "v", "fc2")))
    assert not any(delta.any() for delta in adapter.delta_weights().values())
    for group in adapter.bank.children():
        assert not group.B.any()
        for matrix in group.A:  # kaiming_uniform_(a=√5) of each by itself: bound 1 / √K
            bound = 1 / math.sqrt(matrix.shape[1])
            assert matrix.abs().max() <= bound
            assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter -= 0.1 * parameter.grad
    for name, delta in adapter.delta_weights().items():
        parts = delta.unflatten(0, (3, -1)) if name.endswith("qkv") else delta[None]
        moved = [bool(part.abs().max() > 1e-8) for part in parts]
        assert moved == ([True, False, True] if len(moved) == 3 else [True])


def test_rank_above_the_matrix_is_refused(make_vit):
    with pytest.raises(ValueError, match=r"rank must be at most min\(K, N\)=12 .*qkv"):
        attach(make_vit(), LoRA(rank=13))


def test_targets_without_an_adapted_matrix_are_refused(make_vit):
    with pytest.raises(ValueError, match=r"targets must include linears that LoRA.* got only fc1"):
        attach(make_vit(), LoRA(matrices=("q",)), targets="fc1")


@pytest.fixture
def mlp():
    torch.manual_seed(2)
    layers = [nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 3)]
    return nn.Sequential(*layers).double()


UNKNOWN = [
    ({"targets": ["0", "2"]}, {"0", "2"}),
    ({"targets": "*"}, {"0", "2", "4"}),
    ({"targets": "*", "modules_to_train": "4"}, {"0", "2"}),
    ({"targets": "[02]"}, {"0", "2"}),
]


@pytest.mark.parametrize(("options", "expected"), UNKNOWN, ids=lambda v: str(sorted(v)))
@pytest.mark.parametrize("method", [LoRA(rank=2, scale=1.5), LoRA(rank=2, matrices=None)], ids=str)
def test_any_other_model_through_targets(mlp, randomize, tmp_path, options, expected, method):
    """Roles unknown: each targeted linear is one matrix, whatever `matrices` says."""
    base = {name: p.clone() for name, p in mlp.named_parameters()}
    x = torch.randn(5, 7, dtype=torch.float64)
    before = mlp(x)
    adapter = attach(mlp, method, **({"modules_to_train": ()} | options))
    assert set(adapter.layers()) == expected
    assert {(s.role, s.slices) for s in adapter.sites} == {("linear", 1)}
    torch.testing.assert_close(mlp(x), before, rtol=1e-12, atol=1e-12)
    randomize(adapter)
    deltas = {
        name: method.scale * t["B"][0].detach() @ t["A"][0].detach()
        for name, t in leaves_of(adapter).items()
    }
    for name, found in adapter.delta_weights().items():
        torch.testing.assert_close(found, deltas[name], rtol=1e-11, atol=1e-11)
    h = x
    for index in ("0", "2", "4"):
        weight = base[f"{index}.weight"] + deltas.get(index, 0.0)
        h = nn.functional.linear(h, weight, base[f"{index}.bias"])
        h = h if index == "4" else h.tanh()
    torch.testing.assert_close(mlp(x), h, rtol=1e-11, atol=1e-11)
    assert (h - before).abs().max() > 1e-2
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    assert torch.equal(mlp(x), before)
    load(mlp, tmp_path / "a.safetensors")
    torch.testing.assert_close(mlp(x), h, rtol=1e-11, atol=1e-11)


def test_a_file_names_its_linears_whole(randomize, tmp_path):
    """The linear "0" of a file is not "inner.0" as well, nor a teacher's copy of it."""

    def make():
        torch.manual_seed(4)
        return nn.Sequential(
            OrderedDict({"0": nn.Linear(4, 4), "inner": nn.Sequential(nn.Linear(4, 4))})
        )

    model, twin, x = make(), make(), torch.randn(3, 4)
    adapter = attach(model, LoRA(rank=2), targets="[0]", modules_to_train=())
    assert list(adapter.layers()) == ["0"]
    randomize(adapter)
    adapter.save(tmp_path / "a.safetensors")
    again = load(twin, tmp_path / "a.safetensors")
    assert again.sites == adapter.sites and torch.equal(twin(x), model(x))


def test_default_targets_of_an_unknown_model_are_refused(mlp):
    with pytest.raises(ValueError, match="none in Sequential; name some"):
        attach(mlp, LoRA(rank=2), modules_to_train=())


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=2, matrices=None), KAdaptation(products=2, rank=1, matrices=None)],
    ids=str,
)
def test_names_that_differ_in_dots_and_underscores_alone(randomize, method):
    """a.b_c and a_b.c have factors of their own."""

    def pair(**linears):
        return nn.ModuleDict(linears)

    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(a=pair(b_c=nn.Linear(8, 8)), a_b=pair(c=nn.Linear(8, 8)), a_b_c=nn.Linear(8, 8))
    )
    adapter = attach(model, method, targets="*", modules_to_train=())
    per_linear = 32 if isinstance(method, LoRA) else 16
    shared = 0 if isinstance(method, LoRA) else 8
    assert adapter.num_parameters() == 3 * per_linear + shared
    randomize(adapter)
    deltas = list(adapter.delta_weights().values())
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(deltas))


class Named(nn.Module):
    """A model with a linear at its root, under a given name."""

    def __init__(self, name):
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(8, 8)])
        self.add_module(name, nn.Linear(8, 8))


@pytest.mark.parametrize("name", ["values", "keys", "update"])
@pytest.mark.parametrize(
    "method",
    [LoRA(rank=2, matrices=None), KAdaptation(products=2, rank=1, matrices=None)],
    ids=str,
)
def test_names_that_torchs_containers_use_themselves(randomize, method, name):
    adapter = attach(Named(name), method, targets="*", modules_to_train=())
    randomize(adapter)
    assert set(adapter.delta_weights()) == {name, "inner.0"}
    assert all(delta.norm() > 1e-3 for delta in adapter.delta_weights().values())
    tensors = 4 if isinstance(method, LoRA) else 5
    assert len(list(adapter.parameters())) == len(adapter.state_dict()) == tensors


@pytest.mark.parametrize("name", ["group", "tasks", "attachment"])
def test_names_that_the_bank_uses_itself_are_refused(name):
    model = Named(name)
    with pytest.raises(ValueError, match=f"own attribute, got '{name}'"):
        attach(model, LoRA(rank=2, matrices=None), targets="*", modules_to_train=())
    assert type(model.inner[0]) is nn.Linear and not hasattr(model, "factor_bank")


@pytest.mark.parametrize("chosen", [(0,), (1,), (0, 1)], ids=str)
def test_two_stacked_matrices(chosen):
    """A gate and its fc1 in one weight: each has its own pair, or none."""
    down, up = torch.randn(len(chosen), 5, 2), torch.randn(len(chosen), 3, 2)
    factors = stack_matrices(down, up, chosen, 2)
    expected = torch.zeros(2, 3, 5)
    for pair, matrix in enumerate(chosen):
        expected[matrix] = up[pair] @ down[pair].T
    torch.testing.assert_close(reference.delta_weight(*factors, 2), expected.flatten(0, 1))


def test_no_scale_is_one(make_vit, randomize):
    adapter = attach(make_vit(), LoRA(rank=2, matrices=None))
    randomize(adapter)
    group = next(adapter.bank.children())
    assert torch.equal(group.factors("", False).up[0], group.B[0])
    assert LoRA() == LoRA(scale=1.0)


SWIN_COUNTS = [  # E's Table 3: 0.26, 0.36, 0.43 and 1.47 million
    ("tiny", [0, 4, 12, 24], 264_192),
    ("small", [0, 3, 9, 18], 364_032),
    ("base", [2, 4, 8, 16], 436_224),
    ("large", [3, 9, 18, 36], 1_469_952),
]


@pytest.mark.parametrize(("size", "ranks", "expected"), SWIN_COUNTS)
def test_parameter_counts_on_swin(size, ranks, expected):
    """Set_LoRA.py, set_Swin_LoRA_qv: rank (d // 128)·k; 0 in the first stage of T and S."""
    width = {"tiny": 96, "small": 96, "base": 128, "large": 192}[size]
    k = {"tiny": 4, "small": 3, "base": 2, "large": 3}[size]
    assert ranks == [width * 2**stage // 128 * k for stage in range(4)]
    adapter = attach(meta(f"swin_{size}_patch4_window7_224"), LoRA(rank=ranks))
    assert adapter.num_parameters() == expected
    assert {site.stage for site in adapter.sites} == {i for i, rank in enumerate(ranks) if rank}


def test_ranks_per_stage_train_save_and_load(tmp_path, randomize):
    def make():
        torch.manual_seed(3)
        sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8}
        heads = {"depths": (2, 2, 1), "num_heads": (1, 2, 4), "num_classes": 3}
        return timm.models.swin_transformer.SwinTransformer(**sizes, **heads).eval()

    model, images = make(), torch.randn(2, 3, 32, 32)
    method = LoRA(rank=[0, 2, 4], factor_init="release", dropout=0.1)
    adapter = attach(model, method)
    randomize(adapter)
    shapes = {site.stage: adapter.bank.group(site.name).A.shape[1] for site in adapter.sites}
    assert shapes == {1: 2, 2: 4}
    model(images).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.bank.parameters())
    adapter.save(tmp_path / "lora.safetensors")
    twin = make()
    again = load(twin, tmp_path / "lora.safetensors")
    assert again.method == method
    assert torch.equal(twin(images), model(images))


@pytest.mark.parametrize(
    ("ranks", "kind", "text"),
    [
        ([], ValueError, "rank must have one entry per stage"),
        ([0, 0], ValueError, "rank must be at least 1 in one stage"),
        ([1, -1], ValueError, "rank must be at least 1"),
        ([1, (2, 2)], TypeError, "rank must be an int, or a list"),
        ([1, True], TypeError, "rank must be an int, or a list"),
    ],
)
def test_bad_ranks_per_stage(ranks, kind, text):
    with pytest.raises(kind, match=text):
        LoRA(rank=ranks)


def test_ranks_of_other_stages_leave_the_model_alone(make_vit, unchanged):
    model = make_vit()
    with unchanged(model), pytest.raises(ValueError, match=r"one entry per stage \(1\), got 2"):
        attach(model, LoRA(rank=[1, 2]))


def test_the_release_starts_with_xavier_and_masks_both_factors(make_vit):
    """EFFT's Set_LoRA.py: xavier_uniform_ on LoRAq1 [d, r], and nn.Dropout(0.1) on both."""
    model = make_vit(embed_dim=48)
    adapter = attach(model, LoRA(rank=8, factor_init="release", dropout=0.25))
    group = adapter.bank.group("blocks.0.attn.qkv")
    bound = (6 / (48 + 8)) ** 0.5
    assert 0.9 * bound < group.A.abs().max() <= bound
    assert group.A.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not group.B.any()
    with torch.no_grad():
        group.B.fill_(1.0)
    layer = adapter.layers()["blocks.0.attn.qkv"]
    plain = layer.current_factors(dropout=False)
    kept = []
    for _ in range(50):
        down, _, up = layer.current_factors(dropout=True)
        for masked, full in ((down, plain.down), (up, plain.up)):
            ratio = (masked / full)[full != 0]
            torch.testing.assert_close(ratio[ratio != 0], torch.ones_like(ratio[ratio != 0]) / 0.75)
            kept.append((ratio != 0).float().mean().item())
    assert sum(kept) / len(kept) == pytest.approx(0.75, abs=0.02)
    with pytest.raises(ValueError, match="factor_init must be one of"):
        LoRA(factor_init="xavier")


def test_alpha_is_another_spelling_of_the_scale():
    method = LoRA(rank=8, alpha=16)
    assert method == LoRA(rank=8, scale=2.0) and method.scale == 2.0
    assert LoRA.from_config(method.to_config()) == method and "alpha" not in method.to_config()
    assert dataclasses.replace(method, rank=4).scale == 2.0
    assert LoRA().scale == 1.0


def test_the_written_constructor_has_the_fields_in_their_order_with_their_defaults():
    parameters = inspect.signature(LoRA).parameters.values()
    fields = dataclasses.fields(LoRA)
    assert [p.name for p in parameters] == [*(field.name for field in fields), "alpha"]
    assert all(getattr(LoRA(), field.name) == field.default for field in fields)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_scale_and_alpha_together_are_refused(scale):
    with pytest.raises(ValueError, match="scale and alpha must not both be given"):
        LoRA(rank=8, scale=scale, alpha=16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": [2, 4], "alpha": 8}, ValueError, "one rank for all stages"),
        ({"rank": 0, "alpha": 8}, ValueError, "rank"),
        ({"alpha": "8"}, TypeError, "alpha"),
        ({"alpha": math.nan}, ValueError, "alpha"),
    ],
)
def test_an_alpha_that_gives_no_scale_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        LoRA(**options)


@pytest.mark.parametrize(
    ("role", "matrices", "chosen"),
    [
        ("qkv", ("q", "v"), ((0, 2), 3)),
        ("qkv", ("fc1",), ((), 3)),
        ("gate_fc1", ("fc1",), ((1,), 2)),
        ("o", ("o",), ((0,), 1)),
        ("qkv", None, ((0,), 1)),
        ("linear", ("q",), ((0,), 1)),
    ],
)
def test_which_of_the_stacked_matrices_are_adapted(role, matrices, chosen):
    assert chosen_slices(Site("blocks.0.it", role, 0, 0, D, 6 * D), matrices) == chosen


def test_a_starts_as_nn_linear_does(make_vit):
    """kaiming_uniform_(a=√5) on A [r, K]: within ±1/√K."""
    adapter = attach(make_vit(embed_dim=96), LoRA(rank=8))
    a = torch.cat([adapter.bank.group(name).A.flatten() for name in adapter.layers()])
    assert 0.99 * 96**-0.5 < a.abs().max() <= 96**-0.5
