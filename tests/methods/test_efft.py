"""EFFT1 and EFFT2 against Eq. 2 and 3 of arXiv:2311.06749, written out densely."""

from __future__ import annotations

import functools
import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

from efft_kernels import EFFT1, EFFT2, AdapterSet, attach, load
from efft_kernels.methods import Site, method_from_config

D, DEPTH = 12, 2  # of the small model


@pytest.fixture(scope="module")
def vit_base():
    def make(name="vit_base_patch16_224"):
        with torch.device("meta"):
            return timm.create_model(name)

    return make


COUNTS = [
    (EFFT1(rank=16), 70_656),
    (EFFT1(rank=32), 159_744),
    (EFFT2(rank=16), 104_448),
    (EFFT2(rank=32), 245_760),
    (EFFT2(rank=16, cores="shared"), 87_552),
    (EFFT2(rank=32, cores="shared"), 178_176),
    (EFFT1(rank=16, cores="shared"), 5 * 768 * 16 + 3 * 16**2),
    (EFFT1(rank=(24, 8)), 4 * 768 * 24 + 768 * 8 + 36 * 24 * 8),
    (EFFT2(rank=(24, 8)), 5 * 768 * 24 + 2 * 768 * 8 + 72 * 24 * 8),
    (EFFT2(rank=16, ffn_rank=8), 2 * 768 * 16 + 48 * 16**2 + 5 * 768 * 8 + 24 * 8**2),
    (EFFT1(rank=16, learn_scale=True), 70_656 + 1),
    (EFFT2(rank=16, learn_scale=True), 104_448 + 2),
]


@pytest.mark.parametrize(("method", "expected"), COUNTS, ids=str)
def test_parameter_counts_on_vit_base(vit_base, method, expected):
    model = vit_base()
    adapter = attach(model, method)
    assert adapter.num_parameters() == expected
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == expected + 768 * 1000 + 1000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": "mhsa"}, 2 * 768 * 16 + 48 * 16**2),
        ({"targets": "ffn"}, 5 * 768 * 16 + 24 * 16**2),
        ({"layers": range(3)}, 7 * 768 * 16 + 18 * 16**2),
        ({"layers": 11}, 7 * 768 * 16 + 6 * 16**2),
        ({"layers": [0, 5], "targets": "mhsa"}, 2 * 768 * 16 + 8 * 16**2),
        ({"targets": "attn.qkv"}, 2 * 768 * 16 + 36 * 16**2),
    ],
)
def test_parameter_counts_of_the_ablations(vit_base, options, expected):
    assert attach(vit_base(), EFFT2(rank=16), **options).num_parameters() == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": "mhsa"}, 5 * 768 * 16 + 12 * 16**2),
        ({"targets": "ffn"}, 5 * 768 * 16 + 24 * 16**2),
        ({"layers": range(3)}, 5 * 768 * 16 + 9 * 16**2),
        ({"targets": "attn.qkv"}, 4 * 768 * 16 + 12 * 16**2),
    ],
)
def test_parameter_counts_of_the_ablations_efft1(vit_base, options, expected):
    assert attach(vit_base(), EFFT1(rank=16), **options).num_parameters() == expected


@pytest.mark.parametrize(
    "name", ["deit_base_patch16_224", "deit_base_distilled_patch16_224", "deit3_base_patch16_224"]
)
def test_parameter_counts_on_deit(vit_base, name):
    assert attach(vit_base(name), EFFT1(rank=16)).num_parameters() == 70_656
    assert attach(vit_base(name), EFFT2(rank=16)).num_parameters() == 104_448


def tensor_of(core, u, v, scale):
    """Eq. 3: ΔW[i, j, k] = s Σ_t1 Σ_t2 Σ[i, t1, t2] U[j, t1] V[k, t2]."""
    return scale * torch.einsum("iab,ja,kb->ijk", core, u, v)


def efft1_deltas(groups, layers, parts, shared):
    """Weight name → ΔW [N, K]: slices [q;k;v;o] stacked along out, fc1, fc2^T of each layer."""
    slices = tensor_of(**groups["all"])
    kinds = [
        kind for kind, part in (("mhsa", "mhsa"), ("fc1", "ffn"), ("fc2", "ffn")) if part in parts
    ]
    deltas = {}
    for position, layer in enumerate(layers):
        first = 0 if shared else position * len(kinds)
        block = {kind: slices[first + i] for i, kind in enumerate(kinds)}
        if "mhsa" in block:
            deltas[f"blocks.{layer}.attn.qkv"] = block["mhsa"][: 3 * D]
            deltas[f"blocks.{layer}.attn.proj"] = block["mhsa"][3 * D :]
        if "fc1" in block:
            deltas[f"blocks.{layer}.mlp.fc1"] = block["fc1"]
            deltas[f"blocks.{layer}.mlp.fc2"] = block["fc2"].T
    return deltas


