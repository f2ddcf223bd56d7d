"""FusedEFFTLinear as a drop-in nn.Linear, and FactorBank."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from efft_kernels import (
    EFFT2,
    FactorBank,
    FacTTT,
    FusedEFFTLinear,
    LoRA,
    attach,
    use_backend,
)
from efft_kernels.methods.joint import Kind
from efft_kernels.methods.tensor_train import TensorTrainGroup
from efft_kernels.nn import TracedTasks, _shallow_copy
from efft_kernels.ops.mixed_batch import tasks_linear
from efft_kernels.ops.recompute import Source

FACTOR_KEYS = ["factors.U", "factors.V", "factors.core"]
HALVES = (torch.bfloat16, torch.float16)


def dense_delta(layer):
    """ΔW from U, V, Σ of the layer's own group: s·V·Σ_g^T·U^T for the g-th block of rows."""
    group = layer.factors
    u, v, core = (t.detach().double() for t in (group.U, group.V, group.core))
    scale = group.scale.item() if isinstance(group.scale, torch.Tensor) else group.scale
    return torch.cat([scale * (v @ matrix.T @ u.T) for matrix in core])


@pytest.fixture
def layer(randomize):
    layer = FusedEFFTLinear(7, 15, rank=(3, 2), scale=0.7, slices=3)
    randomize(layer.factors)
    return layer


def hook_weight_norm(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(linear)


def same_linear(a, b):
    return a.weight is b.weight and a.bias is b.bias


class TestDropIn:
    def test_is_a_linear(self, layer):
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (7, 15)
        assert sorted(layer.state_dict()) == sorted(["weight", "bias", *FACTOR_KEYS])

    def test_names_its_attributes(self, layer):
        assert {"weight", "factors", "merge"} <= set(dir(layer)) and "base_layer" not in dir(layer)

    def test_without_bias(self):
        layer = FusedEFFTLinear(7, 5, bias=False, rank=2)
        assert layer.bias is None and "bias" not in layer.state_dict()
        x = torch.randn(4, 7)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight))

    def test_repr_tells_shape_and_choices(self, layer):
        assert "in_features=7, out_features=15, bias=True" in repr(layer)
        assert "U=[7, 3], V=[5, 2], core=[3, 3, 2]" in repr(layer)
        chosen = FusedEFFTLinear(7, 5, rank=2, backend="torch", strategy="split")
        assert "backend='torch'" in repr(chosen) and "strategy='split'" in repr(chosen)
        layer.merge()
        assert "merged=True" in repr(layer)
        layer.unmerge()
        assert "merged" not in repr(layer)

    @pytest.mark.parametrize("init", ["u", "v"])
    @pytest.mark.parametrize("learn_scale", [False, True])
    def test_starts_as_the_linear(self, init, learn_scale):
        layer = FusedEFFTLinear(7, 15, rank=3, slices=3, init=init, learn_scale=learn_scale)
        x = torch.randn(4, 7)
        assert torch.equal(layer.delta_weight(), torch.zeros(15, 7))
        plain = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), plain, rtol=1e-6, atol=1e-6)
        with use_backend("torch"):
            assert torch.equal(layer(x), plain)
        zero, random = (layer.factors.V, layer.factors.U)[:: 1 if init == "v" else -1]
        assert not zero.any() and random.all() and layer.factors.core.all()

    @pytest.mark.parametrize("init", ["u", "v"])
    def test_first_step_can_leave_zero(self, init):
        """The gradient of the factor at zero is not zero, so training starts."""
        layer = FusedEFFTLinear(7, 15, rank=3, slices=3, init=init)
        layer(torch.randn(4, 7)).pow(2).sum().backward()
        assert getattr(layer.factors, init.upper()).grad.norm() > 0

    def test_default_initialisation_of_the_weight_is_that_of_linear(self):
        torch.manual_seed(3)
        expected = nn.Linear(7, 15)
        torch.manual_seed(3)
        layer = FusedEFFTLinear(7, 15, rank=3)
        assert torch.equal(layer.weight, expected.weight) and torch.equal(layer.bias, expected.bias)

    @pytest.mark.parametrize("slices", [1, 3])
    @pytest.mark.parametrize("learn_scale", [False, True])
    @pytest.mark.parametrize("lead", [(4,), (), (2, 3), (0,)])
    def test_forward_is_the_dense_formula(self, randomize, slices, learn_scale, lead):
        layer = FusedEFFTLinear(
            7,
            15,
            rank=(3, 2),
            scale=0.7,
            slices=slices,
            learn_scale=learn_scale,
            dtype=torch.float64,
        )
        randomize(layer.factors)
        x = torch.randn(*lead, 7, dtype=torch.float64)
        delta = dense_delta(layer)
        assert delta.norm() > 0.01
        torch.testing.assert_close(layer.delta_weight(), delta)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight + delta, layer.bias))

    def test_trains_like_the_dense_layer(self, randomize):
        layer = FusedEFFTLinear(7, 15, rank=3, slices=3, learn_scale=True, dtype=torch.float64)
        randomize(layer.factors)
        x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
        leaves = [x, *layer.parameters()]
        found = torch.autograd.grad(layer(x).sin().sum(), leaves)
        group = layer.factors
        delta = torch.einsum("kr,gro,no->gnk", group.U, group.core, group.V).flatten(0, 1)
        y = F.linear(x, layer.weight + group.scale * delta, layer.bias)
        expected = torch.autograd.grad(y.sin().sum(), leaves)
        for a, b in zip(found, expected, strict=True):
            assert b.norm() > 0
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("training", [True, False])
    def test_dropout_acts_in_training_alone(self, randomize, training):
        layer = FusedEFFTLinear(7, 15, rank=3, slices=3, dropout=0.5).train(training)
        randomize(layer.factors)
        x = torch.randn(4, 7)
        outputs = [layer(x) for _ in range(3)]
        assert torch.equal(outputs[0], outputs[1]) == (not training)
        exact = F.linear(x, layer.weight + dense_delta(layer).float(), layer.bias)
        assert torch.allclose(outputs[2], exact, atol=1e-5) == (not training)

    def test_backend_and_strategy_are_used(self, layer):
        layer.strategy = "fused"
        layer.backend = "torch"
        with pytest.raises(ValueError, match="strategy must be one of"):
            layer(torch.randn(2, 7))
        layer.backend = "nothing"
        with pytest.raises(ValueError, match="backend must be"):
            layer(torch.randn(2, 7))

    def test_nan_weight_is_not_hidden(self, layer):
        with torch.no_grad():
            layer.weight[0, 0] = torch.nan
        assert layer(torch.randn(2, 7))[:, 0].isnan().all()


