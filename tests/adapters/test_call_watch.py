"""Adapted linears whose factors cannot learn are named, and no others."""

from __future__ import annotations

import copy
import dataclasses
import operator
import pickle
import threading
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from efft_kernels import EFFT2, Adapter, AdapterSet, FusedEFFTLinear, LoRA, attach, load
from efft_kernels.adapters import call_watch
from efft_kernels.nn import without_numbers

METHODS = [LoRA(rank=2), EFFT2(rank=2, dropout=0.0)]
both = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def _no_warning_unseen():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "adapted linears")
        yield


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet(monkeypatch, fresh_dynamo):
    """What other tests have traced counts for models of the same linears, in the whole process."""
    monkeypatch.setattr(call_watch, "_compiled", set())


@both
def test_a_linear_that_does_not_run_is_named_once(make_vit, images, method):
    model = make_vit()
    adapter = attach(model, method, targets="attn.qkv")
    model(images)
    blocks = list(model.blocks)
    model.blocks = nn.Sequential(blocks[0], nn.Identity())
    with pytest.warns(
        UserWarning, match=r"'blocks\.1\.attn\.qkv' did not run .*targets=\["
    ) as said:
        model(images)
    assert len(said) == 1 and "blocks.0" not in str(said[0].message)
    model(images)
    model.blocks = nn.Sequential(*blocks)
    model(images)
    assert [row["calls"] for row in adapter.describe().rows] == [1, 1]


def run_without(model, images, *dropped):
    for index in dropped:
        model.blocks[index].forward = lambda x, **_: x
    try:
        model(images)
    finally:
        for index in dropped:
            del model.blocks[index].forward


def test_blocks_that_are_dropped_at_random_are_told_once(make_vit, images):
    model = make_vit(depth=4)
    attach(model, LoRA(rank=2), targets="attn.qkv")
    with pytest.warns(UserWarning, match=r"'blocks\.0\.attn\.qkv' did not run") as said:
        run_without(model, images, 0)
    assert len(said) == 1
    for dropped in ((1,), (0, 2), (), (1, 2)):
        run_without(model, images, *dropped)


@both
def test_strict_raises_each_time_and_leaves_the_model_usable(make_vit, images, tmp_path, method):
    model = make_vit()
    attach(model, method).save(tmp_path / "a.safetensors")
    lax = make_vit()
    load(lax, tmp_path / "a.safetensors")
    lax.blocks = nn.Sequential(lax.blocks[0], nn.Identity())
    with pytest.warns(UserWarning, match=r"'blocks\.1\.attn\.qkv'.* did not run"):
        lax(images)
    model = make_vit()
    adapter = load(model, tmp_path / "a.safetensors", strict=True)
    expected = model(images)
    inner = model.blocks[1].attn
    whole = inner.forward
    inner.forward = lambda x, **_: inner.proj(F.linear(x, inner.qkv.weight[:12]))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'blocks\.1\.attn\.qkv' did not run"):
            model(images)
    inner.forward = whole
    assert torch.equal(model(images), expected)
    with pytest.raises(TypeError, match="strict must be a bool, got 1"):
        attach(make_vit(), method, strict=1)
    assert adapter.bank.joint_factors._now is None


def test_a_long_list_is_cut(make_vit, images):
    model = make_vit(depth=8)
    attach(model, EFFT2(rank=2))
    model.blocks = nn.Sequential()
    with pytest.warns(UserWarning, match="and 26 more did not run"):
        model(images)


@pytest.mark.parametrize(
    "quiet",
    ["no_grad", "inference_mode", "frozen factors", "output needs none", "merged"],
)
def test_where_nothing_has_to_learn_nothing_is_said(make_vit, images, quiet):
    model = make_vit()
    adapter = attach(model, EFFT2(rank=2), strict=True)
    if quiet == "merged":
        adapter.merge()
        model.eval()
    else:
        model.blocks.forward = lambda x: x
    for parameter in adapter.parameters():
        parameter.requires_grad_(quiet != "frozen factors")
    if quiet == "output needs none":
        model.requires_grad_(False)
        adapter.bank.requires_grad_(True)
    modes = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode()}
    with modes.get(quiet, torch.enable_grad()):
        model(images)


