"""KAdaptation against Eq. 3 and 4 of arXiv:2203.16329, written out with torch.kron."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call

from efft_kernels import KAdaptation, attach

D = 12  # of the small model
KINDS = {"attn.qkv": ("q", "k", "v"), "attn.proj": ("o",), "mlp.fc1": ("fc1",), "mlp.fc2": ("fc2",)}


def meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


COUNTS = [  # n³ for A, and (K + N)·r for each matrix
    (KAdaptation(products=4, rank=1), 4**3 + 12 * 4 * (768 + 768)),
    (KAdaptation(products=4, rank=3, matrices=("q", "v")), 4**3 + 12 * 2 * (768 + 768) * 3),
    (KAdaptation(products=8, matrices=("o", "fc1")), 8**3 + 12 * (2 * 768 + 768 + 3072)),
    (KAdaptation(products=4, matrices=None), 4**3 + 12 * (768 * 4 + 2 * 768 + 2 * 3840)),
]


@pytest.mark.parametrize(("method", "expected"), COUNTS, ids=str)
def test_parameter_counts_on_vit_base(method, expected):
    assert attach(meta("vit_base_patch16_224"), method).num_parameters() == expected


def leaves_of(adapter):
    group = adapter.bank.kadaptation
    fresh = {n: p.detach().clone().requires_grad_() for n, p in group.named_parameters()}
    sites = {
        site: {"u": fresh[f"u.{_key(site)}"], "v": fresh[f"v.{_key(site)}"]}
        for site in adapter.layers()
    }
    return fresh, sites


def _key(site):
    return site.replace(".", "_")


def kronecker(a, u, v, s):
    """The paper's ΔW of one matrix, [K, N], for y = x·ΔW: s Σ_i A_i ⊗ (u_i·v_i^T)."""
    return s * sum(torch.kron(a[i], u[i] @ v[i].T) for i in range(len(a)))


def dense(site, a, tensors, matrices, s):
    """ΔW [N, K] in nn.Linear's layout; zero for the matrices that are left alone."""
    if matrices is None:
        return kronecker(a, tensors["u"][0], tensors["v"][0], s).T
    pairs = iter(zip(tensors["u"], tensors["v"], strict=True))
    k = tensors["u"].shape[1] * tensors["u"].shape[2]
    n = tensors["v"].shape[1] * tensors["v"].shape[2]
    parts = [
        kronecker(a, *next(pairs), s).T if kind in matrices else a.new_zeros(n, k)
        for kind in KINDS[site.split(".", 2)[2]]
    ]
    assert next(pairs, None) is None
    return torch.cat(parts)