class TestFromLinear:
    def test_keeps_the_very_same_tensors(self):
        linear = nn.Linear(7, 15)
        linear.weight.requires_grad_(False)
        layer = FusedEFFTLinear.from_linear(linear, rank=3, slices=3)
        assert same_linear(layer, linear) and not layer.weight.requires_grad
        assert type(linear) is nn.Linear and sorted(linear.state_dict()) == ["bias", "weight"]

    @pytest.mark.parametrize("training", [True, False])
    def test_keeps_hooks_and_training_flag(self, training):
        linear = nn.Linear(7, 15).train(training)
        seen = []
        handle = linear.register_forward_hook(lambda *_: seen.append("forward"))
        linear.register_full_backward_hook(lambda *_: seen.append("backward"))
        layer = FusedEFFTLinear.from_linear(linear, rank=3)
        assert layer.training is training and layer.factors.training is training
        layer(torch.randn(2, 7)).sum().backward()
        assert seen == ["forward", "backward"]
        handle.remove()
        layer(torch.randn(2, 7))
        assert seen == ["forward", "backward"]

    def test_does_not_draw_random_numbers_for_the_weight(self):
        linear = nn.Linear(64, 64)
        before = linear.weight.clone()
        FusedEFFTLinear.from_linear(linear, rank=3)
        assert torch.equal(linear.weight, before)

    def test_refuses_what_is_no_plain_linear(self):
        for module in (nn.Identity(), FusedEFFTLinear(7, 5, rank=2), nn.LazyLinear(3), None):
            with pytest.raises(TypeError) as error:
                FusedEFFTLinear.from_linear(module)
            assert f"linear must be an nn.Linear itself, got {type(module).__name__}" in str(
                error.value
            )

    def test_refuses_a_site_the_bank_does_not_have(self):
        bank = FactorBank({}, {})
        for site in ("elsewhere", None):
            with pytest.raises(ValueError, match="site must be one of the bank's sites"):
                FusedEFFTLinear.from_linear(nn.Linear(7, 5), bank=bank, site=site)

    def test_to_linear_is_the_way_back(self, layer):
        seen = []
        layer.register_forward_hook(lambda *_: seen.append(1))
        linear = layer.to_linear()
        assert type(linear) is nn.Linear and same_linear(linear, layer)
        assert vars(linear).keys() == vars(nn.Linear(2, 2)).keys()
        assert sorted(linear.state_dict()) == ["bias", "weight"]
        linear(torch.randn(2, 7))
        assert seen == [1]
        assert layer.factors is not None

    def test_to_linear_of_a_merged_layer_keeps_the_merged_weight(self, layer):
        x = torch.randn(4, 7)
        expected = layer.eval()(x)
        layer.merge()
        torch.testing.assert_close(layer.to_linear()(x), expected)


