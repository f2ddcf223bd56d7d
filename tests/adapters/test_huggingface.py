"""Hugging Face's ViT, DINOv2 and CLIP: separate q, k, v are one group and share one x·down."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading

import pytest
import torch
from torch import nn

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
    use_backend,
)
from efft_kernels.methods.tensor_train import TensorTrainGroup
from efft_kernels.ops import shared_projection
from efft_kernels.ops.shared_projection import project

transformers = pytest.importorskip("transformers")

D, DEPTH = 16, 2
COMMON = {"hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4}  # fmt: skip


def built(kind, config):
    """A model in float64, no parameter at a special value, the same whenever it is built."""
    torch.manual_seed(5)
    model = kind(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def vit():
    config = transformers.ViTConfig(**COMMON, intermediate_size=4 * D, num_labels=5)
    return built(transformers.ViTForImageClassification, config)


def dinov2(swiglu=False):
    config = transformers.Dinov2Config(**COMMON, mlp_ratio=4, num_labels=5, use_swiglu_ffn=swiglu)
    return built(transformers.Dinov2ForImageClassification, config)


def clip():
    config = transformers.CLIPVisionConfig(**COMMON, intermediate_size=4 * D)
    return built(transformers.CLIPVisionModel, config)


MODELS = {"vit": vit, "dinov2": dinov2, "clip": clip}
METHODS = [
    EFFT1(rank=3, scale=0.7, dropout=0.0),
    EFFT2(rank=(3, 2), scale=0.7, dropout=0.0),
    FacTTT(rank=(2, 3), dropout=0.0),
    FacTTK(rank=3, layer_rank=4, dropout=0.0),
    LoRA(rank=2, scale=0.5),
    KAdaptation(products=2, rank=1),
]
SHARING = METHODS[1:4]  # EFFT1's q, k and v share V, the input side, as well


def adapted(name, method, **options):
    model = MODELS[name]()
    heads = () if name == "clip" else ("head",)
    return model, attach(model, method, **({"modules_to_train": heads} | options))


def output(model, images):
    result = model(pixel_values=images)
    return result.pooler_output if hasattr(result, "pooler_output") else result.logits


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


@pytest.fixture
def projections(monkeypatch, in_torch):
    """The x's that were multiplied by `down` for several linears."""
    seen = []

    def recording(x, down, source):
        seen.append(x)
        return project(x, down, source)

    monkeypatch.setattr(shared_projection, "project", recording)
    return seen


def unshared(model):
    """The same model with every linear computing its own x·down."""
    twin = copy.deepcopy(model)
    for layer in Adapter(twin).layers().values():
        layer.shared_input = None
    return twin


@pytest.mark.parametrize("name", MODELS)
def test_separate_q_k_and_v_are_one_group(randomize, name):
    """The counts and the slices of a fused qkv: q, k, v, o of a layer take successive cores."""
    _, adapter = adapted(name, METHODS[1])
    assert adapter.num_parameters() == (
        D * 5 + 4 * DEPTH * 6  # U [d, 3], V [d, 2], Σ [4L, 3, 2]
    ) + (4 * D * 3 + D * 2 + 2 * DEPTH * 6)
    randomize(adapter)
    assert {s.role for s in adapter.sites} == {"q", "k", "v", "o", "fc1", "fc2"}
    assert {adapter.bank.group_of[s.name] for s in adapter.sites} == {"mhsa", "ffn"}
    group, found = adapter.bank.mhsa, adapter.delta_weights()
    for site in adapter.sites:
        if site.role in ("q", "k", "v", "o"):
            core = group.core[4 * site.block + ("q", "k", "v", "o").index(site.role)]
            expected = 0.7 * (group.U @ core @ group.V.T).T
            torch.testing.assert_close(found[site.name], expected.detach())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_life_of_an_adapter(randomize, images, tmp_path, name, method):
    model, adapter = adapted(name, method)
    plain = MODELS[name]()
    before = output(plain, images)
    torch.testing.assert_close(output(model, images), before, rtol=1e-11, atol=1e-11)
    output(model.train(), images).square().sum().backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter -= 0.1 * parameter.grad
    assert all(delta.any() for delta in adapter.delta_weights().values())
    model.eval()
    randomize(adapter)
    expected = output(model, images)
    assert (expected - before).abs().max() > 1e-3
    dense = MODELS[name]()
    with torch.no_grad():
        for site, delta in adapter.delta_weights().items():
            dense.get_submodule(site).weight += delta
    torch.testing.assert_close(expected, output(dense, images), rtol=1e-9, atol=1e-9)
    adapter.merge()
    torch.testing.assert_close(output(model, images), expected, rtol=1e-9, atol=1e-9)
    adapter.unmerge()
    adapter.save(tmp_path / "a.safetensors")
    twin = MODELS[name]()
    load(twin, tmp_path / "a.safetensors")
    assert torch.equal(output(twin, images), expected)
    adapter.detach()
    assert torch.equal(output(model, images), before)
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in plain.named_modules()
    }
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m._forward_hooks_always_called for m in model.modules())


