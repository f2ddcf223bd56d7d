"""What methods are built from: sites, ranks per stage, configurations; a method of one's own."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from efft_kernels import EFFT1, EFFT2, FacTTK, FacTTT, KAdaptation, LoRA, attach, load
from efft_kernels.methods import METHODS, method_from_config, register_method
from efft_kernels.methods.base import (
    MHSA_ROLES,
    FactorGroup,
    Factors,
    Method,
    Site,
    by_stage,
    check_number,
    constant_float,
    ffn_hidden,
    is_older,
    stage_rank,
    undotted_names,
)
from efft_kernels.methods.tensor_train import TensorTrainGroup
from efft_kernels.ops.reference import delta_weight


def site(role, k=12, n=12, block=0, stage=0):
    return Site(f"blocks.{block}.{role}", role, block, stage, k, n)


@pytest.mark.parametrize(
    ("role", "k", "n", "matrices", "width"),
    [
        ("qkv", 12, 36, ("q", "k", "v"), 12),
        ("q", 12, 12, ("q",), 12),
        ("o", 20, 12, ("o",), 12),
        ("fc1", 12, 48, ("fc1",), 12),
        ("gate_fc1", 12, 64, ("gate", "fc1"), 12),
        ("fc2", 48, 12, ("fc2",), 12),
        ("linear", 7, 5, ("linear",), 7),
    ],
)
def test_site(role, k, n, matrices, width):
    it = site(role, k, n)
    assert (it.matrices, it.slices, it.width) == (matrices, len(matrices), width)


def test_groups_are_in_the_papers_order_by_block():
    roles = ["fc2", "o", "fc1", "v", "gate", "q", "k"]
    shuffled = [site(role, block=block) for block in (1, 0) for role in roles]
    groups = by_stage(shuffled, lambda s: "mhsa" if s.role in MHSA_ROLES else "ffn")
    assert [(s.block, s.role) for s in groups["mhsa"]] == [
        (block, role) for block in (0, 1) for role in ("q", "k", "v", "o")
    ]
    assert [(s.block, s.role) for s in groups["ffn"]] == [
        (block, role) for block in (0, 1) for role in ("gate", "fc1", "fc2")
    ]


def test_groups_of_several_stages_carry_the_stage():
    sites = [site("q", 8, 8, 0, 0), site("q", 16, 16, 1, 2)]
    assert list(by_stage(sites, lambda s: "all")) == ["stage0_all", "stage2_all"]
    with pytest.raises(ValueError, match=r"'all' must have one width d, got \[8, 16\]"):
        by_stage([dataclasses.replace(s, stage=0) for s in sites], lambda s: "all")


def test_rank_of_a_stage_counts_the_stages_that_are_there():
    sites = [site("q", stage=1), site("q", stage=3)]
    assert stage_rank("rank", [2, (5, 3)], sites, 1) == (2, 2)
    assert stage_rank("rank", [2, (5, 3)], sites, 3) == (5, 3)
    assert stage_rank("rank", (4, 6), sites, 3) == (4, 6)
    with pytest.raises(ValueError, match=r"rank must have one entry per stage \(2\), got 4"):
        stage_rank("rank", [1, 2, 3, 4], sites, 1)


@pytest.mark.parametrize("name", ["rank", "ffn_rank"])
def test_a_rank_of_another_length_is_named(name):
    with pytest.raises(ValueError, match=rf"^{name} must have one entry per stage \(1\), got 2"):
        EFFT2(**{name: [3, 3]}).build([site("fc1", 12, 48)])


@pytest.mark.parametrize("kind", [EFFT1, EFFT2, FacTTT, FacTTK, LoRA, KAdaptation])
@pytest.mark.parametrize("role", ["q", "fc1", "fc2"])
def test_one_linear_is_a_group(kind, role):
    method = LoRA(matrices=(role,)) if kind is LoRA else kind()
    method = KAdaptation(matrices=(role,)) if kind is KAdaptation else method
    it = site(role, *{"q": (16, 16), "fc1": (16, 64), "fc2": (64, 16)}[role])
    ((_, group),) = method.build([it]).items()
    down, core, up = group(it.name, False)
    slices = up.shape[0] if core is None else core.shape[0]
    delta = delta_weight(down, core, up, slices)
    assert delta.shape == (it.out_features, it.in_features) and not delta.any()


def test_hidden_width_of_packed_gates():
    assert ffn_hidden([site("gate_fc1", 12, 64), site("fc2", 32, 12)]) == 32
    with pytest.raises(ValueError, match=r"share a hidden width, got \[32, 48\]"):
        ffn_hidden([site("fc1", 12, 48), site("fc2", 32, 12)])


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, TypeError), ("1", TypeError), (float("nan"), ValueError), (float("inf"), ValueError)],
)
def test_check_number(value, kind):
    with pytest.raises(kind, match="scale must be"):
        check_number("scale", value)
    check_number("scale", -sys.float_info.max)


def test_names_without_dots_are_told_apart():
    names = ["a.b", "a_b", "a.b_", "keys"]  # a ParameterDict has a method of the last name
    sites = [dataclasses.replace(site("q"), name=name) for name in names]
    assert undotted_names(sites) == dict(zip(names, ["a_b", "a_b_", "a_b__", "keys_"], strict=True))


def test_which_of_two_methods_is_further_up():
    class First:
        def one(self):
            pass

        def other(self):
            pass

    class Second(First):
        def other(self):
            pass

    class Third(Second):
        def one(self):
            pass

    found = [is_older(kind, "one", "other") for kind in (First, Second, Third)]
    assert found == [False, True, False]
    assert [is_older(kind, "other", "one") for kind in (First, Second, Third)] == [0, 0, 1]


@pytest.mark.parametrize("kind", [FactorGroup, TensorTrainGroup])
def test_a_group_takes_no_class_arguments(kind):
    with pytest.raises(TypeError, match="takes no keyword arguments"):
        type(kind)("Own", (kind,), {}, colour=1)


CONFIGURATIONS = [
    EFFT1(rank=(3, 2), scale=0.5, init="u", learn_scale=True),
    EFFT2(rank=[2, (3, 4)], ffn_rank=[(1, 2), 3], cores="shared", dropout=0.0),
    FacTTT(rank=[1, 2], dropout=0.3),
    FacTTK(rank=(3, 2), layer_rank=7, scale=100.0),
    LoRA(rank=5, matrices=("q", "fc2")),
    LoRA(matrices=None),
    LoRA(rank=[0, 2, 4], dropout=0.1, factor_init="release"),
    FacTTK(factor_init="release"),
    KAdaptation(products=2, rank=3, init="u", matrices=("k",)),
]


@pytest.mark.parametrize("method", CONFIGURATIONS, ids=str)
def test_configuration_survives_json(method):
    config = json.loads(json.dumps(method.to_config()))
    again = method_from_config(config)
    assert again == method and type(again) is type(method)
    assert all(
        type(getattr(again, f.name)) is type(getattr(method, f.name))
        for f in dataclasses.fields(method)
    )
    with pytest.raises(ValueError, match=r"got unknown \['colour'\]"):
        method_from_config(config | {"colour": 1})


BAD = [
    (lambda: FacTTT(rank=0), ValueError, "rank must be at least 1"),
    (lambda: FacTTT(rank=[]), ValueError, "rank must have one entry per stage"),
    (lambda: FacTTT(rank=(1, 2, 3)), TypeError, "rank must be an int or a pair"),
    (lambda: FacTTT(rank=(1, 2.0)), TypeError, "rank must be an int or a pair"),
    (lambda: FacTTT(rank=(1, True)), TypeError, "rank must be an int or a pair"),
    (lambda: FacTTT(rank="16"), TypeError, "rank must be an int or a pair"),
    (lambda: FacTTT(rank=(1, 0)), ValueError, "rank must be at least 1"),
    (lambda: FacTTT(dropout=1.0), ValueError, "dropout must be at least 0.0 and below 1.0, got"),
    (lambda: FacTTT(dropout=-0.1), ValueError, "dropout must be"),
    (lambda: LoRA(dropout=1.0), ValueError, "dropout must be"),
    (lambda: LoRA(dropout=-0.1), ValueError, "dropout must be"),
    (lambda: FacTTT(scale="1"), TypeError, "scale must be a number"),
    (lambda: FacTTT(learn_scale=1), TypeError, "learn_scale must be a bool"),
    (lambda: FacTTK(layer_rank=0), ValueError, "layer_rank must be at least 1"),
    (lambda: LoRA(scale="1"), TypeError, "scale must be a number"),
    (lambda: LoRA(rank=(2, 2)), TypeError, "rank must be an int"),
    (lambda: LoRA(rank=True), TypeError, "rank must be an int"),
    (lambda: LoRA(rank=0), ValueError, "rank must be at least 1"),
    (lambda: LoRA(matrices=()), TypeError, "matrices must be None or a tuple"),
    (lambda: LoRA(matrices="q"), TypeError, "matrices must be None or a tuple"),
    (lambda: LoRA(matrices=("q", "w")), ValueError, "matrices must be one of .* got 'w'"),
    (lambda: KAdaptation(matrices=("q", "w")), ValueError, "matrices must be one of .* got 'w'"),
    (lambda: KAdaptation(products=0), ValueError, "products must be at least 1"),
    (lambda: KAdaptation(products=2.0), TypeError, "products must be an int"),
    (lambda: KAdaptation(scale="1"), TypeError, "scale must be a number"),
    (lambda: KAdaptation(init="uv"), ValueError, "init must be one of"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_options(case):
    make, kind, text = BAD[case]
    with pytest.raises(kind, match=text):
        make()


@dataclass(frozen=True)
class CP(Method):
    """A canonical polyadic method of one's own: ΔW_i[j, k] = Σ_t a[i, t]·b[j, t]·c[k, t]."""

    rank: int = 4
    name: ClassVar[str] = "toy_cp"

    def select(self, sites):
        return [site for site in sites if site.role in MHSA_ROLES]

    def build(self, sites):
        return {self.name: CPGroup(sites, self.rank)}


