"""Putting a method on a model: what is swapped, frozen and refused; a refusal leaves no trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from efft_kernels import EFFT1, EFFT2, Adapter, FactorBank, FusedEFFTLinear, LoRA, attach
from efft_kernels.adapters.attach import _fits
from efft_kernels.methods.base import Site

ADAPTED = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def snapshot(model):
    """Everything about a model that an error must not change."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad, p.device) for n, p in model.named_parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "values": [p.detach().double().sum().item() for p in model.parameters() if not p.is_meta],
    }


def test_swaps_exactly_the_linears_of_the_blocks(make_vit):
    model = make_vit()
    before = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    adapter = attach(model, EFFT2(rank=3))
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in ADAPTED}
    assert set(adapter.layers()) == expected
    for name, module in model.named_modules():
        if name in expected:
            assert type(module) is FusedEFFTLinear
            assert module.weight is parameters[f"{name}.weight"]
            assert module.bias is parameters[f"{name}.bias"]
        elif not name.startswith("factor_bank"):
            assert module is before[name]


def test_freezes_all_but_factors_and_head(make_vit):
    model = make_vit()
    adapter = attach(model, EFFT2(rank=3))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = {f"factor_bank.{name}" for name, _ in adapter.named_parameters()}
    assert trained == factors | {"head.weight", "head.bias"}
    assert {id(p) for p in adapter.parameters()} == {
        id(p) for name, p in model.named_parameters() if name in factors
    }
    assert len(list(adapter.parameters())) == len({id(p) for p in adapter.parameters()}) == 6


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ((), set()),
        ("head", {"head"}),
        (["norm", "head"], {"norm", "head"}),
        (("patch_embed",), {"patch_embed.proj"}),
    ],
)
def test_modules_to_train(make_vit, modules, expected):
    model = make_vit()
    adapter = attach(model, EFFT2(rank=3), modules_to_train=modules)
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if not name.startswith("factor_bank")} == expected
    assert adapter.num_parameters() == 7 * 12 * 3 + 12 * 9


def test_a_block_that_is_trained_whole_is_not_adapted(make_vit):
    model = make_vit()
    adapter = attach(model, EFFT2(rank=3), modules_to_train=("head", "blocks.1"))
    assert {site.block for site in adapter.sites} == {0}
    assert all(p.requires_grad for p in model.blocks[1].parameters())
    assert type(model.blocks[1].attn.qkv) is nn.Linear


@pytest.mark.parametrize("made_by", ["create_model", "class"])
def test_both_heads_of_distilled_deit_are_trained(make_vit, made_by):
    model = make_vit(distilled=True)
    if made_by == "create_model":
        with torch.device("meta"):
            model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    adapter = attach(model, EFFT1(rank=3))
    assert set(adapter.modules_to_train) == {"head", "head_dist"}
    assert model.head_dist.weight.requires_grad and model.head.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": "attn.qkv"}, {(0, "qkv"), (1, "qkv")}),
        ({"targets": "mhsa"}, {(0, "qkv"), (0, "o"), (1, "qkv"), (1, "o")}),
        ({"targets": ["ffn"]}, {(0, "fc1"), (0, "fc2"), (1, "fc1"), (1, "fc2")}),
        (
            {"targets": ["mhsa", "fc1"]},
            {(0, "qkv"), (0, "o"), (0, "fc1"), (1, "qkv"), (1, "o"), (1, "fc1")},
        ),
        ({"targets": "blocks.1.*"}, {(1, "qkv"), (1, "o"), (1, "fc1"), (1, "fc2")}),
        ({"targets": "blocks.0.mlp.fc2"}, {(0, "fc2")}),
        ({"layers": 0, "targets": "mhsa"}, {(0, "qkv"), (0, "o")}),
        ({"layers": range(1, 2), "targets": "ffn"}, {(1, "fc1"), (1, "fc2")}),
        ({"layers": {1}, "targets": "attn.proj"}, {(1, "o")}),
    ],
)
def test_targets_and_layers(make_vit, options, expected):
    model = make_vit()
    adapter = attach(model, EFFT2(rank=3), **options)
    assert {(site.block, site.role) for site in adapter.sites} == expected
    swapped = {n for n, m in model.named_modules() if isinstance(m, FusedEFFTLinear)}
    assert swapped == {site.name for site in adapter.sites}
    assert [site.name for site in adapter.sites] == [
        name for name, module in model.named_modules() if name in swapped
    ]


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", [EFFT1(rank=3), EFFT2(rank=3, init="u")], ids=repr)
def test_outputs_do_not_change_at_attach(make_vit, method, training, distilled):
    model = make_vit(distilled).train(training)
    images = torch.randn(2, 3, 8, 8)
    before = model(images)
    attach(model, method)
    assert all(module.training is training for module in model.modules())
    torch.testing.assert_close(model(images), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factor_dtype_follows_the_model(make_vit, dtype):
    model = make_vit(dtype=dtype)
    adapter = attach(model, EFFT2(rank=3))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in adapter.parameters()} == {expected}
    model(torch.randn(2, 3, 8, 8, dtype=dtype)).sum().backward()
    assert all(p.grad.dtype == expected for p in adapter.parameters())