def test_gated_ffn_of_dinov2_giant(randomize, images):
    model = dinov2(swiglu=True)
    before = output(model, images)
    adapter = attach(model, LoRA(rank=2, matrices=("gate", "fc1", "fc2")))
    expected = {"gate", "fc1", "fc2"} if hasattr(
        model.dinov2.encoder.layer[0].mlp, "gate_proj"
    ) else {"gate_fc1", "fc2"}  # fmt: skip
    assert {s.role for s in adapter.sites} == expected
    randomize(adapter)
    assert (output(model, images) - before).abs().max() > 1e-3
    adapter.detach()
    both = attach(model, EFFT2(rank=2))
    assert {s.role for s in both.sites} == expected | {"q", "k", "v", "o"}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", MODELS)
def test_x_down_is_computed_once_per_attention(randomize, images, projections, name, method):
    model, adapter = adapted(name, method)
    randomize(adapter)
    output(model, images)
    shares = method in METHODS[:4]
    assert len(projections) == (DEPTH if shares else 0)
    assert len({id(x) for x in projections}) == len(projections)
    output(model, images)
    assert len(projections) == (2 * DEPTH if shares else 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS[:4], ids=lambda m: m.name)
@pytest.mark.parametrize("name", MODELS)
def test_sharing_changes_nothing(randomize, images, projections, name, method, training):
    """Output and every gradient, the input's and the heads' included."""
    model, adapter = adapted(name, method)
    randomize(adapter)
    model.train(training)
    twin = unshared(model)

    def run(model):
        x = images.clone().requires_grad_()
        y = output(model, x)
        y.tanh().sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return y.detach(), {"x": x.grad} | trained

    y, found = run(model)
    assert len(projections) == DEPTH
    y_alone, expected = run(twin)
    assert len(projections) == DEPTH
    torch.testing.assert_close(y, y_alone, rtol=1e-11, atol=1e-11)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 1e-9, name
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj", "v_proj"], ["k_proj", "o_proj"]])
def test_some_of_the_three(randomize, images, projections, targets):
    model, adapter = adapted("vit", METHODS[1], targets=targets)
    randomize(adapter)
    y = output(model, images)
    together = isinstance(targets, list) and "v_proj" in targets
    assert len(projections) == (DEPTH if together else 0)
    torch.testing.assert_close(y, output(unshared(model), images), rtol=1e-11, atol=1e-11)