class CPGroup(FactorGroup):
    def __init__(self, sites, rank):
        super().__init__()
        self.first, total = {}, 0
        for site in sites:
            self.first[site.name] = slice(total, total + site.slices)
            total += site.slices
        d = sites[0].width
        self.a, self.b, self.c = (nn.Parameter(torch.empty(n, rank)) for n in (total, d, d))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.xavier_uniform_(self.a)
        nn.init.xavier_uniform_(self.b)
        nn.init.zeros_(self.c)

    def factors(self, site, dropout):
        cores = torch.diag_embed(self.a[self.first[site]])
        return Factors(self.b, cores, self.c.unsqueeze(0))


@pytest.fixture
def registered():
    register_method(CP)
    yield
    del METHODS[CP.name]


@pytest.mark.parametrize(
    ("method", "given", "advice"),
    [
        (LoRA, {"r": 8}, "LoRA has no argument 'r': pass rank=8; it takes rank, scale, matrices, "),
        (LoRA, {"rank": 8, "lora_alpha": 16}, "pass alpha=16;"),
        (EFFT2, {"alpha": 16}, "pass scale=16 / rank;"),
        (EFFT2, {"target_modules": ["qkv"]}, r"pass attach\(\.\.\., targets=\['qkv'\]\);"),
        (FacTTT, {"dropuot": 0.1}, "pass dropout=0.1;"),
        (KAdaptation, {"beta": 1}, "no argument 'beta'; it takes products, "),
    ],
)
def test_arguments_of_other_names_are_told_ours(method, given, advice):
    with pytest.raises(TypeError, match=advice):
        method(**given)


