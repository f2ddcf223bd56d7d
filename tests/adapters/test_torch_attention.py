"""torch.nn's own attention and encoders: adapted projections compute what merged ones do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.utils.prune
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from efft_kernels import (
    EFFT1,
    EFFT2,
    Adapter,
    AdapterSet,
    FacTTK,
    FacTTT,
    KAdaptation,
    LoRA,
    attach,
    export_peft_lora,
    load,
)

METHODS = [
    EFFT1(rank=2, dropout=0.0),
    EFFT2(rank=(3, 2), dropout=0.0),
    FacTTT(rank=2, dropout=0.0),
    FacTTK(rank=2, layer_rank=3, dropout=0.0),
    LoRA(rank=2, matrices=("q", "k", "v", "o", "fc1", "fc2")),
    KAdaptation(products=2, rank=1, matrices=("q", "v", "o")),
]
KEYS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")


class Attends(nn.Module):
    """One attention, to be called with anything."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, **options)

    def forward(self, *args, **options):
        return self.attn(*args, **options)


def attention(method=None, seed=3, **options):
    torch.manual_seed(seed)
    model = Attends(dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    method = method or LoRA(rank=2, matrices=None)
    adapter = attach(model, method, targets=["in_proj", "out_proj"], modules_to_train=())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    return model.eval(), adapter


def merged(model):
    """A plain model with the increments in its weights."""
    twin = copy.deepcopy(model)
    adapter = Adapter(twin)
    adapter.merge()
    return adapter.detach()


def vit(**options):
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 2, "num_heads": 2}
    sizes |= {"hidden_dim": 8, "mlp_dim": 32, "num_classes": 5}
    model = vision.VisionTransformer(**(sizes | options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


CALLS = {
    "self": {},
    "no weights": {"need_weights": False},
    "each head's weights": {"average_attn_weights": False},
    "bool mask": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "float mask, no weights": {"attn_mask": torch.ones(5, 5).triu(1), "need_weights": False},
    "a mask a head": {"attn_mask": torch.rand(2 * 3, 5, 5) > 0.8},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False, False, False, True, True]])},
    "both": {
        "key_padding_mask": torch.tensor([[False] * 5, [False, False, False, True, True]]),
        "attn_mask": torch.ones(5, 5).triu(2).bool(),
        "need_weights": False,
    },
    "causal": {
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
        "is_causal": True,
        "need_weights": False,
    },
    "causal and padding": {
        "key_padding_mask": torch.tensor([[False] * 5, [False, False, False, True, True]]),
        "attn_mask": torch.ones(5, 5).triu(1).bool(),
        "is_causal": True,
        "need_weights": False,
    },
    "causal with weights": {
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
        "is_causal": True,
    },
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_is_the_attention_of_the_merged_weights(name, batch_first):
    model, _ = attention(batch_first=batch_first)
    plain = merged(model)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    for found, expected in zip(
        model(x, x, x, **CALLS[name]), plain(x, x, x, **CALLS[name]), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("same", ["none", "query and key", "key and value", "unbatched", "no bias"])
def test_other_inputs(same):
    model, _ = attention(batch_first=True, bias=same != "no bias")
    plain = merged(model)
    q, k, v = (torch.randn(2, n, 12, dtype=torch.float64) for n in (4, 5, 5))
    if same == "query and key":
        q = k
    if same == "key and value":
        v = k
    if same == "unbatched":
        q, k, v = q[0], k[0], v[0]
    for found, expected in zip(model(q, k, v), plain(q, k, v), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_gradients_and_dropout_are_those_of_the_merged_weights():
    model, adapter = attention(batch_first=True, dropout=0.4)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    deltas = adapter.layers()
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in deltas.items()}
    assert sizes == {"attn.in_proj": (12, 36), "attn.out_proj": (12, 12)}

    def composed(name):
        down, core, up = deltas[name].current_factors()
        return (down @ up[0].T if core is None else down @ core[0] @ up[0].T).T

    plain = nn.MultiheadAttention(12, 3, 0.4, batch_first=True, dtype=torch.float64)

    def expected():
        own = dict(model.attn.named_parameters())
        own["in_proj_weight"] = own["in_proj_weight"] + composed("attn.in_proj")
        own["out_proj.weight"] = own["out_proj.weight"] + composed("attn.out_proj")
        return torch.func.functional_call(plain, own, (x, x, x))[0]

    results = []
    for run in (lambda: model.train()(x, x, x)[0], expected):
        torch.manual_seed(1)
        y = run()
        results.append([y, *torch.autograd.grad(y.square().sum(), list(adapter.parameters()))])
    for found, wanted in zip(*results, strict=True):
        assert wanted.norm() > 1e-6
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_whole_life_on_torchvisions_vit(randomize, tmp_path, method):
    model, x = vit(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before, keys, base = model(x), list(model.state_dict()), copy.deepcopy(model.state_dict())
    kinds = {name: type(module) for name, module in model.named_modules()}
    adapter = attach(model, method, strict=True)
    assert {site.role for site in adapter.sites} >= {"qkv", "o"}
    torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-11)
    own = [key for key in model.state_dict() if not key.startswith("factor_bank.")]
    assert own == keys
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)
    assert {row["calls"] for row in adapter.describe().rows} == {1}

    randomize(adapter)
    expected = model.eval()(x)
    assert (expected - before).abs().max() > 1e-3
    dense = vit()
    with torch.no_grad():
        for name, delta in adapter.delta_weights().items():
            joint = "_" if name.endswith("in_proj") else "."
            dense.get_parameter(f"{name}{joint}weight").add_(delta)
        torch.testing.assert_close(dense(x), expected, rtol=1e-9, atol=1e-9)
    adapter.merge()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    adapter.unmerge()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.items())
    adapter.save(tmp_path / "a.safetensors")
    twin = vit()
    load(twin, tmp_path / "a.safetensors", strict=True)
    assert torch.equal(twin(x), expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)
        assert copied.encoder.layers[0].self_attention.in_proj_weight is not (
            model.encoder.layers[0].self_attention.in_proj_weight
        )
    adapter.detach()
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_merged_and_detached_keeps_the_increment(randomize):
    model, x = vit(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    adapter = attach(model, EFFT2(rank=2))
    randomize(adapter)
    expected = model(x)
    adapter.merge()
    torch.testing.assert_close(adapter.detach()(x), expected, rtol=1e-9, atol=1e-9)
    assert type(model.encoder.layers[0].self_attention) is nn.MultiheadAttention


def test_an_open_clip_tower_by_default():
    """Its blocks' names and structure; without an installation of open_clip."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(12, 2, batch_first=True)
            self.mlp = nn.Sequential()
            self.mlp.c_fc, self.mlp.gelu = nn.Linear(12, 48), nn.GELU()
            self.mlp.c_proj = nn.Linear(48, 12)

        def forward(self, x):
            x = x + self.attn(x, x, x, need_weights=False)[0]
            return x + self.mlp(x)

    tower = nn.Sequential()
    tower.transformer = nn.Sequential()
    tower.transformer.resblocks = nn.Sequential(Block(), Block())
    adapter = attach(tower, EFFT2(rank=2), modules_to_train=(), strict=True)
    assert [site.role for site in adapter.sites] == ["qkv", "o", "fc1", "fc2"] * 2
    tower(torch.randn(2, 5, 12)).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("targets", ["in_proj", "out_proj"])
def test_one_of_the_two(randomize, targets):
    model, x = vit(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = model(x)
    adapter = attach(model, LoRA(rank=2, matrices=None), targets=targets, strict=True)
    randomize(adapter)
    expected = model(x)
    assert (expected - before).abs().max() > 1e-3
    adapter.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    adapter.unmerge()
    assert torch.equal(adapter.detach()(x), before)
    attention = model.encoder.layers[0].self_attention
    assert type(attention.out_proj) is NonDynamicallyQuantizableLinear


def test_rows_of_different_tasks(randomize):
    model, x = vit(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    adapter = attach(model, EFFT2(rank=2))
    tasks, expected = AdapterSet(adapter), []
    for i, name in enumerate("ab"):
        randomize(adapter)
        tasks.add(name)
        expected.append(model(x[i : i + 1]))
    with tasks.tasks(["a", "b"]), torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat(expected), rtol=1e-9, atol=1e-9)


def test_compiles_to_one_graph(randomize):
    model, x = vit(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    randomize(attach(model, LoRA(rank=2, matrices=None)))
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_moved_and_cast(randomize):
    model, x = vit(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    randomize(attach(model, LoRA(rank=2, matrices=None)))
    expected = model(x)
    torch.testing.assert_close(model.float()(x.float()), expected.float(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x.float()) - expected).abs().max() < 0.3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kdim": 7}, "nn.MultiheadAttention with kdim or vdim"),
        ({"add_bias_kv": True}, "with add_bias_kv or add_zero_attn"),
        ({"add_zero_attn": True}, "with add_bias_kv or add_zero_attn"),
    ],
)
def test_attentions_that_cannot_be_adapted(options, text):
    model = nn.Sequential(nn.MultiheadAttention(12, 3, **options), nn.Linear(12, 12))
    with pytest.raises(TypeError, match=rf"'0.out_proj' .*{text}.*targets=\['1'\]"):
        attach(model, LoRA(rank=2, matrices=None), targets="*", modules_to_train=())
    assert type(model[0]) is nn.MultiheadAttention


def test_an_output_projection_of_the_users_own(randomize):
    model, x = Attends(), torch.randn(2, 5, 12)
    model.attn.out_proj = nn.Linear(12, 12)
    model.eval()
    adapter = attach(model, LoRA(rank=2, matrices=None), targets="out_proj", modules_to_train=())
    randomize(adapter)
    expected = model(x, x, x)[0]
    adapter.merge()
    torch.testing.assert_close(model(x, x, x)[0], expected)


def test_a_subclass_may_compute_something_else():
    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match=r"Own, a subclass of nn\.MultiheadAttention"):
        attach(
            nn.Sequential(Own(12, 3)),
            LoRA(rank=2, matrices=None),
            targets="out_proj",
            modules_to_train=(),
        )


def test_peft_has_no_such_linears(tmp_path):
    _, adapter = attention()
    with pytest.raises(ValueError, match=r"'attn\.in_proj' of an nn\.MultiheadAttention.*merge"):
        export_peft_lora(adapter, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


class TestEncoders:
    """Their fast paths read weights in eval without gradients; with an adapter they do not run."""

    @staticmethod
    def encoder(**options):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(12, 2, 48, 0.0, batch_first=True, **options)
        return nn.TransformerEncoder(layer, 2).eval()

    @pytest.mark.parametrize("targets", [None, ["linear1"], ["out_proj"], ["in_proj"]])
    @pytest.mark.parametrize("padded", [False, True])
    @torch.no_grad()
    def test_take_effect(self, randomize, targets, padded):
        encoder, x = self.encoder(), torch.randn(2, 5, 12)
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
        real = slice(None) if mask is None else ~mask
        before = encoder(x, src_key_padding_mask=mask)
        adapter = attach(encoder, EFFT2(rank=2), targets=targets, modules_to_train=())
        randomize(adapter)
        after = encoder(x, src_key_padding_mask=mask)
        assert (after[real] - before[real]).abs().max() > 1e-3
        adapter.merge()
        torch.testing.assert_close(
            encoder(x, src_key_padding_mask=mask)[real], after[real], rtol=1e-4, atol=1e-5
        )
        adapter.unmerge()
        adapter.detach()
        assert torch.equal(encoder(x, src_key_padding_mask=mask), before)
        assert encoder.use_nested_tensor
        assert not any(module._forward_pre_hooks for module in encoder.modules())

    def test_every_linear_learns(self):
        encoder = self.encoder().train()
        adapter = attach(encoder, EFFT2(rank=2), modules_to_train=(), strict=True)
        assert [site.role for site in adapter.sites] == ["qkv", "o", "fc1", "fc2"] * 2
        encoder(torch.randn(2, 5, 12)).square().sum().backward()
        assert all(p.grad is not None for p in adapter.parameters())

    def test_one_that_makes_no_nested_tensors_makes_none_afterwards(self):
        encoder = self.encoder()
        encoder.use_nested_tensor = False
        attach(encoder, EFFT2(rank=2), modules_to_train=()).detach()
        assert encoder.use_nested_tensor is False

    def test_as_a_part_of_a_model(self, randomize):
        model, x = nn.Sequential(self.encoder(), nn.Linear(12, 3)), torch.randn(2, 5, 12)
        adapter = attach(model, LoRA(rank=2, matrices=None), modules_to_train="1")
        randomize(adapter)
        with torch.no_grad():
            quick = model(x)
        torch.testing.assert_close(quick, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("into", ["unmerged", "merged"])
@pytest.mark.parametrize("from_merged", [True, False])
def test_states_of_merged_models(randomize, into, from_merged, assign):
    """A state counts the increment once, whichever of the two models is merged, and stays as it
    is, with the model that it was taken from."""
    model, x = vit(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    adapter = attach(model, LoRA(rank=2, matrices=None))
    randomize(adapter)
    with torch.no_grad():
        model.encoder.layers[0].self_attention.in_proj_weight.mul_(1.5)
    expected = model(x)
    if from_merged:
        adapter.merge()
    other = vit()
    handle = attach(other, LoRA(rank=2, matrices=None))
    randomize(handle)
    if into == "merged":
        handle.merge()
    state = model.state_dict()
    before = copy.deepcopy(state)
    other.load_state_dict(state, assign=assign)
    torch.testing.assert_close(other(x), expected, rtol=1e-9, atol=1e-9)
    handle.merge()
    torch.testing.assert_close(other(x), expected, rtol=1e-9, atol=1e-9)
    handle.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_a_base_weight_that_does_not_fit_is_named():
    model, adapter = attention()
    adapter.merge()
    state = model.state_dict() | {"attn.in_proj.base_weight": torch.ones(2)}
    with pytest.raises(RuntimeError, match=r"size mismatch for attn\.in_proj_weight"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"base_weight"'):
        model.attn.in_proj.load_state_dict({"base_weight": torch.ones(36, 12)})


def test_a_state_of_another_model_is_refused():
    model, _ = attention()
    state = {"attn.in_proj.other": torch.ones(1), "attn.other": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r'"attn\.other", "attn\.in_proj\.other"'):
        model.load_state_dict(model.state_dict() | state)


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
def test_a_pruned_attention_is_refused(name):
    model = nn.Sequential(nn.MultiheadAttention(12, 3))
    torch.nn.utils.prune.l1_unstructured(model[0], name, 0.5)
    with pytest.raises(TypeError, match="a weight or bias that a hook computes"):
        attach(model, LoRA(rank=2, matrices=None), targets="*", modules_to_train=())


COMPUTED = {
    "prune": lambda attn: torch.nn.utils.prune.l1_unstructured(attn, "in_proj_weight", 0.5),
    "parametrize": lambda attn: nn.utils.parametrizations.weight_norm(attn, "in_proj_weight"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_since_is_not_merged(name):
    model, adapter = attention()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    COMPUTED[name](model.attn)
    expected = model(x, x, x)[0]
    with pytest.raises(RuntimeError, match="weight must be a parameter of the layer to merge"):
        adapter.merge()
    assert not adapter.merged and torch.equal(model(x, x, x)[0], expected)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_since_merging_is_not_unmerged(name):
    model, adapter = attention()
    adapter.merge()
    COMPUTED[name](model.attn)
    with pytest.raises(RuntimeError, match="weight must be a parameter of the layer to unmerge"):
        adapter.unmerge()


@pytest.mark.parametrize("targets", ["in_proj", "out_proj"])
def test_a_parametrized_attention_keeps_its_adapter(targets):
    """Its class from before would be without the weight."""
    model = Attends(dtype=torch.float64).eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    adapter = attach(model, LoRA(rank=2, matrices=None), targets=targets, modules_to_train=())
    COMPUTED["parametrize"](model.attn)
    expected = model(x, x, x)[0]
    with pytest.raises(RuntimeError, match=r"cannot become a plain one.*remove_param"):
        adapter.detach()
    assert torch.equal(model(x, x, x)[0], expected)
    nn.utils.parametrize.remove_parametrizations(model.attn, "in_proj_weight")
    torch.testing.assert_close(adapter.detach()(x, x, x)[0], expected)
    assert type(model.attn) is nn.MultiheadAttention