class TestDtypesAndDevices:
    @pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
    def test_factors_are_at_least_float32(self, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for layer in (
            FusedEFFTLinear(7, 15, rank=3, dtype=dtype),
            FusedEFFTLinear.from_linear(nn.Linear(7, 15, dtype=dtype), rank=3),
        ):
            assert layer.weight.dtype == layer.bias.dtype == dtype
            assert {p.dtype for p in layer.factors.parameters()} == {wide}
            y = layer(torch.randn(2, 7, dtype=dtype))
            y.sum().backward()
            assert y.dtype == dtype and layer.factors.V.grad.dtype == wide

    @pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
    def test_to_dtype(self, layer, dtype):
        x = torch.randn(4, 7)
        expected = layer(x)
        layer.to(dtype)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        tolerance = {torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
        torch.testing.assert_close(layer(x.to(dtype)).float(), expected, rtol=0, atol=tolerance)

    def test_meta_then_real(self):
        layer = FusedEFFTLinear(7, 15, rank=3, slices=3, learn_scale=True, device="meta")
        assert all(p.is_meta for p in layer.parameters())
        assert layer(torch.empty(2, 7, device="meta")).shape == (2, 15)
        layer.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(torch.nan)
        layer.reset_parameters()
        assert all(p.isfinite().all() for p in layer.parameters())
        assert layer.weight.std() > 0 and layer.factors.scale.item() == 1.0
        assert torch.equal(layer.delta_weight(), torch.zeros(15, 7))

    def test_made_under_a_device_context(self):
        with torch.device("meta"):
            layer = FusedEFFTLinear(7, 15, rank=3)
        assert all(p.is_meta for p in layer.parameters())

    def test_to_meta(self, layer):
        assert all(p.is_meta for p in layer.to("meta").parameters())


class TestCopies:
    def check_independent(self, copied, layer):
        x = torch.randn(4, 7)
        expected = layer(x).detach()
        assert torch.equal(copied(x), expected)
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in layer.parameters()}
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1.0)
        assert torch.equal(layer(x), expected) and not torch.equal(copied(x), expected)

    def test_deepcopy(self, layer):
        self.check_independent(copy.deepcopy(layer), layer)

    def test_pickle(self, layer):
        self.check_independent(pickle.loads(pickle.dumps(layer)), layer)

    def test_torch_save(self, layer):
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        self.check_independent(torch.load(file, weights_only=False), layer)

    @pytest.mark.parametrize("assign", [False, True])
    def test_load_state_dict(self, layer, assign):
        other = FusedEFFTLinear(7, 15, rank=(3, 2), scale=0.7, slices=3)
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        other.load_state_dict(state, assign=assign)
        assert (other.factors.U.data_ptr() == state["factors.U"].data_ptr()) is assign
        x = torch.randn(4, 7)
        assert torch.equal(other(x), layer(x))

    def test_assign_onto_meta(self, layer):
        other = FusedEFFTLinear(7, 15, rank=(3, 2), scale=0.7, slices=3, device="meta")
        other.load_state_dict(layer.state_dict(), assign=True)
        x = torch.randn(4, 7)
        assert torch.equal(other(x), layer(x))

    def test_linear_checkpoint_loads(self, layer):
        linear = nn.Linear(7, 15)
        missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
        assert sorted(missing) == FACTOR_KEYS and not unexpected
        assert torch.equal(layer.weight, linear.weight)

    def test_a_banked_layer_copied_alone_keeps_working(self, make_vit, randomize):
        model = make_vit()
        randomize(attach(model, EFFT2(rank=3, dropout=0.0)))
        layer = model.blocks[1].attn.qkv
        x = torch.randn(4, 12)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(copied(x), layer(x))
            assert copied._bank[0] is not layer._bank[0]
            assert torch.equal(copied.delta_weight(), layer.delta_weight())


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
    def test_unmerge_is_bit_exact(self, layer, dtype):
        layer = FusedEFFTLinear.from_linear(nn.Linear(7, 15, dtype=dtype), rank=3, slices=3)
        with torch.no_grad():
            for parameter in layer.factors.parameters():
                parameter.normal_()
        base, bits = layer.weight, layer.weight.clone()
        for _ in range(3):
            layer.merge()
            assert layer.merged and not torch.equal(layer.weight, bits)
            layer.unmerge()
            assert layer.weight is base and torch.equal(layer.weight, bits) and not layer.merged

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
    def test_merged_weight_is_rounded_once(self, dtype):
        layer = FusedEFFTLinear.from_linear(nn.Linear(7, 15, dtype=dtype), rank=3, slices=3)
        with torch.no_grad():
            for parameter in layer.factors.parameters():
                parameter.normal_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = (layer.weight.to(wide) + dense_delta(layer).to(wide)).to(dtype)
        layer.merge()
        assert layer.weight.dtype == dtype
        if dtype in HALVES:
            assert torch.equal(layer.weight, expected)
        else:  # ΔW may differ in its last bits by the order of its sums
            bound = 4 * torch.finfo(dtype).eps * expected.abs().max()
            assert (layer.weight - expected).abs().max() <= bound

    def test_merged_output_is_the_unmerged(self, layer):
        x = torch.randn(4, 7)
        expected = layer.eval()(x)
        assert not torch.allclose(expected, F.linear(x, layer.weight, layer.bias))
        layer.merge()
        torch.testing.assert_close(layer(x), expected)

    def test_training_while_merged_is_refused(self, layer):
        x = torch.randn(2, 7)
        layer.train().merge()
        with pytest.raises(RuntimeError, match=r"merged.*unmerge\(\).*eval\(\)"):
            layer(x)
        with torch.no_grad():
            layer(x)
        layer.eval()(x)
        layer.unmerge()
        layer.train()(x)

    def test_twice_is_once(self, layer):
        base = layer.weight
        layer.merge()
        merged = layer.weight.clone()
        layer.merge()
        assert torch.equal(layer.weight, merged)
        layer.unmerge()
        layer.unmerge()
        assert layer.weight is base

    @pytest.mark.parametrize("requires_grad", [True, False])
    def test_keeps_requires_grad(self, layer, requires_grad):
        layer.weight.requires_grad_(requires_grad)
        layer.merge()
        assert layer.weight.requires_grad is requires_grad
        layer.unmerge()
        assert layer.weight.requires_grad is requires_grad

    def test_moved_while_merged(self, layer):
        """The kept base goes where the layer goes."""
        base = layer.weight.clone()
        layer.merge()
        layer.to(torch.float64)
        layer.unmerge()
        assert layer.weight.dtype == torch.float64 and torch.equal(layer.weight, base.double())
        layer.merge()
        layer.to("meta")
        layer.unmerge()
        assert layer.weight.is_meta

    def test_copied_while_merged(self, layer):
        base = layer.weight.clone()
        layer.merge()
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert copied.merged
            copied.unmerge()
            assert torch.equal(copied.weight, base)
        assert layer.merged

    def test_state_dict_holds_the_base_while_merged(self, layer):
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        base = layer.weight
        layer.merge()
        assert layer.state_dict(keep_vars=True)["base_weight"] is base
        state = layer.state_dict()
        assert not state["base_weight"].requires_grad
        assert torch.equal(state.pop("base_weight"), before["weight"])
        assert torch.equal(state.pop("weight"), before.pop("weight") + layer.delta_weight())
        assert state.keys() == before.keys()
        layer.unmerge()
        assert "base_weight" not in layer.state_dict()

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("into_merged", [False, True])
    @pytest.mark.parametrize("taken_merged", [False, True])
    def test_a_state_taken_or_loaded_while_merged_is_the_same_layer(
        self, layer, randomize, taken_merged, into_merged, assign
    ):
        x = torch.randn(4, 7)
        layer.eval()
        expected, base = layer(x), layer.weight.clone()
        if taken_merged:
            layer.merge()
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        other = FusedEFFTLinear(7, 15, rank=(3, 2), scale=0.7, slices=3).eval()
        randomize(other.factors)
        if into_merged:
            other.merge()
        other.load_state_dict(state, assign=assign)
        assert not other.merged and torch.equal(other.weight, base)
        assert torch.equal(other(x), expected)

    def test_a_part_of_a_state_loaded_while_merged(self, layer):
        """New factors alone: the old ΔW must not stay in the weight."""
        base, factors = layer.weight.clone(), layer.factors.state_dict()
        part = {f"factors.{name}": 2 * tensor for name, tensor in factors.items()}
        layer.merge()
        layer.load_state_dict(part, strict=False)
        assert torch.equal(layer.weight, base) and torch.equal(layer.factors.U, part["factors.U"])
        x = torch.randn(2, 7)
        assert torch.allclose(layer(x), F.linear(x, base + dense_delta(layer).float(), layer.bias))

    def test_a_plain_linear_does_not_take_a_merged_state_by_mistake(self, layer):
        layer.merge()
        state = {n: t for n, t in layer.state_dict().items() if not n.startswith("factors.")}
        with pytest.raises(RuntimeError, match=r"Unexpected.*base_weight"):
            nn.Linear(7, 15).load_state_dict(state)

    @pytest.mark.parametrize("requires_grad", [True, False])
    def test_requires_grad_set_while_merged_is_kept(self, layer, requires_grad):
        layer.weight.requires_grad_(not requires_grad)
        layer.merge()
        layer.requires_grad_(requires_grad)
        layer.unmerge()
        assert layer.weight.requires_grad is requires_grad

    @pytest.mark.parametrize("requires_grad", [True, False])
    def test_merged_in_inference_mode(self, layer, requires_grad):
        """The merged weight takes part in autograd afterwards."""
        base = layer.weight.requires_grad_(requires_grad)
        layer.eval()
        with torch.inference_mode():
            layer.merge()
        assert not layer.weight.is_inference() and layer.weight.requires_grad is requires_grad
        x = torch.randn(2, 7, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, (base + dense_delta(layer).float()).sum(0).expand(2, 7))
        with torch.inference_mode():
            layer.unmerge()
        assert layer.weight is base

    @pytest.mark.parametrize("how", ["prune", "weight_norm", "parametrize"])
    def test_a_weight_that_is_computed_later_is_not_merged(self, layer, how):
        if how == "prune":
            prune.l1_unstructured(layer, "weight", 0.3)
        elif how == "weight_norm":
            hook_weight_norm(layer)
        else:
            nn.utils.parametrizations.weight_norm(layer)
        x = torch.randn(4, 7)
        expected = layer.eval()(x)
        with pytest.raises(RuntimeError, match=r"a parameter of the layer to merge.*prune\.remove"):
            layer.merge()
        assert not layer.merged and torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "compute",
    [
        hook_weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        lambda linear: prune.random_unstructured(linear, "weight", 0.3),
        lambda linear: prune.identity(linear, "weight"),
    ],
    ids=[
        "weight_norm",
        "spectral_norm",
        "new weight_norm",
        "orthogonal",
        "prune",
        "prune.identity",
    ],
)
def test_computed_weights_are_refused_with_the_way_out(compute, unchanged):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    compute(model[0])
    with (
        unchanged(model, swapped=True),
        pytest.raises(TypeError, match=r"target '0' must hold its weight as a parameter.*remove"),
    ):
        attach(model, LoRA(rank=2), targets="0", modules_to_train=())
    with pytest.raises(TypeError, match=r"linear must hold its weight as a parameter"):
        FusedEFFTLinear.from_linear(model[0], rank=2)