@pytest.mark.parametrize("strict", [False, True])
def test_a_replaced_linear_is_told_in_inference_too(make_vit, images, strict):
    model = make_vit().eval()
    adapter = attach(model, EFFT2(rank=2), strict=strict)
    qkv = model.blocks[0].attn.qkv
    with torch.no_grad():
        model(images)
        adapter.merge()
        model(images)
        adapter.unmerge()
        model.blocks[0].attn.qkv = nn.Linear(12, 36)
        if strict:
            for _ in range(2):
                with pytest.raises(RuntimeError, match=r"'blocks\.0\.attn\.qkv' are not in the"):
                    model(images)
        else:
            with pytest.warns(UserWarning, match=r"'blocks\.0\.attn\.qkv' are not in the model"):
                model(images)
            model(images)
        model.blocks[0].attn.qkv = qkv
        model(images)


@pytest.mark.parametrize("wrap", [tuple, lambda y: {"logits": [y]}], ids=["tuple", "dict"])
def test_outputs_of_any_form(images, wrap):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return wrap([self.head(x)]) if wrap is tuple else wrap(self.head(x))

    model = Model()
    attach(model, LoRA(rank=2, matrices=None), targets="one")
    with pytest.warns(UserWarning, match="'one' did not run"):
        model(images)


@both
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_checkpoints(make_vit, images, method, use_reentrant, input_needs_grad):
    """A reentrant one whose input needs no gradient gives none to what is in it."""
    model = make_vit()
    adapter = attach(model, method, strict=True)
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=use_reentrant)
    if input_needs_grad:
        images.requires_grad_()
    if use_reentrant and not input_needs_grad:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
            with pytest.raises(RuntimeError, match=r"without gradients .*use_reentrant=False"):
                model(images)
        return
    for _ in range(2):
        model(images).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_under_no_grad(make_vit, images):
    model = make_vit()
    attach(model, EFFT2(rank=2))
    inner = model.blocks.forward
    model.blocks.forward = torch.no_grad()(inner)
    with pytest.warns(UserWarning, match=r"blocks\.0\..* and 2 more ran without gradients"):
        model(images)