def efft2_deltas(groups, layers, parts, shared):
    """Weight name → ΔW [N, K]: q, k, v, o with U on the input side; fc1^T and fc2 with U on 4d."""
    deltas = {}
    for position, layer in enumerate(layers):
        if "mhsa" in parts:
            first = 0 if shared else 4 * position
            q, k, v, o = tensor_of(**groups["mhsa"])[first : first + 4]  # each [in, out]
            deltas[f"blocks.{layer}.attn.qkv"] = torch.cat([q.T, k.T, v.T])
            deltas[f"blocks.{layer}.attn.proj"] = o.T
        if "ffn" in parts:
            first = 0 if shared else 2 * position
            fc1, fc2 = tensor_of(**groups["ffn"])[first : first + 2]  # each [4d, d]
            deltas[f"blocks.{layer}.mlp.fc1"] = fc1  # nn.Linear's [out, in]
            deltas[f"blocks.{layer}.mlp.fc2"] = fc2.T
    return deltas


def efft1_in_deltas(groups, layers, parts, shared):
    """The same with [q;k;v;o] stacked along in: as the paper's x·W, W_q is its rows' U_q·Σ·V^T."""
    deltas = efft1_deltas(groups, layers, parts, shared)
    for name, delta in deltas.items():
        if ".attn." in name:  # [slices·d, d], each slice's own rows
            deltas[name] = torch.cat([matrix.T for matrix in delta.split(D)])
    return deltas


EFFT1_IN = functools.partial(EFFT1, attention_side="in")
DENSE = {EFFT1: efft1_deltas, EFFT2: efft2_deltas, EFFT1_IN: efft1_in_deltas}
EVERY_KIND = [EFFT1, EFFT2, pytest.param(EFFT1_IN, id="EFFT1-in")]


def group_tensors(adapter, leaves=False):
    """Group name → {"core", "u", "v", "scale"} as float64 tensors of their own."""
    groups = {}
    for name, group in adapter.bank.named_children():
        tensors = {"core": group.core, "u": group.U, "v": group.V}
        if isinstance(group.scale, nn.Parameter):
            tensors["scale"] = group.scale
        tensors = {key: t.detach().double().clone() for key, t in tensors.items()}
        if leaves:
            tensors = {key: t.requires_grad_() for key, t in tensors.items()}
        groups[name] = {"scale": adapter.method.scale} | tensors
    return groups


ATTACH_OPTIONS = {
    "all": ({}, [0, 1], ("mhsa", "ffn")),
    "mhsa": ({"targets": "mhsa"}, [0, 1], ("mhsa",)),
    "ffn": ({"targets": "ffn"}, [0, 1], ("ffn",)),
    "layer 1": ({"layers": 1}, [1], ("mhsa", "ffn")),
    "mhsa of layer 1": ({"layers": [1], "targets": "mhsa"}, [1], ("mhsa",)),
}
METHOD_OPTIONS = [
    {"rank": 3, "scale": 2.5},
    {"rank": (3, 2), "scale": 10.0},
    {"rank": (2, 5), "scale": 0.1, "cores": "shared"},
    {"rank": 4, "scale": 2.0, "learn_scale": True},
    {"rank": 4, "scale": 2.0, "cores": "shared", "learn_scale": True, "init": "u"},
]


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("where", ATTACH_OPTIONS)
@pytest.mark.parametrize("options", METHOD_OPTIONS, ids=str)
def test_every_slice_is_the_papers(make_vit, randomize, kind, where, options):
    attach_options, layers, parts = ATTACH_OPTIONS[where]
    model = make_vit(dtype=torch.float64)
    adapter = attach(model, kind(**options), **attach_options)
    randomize(adapter)
    shared = options.get("cores") == "shared"
    expected = DENSE[kind](group_tensors(adapter), layers, parts, shared)
    found = adapter.delta_weights()
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert delta.norm() > 0
        torch.testing.assert_close(found[name], delta, rtol=1e-11, atol=1e-11)
        assert found[name].shape == model.get_submodule(name).weight.shape
        assert not found[name].requires_grad