def test_a_method_of_ones_own_is_short():
    assert sum(len(inspect.getsource(part).splitlines()) for part in (CP, CPGroup)) < 40


def test_a_method_of_ones_own_attaches_trains_saves_and_loads(make_vit, tmp_path, registered):
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    model = make_vit()
    before = model.eval()(images)
    adapter = attach(model, CP(rank=3))
    torch.testing.assert_close(model(images), before, rtol=1e-6, atol=1e-6)
    assert adapter.num_parameters() == (2 * 4 + 12 + 12) * 3
    assert {s.role for s in adapter.sites} == {"qkv", "o"}

    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    group = adapter.bank.toy_cp
    assert group.activation_dropout == 0
    dense = torch.einsum("it,jt,kt->ikj", group.a, group.b, group.c).detach()  # [slice, out, in]
    found = adapter.delta_weights()
    torch.testing.assert_close(found["blocks.0.attn.qkv"], dense[:3].flatten(0, 1))
    torch.testing.assert_close(found["blocks.1.attn.proj"], dense[7])

    adapter.save(tmp_path / "cp.safetensors")
    twin = make_vit()
    again = load(twin, tmp_path / "cp.safetensors")
    assert again.method == CP(rank=3)
    assert torch.equal(twin.eval()(images), model(images))
    assert (model(images) - before).abs().max() > 1e-2