class TestCompiled:
    """What runs in a graph is not counted, so nothing is said of it; nothing breaks the graph."""

    def test_whole(self, make_vit, images):
        model = make_vit()
        attach(model, LoRA(rank=2), strict=True)
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(3):
            compiled(images).sum().backward()
        assert counter.frame_count == 1

    def test_models_that_are_alike_share_a_graph(self, make_vit, images):
        """Eight graphs are torch's limit for a forward; beyond, it runs without or fails."""
        counter = torch._dynamo.testing.CompileCounter()
        for seed in range(3):
            model = make_vit(seed=seed)
            attach(model, EFFT2(rank=2), strict=True)
            torch.compile(model, backend=counter, fullgraph=True)(images).sum().backward()
        assert counter.frame_count == 1

    @pytest.mark.parametrize("numbered", [True, False])
    def test_what_is_traced_counts_for_models_of_the_same_linears(
        self, make_vit, images, numbered, monkeypatch
    ):
        traced = attach(make_vit(), LoRA(rank=2), targets="attn.qkv")
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
            for site in traced.sites:
                traced.bank.calls.count(site.name if numbered else without_numbers(site.name))
        for targets, told in (("attn.qkv", False), ("blocks.1.attn.qkv", True)):
            model = make_vit()
            attach(model, LoRA(rank=2), targets=targets, strict=True)
            model.blocks = nn.Sequential()
            if told:
                with pytest.raises(RuntimeError, match="did not run"):
                    model(images)
            else:
                model(images)

    def test_blocks(self, make_vit, images):
        model = make_vit()
        adapter = attach(model, EFFT2(rank=2, dropout=0.0), strict=True)
        expected = model(images)
        model.blocks[1].compile(backend="eager", fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(model(images), expected)
        calls = {row["name"]: row["calls"] for row in adapter.describe().rows}
        assert calls["blocks.0.attn.qkv"] == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_count_for_themselves(make_vit, images, how):
    model = make_vit()
    adapter = attach(model, LoRA(rank=2))
    model(images)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    twin.blocks = nn.Sequential(twin.blocks[0], nn.Identity())
    with pytest.warns(UserWarning, match="did not run"):
        twin(images)
    model(images)
    assert [row["calls"] for row in adapter.describe().rows] == [1, 1]
    assert twin.factor_bank.calls.calls == {"blocks.0.attn.qkv": 1}


def test_threads_do_not_mix(make_vit, images):
    model = make_vit()
    attach(model, LoRA(rank=2), strict=True)
    entered, done = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is other:
            entered.set()
            done.wait(10)

    model.blocks[0].register_forward_hook(wait)
    failures = []

    def run():
        try:
            model(images)
        except Exception as error:
            failures.append(error)

    other = threading.Thread(target=run)
    other.start()
    assert entered.wait(10)
    model(images)
    done.set()
    other.join(10)
    assert not failures


def test_an_error_in_forward_leaves_nothing_that_counts(make_vit, images):
    model = make_vit()
    attach(model, LoRA(rank=2), strict=True)
    with pytest.raises(Exception):  # noqa: B017
        model(images[:, :2])
    model(images)


def test_detach_and_unwatch_take_the_hooks_away(make_vit):
    for leave in (lambda adapter: adapter.detach(), lambda a: a.bank.unwatch(a.model)):
        model = make_vit()
        leave(attach(model, EFFT2(rank=2)))
        assert not model._forward_hooks and not model._forward_pre_hooks


@both
def test_mixed_batches_are_counted(make_vit, images, method):
    model = make_vit().eval()
    adapter = attach(model, method)
    tasks = AdapterSet(adapter)
    tasks.add("a")
    with tasks.tasks(["a", "a"]), torch.no_grad():
        model(images)
    assert {row["calls"] for row in adapter.describe().rows} == {1}


class TestInnerAdapters:
    def test_frozen_by_an_outer_one(self, make_vit):
        inner = make_vit()
        attach(inner, LoRA(rank=2), modules_to_train=())
        model = nn.ModuleDict({"tower": inner, "own": nn.Linear(5, 5), "head": nn.Linear(5, 2)})
        outer = LoRA(rank=2, matrices=None)
        with pytest.raises(ValueError, match=r"'tower' of ModuleDict .*which attach freezes"):
            attach(model, outer, targets="own", strict=True)
        assert all(p.requires_grad for p in inner.factor_bank.parameters())
        assert type(model["own"]) is nn.Linear
        with pytest.warns(UserWarning, match="'tower' of ModuleDict .*modules_to_train") as told:
            attach(model, outer, targets="own")
        assert told[0].filename == __file__

    def test_layers_with_factors_of_their_own(self):
        model = nn.ModuleDict({"a": FusedEFFTLinear(4, 4, rank=2), "own": nn.Linear(4, 4)})
        with pytest.warns(UserWarning, match="'a' of ModuleDict"):
            attach(model, LoRA(rank=2, matrices=None), targets="own", modules_to_train=())

    @pytest.mark.parametrize("how", ["named", "frozen"])
    def test_one_that_trains_on_or_was_frozen_before(self, make_vit, how):
        inner = make_vit()
        attach(inner, LoRA(rank=2), modules_to_train=())
        model = nn.ModuleDict({"tower": inner, "own": nn.Linear(5, 5)})
        if how == "frozen":
            inner.requires_grad_(False)
        trained = ["tower"] if how == "named" else ()
        attach(
            model, LoRA(rank=2, matrices=None), targets="own", modules_to_train=trained, strict=True
        )


class TestUsedTwice:
    """A module under several names, or at several depths, is one site."""

    def test_a_block_at_two_depths(self, make_vit, images, randomize):
        model = make_vit(depth=3)
        model.blocks[2] = model.blocks[0]
        before = model(images)
        adapter = attach(model, LoRA(rank=2))
        assert [site.name for site in adapter.sites] == [
            "blocks.0.attn.qkv",
            "blocks.1.attn.qkv",
        ]
        model(images).sum().backward()
        assert all(p.grad is not None for p in adapter.parameters())
        assert [row["calls"] for row in adapter.describe().rows] == [2, 1]
        randomize(adapter)
        expected = model.eval()(images)
        adapter.merge()
        torch.testing.assert_close(model(images), expected)
        adapter.unmerge()
        adapter.detach()
        assert torch.equal(model(images), before)
        assert not any(isinstance(m, FusedEFFTLinear) for m in model.modules())

    def test_a_linear_under_two_names(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(6, 6)
                self.second = self.first

            def forward(self, x):
                return self.second(self.first(x))

        for targets in ("first", "second", "*"):
            model = Model()
            adapter = attach(
                model, LoRA(rank=2, matrices=None), targets=targets, modules_to_train=()
            )
            assert [site.name for site in adapter.sites] == ["first"]
            assert model.first is model.second and type(model.first) is FusedEFFTLinear
            model(torch.randn(3, 6)).sum().backward()
            assert Adapter(model).describe().rows[0]["calls"] == 2
            adapter.detach()
            assert model.first is model.second and type(model.first) is nn.Linear

    def test_one_name_of_it_is_trained_whole(self, make_vit):
        model = make_vit()
        model.twin = model.blocks[1]
        options = {"targets": ["blocks.0.attn.qkv", "twin.attn.qkv"]}
        with pytest.raises(ValueError, match=r"'twin\.attn\.qkv' matches no"):
            attach(model, LoRA(rank=2), modules_to_train=("head", "blocks.1"), **options)
        adapter = attach(model, LoRA(rank=2), modules_to_train=("head", "blocks.1"))
        assert [site.name for site in adapter.sites] == ["blocks.0.attn.qkv"]
        assert all(p.requires_grad for p in model.blocks[1].parameters())


class TestReadBySource:
    """Parents whose source uses a linear's weight without calling the linear are refused."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)
            nn.init.zeros_(self.proj.weight)

        def forward(self, x):
            return self.proj(self._qkv(x)[..., :6])

        def _qkv(self, x):
            return F.linear(x, self.qkv.weight, self.qkv.bias)

    class ReadsDeeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = TestReadBySource.Reads()

        def forward(self, x):
            return F.linear(x, self.attn.proj.weight)

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(6, 18)

        def forward(self, x):
            return self.qkv(x.to(self.qkv.weight.dtype))

    def test_refused_with_the_way_out(self):
        model = nn.Sequential(self.Reads())
        method = LoRA(rank=2, matrices=None)
        with pytest.raises(
            TypeError,
            match=r"'0\.qkv' must be called .* Reads\.forward .* targets=\['0.proj'\]",
        ):
            attach(model, method, targets="*", modules_to_train=())
        assert type(model[0].qkv) is nn.Linear and model[0].qkv.weight.requires_grad
        attach(model, method, targets="proj", modules_to_train=())

    def test_of_a_source_that_is_not_at_hand_nothing_is_known(self):
        forward = {"forward": eval("lambda self, x: self.qkv(x) + self.qkv.weight.sum()")}
        model = type("Made", (nn.Module,), forward)()
        model.qkv = nn.Linear(6, 6)
        attach(model, LoRA(rank=2, matrices=None), targets="qkv", modules_to_train=())

    def test_what_another_name_stands_for_is_not_followed(self):
        class Renamed(TestReadBySource.Asks):
            def forward(self, x):
                own, (linear,) = self, self.children()
                return linear(x) * own.qkv.weight.mean()

        attach(Renamed(), LoRA(rank=2, matrices=None), targets="qkv", modules_to_train=())

    def test_by_a_module_further_up(self):
        with pytest.raises(TypeError, match=r"'attn\.proj' .* ReadsDeeper\.forward"):
            attach(
                self.ReadsDeeper(), LoRA(rank=2, matrices=None), targets="proj", modules_to_train=()
            )

    def test_reading_a_dtype_beside_a_call_is_no_bypass(self):
        attach(self.Asks(), LoRA(rank=2, matrices=None), targets="qkv", modules_to_train=())

    @pytest.mark.parametrize("version", [1, 2])
    def test_torchvisions_swin(self, version):
        swin = pytest.importorskip("torchvision.models.swin_transformer")
        own = (
            {}
            if version == 1
            else {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        )
        model = swin.SwinTransformer(
            [4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=5, stochastic_depth_prob=0.0, **own
        )
        with pytest.raises(
            TypeError, match=r"ShiftedWindowAttention.*targets=\['mlp\.0', 'mlp\.3'\]"
        ):
            attach(model, EFFT2(rank=2))
        adapter = attach(model, EFFT2(rank=2), targets=["mlp.0", "mlp.3"], strict=True)
        assert [site.role for site in adapter.sites] == ["fc1", "fc2"] * 2
        model(torch.randn(1, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in adapter.parameters())


def test_sams_vision_encoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.SamVisionConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        output_channels=4,
        mlp_dim=48,
        global_attn_indexes=[1],
        window_size=2,
    )
    model = transformers.SamVisionModel(config)
    adapter = attach(model, EFFT2(rank=2), modules_to_train=(), strict=True)
    assert [site.role for site in adapter.sites] == ["qkv", "o", "fc1", "fc2"] * 2
    model(torch.randn(1, 3, 16, 16)).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_the_tensors_in_what_a_model_returns():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        more: object = None

    a, b, c = (torch.tensor(float(i), requires_grad=True) for i in range(3))
    found = call_watch._tensors({"a": a, "rest": [Output(b, (c, "text", None)), Output, 3]})
    assert all(map(operator.is_, found, (a, b, c)))
    assert len(list(call_watch._tensors([a, (b, Output(c))]))) == 3


def test_a_reentrant_checkpoint_is_found_in_a_graph():
    x = torch.ones(2, requires_grad=True)
    plain, run = x.sin() * x, checkpoint(torch.sin, x, use_reentrant=True)
    assert call_watch._checkpointed([plain, plain * run + 1]) is True
    assert call_watch._checkpointed([x, plain]) is False
    assert call_watch._checkpointed([x]) is False
    for _ in range(60):
        plain = plain.sin() * plain.cos()  # each node is looked at once
    assert call_watch._checkpointed([plain]) is False


def test_six_linears_are_named():
    names = list("abcdefgh")
    six = "adapted linears 'a', 'b', 'c', 'd', 'e', 'f'"
    assert call_watch._listed(names[:6]) == six
    assert call_watch._listed(names[:7]) == f"{six} and 1 more"
    assert call_watch._listed(names) == f"{six} and 2 more"


def test_adapters_inside_that_are_about_to_be_frozen(make_vit):
    model = nn.ModuleDict({"a": make_vit(), "b": FusedEFFTLinear(4, 4, rank=2)})
    attach(model.a, EFFT2(rank=2))

    def told(*trained):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call_watch.tell_of_frozen(model, trained, False)
        return [str(warning.message).partition(" of ModuleDict")[0] for warning in caught]

    assert told() == ["'a', 'b'"]
    assert told("a") == ["'b'"] and told("b") == ["'a'"] and told("a", "b") == []
    with pytest.raises(ValueError, match="'b' of ModuleDict has factors of its own"):
        call_watch.tell_of_frozen(model, ["a"], True)
    model.b.factors.requires_grad_(False)
    assert told("a") == [] and told("a.factor_bank") == []
