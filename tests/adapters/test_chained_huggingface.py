"""Hugging Face's ViT and DINOv2, whose layers run as a chain, against the same model whose layers
run one module after the other.

On the CPU plain torch stands in for what runs a chain on a GPU, in float64.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

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
    load,
)
from efft_kernels.adapters import chain_blocks, chained
from efft_kernels.methods.tensor_train import TensorTrainGroup
from efft_kernels.ops import chains
from efft_kernels.testing.error_budget import BUDGET, relative_error

transformers = pytest.importorskip("transformers", minversion="5.20")

EFFT = EFFT2(rank=3, dropout=0.0, scale=0.7)
NOISY = EFFT2(rank=3, dropout=0.3, scale=0.7)
METHODS = [
    EFFT1(rank=3, dropout=0.0, scale=0.7),
    EFFT1(rank=3, dropout=0.0, scale=0.7, attention_side="in"),
    EFFT,
    EFFT2(rank=(3, 2), ffn_rank=4, dropout=0.0, learn_scale=True, cores="shared"),
    NOISY,
    FacTTT(rank=(2, 3), dropout=0.0),
    FacTTK(rank=3, layer_rank=4, dropout=0.0),
    LoRA(rank=2, matrices=None),
    LoRA(rank=2, matrices=None, dropout=0.3),
    KAdaptation(products=2, matrices=None),
]
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 8,
         "patch_size": 4, "num_labels": 5}  # fmt: skip
MODELS = {
    "vit": ("ViTConfig", "ViTForImageClassification"),
    "deit": ("DeiTConfig", "DeiTForImageClassification"),
    "vit_msn": ("ViTMSNConfig", "ViTMSNForImageClassification"),
    "ijepa": ("IJepaConfig", "IJepaForImageClassification"),
    "vit_mae": ("ViTMAEConfig", "ViTMAEModel"),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersForImageClassification",
    ),
}


def make(name="vit", kind=None, seed=5, **options):
    """A model in float64 and training, no parameter at a special value."""
    config, own = (getattr(transformers, each) for each in MODELS[name])
    own = own if kind is None else getattr(transformers, kind)
    sizes = {"mlp_ratio": 4} if name.startswith("dinov2") else {"intermediate_size": 96}
    torch.manual_seed(seed)
    model = own(config(**(SIZES | sizes | options))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


@pytest.fixture
def models(randomize):
    """(a chained model, the same attached with fuse="pairs")."""

    def both(name="vit", method=EFFT, attaching=(), **options):
        pair = []
        for fuse in ("auto", "pairs"):
            model = make(name, **options)
            adapter = attach(model, method, fuse=fuse, **dict(attaching))
            torch.manual_seed(5)
            randomize(adapter)
            pair.append(model)
        return pair

    return both


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def output(result):
    return result.logits if "logits" in result else result.last_hidden_state


def step(model, images, **options):
    """The output and all gradients; the masks of dropout are the same in every call."""
    torch.manual_seed(11)
    model.zero_grad()
    y = output(model(images, **options))
    y.tanh().sum().backward()
    return [y.detach(), *(p.grad for p in trained(model))]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_is_the_model_of_lone_linears(models, images, runs, name, method):
    model, twin = models(name, method)
    close(step(model, images), step(twin, images))
    assert len(runs) == 1


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("vit", "dinov2")])
def test_families_with_the_same_layers(models, images, runs, name):
    model, twin = models(name)
    close(step(model, images), step(twin, images))
    assert len(runs) == 1


def test_no_biases_of_q_k_and_v(models, images, runs):
    model, twin = models(qkv_bias=False)
    close(step(model, images), step(twin, images))
    assert len(runs) == 1


def test_a_backbone_and_a_model_without_head(models, images, runs):
    for kind in ("Dinov2Model", "Dinov2Backbone"):
        pair = models("dinov2", kind=kind, attaching={"strict": True})
        first = [next(iter(model(images).values())) for model in pair]
        first = [y[0] if isinstance(y, tuple) else y for y in first]
        torch.testing.assert_close(*first)
    assert len(runs) == 1  # a backbone gives hidden states, which hooks of transformers take


def test_a_model_around_it(randomize, images, runs):
    """What loops over the layers may lie anywhere in the model."""
    results = []
    for fuse in ("auto", "pairs"):
        model = nn.ModuleDict({"tower": make(kind="ViTModel"), "head": nn.Linear(24, 3).double()})
        randomize(attach(model, EFFT, fuse=fuse))
        tower = model["tower"]
        y = model["head"](tower(images).last_hidden_state)
        results.append([y, *torch.autograd.grad(y.tanh().sum(), model.factor_bank.parameters())])
    assert len(runs) == 1


class TestWhatIsAskedFor:
    def test_hidden_states(self, models, images, runs):
        model, twin = models()
        found, expected = (one(images, output_hidden_states=True) for one in (model, twin))
        assert len(found.hidden_states) == 3 and not runs
        torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=0, atol=0)
        close(step(model, images), step(twin, images))
        assert len(runs) == 1  # its hooks are still there, and do nothing
        model.config.output_hidden_states = True
        assert len(model(images).hidden_states) == 3
        assert len(runs) == 1

    def test_attentions(self, models, images, runs):
        model, twin = models(attn_implementation="eager")
        found, expected = (one(images, output_attentions=True) for one in (model, twin))
        assert len(found.attentions) == 2
        torch.testing.assert_close(found.attentions, expected.attentions, rtol=0, atol=0)
        assert not runs

    def test_where_nobody_can_tell_whether_a_hook_idles(self, models, images, runs, monkeypatch):
        model, _ = models()
        model(images, output_hidden_states=True)
        monkeypatch.delattr("transformers.utils.output_capturing._active_collector")
        assert "hooks" in Adapter(model).describe().alone

    def test_a_mask(self, models, images, runs):
        mask = torch.ones(3, 5, dtype=torch.long)
        mask[:, 3:] = 0
        results = [one(images, attention_mask=mask).logits for one in models()]
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert not runs

    def test_options_of_the_attention(self, models, images, runs):
        model, twin = models()
        results = [one(images, is_causal=True).logits for one in (model, twin)]
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert not runs
        model(images, is_causal=False, output_attentions=False, num_items_in_batch=3)
        assert len(runs) == 1

    def test_a_loss(self, models, images, runs):
        labels = torch.tensor([0, 1, 2])
        model, twin = models()
        for one in (model, twin):
            one(images, labels=labels).loss.backward()
        close([p.grad for p in trained(model)], [p.grad for p in trained(twin)])
        assert len(runs) == 1


class TestTraining:
    def test_accumulation_and_optimizer_steps(self, models, images, runs):
        results = []
        for model in models(method=NOISY):
            optimizer = torch.optim.AdamW(trained(model), lr=0.1)
            torch.manual_seed(2)
            for _ in range(2):
                for part in images.split([1, 2]):
                    model(part).logits.tanh().sum().backward()
                optimizer.step()
            results.append(step(model, images))
        close(*results)
        assert len(runs) == 5

    def test_two_forwards_before_one_backward(self, models, images, runs):
        results = []
        for model in models():
            (model(images).logits.tanh() * model(images.flip(0)).logits.tanh()).sum().backward()
            results.append([p.grad for p in trained(model)])
        close(*results)

    def test_gradient_of_the_images(self, models, images, runs):
        results = []
        for model in models("dinov2"):
            x = images.clone().requires_grad_()
            results.append(torch.autograd.grad(model(x).logits.tanh().sum(), [x]))
        close(*results)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint_around_the_encoder(self, models, runs, reentrant):
        results = []
        for model in models("dinov2", NOISY):
            encoder = model.dinov2.encoder
            x = torch.linspace(-1, 1, 240, dtype=torch.float64).view(2, 5, 24).requires_grad_()
            torch.manual_seed(3)
            y = checkpoint(lambda x, e=encoder: e(x)[0], x, use_reentrant=reentrant)
            y.tanh().sum().backward()
            results.append([y.detach(), *(p.grad for p in model.factor_bank.parameters())])
        assert len(runs) == (1 if reentrant else 2)  # a reentrant one goes forward without
        for model in models("dinov2", NOISY):
            assert "layer" not in model.dinov2.encoder.__dict__


# Everything that sends a call to the modules themselves. Each yields while it is so.


@contextlib.contextmanager
def hooked(model, register, *, of="vit.layers.1.mlp"):
    handle = getattr(model.get_submodule(of), register)(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def setting(model, of, name, value):
    owner = model.get_submodule(of)
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


@contextlib.contextmanager
def forward_of_its_own(model, of):
    module = model.get_submodule(of)
    module.forward = functools.partial(type(module).forward, module)
    yield
    del module.forward


@contextlib.contextmanager
def forward_of_the_class(model, of):
    kind = type(model.get_submodule(of))
    original = kind.forward
    kind.forward = lambda self, *args, **options: original(self, *args, **options)
    yield
    kind.forward = original


@contextlib.contextmanager
def another(model, of, make_module):
    owner, _, name = of.rpartition(".")
    table = model.get_submodule(owner)._modules
    before = table[name]
    table[name] = make_module(before)
    yield
    table[name] = before


@contextlib.contextmanager
def checkpointing(model):
    model.gradient_checkpointing_enable()
    yield
    model.gradient_checkpointing_disable()


@contextlib.contextmanager
def other_sdpa(model):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def own(*args, **options):
        return sdpa_attention_forward(*args, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    yield
    del ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextlib.contextmanager
def trainable(model, name):
    parameter = model.get_parameter(name).requires_grad_()
    yield
    parameter.requires_grad_(False)


ATTENTION = "vit.layers.1.attention"
OTHERWISE = {
    "pre-hook": lambda m: hooked(m, "register_forward_pre_hook", of="vit.layers"),
    "hook of a layer": lambda m: hooked(m, "register_forward_hook", of="vit.layers.0"),
    "hook of an attention": lambda m: hooked(m, "register_forward_hook", of=ATTENTION),
    "backward hook": lambda m: hooked(m, "register_full_backward_hook"),
    "forward of a layer": lambda m: forward_of_its_own(m, "vit.layers.0"),
    "forward of the model": lambda m: forward_of_its_own(m, "vit"),
    "forward of its class": lambda m: forward_of_the_class(m, "vit"),
    "forward of a layer's class": lambda m: forward_of_the_class(m, "vit.layers.0"),
    "fewer layers": lambda m: another(m, "vit.layers", lambda layers: layers[:1]),
    "another layer": lambda m: another(m, "vit.layers.1", copy.deepcopy),
    "layers twice": lambda m: another(m, "vit.layers", lambda own: nn.ModuleList([*own, *own])),
    "another attention": lambda m: setting(m, ATTENTION, "is_causal", True),
    "scaling": lambda m: setting(m, ATTENTION, "scaling", 0.3),
    "implementation": lambda m: implementation(m, "eager"),
    "torch's attention": other_sdpa,
    "dropout of attention": lambda m: setting(m, ATTENTION, "attention_dropout", 0.5),
    "dropout": lambda m: setting(m, "vit.layers.1.dropout", "p", 0.5),
    "GELU by tanh": lambda m: setting(m, "vit.layers.1.mlp.activation_fn", "act", torch.tanh),
    "trainable weight": lambda m: trainable(m, "vit.layers.0.attention.k_proj.weight"),
    "trainable bias": lambda m: trainable(m, "vit.layers.0.attention.v_proj.bias"),
    "trainable norm": lambda m: trainable(m, "vit.layers.0.layernorm_after.weight"),
    "backend": lambda m: setting(m, "vit.layers.0.attention.k_proj", "backend", "torch"),
    "checkpoints": checkpointing,
    "no gradients": lambda m: torch.no_grad(),
    "inference": lambda m: torch.inference_mode(),
}


@contextlib.contextmanager
def implementation(model, name):
    model.set_attn_implementation(name)
    yield
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("otherwise", OTHERWISE.values(), ids=OTHERWISE)
def test_the_modules_run_where_the_chain_does_not_do(models, images, runs, otherwise):
    model, twin = models()
    results = []
    for one in (model, twin):
        with otherwise(one):
            torch.manual_seed(0)
            y = one(images).logits
            results.append([y.detach()])
            if y.requires_grad:
                y.tanh().sum().backward()
                results[-1] += [p.grad for p in one.factor_bank.parameters()]
    assert not runs
    torch.testing.assert_close(*results, rtol=0, atol=0)
    model(images)
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("num_attention_heads", 2), ("head_dim", 4), ("head_dim", 12)]
)
def test_heads_that_are_changed(models, images, runs, name, value):
    """q, k and v are then split in another way, or not at all."""
    model, _ = models()
    setattr(model.vit.layers[1].attention, name, value)
    assert Adapter(model).describe().alone
    with contextlib.suppress(RuntimeError):
        model(images)
    assert not runs


def test_a_compiled_layer(models, images, runs):
    model, _ = models()
    model.vit.layers[1].compile(backend="eager")
    assert "compiled" in Adapter(model).describe().alone


def test_a_layer_scale_that_trains(models, images, runs):
    pair = models("dinov2")
    for model in pair:
        model.dinov2.encoder.layer[1].layer_scale2.lambda1.requires_grad_()
    close(*(step(model, images) for model in pair))
    assert not runs


class TestCallsOfLayers:
    """What runs the layers otherwise than the model's own loop gets the layers."""

    def test_one_by_itself(self, models, images, runs):
        model, twin = models()
        x = torch.randn(2, 5, 24, dtype=torch.float64)
        for place in (0, 1):
            torch.testing.assert_close(model.vit.layers[place](x), twin.vit.layers[place](x))
        assert not runs

    def test_a_loop_outside(self, models, runs):
        x = torch.randn(2, 5, 24, dtype=torch.float64)
        results = []
        for model in models():
            y = x
            for layer in model.vit.layers:
                y = layer(y)
            results.append(y)
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert not runs

    def test_the_forward_of_the_model_by_itself(self, models, images, runs):
        results = [one.vit.forward(images).last_hidden_state for one in models()]
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert not runs

    def test_the_layers_are_in_their_place_again(self, models, images, runs):
        model, _ = models()
        seen = []
        own = vars(model.vit)
        model.vit.layernorm.register_forward_hook(lambda *_: seen.append("layers" in own))
        model(images)
        assert seen == [True] and "layers" not in own
        with pytest.raises(ValueError, match="image size"):
            model(torch.zeros(1, 3, 4, 4, dtype=torch.float64))
        assert "layers" not in vars(model.vit)
        assert type(model.vit.layers) is nn.ModuleList

    def test_another_thread_meanwhile(self, models, images, runs):
        """Each gets what all layers make, whatever the other sees in their place."""
        model, twin = models()
        expected = twin.vit(images).last_hidden_state
        found = []

        def meanwhile(*_):
            handle.remove()
            seen = "layers" in vars(model.vit)
            thread = threading.Thread(target=lambda: found.append((seen, run(images))))
            thread.start()
            thread.join()

        run = functools.partial(type(model.vit).forward, model.vit)
        handle = model.vit.embeddings.register_forward_hook(meanwhile)
        torch.testing.assert_close(model.vit(images).last_hidden_state, expected)
        ((seen, other),) = found
        assert seen
        torch.testing.assert_close(other.last_hidden_state, expected)

    def test_layers_that_are_no_module_any_more(self, models, images, runs):
        results = []
        for model in models():
            layers = list(model.vit.layers)
            del model.vit.layers
            model.vit.layers = layers
            results.append(model(images).logits)
            assert model.vit.layers is layers
            torch.testing.assert_close(copy.deepcopy(model)(images).logits, results[-1])
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert not runs

    def test_another_model_of_the_same_layers(self, models, images, runs):
        """It is not known to the chain, nor is its list of layers."""
        model, twin = models(kind="ViTModel")
        other = make(kind="ViTModel", num_hidden_layers=1)
        expected = []
        for one in (model, twin):
            other.layers[0] = one.layers[1]
            expected.append(other(images).last_hidden_state)
        torch.testing.assert_close(*expected, rtol=0, atol=0)
        assert not runs

    def test_a_replica(self, models, images, runs):
        """As DataParallel makes them: another module with the same hooks."""
        model, _ = models()
        replica = model.vit._replicate_for_data_parallel()
        replica(images)
        assert "layers" not in vars(replica) and not runs