def test_made_permanent_a_computed_weight_is_adapted(randomize):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    prune.l1_unstructured(model[0], "weight", 0.3)
    prune.l1_unstructured(model[0], "bias", 0.3)  # merging leaves the bias alone
    prune.remove(model[0], "weight")
    adapter = attach(model, LoRA(rank=2, matrices=None), targets="0", modules_to_train=())
    randomize(adapter)
    x = torch.randn(4, 7)
    expected, base = model.eval()(x), model[0].weight.clone()
    adapter.merge()
    torch.testing.assert_close(model(x), expected)
    adapter.unmerge()
    assert torch.equal(model[0].weight, base) and torch.equal(model(x), expected)


BAD_OPTIONS = [
    ({"rank": 0}, ValueError, ["rank must be at least 1", "0"]),
    ({"rank": -4}, ValueError, ["rank must be at least 1", "-4"]),
    ({"rank": (3, 0)}, ValueError, ["rank must be at least 1", "(3, 0)"]),
    ({"rank": 8}, ValueError, ["rank must be at most min(K, N)=7", "K=7", "N=15", "got 8"]),
    ({"rank": (2, 8)}, ValueError, ["rank must be at most min(K, N)=7", "(2, 8)"]),
    ({"rank": 2.0}, TypeError, ["rank must be an int or a pair", "2.0"]),
    ({"rank": True}, TypeError, ["rank must be an int or a pair", "True"]),
    ({"rank": "16"}, TypeError, ["rank must be an int or a pair", "'16'"]),
    ({"rank": (1, 2, 3)}, TypeError, ["rank must be an int or a pair", "(1, 2, 3)"]),
    ({"rank": None}, TypeError, ["rank must be an int or a pair", "None"]),
    ({"slices": 2}, ValueError, ["slices must divide out_features N=15", "2"]),
    ({"slices": 0}, ValueError, ["slices must divide out_features N=15", "0"]),
    ({"slices": -3}, ValueError, ["slices must divide out_features N=15", "-3"]),
    ({"slices": 3.0}, TypeError, ["slices must be an int", "float"]),
    ({"slices": True}, TypeError, ["slices must be an int", "bool"]),
    ({"scale": "big"}, TypeError, ["scale must be a number", "str"]),
    ({"scale": float("nan")}, ValueError, ["scale must be finite", "nan"]),
    ({"scale": float("inf")}, ValueError, ["scale must be finite", "inf"]),
    ({"init": "w"}, ValueError, ["init must be one of ('u', 'v')", "'w'"]),
    ({"dropout": 1.0}, ValueError, ["dropout must be at least 0.0 and below 1.0", "1.0"]),
    ({"dropout": -0.1}, ValueError, ["dropout must be at least 0.0 and below 1.0", "-0.1"]),
    ({"dropout": None}, TypeError, ["dropout must be a number", "NoneType"]),
]