CASES = [
    {"products": 2, "rank": 3, "scale": 0.7},
    {"products": 3, "rank": 1, "scale": 2.0},
    {"products": 2, "rank": 2, "matrices": ("q", "v")},
    {"products": 2, "rank": 1, "matrices": ("k", "fc1", "fc2"), "init": "u"},
    {"products": 1, "rank": 4, "matrices": ("v", "o")},
    {"products": 2, "rank": 2, "matrices": None},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_every_slice_and_a_training_step_are_the_dense_models(make_vit, randomize, options):
    plain, model = make_vit(dtype=torch.float64), make_vit(dtype=torch.float64)
    method = KAdaptation(**options)
    adapter = attach(model, method)
    randomize(adapter, 0.5)
    fresh, sites = leaves_of(adapter)
    deltas = {
        site: dense(site, fresh["A"], tensors, method.matrices, method.scale)
        for site, tensors in sites.items()
    }
    found = adapter.delta_weights()
    for site, delta in deltas.items():
        assert delta.norm() > 1e-3
        torch.testing.assert_close(found[site], delta.detach(), rtol=1e-11, atol=1e-11)
    assert found.keys() == {
        f"blocks.{i}.{tail}"
        for i in range(2)
        for tail, kinds in KINDS.items()
        if method.matrices is None or set(kinds) & set(method.matrices)
    }

    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    model.train()(x).square().sum().backward()
    weights = {f"{n}.weight": plain.get_submodule(n).weight.detach() + d for n, d in deltas.items()}
    functional_call(plain.train(), weights, (y,)).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in adapter.bank.kadaptation.named_parameters():
        assert fresh[name].grad.norm() > 1e-6, name
        torch.testing.assert_close(parameter.grad, fresh[name].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("matrices", [("q", "v"), ("k",)], ids=str)
def test_other_slices_outputs_are_untouched_to_the_bit(make_vit, randomize, matrices):
    model = make_vit()
    x = torch.randn(2, 5, D)
    plain = model.blocks[0].attn.qkv(x)
    adapter = attach(model, KAdaptation(products=2, rank=1, matrices=matrices))
    before = model.blocks[0].attn.qkv(x).unflatten(-1, (3, D))  # ΔW is zero still
    torch.testing.assert_close(before.flatten(-2), plain)
    randomize(adapter)
    after = model.blocks[0].attn.qkv(x).unflatten(-1, (3, D))
    for position, kind in enumerate(("q", "k", "v")):
        same = torch.equal(after[..., position, :], before[..., position, :])
        assert same == (kind not in matrices)


def test_factors_at_a_position_are_those_of_the_name(make_vit, randomize):
    adapter = attach(make_vit(), KAdaptation(products=2))
    randomize(adapter)
    group = adapter.bank.kadaptation
    for name in adapter.layers():
        expected = group.factors(name, False)
        down, core, up = group.factors_at(group.position(name), False)
        assert torch.equal(down, expected.down) and torch.equal(up, expected.up) and core is None
    for key, table in (("blocks_0_attn_qkv", group.u), ("blocks_1_attn_proj", group.v)):
        table._parameters.pop(key)  # as a parametrization does
        assert group.factors_at(group.position(key.replace("_", ".")), False) is None


@pytest.mark.parametrize("init", ["u", "v"])
def test_what_does_not_start_at_zero_is_drawn_as_matrices(make_vit, init):
    """xavier_uniform_ of each u_i [K/n, r] or v_i [N/n, r]: within ±√(6 / (K/n + r))."""
    model = make_vit(embed_dim=96)
    method = KAdaptation(products=4, rank=2, init=init, matrices=("q", "k", "v", "o"))
    group = attach(model, method).bank.kadaptation
    for parameter in (group.u if init == "v" else group.v).values():
        bound = (6 / (96 / 4 + 2)) ** 0.5
        assert 0.9 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize("products", [2, 3])
@pytest.mark.parametrize("init", ["u", "v"])
def test_starts_at_exactly_zero_and_learns_from_the_first_step(make_vit, init, products):
    """The release starts u and v at zero, where every gradient of the increment vanishes."""
    model = make_vit()
    adapter = attach(model, KAdaptation(products=products, rank=1, init=init))
    group = adapter.bank.kadaptation
    zero, random = (group.v, group.u) if init == "v" else (group.u, group.v)
    assert group.A.all() and not any(p.any() for p in zero.values())
    assert all(p.all() for p in random.values())
    assert not any(delta.any() for delta in adapter.delta_weights().values())

    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    first = nn.functional.cross_entropy(model(images), labels)
    first.backward()
    assert all(p.grad.abs().max() > 1e-7 for p in zero.values())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter -= 0.5 * parameter.grad
    for name, delta in adapter.delta_weights().items():
        parts = delta.unflatten(0, (3, -1)) if name.endswith("qkv") else delta[None]
        assert all(part.abs().max() > 1e-6 for part in parts), name
    assert nn.functional.cross_entropy(model(images), labels) < first - 1e-3


def test_factors_are_of_the_effective_rank(make_vit, randomize):
    """(down, core, up) has n²·r columns per matrix, and ΔW really has that rank."""
    adapter = attach(
        make_vit(dtype=torch.float64), KAdaptation(products=3, rank=1, matrices=("o",))
    )
    randomize(adapter)
    layer = adapter.layers()["blocks.0.attn.proj"]
    down, core, up = layer.current_factors()
    assert down.shape == (D, 9) and core is None and up.shape == (1, D, 9)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 9


REFUSED = [
    ({"products": 5}, r"products must divide K=12 and N=12 of each matrix in 'blocks.0.attn.qkv'"),
    ({"products": 16, "matrices": ("fc1",)}, "products must divide K=12 and N=48"),
    ({"products": 16, "matrices": ("fc2",)}, "products must divide K=48 and N=12"),
    ({"products": 4, "rank": 1}, r"products²·rank must be at most min\(K, N\)=12 .* got 16"),
    ({"products": 2, "rank": 4}, r"products²·rank must be at most min\(K, N\)=12 .* got 16"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_refused(make_vit, options, text):
    with pytest.raises(ValueError, match=text):
        attach(make_vit(), KAdaptation(**options))


@pytest.mark.parametrize("field", ["products", "rank"])
def test_a_size_below_one_is_refused_at_once(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        KAdaptation(**{field: 0})


def test_the_releases_slow_weights_are_tiny_and_of_rank_one(make_vit):
    """PEViT's model.py: phm_rule_left [n, n, 1] and phm_rule_right [n, 1, n] within ±0.01."""
    model = make_vit(embed_dim=64, num_heads=4)
    group = attach(model, KAdaptation(products=8, factor_init="release")).bank.kadaptation
    for matrix in group.A:
        assert torch.linalg.matrix_rank(matrix, rtol=1e-3) == 1
    assert 0.5e-4 < group.A.abs().max() <= 1e-4
    assert group.A.std().item() == pytest.approx(1e-4 / 3, rel=0.2)
    assert all(u.any() for u in group.u.values())  # the release's are zero, and never learn
    assert not any(v.any() for v in group.v.values())
    with pytest.raises(ValueError, match="factor_init must be one of"):
        KAdaptation(factor_init="paper")