class TestInAGraph:
    def test_whole(self, models, images, runs, fresh_dynamo):
        model, twin = models()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(step(model, images), step(twin, images))
        y = compiled(images).logits
        torch.testing.assert_close(y, twin(images).logits)
        assert len(runs) == 1

    def test_layer_by_layer(self, images, runs, randomize, fresh_dynamo):
        """In as many graphs as without a chain: all layers but the first have one."""
        counts = []
        for fuse in ("auto", "pairs"):
            model = make(num_hidden_layers=4)
            randomize(attach(model, EFFT, fuse=fuse))
            expected = step(model, images)
            counter = CompileCounterWithBackend("eager")
            for layer in model.vit.layers:
                layer.compile(fullgraph=True, backend=counter)
            close(step(model, images), expected)
            counts.append(counter.frame_count)
        assert counts == [2, 2] and len(runs) == 1

    def test_exported(self, models, images, runs):
        model, twin = models()
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images).logits, twin(images).logits)
        assert not runs

    def test_traced(self, models, images, runs):
        model, twin = (one.eval() for one in models(kind="ViTModel", return_dict=False))
        traced = torch.jit.trace(model, images, check_trace=False)
        torch.testing.assert_close(traced(images)[0], twin(images)[0])
        assert not runs


class TestGroupsThatAreExchanged:
    @pytest.mark.parametrize("method", [EFFT, FacTTT(rank=3, dropout=0.0)], ids=str)
    def test_another_group(self, models, images, runs, exchange_groups, method):
        pair = models(method=method)
        for model in pair:
            step(model, images)
            exchange_groups(model)
        close(*(step(model, images) for model in pair))
        assert len(runs) == 2

    def test_one_that_shares_no_down(self, models, images, runs):
        class Own(TensorTrainGroup):
            def down_key(self, site):
                return None

        model, twin = models()
        expected = step(twin, images)
        step(model, images)
        for group in model.factor_bank.children():
            group.__class__ = Own
        close(step(model, images), expected)
        assert [run[2][0].shape[2] for run in runs] == [3, 9]