@pytest.mark.parametrize(("options", "kind", "texts"), BAD_OPTIONS)
def test_bad_options(options, kind, texts):
    linear = nn.Linear(7, 15)
    before = dict(vars(linear))
    options = {"rank": 3} | options
    for make in (
        lambda: FusedEFFTLinear(7, 15, **options),
        lambda: FusedEFFTLinear.from_linear(linear, **options),
    ):
        with pytest.raises(kind) as error:
            make()
        assert all(text in str(error.value) for text in texts), str(error.value)
    assert vars(linear) == before


@pytest.mark.parametrize(
    ("options", "text"),
    [({"backend": "tpu"}, "backend must be"), ({"strategy": "best"}, "strategy must be")],
)
def test_bad_backend_or_strategy_is_refused_at_first_use(options, text):
    layer = FusedEFFTLinear(7, 15, rank=3, **options)
    with pytest.raises(ValueError, match=text):
        layer(torch.randn(2, 7))


def test_what_made_x_is_looked_at_where_a_backward_may_follow(layer):
    x = torch.randn(2, 7)
    with torch.no_grad():
        layer(x)
    assert layer.input_from is None
    torch.jit.trace(layer, x, check_trace=False)
    assert layer.input_from is None
    layer.factors.requires_grad_(False)
    layer(x)
    assert layer.input_from is None
    layer.factors.requires_grad_(True)
    layer(x)
    assert layer.input_from == "kept"