def test_meta_model_materialises(make_vit):
    with torch.device("meta"):
        model = make_vit()
        adapter = attach(model, EFFT2(rank=3))
    assert all(p.is_meta for p in adapter.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(make_vit().state_dict(), strict=False)
    adapter.bank.reset_parameters()
    assert not any(delta.any() for delta in adapter.delta_weights().values())
    torch.testing.assert_close(
        model.eval()(torch.ones(1, 3, 8, 8)), make_vit().eval()(torch.ones(1, 3, 8, 8))
    )


# (arguments of attach beside the model, error, texts of its message)
BAD = {
    "rank above min(K, N)": (
        {"method": EFFT2(rank=13)},
        ValueError,
        ["rank must be at most min(K, N)=12", "K=12", "N=36", "13"],
    ),
    "ffn rank above min(K, N)": (
        {"method": EFFT2(rank=3, ffn_rank=13)},
        ValueError,
        ["rank must be at most min(K, N)=12", "13"],
    ),
    "second rank above min(K, N)": (
        {"method": EFFT1(rank=(3, 13))},
        ValueError,
        ["rank must be at most min(K, N)=12", "13"],
    ),
    "rank list of another length": (
        {"method": EFFT2(rank=[3, 3])},
        ValueError,
        ["rank", "one entry per stage", "1", "2"],
    ),
    "method is a class": ({"method": EFFT2}, TypeError, ["method must be", "EFFT2"]),
    "method is a string": ({"method": "efft2"}, TypeError, ["method must be", "'efft2'"]),
    "target that matches nothing": (
        {"targets": "attn.qvk"},
        ValueError,
        ["targets", "'attn.qvk'", "matches no nn.Linear", "it has attn.qkv, "],
    ),
    "one of two targets matches nothing": (
        {"targets": ["mhsa", "query"]},
        ValueError,
        ["targets", "'query'"],
    ),
    "target of another kind": ({"targets": "norm1"}, ValueError, ["targets", "'norm1'"]),
    "no targets": ({"targets": []}, TypeError, ["targets must be", "[]"]),
    "targets is a number": ({"targets": 3}, TypeError, ["targets must be", "3"]),
    "targets holds a number": ({"targets": ["mhsa", 3]}, TypeError, ["targets must be", "3"]),
    "target without a place in the method": (
        {"targets": "head", "modules_to_train": ()},
        ValueError,
        ["targets", "head"],
    ),
    "layer out of range": ({"layers": 2}, ValueError, ["layers must be within 0..1", "2"]),
    "negative layer": ({"layers": [-1]}, ValueError, ["layers must be within 0..1", "-1"]),
    "no layers": ({"layers": []}, ValueError, ["layers must name at least one block"]),
    "layers is a bool": ({"layers": True}, TypeError, ["layers must be block indices", "True"]),
    "layers is a float": ({"layers": 1.0}, TypeError, ["layers must be", "1.0"]),
    "layers is text": ({"layers": "01"}, TypeError, ["layers must be", "'0'"]),
    "layers without the targets": (
        {"targets": "blocks.0.*", "layers": 1},
        ValueError,
        ["layers [1]", "targets"],
    ),
    "unknown module to train": (
        {"modules_to_train": ("haed",)},
        ValueError,
        ["modules_to_train", "'haed'", "patch_embed"],
    ),
    "root as module to train": (
        {"modules_to_train": ("",)},
        ValueError,
        ["modules_to_train", "''"],
    ),
    "modules to train of another kind": (
        {"modules_to_train": 3},
        TypeError,
        ["modules_to_train", "3"],
    ),
    "modules to train holds None": (
        {"modules_to_train": [None]},
        TypeError,
        ["modules_to_train", "None"],
    ),
    "everything trained whole": ({"modules_to_train": "blocks"}, ValueError, ["targets"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_and_left_as_it_was(make_vit, case):
    options, kind, texts = BAD[case]
    model = make_vit()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    model.blocks[1].eval()
    before = snapshot(model)
    with pytest.raises(kind) as error:
        attach(model, **({"method": EFFT2(rank=3)} | options))
    assert all(text in str(error.value) for text in texts), str(error.value)
    assert snapshot(model) == before


def test_already_attached(make_vit):
    model = make_vit()
    attach(model, EFFT2(rank=3))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model must carry no adapter.*detach"):
        attach(model, EFFT1(rank=3))
    assert snapshot(model) == before


def test_adapted_submodule_is_not_adapted_again(make_vit):
    model = make_vit()
    attach(model.blocks, EFFT2(rank=3), targets="attn.qkv", modules_to_train=())
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="FusedEFFTLinear"):
        attach(model, EFFT2(rank=3))
    assert snapshot(model) == before


def test_attribute_in_the_way(make_vit):
    model = make_vit()
    model.factor_bank = "mine"
    with pytest.raises(ValueError, match="factor_bank"):
        attach(model, EFFT2(rank=3))
    assert model.factor_bank == "mine" and model.blocks[0].attn.qkv.weight.requires_grad


def test_mixed_devices(make_vit):
    model = make_vit()
    model.blocks[1].mlp.to("meta")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"one device, got \['cpu', 'meta'\]"):
        attach(model, EFFT2(rank=3))
    assert snapshot(model) == before


def test_subclass_of_linear(make_vit):
    class Own(nn.Linear):
        pass

    model = make_vit()
    model.blocks[1].attn.proj = Own(12, 12)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"'blocks\.1\.attn\.proj'.*nn\.Linear itself, got Own"):
        attach(model, EFFT2(rank=3))
    assert snapshot(model) == before


@pytest.mark.parametrize("others", [0, 1, 8, 9])
def test_what_to_target_beside_a_linear_that_is_refused(others):
    class Own(nn.Linear):
        pass

    names = [f"linear_{letter}" for letter in "abcdefghi"[:others]]
    blocks = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for _ in range(2)
    )
    model = nn.ModuleDict({"blocks": blocks, "refused": Own(4, 4)})
    shown = ", ".join([*map(repr, names[:8]), *["..."] * (others in (0, 9))])
    with pytest.raises(TypeError) as error:
        attach(model, LoRA(rank=2), targets="*", modules_to_train=())
    assert str(error.value).endswith(f"leave it out, e.g. targets=[{shown}]")