class TestTheModelIsTheSame:
    def test_keys_modules_and_output(self, models, images, runs):
        model, twin = models()
        assert model.state_dict().keys() == twin.state_dict().keys()
        assert [(n, type(m)) for n, m in model.named_modules()] == [
            (n, type(m)) for n, m in twin.named_modules()
        ]
        found, expected = (one.vit(images) for one in (model, twin))
        assert type(found) is type(expected) and found.keys() == expected.keys()
        assert len(runs) == 1

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
    )
    def test_a_copy_runs_its_own_layers(self, models, images, runs, copied):
        model, twin = models("dinov2")
        model(images)
        clone = copied(model)
        del model
        gc.collect()
        runs.clear()
        close(step(clone, images), step(twin, images))
        with torch.no_grad():
            for one in (clone, twin):
                one.dinov2.encoder.layer[0].mlp.fc1.weight.mul_(1.5)
                next(one.factor_bank.parameters()).mul_(1.5)
        close(step(clone, images), step(twin, images))
        assert len(runs) == 2

    def test_its_memory_is_freed_without_a_collection(self, models, images, runs):
        model, _ = models()
        step(model, images)
        runs.clear()
        gone = weakref.ref(model.vit.layers[0].attention.q_proj.weight)
        gc.disable()
        try:
            del model
            assert gone() is None
        finally:
            gc.enable()

    def test_detach_and_attach_again(self, models, images, runs):
        model, _ = models()
        for method in (LoRA(rank=2, matrices=None), EFFT, EFFT):
            Adapter(model).detach()
            assert not model.vit._forward_pre_hooks and not model.vit._forward_hooks
            assert not model.vit._forward_hooks_always_called
            model(images)
            assert not runs
            attach(model, method)
            model(images)
            assert len(runs) == 1
            runs.clear()

    def test_merge_and_unmerge(self, models, images, runs):
        model, twin = models("dinov2")
        expected = step(twin, images)
        Adapter(model).merge()
        torch.testing.assert_close(model.eval()(images).logits, expected[0])
        assert not runs
        assert Adapter(model).describe().alone is None
        Adapter(model).unmerge()
        close(step(model.train(), images), expected)
        assert len(runs) == 1

    def test_a_batch_of_several_tasks(self, models, images, runs):
        results = []
        for model in models():
            tasks = AdapterSet(Adapter(model))
            tasks.add("a")
            tasks.add("b")
            model.eval()
            runs.clear()
            with tasks.tasks("aba"):
                results.append(model(images).logits)
            assert not runs
        torch.testing.assert_close(*results, rtol=0, atol=0)

    def test_hooks_of_the_bank_are_removed(self, randomize, images, runs):
        model = make(kind="ViTModel")
        adapter = attach(model, EFFT)
        model(images)
        adapter.bank.unwatch(model)
        assert not model._forward_hooks and not model._forward_pre_hooks
        model(images)
        assert len(runs) == 1
        assert "the hooks were removed" in adapter.describe().alone