@pytest.mark.parametrize("kind", [EFFT1, EFFT2])
@pytest.mark.parametrize("init", ["u", "v"])
@pytest.mark.parametrize("learn_scale", [False, True])
def test_starts_at_exactly_zero(make_vit, kind, init, learn_scale):
    model = make_vit()
    images = torch.randn(2, 3, 8, 8)
    before = model.eval()(images)
    adapter = attach(model, kind(rank=3, init=init, learn_scale=learn_scale))
    deltas = adapter.delta_weights()
    assert len(deltas) == 8 and not any(delta.any() for delta in deltas.values())
    assert all(delta.dtype == torch.float32 for delta in deltas.values())
    torch.testing.assert_close(model(images), before)
    for group in adapter.bank.children():
        assert group.scale == 10.0 and isinstance(group.scale, nn.Parameter) is learn_scale
        zero, random = (group.V, group.U) if init == "v" else (group.U, group.V)
        assert not zero.any() and random.all() and group.core.all()


@pytest.mark.parametrize("kind", [EFFT1, EFFT2])
def test_random_factors_are_xavier_uniform(make_vit, kind):
    """Each Σ_i as its own r1×r2 matrix; U as a D×r matrix."""
    adapter = attach(make_vit(embed_dim=48, depth=6), kind(rank=(12, 6)))
    for group in adapter.bank.children():
        for matrices in (group.U[None], group.core):
            bound = (6 / sum(matrices.shape[1:])) ** 0.5
            assert matrices.abs().max() <= bound
            assert matrices.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert abs(matrices.mean().item()) < 0.1 * bound


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("options", METHOD_OPTIONS[1:4], ids=str)
@pytest.mark.parametrize("strategy", ["auto", "split", "merged"])
def test_training_step_is_that_of_the_dense_model(
    make_vit, randomize, kind, options, distilled, strategy
):
    """The same model with W0 + ΔW for its weights, ΔW differentiated through Eq. 3."""
    plain = make_vit(distilled, torch.float64)
    model = make_vit(distilled, torch.float64)
    adapter = attach(model, kind(**options, dropout=0.0))
    randomize(adapter, 0.2)
    for layer in adapter.layers().values():
        layer.strategy = strategy
    model.train()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    labels = torch.tensor([4, 0, 2])

    x = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()

    groups = group_tensors(adapter, leaves=True)
    deltas = DENSE[kind](groups, [0, 1], ("mhsa", "ffn"), options.get("cores") == "shared")
    weights = {
        f"{name}.weight": plain.get_submodule(name).weight.detach() + delta
        for name, delta in deltas.items()
    }
    assert len(weights) == 8 and all(delta.norm() > 1e-4 for delta in deltas.values())
    x_plain = images.clone().requires_grad_()
    plain.train()
    expected = nn.functional.cross_entropy(functional_call(plain, weights, (x_plain,)), labels)
    expected.backward()

    def close(found, right):
        assert right.norm() > 0
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)

    close(loss.detach(), expected.detach())
    close(x.grad, x_plain.grad)
    heads = ["head", "head_dist"] if distilled else ["head"]
    for head in heads:
        for name, parameter in plain.get_submodule(head).named_parameters():
            close(model.get_submodule(head).get_parameter(name).grad, parameter.grad)
    for name, group in adapter.bank.named_children():
        close(group.U.grad, groups[name]["u"].grad)
        close(group.V.grad, groups[name]["v"].grad)
        close(group.core.grad, groups[name]["core"].grad)
        if "learn_scale" in options:
            close(group.scale.grad, groups[name]["scale"].grad)
    trained = {p for p in model.parameters() if p.requires_grad}
    assert {p for p in model.parameters() if p.grad is not None} == trained