@pytest.mark.parametrize("model", [None, "vit", torch.ones(2)], ids=repr)
def test_model_of_another_kind(model):
    with pytest.raises(TypeError, match=f"model must be an nn.Module, got {type(model).__name__}"):
        attach(model, EFFT2(rank=3))


def test_every_floating_dtype_at_once():
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    model = nn.Sequential(*(nn.Linear(3, 3, dtype=dtype) for dtype in dtypes))
    adapter = attach(model, LoRA(rank=1, matrices=None), targets="*", modules_to_train=())
    assert len(adapter.sites) == 4
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}


def test_whether_a_method_takes_linears_at_its_lowest_rank():
    narrow = [Site("blocks.0.fc1", "fc1", 0, 0, 1, 4)]
    assert _fits(LoRA(rank=8, matrices=None), narrow) is True
    assert _fits(EFFT2(rank=8, ffn_rank=9), narrow) is True
    assert _fits(LoRA(), []) is False
    assert _fits(EFFT1(), narrow * 2) is True
    assert _fits(EFFT1(), [Site("blocks.0.fc1", "fc1", 0, 0, 1, 3)]) is False


def test_model_that_is_a_linear_itself():
    """There is no parent to swap it in."""
    for targets in (None, "*"):
        model = nn.Linear(12, 12)
        before = snapshot(model)
        with pytest.raises(ValueError, match="targets"):
            attach(model, LoRA(rank=3), targets=targets, modules_to_train=())
        assert snapshot(model) == before


def test_model_without_linears():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(
        ValueError, match=r"targets=None finds nothing to adapt: Sequential has no nn.Linear"
    ):
        attach(model, EFFT2(rank=3), modules_to_train=())