class TestAttach:
    def test_load(self, models, images, runs, tmp_path):
        Adapter(models()[0]).save(tmp_path / "a.safetensors")
        for fuse, count in (("auto", 1), ("off", 0)):
            model = make()
            load(model, tmp_path / "a.safetensors", fuse=fuse)
            model(images)
            assert len(runs) == count
            runs.clear()

    @pytest.mark.parametrize(
        ("name", "options", "attaching", "why"),
        [
            ("vit", {"hidden_act": "relu"}, {}, "vit.layers.0.mlp.activation_fn is a ReLU"),
            ("vit", {"hidden_act": "gelu_new"}, {}, "activation_fn is a NewGELUActivation"),
            ("vit", {"hidden_act": "gelu_python"}, {}, "a GELU of the blocks is no exact one"),
            ("vit", {"hidden_dropout_prob": 0.1}, {}, "a dropout of the blocks is on"),
            ("vit", {"attention_probs_dropout_prob": 0.1}, {}, "a dropout of the blocks is on"),
            ("vit", {"attn_implementation": "eager"}, {}, "attn_implementation is not 'sdpa'"),
            (
                "vit",
                {"head_dim": 4},
                {"method": METHODS[7]},
                "vit.layers.0 has other sizes",
            ),
            ("dinov2", {"drop_path_rate": 0.1}, {}, "layer.0.drop_path is a Dinov2DropPath"),
            ("dinov2", {"use_swiglu_ffn": True}, {}, "layer.0.mlp is a Dinov2SwiGLUFFN"),
            ("vit", {}, {"targets": "mhsa"}, "vit.layers.0.mlp.fc1 is a Linear"),
            ("vit", {}, {"layers": [1]}, "vit.layers.0.attention.q_proj is a Linear"),
            ("vit", {}, {"method": LoRA(rank=2)}, "vit.layers.0.attention.k_proj is a Linear"),
            ("vit", {}, {"fuse": "off"}, "fuse='off'"),
        ],
        ids=lambda value: str(value),
    )
    def test_what_a_chain_does_not_know(self, name, options, attaching, why):
        description = attach(make(name, **options), **{"method": EFFT, **attaching}).describe()
        assert why in description.alone
        assert {row["fused"] for row in description.rows} == {"alone"}

    @pytest.mark.parametrize(
        ("of", "name", "value", "why"),
        [
            ("attention.k_proj", "bias", None, "only some of q, k and v of vit.layers.1 have"),
            ("", "layernorm_after", nn.LayerNorm(24, bias=False), "a norm of vit.layers.1"),
            ("", "layernorm_after", nn.LayerNorm([1, 24]), "a norm of vit.layers.1"),
            ("attention", "num_attention_heads", 4, "vit.layers.1 has other sizes"),
            ("attention", "o_proj", nn.Identity(), "attention.o_proj is a Identity"),
        ],
        ids=lambda value: str(value),
    )
    def test_a_layer_that_differs(self, of, name, value, why):
        model = make()
        setattr(model.vit.layers[1].get_submodule(of), name, copy.deepcopy(value))
        assert why in attach(model, LoRA(rank=2, matrices=None)).describe().alone

    def test_heads_that_do_not_divide_the_width(self):
        model = make()
        for layer in model.vit.layers:
            layer.attention.num_attention_heads = 5
        alone = attach(model, EFFT).describe().alone
        assert alone == "an attention of the blocks is not the plain one"

    def test_models_that_are_none(self, monkeypatch):
        """Not even where neither package was imported."""
        model = nn.Sequential(nn.Linear(4, 4))
        assert "nor has it" in attach(model, LoRA(rank=1), targets=["0"]).describe().alone
        for name in [name for name in sys.modules if name.startswith(("timm", "transformers"))]:
            monkeypatch.delitem(sys.modules, name)
        assert "nor has it" in chained.chain(model, None)
        assert chain_blocks.kind_of(nn.Linear) is None
        assert not [name for name in sys.modules if name.startswith(("timm", "transformers"))]

    def test_two_of_them(self):
        model = nn.ModuleDict({"a": make(kind="ViTModel"), "b": make(kind="ViTModel")})
        assert "the layers of one ViT" in attach(model, METHODS[7]).describe().alone

    def test_describe_tells_what_is_in_the_chain(self):
        model = make()
        adapter = attach(model, EFFT)
        description = adapter.describe()
        assert description.alone is None
        assert {row["fused"] for row in description.rows} == {"chain"}
        model.vit.layers[0].register_forward_hook(lambda *_: None)
        assert "hooks" in adapter.describe().alone
        model.vit.layers = nn.ModuleList(model.vit.layers)
        assert adapter.describe().alone == "vit.layers was replaced"

    def test_ranks(self, monkeypatch):
        """Of q, k and v side by side it is the sum."""
        monkeypatch.setattr(chains, "MAX_RANK", 8)
        assert attach(make(), EFFT2(rank=8)).describe().alone is None
        alone = attach(make(), LoRA(rank=3, matrices=None)).describe().alone
        assert alone == "the kernels take a rank of 8, not 9"