def test_dropout_masks_entries_and_rescales(make_vit, randomize):
    """In training the factors are masked with probability p and the rest scaled by 1/(1 - p)."""
    model = make_vit()
    adapter = attach(model, EFFT2(rank=3, scale=1.0, dropout=0.25))
    randomize(adapter)
    group = adapter.bank.mhsa
    layer = model.blocks[0].attn.qkv
    masks = {"U": [], "V": [], "core": []}
    for _ in range(400):
        down, core, up = layer.current_factors(dropout=True)
        for name, t, full in (
            ("U", down, group.U),
            ("V", up[0], group.V),
            ("core", core, group.core[:3]),
        ):
            ratio = t / full
            kept = ratio != 0
            torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75))
            masks[name].append(kept.float())
    for drawn in masks.values():
        rate = torch.stack(drawn).mean(0)
        assert rate.mean().item() == pytest.approx(0.75, abs=0.02)
        assert ((rate > 0.6) & (rate < 0.9)).all()
    quiet = layer.current_factors(dropout=False)
    assert torch.equal(quiet.down, group.U) and torch.equal(quiet.up[0], group.V)


BAD = [
    ({"rank": 0}, ValueError, ["rank must be at least 1", "0"]),
    ({"rank": (4, -1)}, ValueError, ["rank must be at least 1", "(4, -1)"]),
    ({"rank": 1.5}, TypeError, ["rank must be an int or a pair", "1.5"]),
    ({"rank": True}, TypeError, ["rank must be an int or a pair", "True"]),
    ({"rank": None}, TypeError, ["rank must be an int or a pair", "None"]),
    ({"scale": None}, TypeError, ["scale must be a number", "NoneType"]),
    ({"scale": float("inf")}, ValueError, ["scale must be finite", "inf"]),
    ({"init": "both"}, ValueError, ["init must be one of ('u', 'v')", "'both'"]),
    ({"dropout": 1}, ValueError, ["dropout must be at least 0.0 and below 1.0", "1"]),
    ({"dropout": -1}, ValueError, ["dropout must be at least 0.0 and below 1.0", "-1"]),
    ({"cores": "one"}, ValueError, ["cores must be one of ('per_layer', 'shared')", "'one'"]),
    ({"learn_scale": 1}, TypeError, ["learn_scale must be a bool", "int"]),
]