def test_error_in_the_last_step_is_undone(make_vit, monkeypatch):
    """Also what only comes up while the layers are made."""
    model = make_vit()
    before = snapshot(model)
    made = []
    real = FusedEFFTLinear.from_linear.__func__

    def failing(cls, linear, **options):
        made.append(real(cls, linear, **options))
        if len(made) == 8:
            raise MemoryError
        return made[-1]

    monkeypatch.setattr(FusedEFFTLinear, "from_linear", classmethod(failing))
    with pytest.raises(MemoryError):
        attach(model, EFFT2(rank=3))
    assert snapshot(model) == before


def train_one_step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    torch.manual_seed(1)
    model(torch.ones(2, 3, 8, 8)).pow(2).sum().backward()
    optimizer.step()


def test_two_models_share_nothing(make_vit, randomize):
    method = EFFT2(rank=3, dropout=0.0)
    first, second = make_vit(), make_vit()
    adapters = [attach(first, method), attach(second, method)]
    for adapter in adapters:
        randomize(adapter)
    kept = {name: t.clone() for name, t in second.state_dict().items()}
    train_one_step(first)
    adapters[0].merge()
    assert all(torch.equal(t, kept[name]) for name, t in second.state_dict().items())
    assert all(p.grad is None for p in second.parameters())
    storages = [{p.data_ptr() for p in model.parameters()} for model in (first, second)]
    assert not storages[0] & storages[1] and not adapters[1].merged


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(make_vit, randomize, how):
    model = make_vit()
    randomize(attach(model, EFFT2(rank=3, dropout=0.0)))
    images = torch.randn(2, 3, 8, 8)
    expected = model(images).detach()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert isinstance(twin.factor_bank, FactorBank) and twin.factor_bank is not model.factor_bank
    for name, layer in Adapter(twin).layers().items():
        assert layer._bank[0] is twin.factor_bank
        assert layer is not model.get_submodule(name)
    assert torch.equal(twin(images), expected)
    train_one_step(twin)
    assert not torch.equal(twin(images), expected)
    assert torch.equal(model(images), expected)
    Adapter(twin).detach()
    assert torch.equal(model(images), expected)


def test_state_dict_round_trip_by_assignment(make_vit, randomize):
    """One key for each factor, and the layers see what was assigned."""
    model = make_vit()
    randomize(attach(model, EFFT2(rank=3)))
    model.eval()
    twin = make_vit(seed=8)
    attach(twin, EFFT2(rank=3))
    state = model.state_dict()
    plain_keys = list(make_vit().state_dict())
    assert [key for key in state if not key.startswith("factor_bank.")] == plain_keys
    twin.load_state_dict(copy.deepcopy(state), assign=True)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(twin.eval()(images), model(images))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_give_the_same_gradients(make_vit, randomize, use_reentrant):
    """Factor dropout included: recomputation draws the same masks."""
    model = make_vit(dtype=torch.float64)
    adapter = attach(model, EFFT2(rank=3, dropout=0.5))
    randomize(adapter)
    model.train()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    leaves = [images, *adapter.parameters()]

    def gradients(run):
        torch.manual_seed(11)
        for leaf in leaves:
            leaf.grad = None
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:
            x = run(block, x)
        torch.randn(3)
        model.norm(x).tanh().sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(lambda block, x: block(x))
    found = gradients(lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant))
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 0
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_distributed_wrappers_give_the_same_gradients(make_vit, randomize, wrapper):
    def prepared():
        model = make_vit()
        adapter = attach(model, EFFT2(rank=3, dropout=0.0))
        torch.manual_seed(2)
        randomize(adapter)
        return model, adapter

    def step(model):
        model(torch.linspace(-1, 1, 384).view(2, 3, 8, 8)).tanh().sum().backward()

    def gradients(adapter):
        found = {name: p.grad for name, p in adapter.named_parameters()}
        return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}

    plain, plain_adapter = prepared()
    step(plain)
    model, adapter = prepared()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if wrapper == "DDP":
            wrapped = DistributedDataParallel(model)
        else:
            for block in model.blocks:
                fully_shard(block)
            wrapped = fully_shard(model)
        step(wrapped)
        found = gradients(adapter)
        for name, expected in gradients(plain_adapter).items():
            assert expected.norm() > 0
            torch.testing.assert_close(found[name], expected)
    finally:
        dist.destroy_process_group()
