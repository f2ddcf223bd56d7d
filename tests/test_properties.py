"""Random small architectures and random options: what must hold of every method on every model."""

from __future__ import annotations

import copy
import itertools
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from efft_kernels import EFFT1, EFFT2, AdapterSet, FacTTK, FacTTT, KAdaptation, LoRA, attach, load
from efft_kernels.methods import method_from_config

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@st.composite
def architectures(draw):
    """Options of a small ViT: width, depth, heads, FFN ratio, tokens, and what else differs."""
    heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "embed_dim": heads * draw(st.sampled_from([4, 6, 8])),
        "num_heads": heads,
        "depth": draw(st.integers(1, 3)),
        "mlp_ratio": draw(st.sampled_from([1, 2, 4])),
        "img_size": draw(st.sampled_from([4, 8, 12])),
        "patch_size": 4,
        "num_classes": draw(st.integers(1, 4)),
        "qkv_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "class_token": draw(st.booleans()),
        "global_pool": "avg",
    }


SCALES = st.sampled_from([0.1, 1.0, 3.0])
MATRICES = st.lists(
    st.sampled_from(["q", "k", "v", "o", "fc1", "fc2"]), min_size=1, max_size=4, unique=True
).map(tuple)


@st.composite
def methods(draw, architecture, dropout=None):
    d = architecture["embed_dim"]
    ranks = st.one_of(st.integers(1, d), st.tuples(st.integers(1, d), st.integers(1, d)))
    rate = st.sampled_from([0.0, 0.3]) if dropout is None else st.just(dropout)
    common = {"scale": draw(SCALES)}
    kinds = [EFFT2, FacTTT, FacTTK, LoRA, KAdaptation]
    if architecture["mlp_ratio"] == 4:
        kinds.append(EFFT1)
    kind = draw(st.sampled_from(kinds))
    if kind is LoRA:
        matrices = draw(st.one_of(st.none(), MATRICES))
        return LoRA(rank=draw(st.integers(1, d)), matrices=matrices, **common)
    if kind is KAdaptation:
        products = draw(st.sampled_from([1, 2]))
        rank = draw(st.integers(1, d // products**2))
        init, matrices = draw(st.sampled_from("uv")), draw(st.one_of(st.none(), MATRICES))
        return KAdaptation(products=products, rank=rank, init=init, matrices=matrices, **common)
    common |= {
        "rank": draw(st.one_of(ranks, ranks.map(lambda rank: [rank]))),
        "dropout": draw(rate),
        "learn_scale": draw(st.booleans()),
    }
    if kind is FacTTK:
        return FacTTK(layer_rank=draw(st.one_of(st.none(), st.integers(1, 6))), **common)
    if kind is FacTTT:
        return FacTTT(**common)
    common |= {
        "init": draw(st.sampled_from("uv")),
        "cores": draw(st.sampled_from(["per_layer", "shared"])),
    }
    if kind is EFFT2:
        return EFFT2(ffn_rank=draw(st.one_of(st.none(), ranks)), **common)
    return EFFT1(**common)


cases = architectures().flatmap(lambda a: st.tuples(st.just(a), methods(a), st.integers(0, 99)))
quiet_cases = architectures().flatmap(
    lambda a: st.tuples(st.just(a), methods(a, dropout=0.0), st.integers(0, 99))
)


def build(architecture, seed):
    torch.manual_seed(seed)
    model = VisionTransformer(**architecture).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def fill(adapter, std=0.3):
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * std)


def images(architecture, count=2):
    size = architecture["img_size"]
    return torch.randn(count, 3, size, size, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@EXAMPLES
@given(cases)
def test_attach_leaves_the_outputs_and_freezes_the_rest(case):
    architecture, method, seed = case
    model = build(architecture, seed)
    x = images(architecture)
    before = model(x)
    adapter = attach(model, method)
    close(model(x), before)
    deltas = adapter.delta_weights()
    assert deltas and not any(delta.any() for delta in deltas.values())
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in (*adapter.parameters(), *model.head.parameters())}
    assert adapter.num_parameters() == sum(
        tensor.numel() for key, tensor in adapter.state_dict().items() if key[:8] == "factors."
    )


@EXAMPLES
@given(quiet_cases)
def test_delta_weights_are_the_effect_in_training_and_inference(case):
    """The plain model with W + ΔW: outputs, and the gradient of the input and the head."""
    architecture, method, seed = case
    model, plain = build(architecture, seed), build(architecture, seed)
    adapter = attach(model, method)
    fill(adapter)
    deltas = adapter.delta_weights()
    with torch.no_grad():
        for name, delta in deltas.items():
            assert delta.norm() > 0
            plain.get_submodule(name).weight += delta
    x = images(architecture)
    for training in (False, True):
        model.train(training)
        plain.train(training)
        pair = []
        for each in (model, plain):
            leaf = x.clone().requires_grad_()
            y = each(leaf)
            dx, d_head = torch.autograd.grad(y.square().sum(), [leaf, each.head.weight])
            pair.append((y.detach(), dx, d_head))
        for found, expected in zip(*pair, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@EXAMPLES
@given(quiet_cases)
def test_gradients_of_the_factors_are_finite_differences(case):
    """Along a random direction in the space of all factors."""
    architecture, method, seed = case
    model = build(architecture, seed).train()
    adapter = attach(model, method)
    fill(adapter, 0.2)
    x, target = images(architecture), torch.randn(2, architecture["num_classes"]).double()
    factors = list(adapter.parameters())

    def loss():
        return (model(x) * target).sum()

    loss().backward()
    direction = [torch.randn_like(p) for p in factors]
    slope = sum((p.grad * d).sum() for p, d in zip(factors, direction, strict=True))
    step, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(factors, direction, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(loss())
            for p, d in zip(factors, direction, strict=True):
                p.sub_(d, alpha=sign * step)
    numeric = (values[0] - values[1]) / (2 * step)
    assert all(p.grad.norm() > 0 for p in factors)
    torch.testing.assert_close(slope, numeric, rtol=2e-4, atol=2e-5)


@EXAMPLES
@given(cases)
def test_save_and_load_round_trip(case):
    architecture, method, seed = case
    model, twin = build(architecture, seed), build(architecture, seed)
    adapter = attach(model, method)
    fill(adapter)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        adapter.save(path)
        again = load(twin, path)
    assert again.method == method == method_from_config(method.to_config())
    assert again.sites == adapter.sites
    x = images(architecture)
    assert torch.equal(twin(x), model(x))
    assert again.state_dict().keys() == adapter.state_dict().keys()


@EXAMPLES
@given(cases)
def test_merge_unmerge_detach(case):
    architecture, method, seed = case
    model = build(architecture, seed)
    x = images(architecture)
    before = model(x)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = attach(model, method)
    fill(adapter)
    expected = model(x)
    adapter.merge()
    close(model(x), expected)
    merged = copy.deepcopy(model)
    adapter.unmerge()
    assert torch.equal(model(x), expected)
    adapter.detach()
    assert torch.equal(model(x), before)
    assert model.state_dict().keys() == base.keys()
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.state_dict().items())
    assert not any(p.grad_fn for p in merged.parameters())
    close(merged(x), expected)


@EXAMPLES
@given(cases, st.lists(st.sampled_from("abc"), min_size=1, max_size=4))
def test_a_mixed_batch_is_each_row_alone(case, ids):
    architecture, method, seed = case
    model = build(architecture, seed)
    adapter = attach(model, method)
    tasks = AdapterSet(adapter)
    for name in "abc":
        fill(adapter)
        fill(model.head)
        tasks.add(name)
    x, rows = images(architecture, len(ids)), []
    with torch.no_grad():
        for row, name in zip(x, ids, strict=True):
            tasks.use(name)
            rows.append(model(row[None])[0])
        with tasks.tasks(ids):
            found = model(x)
    close(found, torch.stack(rows))


@EXAMPLES
@given(cases, st.data())
def test_targets_and_layers_choose_what_is_adapted(case, data):
    architecture, method, seed = case
    model = build(architecture, seed)
    layers = data.draw(
        st.lists(st.integers(0, architecture["depth"] - 1), min_size=1, unique=True), "layers"
    )
    parts = data.draw(st.sampled_from([None, "mhsa", "ffn", ["attn.qkv", "mlp.fc2"]]), "targets")
    matrices = getattr(method, "matrices", None)
    mhsa, ffn = {"qkv", "o"}, {"fc1", "fc2"}
    groups = {None: mhsa | ffn, "mhsa": mhsa, "ffn": ffn}
    allowed = {"qkv", "fc2"} if isinstance(parts, list) else groups[parts]
    stacked = {"qkv": {"q", "k", "v"}}
    chosen = {r for r in allowed if matrices is None or stacked.get(r, {r}) & set(matrices)}
    if not chosen:
        with pytest.raises(ValueError, match="targets must include linears"):
            attach(model, method, targets=parts, layers=layers)
        assert not hasattr(model, "factor_bank")
        return
    adapter = attach(model, method, targets=parts, layers=layers)
    assert {(s.block, s.role) for s in adapter.sites} == set(itertools.product(layers, chosen))
    fill(adapter)
    plain = build(architecture, seed)
    with torch.no_grad():
        for name, delta in adapter.delta_weights().items():
            plain.get_submodule(name).weight += delta
    x = images(architecture)
    close(model(x), plain(x))


@settings(EXAMPLES, max_examples=12)
@given(
    st.lists(st.integers(1, 2), min_size=2, max_size=4),
    st.sampled_from([4, 8]),
    st.data(),
)
def test_swins_of_any_depth(depths, width, data):
    """A rank for each stage; the increments are the effect, and merging is exact."""
    ranks = [data.draw(st.integers(1, min(4, width << i)), f"rank {i}") for i in range(len(depths))]
    kind = data.draw(st.sampled_from([EFFT1, EFFT2, FacTTT, FacTTK]), "kind")
    torch.manual_seed(width)
    size = 4 * 2 ** len(depths)
    sizes = {"img_size": size, "window_size": 2, "embed_dim": width, "num_classes": 3}
    sizes |= {"depths": tuple(depths), "num_heads": (2,) * len(depths)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes).double().eval()
    plain = copy.deepcopy(model)
    adapter = attach(model, kind(rank=list(ranks), scale=0.5))
    per_stage = {
        "efft1": lambda d, r, n: 5 * d * r + 3 * n * r * r,
        "efft2": lambda d, r, n: 7 * d * r + 6 * n * r * r,
        "fact_tt": lambda d, r, n: 2 * d * r + 12 * n * r * r,
        "fact_tk": lambda d, r, n: 2 * d * r + r**3 + 12 * n * r,
    }[kind.name]
    assert adapter.num_parameters() == sum(
        per_stage(width << i, r, n) for i, (r, n) in enumerate(zip(ranks, depths, strict=True))
    )
    fill(adapter)
    with torch.no_grad():
        for name, delta in adapter.delta_weights().items():
            assert delta.norm() > 0
            plain.get_submodule(name).weight += delta
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = model(x)
    close(expected, plain(x))
    adapter.merge()
    close(model(x), expected)
    assert all(type(m) is nn.Linear for m in adapter.detach().modules() if isinstance(m, nn.Linear))