@pytest.mark.parametrize("kind", [EFFT1, EFFT2])
@pytest.mark.parametrize(("options", "error_type", "texts"), BAD)
def test_bad_options(kind, options, error_type, texts):
    with pytest.raises(error_type) as error:
        kind(**options)
    assert all(text in str(error.value) for text in texts), str(error.value)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: EFFT2(ffn_rank=0), "ffn_rank must be at least 1"),
        (lambda: EFFT2(ffn_init="vv"), r"ffn_init must be one of \('u', 'v'\), got 'vv'"),
        (
            lambda: EFFT2(factor_init="paper"),
            r"factor_init must be one of .*'release'\), got 'paper'",
        ),
        (
            lambda: EFFT1(attention_side="q"),
            r"attention_side must be one of \('out', 'in'\), got 'q'",
        ),
    ],
)
def test_bad_options_of_one(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_the_side_of_attention_is_another_function_of_as_many_numbers(make_vit, vit_base):
    """Separate q, k and v would share x·V, or have each a rank of its own."""
    assert attach(vit_base(), EFFT1_IN(rank=16)).num_parameters() == 70_656
    for kind, rank in ((EFFT1, 3), (EFFT1_IN, 9)):
        adapter = attach(make_vit(), kind(rank=3))
        factors = adapter.layers()["blocks.0.attn.qkv"].current_factors(dropout=False)
        assert factors.down.shape == (D, rank)


def test_a_fused_qkv_is_its_three_matrices_whatever_the_side(randomize):
    """The same U, Σ and V give a fused qkv, and q, k and v by themselves, one ΔW."""

    def site(role, slices=1):
        return Site(f"blocks.0.{role}", role, 0, 0, D, slices * D)

    def delta(group, name):
        down, core, up = group.factors(f"blocks.0.{name}", False)
        return torch.cat(
            [(down @ c @ up[0 if len(up) == 1 else g].T).T for g, c in enumerate(core)]
        )

    for side in ("out", "in"):
        method = EFFT1(rank=(3, 2), attention_side=side)
        fused = method.build([site("qkv", 3), site("o")])["all"]
        apart = method.build([site("q"), site("k"), site("v"), site("o")])["all"]
        randomize(fused)
        apart.load_state_dict(fused.state_dict())
        for name, found, u in zip(
            "qkv", delta(fused, "qkv").split(D), fused.U.split(D)[:3], strict=True
        ):
            torch.testing.assert_close(found, delta(apart, name))
            matrix = 10.0 * u @ fused.core[0] @ fused.V.T
            torch.testing.assert_close(found, matrix.T if side == "in" else matrix)


def test_adapters_of_the_other_side_save_load_and_share_a_batch(make_vit, randomize, tmp_path):
    model, images = make_vit().eval(), torch.randn(3, 3, 8, 8)
    adapter = attach(model, EFFT1_IN(rank=(3, 2)))
    randomize(adapter)
    expected = model(images)
    adapter.save(tmp_path / "in.safetensors")
    twin = make_vit().eval()
    tasks = AdapterSet(load(twin, tmp_path / "in.safetensors"))
    assert torch.equal(twin(images), expected)
    tasks.add("a", tmp_path / "in.safetensors")
    tasks.add("b")
    with tasks.tasks("aba"), torch.no_grad():
        torch.testing.assert_close(twin(images), expected, rtol=1e-4, atol=1e-5)
    attach(make_vit(), EFFT1(rank=(3, 2))).save(tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="attention_side"):
        tasks.add("c", tmp_path / "out.safetensors")


@pytest.mark.parametrize("init", ["u", "v"])
@pytest.mark.parametrize("ffn_init", ["u", "v"])
def test_each_group_has_a_zero_of_its_own(make_vit, init, ffn_init):
    bank = attach(make_vit(), EFFT2(rank=3, init=init, ffn_init=ffn_init)).bank
    for group, letter in ((bank.mhsa, init), (bank.ffn, ffn_init)):
        zero, random = (group.U, group.V) if letter == "u" else (group.V, group.U)
        assert not zero.any() and random.all()
    assert bank.ffn.U.shape == (4 * D, 3)


def uniform(tensor, bound):
    """Whether the entries look like a uniform draw from ±bound."""
    assert 0.9 * bound < tensor.abs().max() <= bound
    assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    return True


@pytest.mark.parametrize("cores", ["per_layer", "shared"])
def test_the_release_draws_a_groups_cores_as_one_tensor(make_vit, cores):
    """Set_EFFT.py: xavier_uniform_ on U [d, r] and on EFFTc [r, r, 4] and [r, r, 2]."""
    r, model = 16, make_vit(embed_dim=48, depth=6)
    bank = attach(model, EFFT2(rank=r, cores=cores, factor_init="release")).bank
    for group, kinds, smaller in ((bank.mhsa, 4, 2.0), (bank.ffn, 2, 2**0.5)):
        released = nn.init.xavier_uniform_(torch.empty(r, r, kinds))
        assert group.core.std().item() == pytest.approx(released.std().item(), rel=0.1)
        assert uniform(group.core, (3 / r) ** 0.5 / smaller)  # each as a matrix: ±√(3/r)
        assert uniform(group.U, (6 / sum(group.U.shape)) ** 0.5)


def test_the_release_draws_swins_cores_by_another_shape():
    """Set_EFFT.py, set_Swin_EFFT: [4, r, r] in attention, [2, r, 2r] in FFNs, 18 in stage 3."""
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    ranks = [4, 8, 16, 32]
    method = EFFT2(
        rank=ranks, ffn_rank=[(2 * r, r) for r in ranks], cores="shared", factor_init="release"
    )
    bank = attach(model, method).bank
    for stage, r in enumerate(ranks):
        ffn = torch.empty(18 if stage == 2 else 2, r, 2 * r)
        for part, tensor in (("mhsa", torch.empty(4, r, r)), ("ffn", ffn)):
            core = getattr(bank, f"stage{stage}_{part}").core
            bound = (6 / sum(nn.init._calculate_fan_in_and_fan_out(tensor))) ** 0.5
            assert (1 - 10 / core.numel()) * bound < core.abs().max() <= bound


@pytest.mark.parametrize(("stages", "fans"), [(1, 4 * (8 + 8)), (2, 8 * (8 + 4))])
def test_two_stages_are_drawn_as_swins(stages, fans):
    sites = [Site(f"{i}.o", "o", i, i % stages, 16, 16) for i in range(12)]
    method = EFFT2(rank=[8] * stages if stages > 1 else 8, factor_init="release")
    for group in method.build(sites).values():
        assert uniform(group.core, (6 / fans) ** 0.5)


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [  # E's Table 3 has 0.36 and 0.59 million and no ranks: 48 and 64 fit; released are 24 and 32
        ("vit_large_patch16_224", 48, 357_888),
        ("vit_huge_patch14_224", 64, 598_016),
        ("vit_large_patch16_224", 24, 175_488),
        ("vit_huge_patch14_224", 32, 292_864),
    ],
)
def test_parameter_counts_on_larger_vits(vit_base, name, rank, expected):
    method = EFFT2(rank=rank, cores="shared")
    assert attach(vit_base(name), method).num_parameters() == expected


