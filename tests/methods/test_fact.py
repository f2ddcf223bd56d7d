"""FacT-TT and FacT-TK against Eq. 3 and 8 to 11 of arXiv:2212.03145, written out densely."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from efft_kernels import FacTTK, FacTTT, attach
from efft_kernels.methods.base import Site

D, DEPTH = 12, 2  # of the small model
KINDS = [FacTTT, FacTTK]


def meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


COUNTS = [
    (FacTTT(rank=16), 61_440),
    (FacTTK(rank=32), 86_528),
    (FacTTT(rank=4), 2 * 768 * 4 + 144 * 4**2),
    (FacTTK(rank=8), 2 * 768 * 8 + 8**3 + 144 * 8),
    (FacTTT(rank=(24, 8)), 768 * 32 + 144 * 24 * 8),
    (FacTTK(rank=(24, 8)), 768 * 32 + 24 * 24 * 8 + 144 * 24),
    (FacTTK(rank=(24, 8), layer_rank=5), 768 * 32 + 5 * 24 * 8 + 144 * 5),
    (FacTTT(rank=16, learn_scale=True), 61_440 + 1),
]


@pytest.mark.parametrize(("method", "expected"), COUNTS, ids=str)
def test_parameter_counts_on_vit_base(method, expected):
    assert attach(meta("vit_base_patch16_224"), method).num_parameters() == expected


@pytest.mark.parametrize(
    ("options", "slices"),
    [({"targets": "mhsa"}, 4 * 12), ({"targets": "ffn"}, 8 * 12), ({"layers": range(3)}, 12 * 3)],
)
def test_parameter_counts_of_the_ablations(options, slices):
    """Eq. 13 and 14: 4L or 8L slices."""
    for method, expected in (
        (FacTTT(rank=16), 2 * 768 * 16 + slices * 16**2),
        (FacTTK(rank=16), 2 * 768 * 16 + 16**3 + slices * 16),
    ):
        assert attach(meta("vit_base_patch16_224"), method, **options).num_parameters() == expected


def tensor_train(core, u, v, s):
    """Eq. 9, term by term: ΔW[i, j, k] = s Σ_t1 Σ_t2 Σ[i, t1, t2] U[j, t1] V[k, t2]."""
    total = torch.zeros(core.shape[0], u.shape[0], v.shape[0], dtype=core.dtype)
    for t1, t2 in itertools.product(range(core.shape[1]), range(core.shape[2])):
        total = total + core[:, t1, t2, None, None] * u[:, t1, None] * v[:, t2]
    return s * total


def tucker(core, p, u, v, s):
    """Eq. 11: ΔW[i, j, k] = s Σ_t1 Σ_t2 Σ_t3 C[t1, t2, t3] P[i, t1] U[j, t2] V[k, t3]."""
    total = torch.zeros(p.shape[0], u.shape[0], v.shape[0], dtype=core.dtype)
    for t1, t2, t3 in itertools.product(*map(range, core.shape)):
        total = total + core[t1, t2, t3] * p[:, t1, None, None] * u[:, t2, None] * v[:, t3]
    return s * total


def dense(group, s):
    if "P" in group:
        return tucker(group["core"], group["P"], group["U"], group["V"], group.get("scale", s))
    return tensor_train(group["core"], group["U"], group["V"], group.get("scale", s))


def deltas(slices, layers, parts):
    """Weight name → ΔW [N, K] of [in, out] slices in the order of Eq. 4: q, k, v, o, up, down."""
    found = {}
    per_layer = 4 * ("mhsa" in parts) + 8 * ("ffn" in parts)
    for position, layer in enumerate(layers):
        mine = list(slices[position * per_layer : (position + 1) * per_layer])
        if "mhsa" in parts:
            q, k, v, o = (mine.pop(0) for _ in range(4))
            found[f"blocks.{layer}.attn.qkv"] = torch.cat([q, k, v], dim=1).T
            found[f"blocks.{layer}.attn.proj"] = o.T
        if "ffn" in parts:
            # Eq. 3: X·W_up^(i) side by side, and each chunk of the hidden through its W_down^(i).
            found[f"blocks.{layer}.mlp.fc1"] = torch.cat(mine[:4], dim=1).T
            found[f"blocks.{layer}.mlp.fc2"] = torch.cat(mine[4:], dim=0).T
    return found


def leaves_of(adapter):
    return {
        name: {
            key: parameter.detach().double().clone().requires_grad_()
            for key, parameter in group.named_parameters()
        }
        for name, group in adapter.bank.named_children()
    }


WHERE = {
    "all": ({}, [0, 1], ("mhsa", "ffn")),
    "mhsa": ({"targets": "mhsa"}, [0, 1], ("mhsa",)),
    "ffn": ({"targets": "ffn"}, [0, 1], ("ffn",)),
    "layer 1": ({"layers": 1}, [1], ("mhsa", "ffn")),
}
OPTIONS = [
    {"rank": 3, "scale": 0.7},
    {"rank": (3, 2), "scale": 10.0},
    {"rank": (2, 5), "scale": 2.0, "learn_scale": True},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_slice_is_the_papers(make_vit, randomize, kind, where, options):
    attach_options, layers, parts = WHERE[where]
    adapter = attach(make_vit(dtype=torch.float64), kind(**options), **attach_options)
    randomize(adapter)
    (group,) = leaves_of(adapter).values()
    expected = deltas(dense(group, options["scale"]).detach(), layers, parts)
    found = adapter.delta_weights()
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert delta.norm() > 1e-3
        torch.testing.assert_close(found[name], delta, rtol=1e-11, atol=1e-11)


def test_hidden_of_another_multiple_of_the_width(make_vit, randomize):
    model = make_vit(dtype=torch.float64, mlp_ratio=3)
    adapter = attach(model, FacTTT(rank=(3, 2), scale=0.5), layers=1, targets=["fc1", "fc2"])
    randomize(adapter)
    (group,) = leaves_of(adapter).values()
    slices = dense(group, 0.5).detach()
    assert len(slices) == 6
    found = adapter.delta_weights()
    torch.testing.assert_close(found["blocks.1.mlp.fc1"], torch.cat(list(slices[:3]), 1).T)
    torch.testing.assert_close(found["blocks.1.mlp.fc2"], torch.cat(list(slices[3:]), 0).T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_training_step_is_that_of_the_dense_model(make_vit, randomize, kind, options):
    plain, model = make_vit(dtype=torch.float64), make_vit(dtype=torch.float64)
    adapter = attach(model, kind(**options, dropout=0.0))
    randomize(adapter)
    images, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([4, 0, 2])
    x = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model.train()(x), labels)
    loss.backward()

    (group,) = leaves_of(adapter).values()
    weights = {
        f"{name}.weight": plain.get_submodule(name).weight.detach() + delta
        for name, delta in deltas(
            dense(group, options["scale"]), range(DEPTH), ("mhsa", "ffn")
        ).items()
    }
    y = images.clone().requires_grad_()
    expected = nn.functional.cross_entropy(functional_call(plain.train(), weights, (y,)), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10)
    for name, parameter in adapter.bank.all.named_parameters():
        assert group[name].grad.norm() > 1e-6
        torch.testing.assert_close(parameter.grad, group[name].grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_exactly_zero_and_leaves_it_with_the_first_step(make_vit, kind):
    adapter = attach(make_vit(), kind(rank=3))
    model = adapter.model
    group = adapter.bank.all
    assert not group.V.any()
    assert all(p.all() for name, p in group.named_parameters() if name != "V")
    assert not any(delta.any() for delta in adapter.delta_weights().values())
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter -= 0.1 * parameter.grad
    assert all(delta.abs().max() > 1e-7 for delta in adapter.delta_weights().values())


@pytest.mark.parametrize("kind", KINDS)
def test_random_factors_are_xavier_uniform(make_vit, kind):
    """U as a d×r matrix, each slice of Σ (or C) as its own r1×r2 matrix, P as a 12L×r matrix."""
    torch.manual_seed(3)
    group = attach(make_vit(embed_dim=48, depth=6), kind(rank=(24, 12))).bank.all
    for name, matrices in group.named_parameters():
        if name != "V":
            bound = (6 / sum(matrices.shape[-2:])) ** 0.5
            assert matrices.abs().max() <= bound
            assert matrices.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


REFUSED = [
    ({"mlp_ratio": 1.5}, {}, r"d×d matrices \(d=12\), got 18 hidden features.*fc1"),
    ({}, {"targets": "head", "modules_to_train": ()}, "FacTTT, which places .*'head'"),
]


@pytest.mark.parametrize(("model", "options", "text"), REFUSED)
def test_refused(make_vit, model, options, text):
    plain = make_vit(**model)
    with pytest.raises(ValueError, match=text):
        attach(plain, FacTTT(rank=2), **options)
    assert all(type(m) is nn.Linear for m in plain.modules() if isinstance(m, nn.Linear))


class TestActivationDropout:
    """On the rank-r activation, in training alone; the factors themselves are never masked."""

    @pytest.fixture
    def adapted(self, make_vit, randomize):
        def make(kind=FacTTT, p=0.5, **options):
            model = make_vit(dtype=torch.float64)
            adapter = attach(model, kind(rank=(3, 2), dropout=p, **options))
            randomize(adapter)
            return model, adapter

        return make

    @pytest.mark.parametrize("kind", KINDS)
    def test_acts_in_training_alone(self, adapted, kind):
        model, adapter = adapted(kind)
        images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        quiet = model.eval()(images)
        assert torch.equal(quiet, model(images))
        adapter.merge()
        torch.testing.assert_close(model(images), quiet, rtol=1e-10, atol=1e-10)
        adapter.unmerge()
        model.train()
        noisy = [model(images) for _ in range(2)]
        assert (noisy[0] - noisy[1]).abs().max() > 1e-3
        assert (noisy[0] - quiet).abs().max() > 1e-3

    def test_factors_are_not_masked(self, adapted):
        _, adapter = adapted()
        for name, layer in adapter.layers().items():
            for a, b in zip(layer.current_factors(True), layer.current_factors(False), strict=True):
                assert a is b is None or torch.equal(a, b), name

    @pytest.mark.parametrize("site", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
    def test_mean_over_masks_is_the_layer_without_dropout(self, adapted, site):
        model, _ = adapted(p=0.4)
        layer = model.blocks[0].get_submodule(site)
        x = torch.randn(layer.in_features, dtype=torch.float64)
        expected = layer.eval()(x)
        with torch.no_grad():
            drawn = layer.train()(x.expand(20_000, -1))
        error = (drawn.mean(0) - expected).abs()
        sigma = drawn.std(0) / len(drawn) ** 0.5
        assert sigma.max() > 0 and (error < 5 * sigma + 1e-12).all()

    def test_masks_are_of_each_slice(self, adapted):
        """From y of a fused qkv to x·U·Σ_g masked, by V's left inverse: each slice its own."""
        model, adapter = adapted(p=0.5, scale=0.7)
        layer, group = model.blocks[1].attn.qkv, adapter.bank.all
        x = torch.randn(600, D, dtype=torch.float64)
        with torch.no_grad():
            low_rank = layer.train()(x) - nn.functional.linear(x, layer.weight, layer.bias)
            masked = low_rank.unflatten(-1, (3, D)) @ torch.linalg.pinv(group.V).T  # [M, 3, r2]
            activation = 0.7 * torch.einsum("mk,ka,gab->mgb", x, group.U, group.core[12:15])
        ratio = masked / activation
        kept = ratio.abs() > 1e-6
        torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 2.0))
        assert kept.double().mean().item() == pytest.approx(0.5, abs=0.05)
        for g, h in ((0, 1), (1, 2), (0, 2)):  # independent: equal half of the time
            agree = (kept[:, g] == kept[:, h]).double().mean().item()
            assert agree == pytest.approx(0.5, abs=0.1)

    def test_masks_are_of_torchs_generator(self, adapted):
        model, _ = adapted()
        images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        model.train()
        torch.manual_seed(5)
        first = model(images)
        other = model(images)
        torch.manual_seed(5)
        assert torch.equal(model(images), first) and not torch.equal(other, first)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_checkpointed_blocks_give_the_same_gradients(self, adapted, kind, use_reentrant):
        model, adapter = adapted(kind)
        images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        leaves = [images, *adapter.parameters()]

        def gradients(run):
            torch.manual_seed(11)
            for leaf in leaves:
                leaf.grad = None
            x = model.train()._pos_embed(model.patch_embed(images))
            for block in model.blocks:
                x = run(block, x)
            torch.randn(3)  # the generator has moved on when the backward recomputes
            model.norm(x).tanh().sum().backward()
            return [leaf.grad for leaf in leaves]

        expected = gradients(lambda block, x: block(x))
        found = gradients(lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant))
        for a, b in zip(found, expected, strict=True):
            assert b.norm() > 1e-6
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_on_factors_compiles(make_vit, randomize, kind):
    """torch's aot_eager takes F.dropout of a view for one with other strides in the backward."""
    adapter = attach(make_vit(), kind(rank=2, dropout=0.0))
    randomize(adapter)
    (group,) = adapter.bank.children()
    group.dropout = 0.5

    def factors():
        return [t for site in group.placements for t in group(site, True) if t is not None]

    def gradients(call):
        torch.manual_seed(3)
        found = call()
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in found)
        return torch.autograd.grad(loss, list(group.parameters()))

    expected = gradients(factors)
    found = gradients(torch.compile(factors, backend="aot_eager", fullgraph=True, dynamic=True))
    assert all(g.norm() > 0 for g in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def is_uniform(tensor, bound):
    """Whether the entries look like a uniform draw from ±bound."""
    spread = tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    return spread and 0.9 * bound < tensor.abs().max() <= bound


@pytest.mark.parametrize("rank", [16, (16, 8)])
def test_the_release_draws_fact_tt_as_linears(make_vit, rank):
    """fact_tt.py: FacTu, q_FacTs, ..., fc1_FacTs and fc2_FacTs are nn.Linear, within ±1/√in."""
    model = make_vit(embed_dim=48, depth=6)
    group = attach(model, FacTTT(rank=rank, factor_init="release")).bank.all
    assert is_uniform(group.U, 48**-0.5) and not group.V.any()
    by_role = {"fc2": [], "others": []}
    for site, place in group.placements.items():
        cores = group.core[place.first_core : place.first_core + place.slices]
        by_role["fc2" if site.endswith("fc2") else "others"].append(cores)
    assert is_uniform(torch.cat(by_role["fc2"]), (4 * 16) ** -0.5)
    assert is_uniform(torch.cat(by_role["others"]), 16**-0.5)


@pytest.mark.parametrize(("role", "rank", "most"), [("q", (2, 3), 6), ("fc1", (1, 2), 4)])
def test_a_layer_rank_beyond_which_nothing_is_added_is_refused(role, rank, most):
    site = Site("blocks.0.it", role, 0, 0, 12, 12 if role == "q" else 48)
    FacTTK(rank=rank, layer_rank=most).build([site])
    with pytest.raises(ValueError, match=rf"max\(cores, r1·r2\)={most}, got {most + 1}"):
        FacTTK(rank=rank, layer_rank=most + 1).build([site])


@pytest.mark.parametrize(("rank", "layer_rank"), [(16, None), ((16, 8), 5)])
def test_the_release_draws_fact_tks_core_as_one_tensor(make_vit, rank, layer_rank):
    """fact_tk.py: xavier_uniform_ on FacTc [r, r, r] and FacTp [r, 12L]."""
    model = make_vit(embed_dim=48, depth=6)
    method = FacTTK(rank=rank, layer_rank=layer_rank, factor_init="release")
    group = attach(model, method).bank.all
    t, r1, r2 = group.core.shape
    assert is_uniform(group.U, 48**-0.5) and not group.V.any()
    assert is_uniform(group.core, (6 / (t * (r1 + r2))) ** 0.5)
    assert is_uniform(group.P, (6 / (72 + t)) ** 0.5)
    if layer_rank is None:
        assert is_uniform(group.core, 3**0.5 / 16)
        released = nn.init.xavier_uniform_(torch.empty(t, t, t))
        assert released.std().item() == pytest.approx(group.core.std().item(), rel=0.1)


@pytest.mark.parametrize(
    ("kind", "rank", "larger"), [(FacTTT, 16, 4.2), (FacTTK, 16, 9.7), (FacTTK, 32, 13.6)]
)
def test_why_the_releases_scales_presuppose_its_start(kind, rank, larger):
    """An Adam step on V moves ΔW by s·|U·Σ|·lr, and U·Σ is larger with xavier_uniform_."""
    model = timm.create_model("vit_base_patch16_224", depth=1)
    spread = {}
    for factor_init in ("xavier", "release"):
        adapter = attach(model, kind(rank=rank, factor_init=factor_init), targets="mhsa")
        group = adapter.bank.all
        spread[factor_init] = group.U.std().item() * group.core.std().item()
        adapter.detach()
    assert spread["xavier"] / spread["release"] == pytest.approx(larger, rel=0.08)


def test_an_unknown_start_is_refused():
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"factor_init must be one of .* got 'linear'"):
            kind(factor_init="linear")