LARGER = {
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "image_size": 32,
    "patch_size": 8,
}
REPRODUCIBLE = [m for m in METHODS if not (isinstance(m, EFFT2 | LoRA) and m.dropout)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestOnAGpu:
    @pytest.fixture
    def ran(self, monkeypatch):
        found, run = [], chains.run_stacks
        monkeypatch.setattr(chains, "run_stacks", lambda *args: found.append(args) or run(*args))
        return found

    def make(self, name, method, fuse, randomize):
        inner = {} if name == "dinov2" else {"intermediate_size": 768}
        model = make(name, **LARGER, **inner).float().cuda()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5 if p.dim() == 2 else 1)  # larger weights amplify every rounding
        adapter = attach(model, method, fuse=fuse)
        torch.manual_seed(5)
        randomize(adapter, 0.1)
        return model

    def results(self, model, batch, dtype):
        """The output, and all gradients in one vector."""
        model.zero_grad()
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            y = model(batch).logits
        (y.float() if dtype else y).tanh().mean().backward()
        grads = [p.grad.flatten() for p in model.factor_bank.parameters()]
        return y.detach(), torch.cat(grads)

    @pytest.mark.parametrize("name", ["vit", "dinov2"])
    @pytest.mark.parametrize("method", REPRODUCIBLE, ids=str)
    def test_within_the_error_budget(self, randomize, ran, dtype, name, method):
        """Over four batches: of one alone the ratio is chance."""
        model, twin = (self.make(name, method, fuse, randomize) for fuse in ("auto", "off"))
        wide = copy.deepcopy(twin).double()
        for layer in Adapter(twin).layers().values():
            layer.backend = "torch"
        squares = torch.zeros(2, 2)  # of (chain, plain torch) in (output, gradients)
        for _ in range(4):
            batch = torch.randn(9, 3, 32, 32, device="cuda")
            exact = self.results(wide, batch.double(), None)
            for row, one in zip(squares, (model, twin), strict=True):
                found = self.results(one, batch, dtype)
                row += torch.tensor(
                    [relative_error(*pair) ** 2 for pair in zip(found, exact, strict=True)]
                )
        assert len(ran) == 4
        assert (squares[0] <= BUDGET**2 * squares[1]).all(), (squares[0] / squares[1]).sqrt()
