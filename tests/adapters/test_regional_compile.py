"""Blocks that are compiled one by one run one graph, as those of the frozen model do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from efft_kernels import (
    EFFT1,
    EFFT2,
    AdapterSet,
    FacTTK,
    FacTTT,
    KAdaptation,
    LoRA,
    attach,
)
from efft_kernels.methods.base import Factors
from efft_kernels.methods.registry import METHODS as REGISTERED
from efft_kernels.methods.tensor_train import TensorTrainGroup

METHODS = [
    EFFT1(rank=3, dropout=0.0, scale=0.7),
    EFFT1(rank=3, dropout=0.0, attention_side="in"),
    EFFT2(rank=(3, 2), ffn_rank=2, dropout=0.0, learn_scale=True),
    EFFT2(rank=3, dropout=0.0, cores="shared"),
    FacTTT(rank=3, dropout=0.0, scale=0.7),
    FacTTK(rank=3, layer_rank=4, dropout=0.0),
    LoRA(rank=2, scale=0.7),
    KAdaptation(products=2, scale=0.7),
]
EFFT = EFFT2(rank=3, dropout=0.0)
IMAGES = torch.linspace(-1, 1, 2 * 192).view(2, 3, 8, 8)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def adapted(make_vit, randomize):
    """(a model of 12 blocks, its adapter)."""

    def make(method=EFFT, **options):
        model = make_vit(embed_dim=32, depth=12, num_heads=2)
        adapter = attach(model, method, strict=True, **options)
        randomize(adapter, std=0.1)
        return model, adapter

    return make


def blockwise(model, backend="eager", **options):
    """A count of the graphs that the model's blocks will need."""
    counter = CompileCounterWithBackend(backend)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter, **options)
    return counter


def step(model, images=IMAGES):
    """The outputs, and a gradient of each factor, after a training step's forward and backward."""
    model.zero_grad()
    y = model(images)
    y.tanh().sum().backward()
    return [y.detach(), *(p.grad for p in model.factor_bank.parameters())]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 0
        # At the tensor's size: three steps of a small model make more of a rounding.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5 * b.abs().max().item())


def test_every_method_is_here():
    assert {type(method) for method in METHODS} >= {
        kind for kind in REGISTERED.values() if kind.__module__.startswith("efft_kernels.")
    }


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_all_blocks_share_a_graph(adapted, method):
    model, _ = adapted(method)
    twin = copy.deepcopy(model)
    counter = blockwise(model, "aot_eager" if isinstance(method, FacTTK) else "eager")
    with torch.no_grad():
        same([model.eval()(IMAGES)], [twin.eval()(IMAGES)])
    assert counter.frame_count == 1
    for one in (model, twin):
        one.train()
        optimizer = torch.optim.SGD(one.factor_bank.parameters(), lr=0.01)
        for _ in range(2):
            step(one)
            optimizer.step()
    same(step(model), step(twin))
    # Another for the first block in training, whose input needs no gradient.
    assert counter.frame_count == 3
    state = {name: 0.5 * tensor for name, tensor in twin.state_dict().items()}
    for one, assign in ((model, True), (twin, False)):
        one.load_state_dict(state, assign=assign)
        one.factor_bank.requires_grad_(True)
    same(step(model), step(twin))
    for one in (model, twin):
        one.set_grad_checkpointing(True)
    same(step(model), step(twin))
    assert counter.frame_count == 3


def test_as_many_graphs_as_the_plain_model(make_vit):
    model = make_vit(embed_dim=32, depth=12, num_heads=2)
    model.patch_embed.requires_grad_(False)
    model.cls_token.requires_grad_(False)
    model.pos_embed.requires_grad_(False)
    counter = blockwise(model)
    with torch.no_grad():
        model.eval()(IMAGES)
    assert counter.frame_count == 1
    model.train()(IMAGES).sum().backward()
    assert counter.frame_count == 3


@pytest.mark.parametrize(
    "method",
    [
        EFFT2(rank=3, dropout=0.3),
        FacTTT(rank=3, dropout=0.3),
        LoRA(rank=2, dropout=0.3),
    ],
    ids=lambda m: m.name,
)
def test_with_dropout_and_any_batch_size(adapted, method):
    """The masks are drawn anew for each block and step: the seed's gradients come again."""
    model, _ = adapted(method)
    model.train().set_grad_checkpointing(True)
    counter = blockwise(model, dynamic=True)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append([g.clone() for g in step(model)])
    same(results[0], results[1])
    assert all(not torch.allclose(a, b) for a, b in zip(results[0], results[2], strict=True))
    step(model, torch.cat([IMAGES, IMAGES[:1]]))
    assert counter.frame_count == 2


def test_modules_that_are_wrapped(adapted):
    """torch.compile(block), and a copy of it, in place of the block."""
    model, adapter = adapted()
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, fullgraph=True, backend=counter)
    same(step(model), step(twin))
    assert counter.frame_count == 2
    adapter.merge()
    with torch.no_grad():
        same([model.eval()(IMAGES)], [twin.eval()(IMAGES)])


@pytest.mark.parametrize("method", [EFFT, KAdaptation(products=2)], ids=lambda m: m.name)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_read_their_own_factors(adapted, randomize, method, duplicate):
    model, _ = adapted(method)
    other = duplicate(model)
    randomize(other.factor_bank, std=0.1)
    twin = copy.deepcopy(other)
    same([step(twin)[0]], [step(other)[0]])
    blockwise(other)
    same(step(other), step(twin))