def test_another_x_is_projected_anew(randomize, projections):
    """Cross-attention: k and v see other tokens than q."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))

        def forward(self, x, y):
            return self.q_proj(x), self.k_proj(y), self.v_proj(y)

    torch.manual_seed(0)
    block = nn.ModuleDict({"attn": Cross()})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])}).double()
    adapter = attach(model, METHODS[1], modules_to_train=())
    randomize(adapter)
    x, y = torch.randn(2, 3, 5, D, dtype=torch.float64).unbind()
    found = block["attn"](x, y)
    assert len(projections) == 2
    deltas = list(adapter.delta_weights().values())
    for out, given, (name, layer), delta in zip(
        found, (x, y, y), adapter.layers().items(), deltas, strict=True
    ):
        expected = nn.functional.linear(given, layer.weight + delta, layer.bias)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.usefixtures("in_torch")
def test_x_changed_in_place_is_projected_anew(randomize):
    class Shifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))

        def forward(self, x):
            return self.q_proj(x), self.k_proj(x.add_(1.0)), self.v_proj(x)

    torch.manual_seed(0)
    block = nn.ModuleDict({"attn": Shifting()})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])}).double()
    adapter = attach(model, METHODS[1], modules_to_train=())
    randomize(adapter)
    x = torch.randn(3, 5, D, dtype=torch.float64)
    with torch.no_grad():
        found, expected = block["attn"](x.clone()), unshared(model)["blocks"][0]["attn"](x.clone())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


class TestDropout:
    def test_of_factors(self, randomize, images, projections):
        """EFFT's masks: drawn from torch's generator; the shared U has one mask for q, k and v."""
        model, adapter = adapted("vit", EFFT2(rank=3, dropout=0.5, scale=0.7))
        randomize(adapter)
        quiet = output(model, images)
        model.train()
        torch.manual_seed(4)
        first, second = output(model, images), output(model, images)
        torch.manual_seed(4)
        assert torch.equal(output(model, images), first)
        assert (first - second).abs().max() > 1e-3 and (first - quiet).abs().max() > 1e-3
        assert len(projections) == DEPTH * 4

    @pytest.mark.usefixtures("in_torch")
    def test_of_factors_is_unbiased(self, randomize):
        model, adapter = adapted("vit", EFFT2(rank=2, dropout=0.3, scale=1.0))
        randomize(adapter)
        attention = model.vit.layers[0].attention
        x = torch.randn(1, 1, D, dtype=torch.float64)
        seen = []
        attention.v_proj.register_forward_hook(lambda m, args, y: seen.append(y[0, 0].detach()))
        with torch.no_grad():
            attention(x)
            attention.train()
            for _ in range(800):
                attention(x)
        expected, drawn = seen[0], torch.stack(seen[1:])
        sigma = drawn.std(0) / len(drawn) ** 0.5
        assert sigma.min() > 1e-4
        assert ((drawn.mean(0) - expected).abs() < 5 * sigma).all()

    @pytest.mark.parametrize("kind", [FacTTT, FacTTK])
    def test_of_activations_does_not_share(self, randomize, images, projections, kind):
        model, adapter = adapted("vit", kind(rank=3, dropout=0.5))
        randomize(adapter)
        quiet = output(model, images)
        assert len(projections) == DEPTH
        noisy = output(model.train(), images)
        assert len(projections) == DEPTH and (noisy - quiet).abs().max() > 1e-3

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize(
        "method", [EFFT2(rank=3, dropout=0.5), FacTTT(rank=3, dropout=0.5)], ids=lambda m: m.name
    )
    @pytest.mark.parametrize("name", MODELS)
    def test_checkpointing(self, randomize, images, monkeypatch, name, method, use_reentrant):
        """A segment draws the masks that its linears draw one by one."""
        model, adapter = adapted(name, method)
        randomize(adapter)
        model.train()
        twin = copy.deepcopy(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert model.is_gradient_checkpointing

        def gradients(model):
            torch.manual_seed(3)
            x = images.clone().requires_grad_()
            y = output(model, x)
            torch.randn(7)
            y.tanh().sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            return {"x": x.grad} | grads

        found = gradients(model)
        monkeypatch.setattr(TensorTrainGroup, "joint", False)
        expected = gradients(twin)
        for key, grad in expected.items():
            assert grad.norm() > 1e-9, key
            torch.testing.assert_close(found[key], grad, rtol=1e-10, atol=1e-12)
        assert_nothing_is_held(model)


def shared_of(model):
    found = {
        id(layer.shared_input): layer.shared_input
        for layer in Adapter(model).layers().values()
        if layer.shared_input
    }
    assert len(found) == DEPTH
    return list(found.values())


def assert_nothing_is_held(model):
    for shared in shared_of(model):
        assert not shared.active
        assert not any(isinstance(value, torch.Tensor | tuple) for value in vars(shared).values())


@pytest.mark.usefixtures("in_torch")
def test_nothing_is_held_between_forwards(randomize, images):
    model, adapter = adapted("vit", METHODS[1])
    randomize(adapter)
    output(model, images)
    assert_nothing_is_held(model)
    before = model.vit.layers[0].attention.q_proj(torch.ones(2, D, dtype=torch.float64))
    assert before.shape == (2, D)  # alone, outside its attention
    assert_nothing_is_held(model)


@pytest.mark.parametrize("where", ["k_proj", "o_proj"])
def test_an_exception_leaves_nothing_behind(randomize, images, projections, where):
    model, adapter = adapted("vit", METHODS[1])
    randomize(adapter)
    expected = output(model, images)
    projections.clear()

    def failing(module, args):
        raise ArithmeticError("on purpose")

    hook = model.vit.layers[1].attention.get_submodule(where).register_forward_pre_hook(failing)
    with pytest.raises(ArithmeticError, match="on purpose"):
        output(model, images + 1)
    assert len(projections) == 2
    assert_nothing_is_held(model)
    hook.remove()
    assert torch.equal(output(model, images), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_share_among_themselves_alone(randomize, images, projections, tmp_path, how):
    model, adapter = adapted("vit", METHODS[1])
    randomize(adapter)
    expected = output(model, images)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "m.pt")
        twin = torch.load(tmp_path / "m.pt", weights_only=False)
    assert not {id(s) for s in shared_of(model)} & {id(s) for s in shared_of(twin)}
    projections.clear()
    assert torch.equal(output(twin, images), expected) and len(projections) == DEPTH
    with torch.no_grad():
        for parameter in Adapter(twin).parameters():
            parameter.zero_()
    assert (output(twin, images) - expected).abs().max() > 1e-3
    assert torch.equal(output(model, images), expected)
    Adapter(twin).detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert shared_of(model)[0] and torch.equal(output(model, images), expected)


def test_detach_keeps_the_users_hooks(randomize, images):
    model, adapter = adapted("vit", METHODS[1])
    seen = []
    attention = model.vit.layers[0].attention
    attention.register_forward_hook(lambda *_: seen.append("after"), always_call=True)
    attention.register_forward_pre_hook(lambda *_: seen.append("before"))
    adapter.detach()
    output(model, images)
    assert seen == ["before", "after"]
    assert len(attention._forward_hooks) == len(attention._forward_hooks_always_called) == 1


def test_merged_needs_no_projection(randomize, images, projections):
    model, adapter = adapted("vit", METHODS[1])
    randomize(adapter)
    adapter.merge()
    output(model, images)
    assert not projections


def test_the_cpu_s_kernels_share_nothing(randomize, images, monkeypatch):
    """They make x·down along with the rest, in less time than a second pass over y takes."""
    model, adapter = adapted("vit", METHODS[1])
    randomize(adapter)
    with use_backend("torch"):
        expected = output(model, images)
    monkeypatch.setattr(shared_projection, "project", None)
    torch.testing.assert_close(output(model, images), expected, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(shared_projection, "why_not", lambda name: f"{name} is not built")
    with pytest.raises(TypeError):
        output(model, images)


def test_inference_mode(randomize, images, projections):
    model, adapter = adapted("vit", METHODS[1])
    randomize(adapter)
    expected = output(model, images)
    with torch.inference_mode():
        found = output(model, images)
    assert len(projections) == DEPTH  # where nobody counts writes in place, P is not shared
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", ["split", "merged"])
def test_an_explicit_strategy_is_each_linears_own(randomize, images, projections, strategy):
    model, adapter = adapted("vit", METHODS[1])
    randomize(adapter)
    expected = output(model, images)
    projections.clear()
    for layer in adapter.layers().values():
        layer.strategy = strategy
    torch.testing.assert_close(output(model, images), expected, rtol=1e-10, atol=1e-10)
    assert not projections


def test_autocast_shares_in_the_ambient_dtype(randomize, images, projections):
    model, adapter = adapted("vit", METHODS[1])
    randomize(adapter)
    model.float()
    twin = unshared(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, alone = output(model, images.float()), output(twin, images.float())
    exact = output(twin.double(), images)
    assert len(projections) == DEPTH
    budget = 2 * (alone.double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= budget
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in adapter.parameters())


def test_two_threads_do_not_mix_their_inputs(randomize):
    """Serving one model from several threads: each gets its own x's projection or none."""
    model, adapter = adapted("vit", METHODS[1])
    randomize(adapter)
    shared = shared_of(model)[0]
    down = torch.randn(D, 3, dtype=torch.float64)
    xs = torch.randn(2, 4, D, dtype=torch.float64).unbind()
    shared.open(None, ())
    wrong, stop = [], threading.Event()

    def use(x):
        right = x @ down
        while not stop.is_set() and not wrong:
            if not torch.equal(shared.projection(x, down), right):
                wrong.append(x)

    threads = [threading.Thread(target=use, args=(x,)) for x in xs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        threads[0].join(0.3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("method", [METHODS[1], METHODS[2]], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_compiles_to_one_graph(randomize, images, name, method):
    torch._dynamo.reset()
    model, adapter = adapted(name, method, layers=[0])
    randomize(adapter)
    expected = output(model, images)
    expected.tanh().sum().backward()
    grads = [p.grad.clone() for p in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.grad = None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y = output(compiled, images)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.tanh().sum().backward()
    for parameter, grad in zip(adapter.parameters(), grads, strict=True):
        assert grad.norm() > 1e-9
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-11)
    for layer in adapter.layers().values():
        assert not layer.shared_input or not layer.shared_input.active
    torch._dynamo.reset()
    gc.collect()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_rows_of_different_tasks(randomize, images, projections, method):
    """The mixed batch does not take P from the attention: each row has its own down."""
    model, adapter = adapted("vit", method)
    tasks = AdapterSet(adapter)
    for name in "abc":
        randomize(adapter)
        tasks.add(name)
    alone = {}
    for name in "abc":
        tasks.use(name)
        with torch.no_grad():
            alone[name] = output(model, images)
    with tasks.tasks(["c", "a", "c"]), torch.no_grad():
        output(model, images)  # the first call also looks at the layout, with the model's own
        projections.clear()
        mixed = output(model, images)
    assert not projections
    expected = torch.stack([alone[t][i] for i, t in enumerate("cac")])
    torch.testing.assert_close(mixed, expected, rtol=1e-11, atol=1e-12)