SWIN_COUNTS = [  # E's Table 3, with the cores that are read: 0.28, 0.37, 0.49 and 1.51 million
    ("tiny", 3, 275_400),
    ("small", 4, 369_920),
    ("base", 4, 489_600),
    ("large", 8, 1_479_680),
]


@pytest.mark.parametrize(("size", "a", "expected"), SWIN_COUNTS)
def test_parameter_counts_on_swin(vit_base, size, a, expected):
    ranks = [a * 2**stage for stage in range(4)]
    method = EFFT2(rank=ranks, ffn_rank=[(2 * r, r) for r in ranks], cores="shared")
    model = vit_base(f"swin_{size}_patch4_window7_224")
    assert attach(model, method).num_parameters() == expected


@pytest.mark.parametrize("options", [{"factor_init": "x"}, {"ffn_init": "x"}])
def test_a_file_of_an_unknown_start_is_refused(make_vit, tmp_path, options):
    path = tmp_path / "a.safetensors"
    attach(make_vit(), EFFT2(rank=2)).save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = file.metadata()
    header["method"] = json.dumps(json.loads(header["method"]) | options)
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=r"init must be one of .* got 'x'"):
        load(make_vit(), path)


def test_a_file_of_an_older_release_has_the_defaults(make_vit, tmp_path):
    for method in (EFFT1(rank=2), EFFT2(rank=2)):
        config = method.to_config()
        for later in ("ffn_init", "factor_init", "attention_side"):
            config.pop(later, None)
        assert method_from_config(config) == method


def test_configurations_survive_json():
    for method in (
        EFFT1(rank=(3, 2), scale=0.1, init="u", dropout=0.0, cores="shared", learn_scale=True),
        EFFT1(rank=4, attention_side="in"),
        EFFT2(rank=4, ffn_rank=(2, 3), ffn_init="u", factor_init="release"),
        EFFT2(rank=[2, (3, 4)]),
    ):
        again = method_from_config(json.loads(json.dumps(method.to_config())))
        assert again == method and type(again) is type(method)


def test_efft1_needs_four_times_the_width(make_vit):
    with pytest.raises(ValueError, match=r"4d=48 hidden features, got 24.*EFFT2"):
        attach(make_vit(mlp_ratio=2), EFFT1(rank=3))
    adapter = attach(make_vit(mlp_ratio=2), EFFT2(rank=3))
    assert adapter.bank.ffn.U.shape == (24, 3)


def test_files_and_older_states_hold_a_scale_without_dimensions(make_vit, randomize, tmp_path):
    """FSDP2 takes no such parameter, so in the model it has one."""
    method = EFFT2(rank=2, learn_scale=True)
    model = make_vit().eval()
    adapter = attach(model, method)
    randomize(adapter)
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)

    def older(state):
        return {k: v[0].clone() if k.endswith(".scale") else v.clone() for k, v in state.items()}

    path = tmp_path / "a.safetensors"
    adapter.save(path)
    assert {t.shape for k, t in load_file(path).items() if k.endswith(".scale")} == {()}
    twin = make_vit().eval()
    tasks = AdapterSet(load(twin, path))
    assert torch.equal(twin(images), expected)
    tasks.add("a", path)
    tasks.add("b")
    with tasks.tasks(["a", "b"]), torch.no_grad():
        torch.testing.assert_close(twin(images), expected, rtol=1e-4, atol=1e-5)
    other = make_vit().eval()
    attach(other, method)
    other.load_state_dict(older(model.state_dict()))
    assert torch.equal(other(images), expected)
    assert all(group.scale.shape == (1,) for group in other.factor_bank.children())


@pytest.mark.parametrize("kind", [EFFT1, EFFT2])
def test_one_linear_alone_and_the_papers_defaults(make_vit, kind):
    adapter = attach(make_vit(), kind(rank=2), targets="attn.qkv", layers=1)
    assert [site.name for site in adapter.sites] == ["blocks.1.attn.qkv"]
    assert kind() == kind(rank=16)