@pytest.mark.parametrize(
    "method", [EFFT, FacTTK(rank=3), LoRA(rank=2), KAdaptation(products=2)], ids=lambda m: m.name
)
def test_exchanged_factors_are_seen(adapted, method):
    """By whatever way: what a graph reads is what the model has now."""
    model, _ = adapted(method)
    counter = blockwise(model.eval())
    block, x = model.blocks[7], torch.randn(2, 5, 32)
    twin = copy.deepcopy(block)  # with a bank of its own, and not compiled
    twin._compiled_call_impl = None
    bank, own = model.factor_bank, twin.attn.qkv._bank[0]

    def check():
        with torch.no_grad():
            torch.testing.assert_close(block(x), twin(x), rtol=1e-4, atol=1e-5)

    check()
    for name, parameter in list(own.named_parameters()):
        module, _, leaf = name.rpartition(".")
        new = torch.randn_like(parameter)
        setattr(own.get_submodule(module), leaf, nn.Parameter(new))
        setattr(bank.get_submodule(module), leaf, nn.Parameter(new.clone()))
    check()
    for name, group in copy.deepcopy(bank).named_children():  # other groups
        group.load_state_dict({key: p + 0.1 for key, p in group.state_dict().items()})
        setattr(bank, name, group)
    own.load_state_dict(bank.state_dict())
    check()
    assert counter.frame_count == 1
    other = {name: 0.1 * torch.randn_like(p) for name, p in bank.named_parameters()}
    with torch.no_grad():
        before = block(x)
        found = torch.func.functional_call(
            model, {f"factor_bank.{n}": p for n, p in other.items()}, (IMAGES,)
        )
        torch.testing.assert_close(block(x), before)
        bank.load_state_dict(other, assign=True)
        torch.testing.assert_close(model(IMAGES), found)
    own.load_state_dict(other)
    check()
    for one in (block, twin):
        one.double()
    for one in (bank, own):
        one.to("meta")
        one.to_empty(device="cpu").double()
        one.load_state_dict({name: p.double() for name, p in other.items()})
    x = x.double()
    check()


def test_a_factors_of_ones_own_is_what_runs(adapted, monkeypatch):
    """A subclass of a group may say anew what its factors are, or its cores."""

    class Doubled(TensorTrainGroup):
        def factors(self, site, dropout):
            down, core, up = super().factors(site, dropout)
            return Factors(down, core, 2 * up)

    class Thrice(TensorTrainGroup):
        def cores(self, first, count):
            return 3 * super().cores(first, count)

    for kind in (Doubled, Thrice):
        assert not kind.joint
        model, adapter = adapted()
        for group in (adapter.bank.mhsa, adapter.bank.ffn):
            group.__class__ = kind
        x = torch.randn(2, 5, 32)
        with torch.no_grad():
            expected = model.blocks[3](x)
            model.blocks[3].compile(fullgraph=True, backend="eager")
            torch.testing.assert_close(model.blocks[3](x), expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("method", [EFFT, LoRA(rank=2)], ids=lambda m: m.name)
def test_layers_of_hugging_face(randomize, method):
    """Their q, k and v are linears of their own, which share x·down in eager mode."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
    randomize(attach(model, method, modules_to_train=(), strict=True), std=0.1)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=counter)

    def gradients(one):
        y = one(pixel_values=IMAGES).last_hidden_state
        factors = list(one.factor_bank.parameters())
        return [y, *torch.autograd.grad(y.tanh().sum(), factors)]

    same(gradients(model), gradients(twin))
    assert counter.frame_count == 2
    model.gradient_checkpointing_enable({"use_reentrant": False})
    same(gradients(model), gradients(twin))
    assert counter.frame_count == 4


def test_a_set_of_tasks(adapted, randomize):
    """`compiled` takes the blocks into its own graph; `use` changes numbers alone; `tasks` is
    for blocks that are not compiled, and says so."""
    model, adapter = adapted()
    tasks = AdapterSet(adapter)
    for name in "ab":
        randomize(adapter, std=0.1)
        tasks.add(name)
    model.eval()
    with torch.no_grad():
        with tasks.tasks("ab"):
            mixed = model(IMAGES)
        counter = blockwise(model)
        torch.testing.assert_close(tasks.compiled(backend="eager")("ab", IMAGES), mixed)
        for row, name in enumerate("ab"):
            tasks.use(name)
            same([model(IMAGES)[row]], [mixed[row]])
        assert counter.frame_count == 1
        with tasks.tasks("ab"), pytest.raises(Exception, match=r"AdapterSet\.compiled\(\)"):
            model(IMAGES)


def test_a_linear_that_does_not_run_is_still_told(make_vit):
    model = make_vit(embed_dim=32, depth=11, num_heads=2)
    attach(model, EFFT)
    for block in model.blocks:
        fc1 = block.mlp.fc1
        block.mlp.fc1 = nn.Linear(32, 128)
        block.mlp.fc1.weight = fc1.weight
        block.compile(backend="eager")
    with pytest.warns(UserWarning, match=r"'blocks\.0\.mlp\.fc1', 'blocks\.1\.mlp\.fc1'"):
        model(IMAGES)