def test_what_made_x_is_looked_at_once(layer, monkeypatch):
    """On the CPU, while a GPU captures a graph or not."""
    makes, looked = Source.makes, []
    monkeypatch.setattr(Source, "makes", lambda *of: looked.append(1) or makes(*of))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        layer(F.gelu(torch.randn(2, 7, requires_grad=True) * 1))
        assert layer.input_from == "GELU"
    assert looked == [1]


def test_bad_input_to_forward(layer):
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., K=7\], got \(2, 8\)"):
        layer(torch.randn(2, 8))
    with pytest.raises(TypeError, match=r"x must be float64, float32.*got torch\.int64"):
        layer(torch.ones(2, 7, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"weight must have x's dtype torch.float64"):
        layer(torch.randn(2, 7, dtype=torch.float64))


class TestFactorBank:
    def test_owns_each_factor_once(self, make_vit):
        model = make_vit()
        adapter = attach(model, EFFT2(rank=3))
        keys = [key for key in model.state_dict() if key.startswith("factor_bank.")]
        assert sorted(keys) == sorted(
            f"factor_bank.{group}.{name}"
            for group in ("mhsa", "ffn")
            for name in ("U", "V", "core")
        )
        assert len(list(adapter.parameters())) == 6
        assert not any(
            isinstance(child, FactorBank) for block in model.blocks for child in block.modules()
        )

    def test_reset_makes_every_increment_zero(self, make_vit, randomize):
        model = make_vit()
        adapter = attach(model, EFFT2(rank=3))
        randomize(adapter)
        assert all(delta.any() for delta in adapter.delta_weights().values())
        adapter.bank.reset_parameters()
        assert not any(delta.any() for delta in adapter.delta_weights().values())

    def test_in_a_graph_of_blocks_factors_are_found_by_their_place(
        self, make_vit, randomize, monkeypatch
    ):
        adapter = attach(make_vit(), EFFT2(rank=3), targets=["attn.qkv", "mlp.fc2"])
        randomize(adapter)
        bank, site, asked = adapter.bank, "blocks.1.attn.qkv", []
        place, group = bank.places[site], bank.mhsa
        expected = group.factors(site, False)
        found = {"place": group.factors_at, "name": group.factors}

        def ask(kind):
            return lambda *of: asked.append(kind) or found[kind](*of)

        group.factors_at, group.factors = ask("place"), ask("name")
        for traced, kinds in ((False, ["place"]), (True, ["place", "name"])):
            # Whether all blocks are in one graph.
            monkeypatch.setattr(type(bank.joint_factors), "traced", traced)
            for tensor, its in zip(bank.factors_in_graph(place, False), expected, strict=True):
                torch.testing.assert_close(tensor, its)
            assert asked == kinds
        assert bank.calls._was_traced(site) and not bank.calls._was_traced("blocks.1.mlp.fc2")
        monkeypatch.setattr(type(bank.joint_factors), "traced", False)
        found["place"] = lambda *of: None  # as where the cores are elsewhere
        assert torch.equal(bank.factors_in_graph(place, False).down, expected.down)
        assert asked[2:] == ["place", "name"]

    def test_a_layer_in_a_graph_takes_the_factors_of_its_place(self, make_vit, monkeypatch):
        model = make_vit()
        bank, layer, asked = attach(model, EFFT2(rank=3)).bank, model.blocks[1].attn.qkv, []
        factors = bank.factors("blocks.1.attn.qkv", False)
        bank.factors_in_graph = lambda *of: asked.append(of) or factors
        monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
        for training in (False, True):
            layer.train(training)(torch.randn(2, 12))
            assert asked.pop() == (bank.places["blocks.1.attn.qkv"], training)

    def test_a_layer_computes_the_tasks_of_a_graph(self, make_vit, randomize):
        model, site = make_vit().eval(), "blocks.1.attn.qkv"
        bank, layer = attach(model, EFFT2(rank=3)).bank, model.blocks[1].attn.qkv
        randomize(bank)
        parameters = {name: torch.stack([p, -2 * p]) for name, p in bank.named_parameters()}
        factors, task_of_row = bank.stacked_factors(site, parameters), torch.tensor([1, 0])
        bank.traced = TracedTasks({site: factors}, {}, task_of_row)
        x = torch.randn(2, 3, 12)
        expected = tasks_linear(x, layer.weight, layer.bias, factors.down, factors.up, task_of_row)
        assert torch.equal(layer(x), expected) and bank.tasks is bank.traced

    @pytest.mark.parametrize("training", [False, True])
    def test_dropout_of_the_rank_r_activation_in_training_alone(
        self, make_vit, randomize, training
    ):
        model, x = make_vit(), torch.randn(4, 12)
        randomize(attach(model, FacTTT(rank=3, dropout=0.5)))
        layer = model.blocks[1].attn.qkv.train(training)
        assert torch.equal(layer(x), layer(x)) == (not training)

    def test_a_place_follows_its_group(self, make_vit):
        bank = attach(make_vit(), EFFT2(rank=3)).bank
        place, other = bank.places["blocks.1.attn.qkv"], copy.deepcopy(bank.mhsa)
        assert place.group is bank.mhsa and place.pattern == "blocks.#.attn.qkv"
        bank.mhsa = other
        assert place.group is other
        assert place.position is other.position("blocks.1.attn.qkv")

    @pytest.mark.parametrize(
        ("method", "dropout", "joint"),
        [
            (EFFT2(rank=3), True, True),
            (EFFT2(rank=3), False, True),
            (FacTTT(rank=3), True, False),  # drops entries of x·down·core
            (FacTTT(rank=3), False, True),
        ],
    )
    def test_what_is_made_for_a_group_at_once(self, make_vit, method, dropout, joint):
        bank, site = attach(make_vit(), method).bank, "blocks.0.attn.qkv"
        made = bank.group(site).factors(site, False)
        bank.joint_factors.get = lambda *of: made
        assert (bank.factors(site, dropout) is made) == joint
        kinds, stacks = [Kind(bank.group(site), TensorTrainGroup, (site,), None)], [made[::2]]
        bank.joint_factors.stacks = lambda *of: stacks if of == (kinds, dropout) else None
        assert bank.stacks(kinds, dropout) is (stacks if joint else None)

    def test_factors_of_tasks_are_made_without_autocast(self, make_vit, randomize):
        bank, site = attach(make_vit(), EFFT2(rank=3)).bank, "blocks.0.attn.qkv"
        randomize(bank)
        parameters = {name: p.detach()[None] for name, p in bank.named_parameters()}
        expected = bank.stacked_factors(site, parameters)
        with torch.autocast("cpu", torch.bfloat16):
            found = bank.stacked_factors(site, parameters)
        assert torch.equal(found.down, expected.down) and torch.equal(found.up, expected.up)


def test_the_defaults_of_a_layer():
    expected = {"rank": 16, "scale": 1.0, "slices": 1, "init": "v", "dropout": 0.0}
    expected |= {"learn_scale": False, "backend": "auto", "strategy": "auto"}
    for make in (FusedEFFTLinear, FusedEFFTLinear.from_linear):
        parameters = inspect.signature(make).parameters
        assert {name: parameters[name].default for name in expected} == expected
    layer = FusedEFFTLinear(16, 16)
    assert layer.bias is not None and layer.remakes_input


def test_a_rank_as_large_as_the_smaller_side():
    assert FusedEFFTLinear(7, 15, rank=7).factors.U.shape == (7, 7)


def test_a_copy_of_a_group_has_its_empty_places():
    group = nn.Sequential(nn.Linear(2, 2))
    group.add_module("none", None)
    copied = _shallow_copy(group)
    assert copied._modules["none"] is None and copied[0] is not group[0]
    assert copied[0].weight is group[0].weight