def test_the_name_of_a_method_is_taken_once(registered):
    assert register_method(CP) is CP  # again, the same one

    class Other(CP):
        pass

    with pytest.raises(ValueError, match=r"name must be new among .*'toy_cp'"):
        register_method(Other)
    assert METHODS["toy_cp"] is CP


def test_an_unregistered_method_is_refused_by_name(make_vit, tmp_path):
    attach(make_vit(), CP(rank=3)).save(tmp_path / "cp.safetensors")
    with pytest.raises(ValueError, match=r"method must be one of .* got 'toy_cp'"):
        load(make_vit(), tmp_path / "cp.safetensors")


def test_a_constant_is_exact_and_no_float_of_the_module():
    class Scaled(nn.Module):
        scale = constant_float("scale")

        def __init__(self):
            super().__init__()
            self.scale = 0.1

    assert Scaled().scale == 0.1
    assert not any(isinstance(value, float) for value in vars(Scaled()).values())


@pytest.mark.parametrize("method", [EFFT1(rank=2), EFFT2(rank=2), FacTTT(rank=2), FacTTK(rank=2)])
@pytest.mark.parametrize("shape", [(8, 12), (12, 16)])
def test_attention_of_two_widths_has_no_place_in_a_tensor(method, shape):
    narrow = Site("blocks.0.attn.q", "q", 0, 0, *shape)
    with pytest.raises(
        ValueError, match=rf"d×d .*'blocks.0.attn.q' with K={shape[0]}, N={shape[1]}"
    ):
        method.build([narrow])


_TENSOR = {"rank": 16, "dropout": 0.1, "learn_scale": False}
_EFFT = {**_TENSOR, "scale": 10.0, "init": "v", "cores": "per_layer"}
_FACT = {**_TENSOR, "scale": 1.0, "factor_init": "xavier"}
DEFAULTS = {
    EFFT1: {**_EFFT, "attention_side": "out"},
    EFFT2: {**_EFFT, "ffn_rank": None, "ffn_init": None, "factor_init": "xavier"},
    FacTTT: _FACT,
    FacTTK: {**_FACT, "layer_rank": None},
    LoRA: {
        "rank": 8,
        "scale": 1.0,
        "matrices": ("q", "v"),
        "dropout": 0.0,
        "factor_init": "kaiming",
    },
    KAdaptation: {
        "products": 4,
        "rank": 1,
        "scale": 1.0,
        "init": "v",
        "matrices": ("q", "k", "v", "o"),
        "factor_init": "xavier",
    },
}


def test_the_defaults_are_the_published_ones():
    assert {kind: dataclasses.asdict(kind()) for kind in DEFAULTS} == DEFAULTS
    assert FacTTK(3, 0.5, 0.2, False, 7) == FacTTK(rank=3, scale=0.5, dropout=0.2, layer_rank=7)
