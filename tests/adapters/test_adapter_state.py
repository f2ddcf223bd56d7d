"""What belongs to an adapted model besides its factors.

Buffers that training moves, a replaced head, the image size, merged states, whole numbers.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from efft_kernels import EFFT2, Adapter, AdapterSet, LoRA, attach, load
from efft_kernels.adapters.architectures import is_position_table
from efft_kernels.adapters.attachment import same_numbers, state_buffers
from efft_kernels.analysis.subspace import load_alone
from efft_kernels.interop import export_peft_lora

METHOD = LoRA(rank=2, matrices=None)
TARGETS = ["fc1", "fc2"]
IMAGES = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)


class Net(nn.Module):
    """Two linears between norms whose statistics move in training, and buffers that do not."""

    def __init__(self, classes=3):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.fc1 = nn.Linear(6, 7)
        self.other_norm = nn.BatchNorm1d(7)
        self.fc2 = nn.Linear(7, 5)
        self.head = nn.Linear(5, classes)
        self.register_buffer("table", torch.arange(5.0))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
        hidden = self.other_norm(self.fc1(self.norm(x))).relu()
        return self.head(self.fc2(hidden) + self.table)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def fresh():
    def make(classes=3):
        torch.manual_seed(11)
        return Net(classes)

    return make


@pytest.fixture
def trained(fresh, randomize):
    """(model, adapter) after training steps that moved the statistics."""

    def make(**options):
        model = fresh()
        adapter = attach(model, METHOD, targets=TARGETS, **options)
        randomize(adapter)
        for seed in range(3):
            torch.manual_seed(seed)
            model.train()(torch.randn(8, 6) * 3 + 1)
        return model.eval(), adapter

    return make


def inputs(rows=4):
    torch.manual_seed(3)
    return torch.randn(rows, 6)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class TestBuffers:
    def test_the_file_is_the_model_that_was_trained(self, fresh, trained, tmp_path):
        model, adapter = trained()
        adapter.save(tmp_path / "a")
        other = fresh().eval()
        load(other, tmp_path / "a")
        assert torch.equal(other(inputs()), model(inputs()))
        assert torch.equal(other.norm.num_batches_tracked, torch.tensor(3))

    def test_what_moved_is_in_the_state_and_nothing_else(self, trained):
        _, adapter = trained()
        buffers = {key for key in adapter.state_dict() if key.startswith("buffers.")}
        assert buffers == {f"buffers.{n}.{s}" for n in ("norm", "other_norm") for s in STATISTICS}

    @pytest.mark.parametrize("change", [nn.Module.double, nn.Module.bfloat16, copy.deepcopy])
    def test_a_cast_or_a_copy_moves_nothing(self, fresh, change):
        model = fresh()
        attach(model, METHOD, targets=TARGETS)
        assert not any("buffers." in key for key in Adapter(change(model)).state_dict())

    def test_a_state_without_buffers_brings_those_of_the_base_back(self, fresh, trained):
        model, adapter = trained()
        state = {key: t for key, t in adapter.state_dict().items() if "buffers." not in key}
        adapter.load_state_dict(state)
        base = fresh().state_dict()
        assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items() if "norm" in n)

    def test_detach_gives_the_base_back(self, fresh, trained):
        model, adapter = trained()
        assert not torch.equal(model.norm.running_mean, fresh().norm.running_mean)
        adapter.detach()
        base = fresh().state_dict()
        assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())

    def test_detached_merged_it_stays_the_adapted_model(self, trained):
        model, adapter = trained()
        expected = model(inputs())
        adapter.merge()
        adapter.detach()
        torch.testing.assert_close(model(inputs()), expected)

    def test_a_buffer_that_was_resized_stays(self, trained):
        model, adapter = trained()
        base = {key: t for key, t in adapter.state_dict().items() if "buffers." not in key}
        model.table = torch.ones(1)
        assert torch.equal(adapter.state_dict()["buffers.table"], torch.ones(1))
        adapter.load_state_dict(base)
        assert torch.equal(adapter.detach().table, torch.ones(1))

    def test_a_trained_norm_is_saved_as_a_module(self, fresh, trained, tmp_path):
        model, adapter = trained(modules_to_train=("norm", "head"))
        state = adapter.state_dict()
        assert "modules.norm.running_mean" in state and "buffers.norm.running_mean" not in state
        assert "buffers.other_norm.running_mean" in state
        adapter.save(tmp_path / "a")
        other = fresh().eval()
        load(other, tmp_path / "a")
        assert torch.equal(other(inputs()), model(inputs()))

    @pytest.mark.parametrize(
        ("key", "tensor", "text"),
        [
            ("buffers.norm.running_mean", torch.ones(7), r"must be \[6\], got \[7\]"),
            ("buffers.gone.running_mean", torch.ones(6), "unknown buffers.gone"),
            ("buffers.seen", torch.ones(()), "unknown buffers.seen"),
            ("buffers.norm.num_batches_tracked", torch.tensor(1.5), "must be torch.int64"),
        ],
    )
    def test_buffers_that_do_not_fit_change_nothing(self, trained, key, tensor, text):
        model, adapter = trained()
        before, state = bits(model), {k: t + 1 for k, t in adapter.state_dict().items()}
        with pytest.raises(ValueError, match=text):
            adapter.load_state_dict({**state, key: tensor})
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    def test_a_file_alone_is_compared(self, trained, tmp_path):
        _, adapter = trained(modules_to_train=("norm", "head"))
        adapter.save(tmp_path / "a")
        alone = load_alone(tmp_path / "a").delta_weights()
        assert all(torch.equal(alone[n], delta) for n, delta in adapter.delta_weights().items())

    def test_an_export_to_peft_names_what_it_cannot_hold(self, trained, fresh, tmp_path):
        with pytest.warns(UserWarning, match=r"no place for the 6 buffers .*norm\.running_mean"):
            export_peft_lora(trained()[1], tmp_path / "a")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            export_peft_lora(attach(fresh(), METHOD, targets=TARGETS), tmp_path / "b")


class TestBuffersOfASet:
    @pytest.fixture
    def tasks(self, fresh, randomize):
        """Tasks "a" and "b" of different statistics; "c" has those of "b"."""
        model = fresh()
        tasks = AdapterSet(attach(model, METHOD, targets=TARGETS))
        for name in "ab":
            randomize(tasks.adapter)
            model.train()(torch.randn(8, 6) + 2)
            tasks.add(name)
        randomize(tasks.adapter)
        tasks.add("c")
        model.eval()
        return tasks

    def outputs(self, tasks):
        found = {}
        for name in tasks.names:
            tasks.use(name)
            found[name] = tasks.model(inputs()).detach()
        return found

    def test_use_changes_the_statistics_too(self, tasks, fresh):
        states = {name: dict(state) for name, state in tasks._states.items()}
        for name, expected in self.outputs(tasks).items():
            alone = fresh()
            attach(alone, METHOD, targets=TARGETS).load_state_dict(states[name])
            assert torch.equal(alone.eval()(inputs()), expected)

    def test_update_stores_what_moved_since(self, tasks):
        tasks.use("a")
        tasks.model.train()(torch.randn(8, 6) - 5)
        expected = tasks.model.eval()(inputs())
        tasks.update("a")
        tasks.use("b")
        tasks.use("a")
        assert torch.equal(tasks.model(inputs()), expected)

    def test_a_task_from_before_any_training(self, fresh, trained):
        model, adapter = trained()
        base = attach(fresh(), METHOD, targets=TARGETS)
        tasks = AdapterSet(adapter)
        tasks.add("untrained", base.state_dict())
        tasks.use("untrained")
        assert torch.equal(model(inputs()), base.model.eval()(inputs()))

    def test_a_mixed_batch_needs_equal_statistics(self, tasks):
        expected = self.outputs(tasks)
        tasks.use("b")
        with torch.no_grad(), tasks.tasks("bcbc"):
            found = tasks.model(inputs())
        rows = torch.stack([expected[name][i] for i, name in enumerate("bcbc")])
        torch.testing.assert_close(found, rows)
        for ids in ("abcb", "aaaa"):
            with pytest.raises(ValueError, match="agree with the model in its buffers, got 'a'"):
                tasks.tasks(ids).__enter__()
        tasks.use("a")
        with torch.no_grad(), tasks.tasks("aaaa"):
            torch.testing.assert_close(tasks.model(inputs()), expected["a"])

    def test_statistics_within_a_head(self, fresh, randomize):
        """MAE's probe: a BatchNorm without parameters before the classifier."""
        model = fresh()
        model.head = nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
        tasks = AdapterSet(attach(model, METHOD, targets="fc1"))
        for name in "ab":
            randomize(model.head)
            tasks.add(name)
        model.eval()
        with torch.no_grad():
            expected = self.outputs(tasks)
            with tasks.tasks("abab"):
                found = model(inputs())
        rows = torch.stack([expected[name][i] for i, name in enumerate("abab")])
        torch.testing.assert_close(found, rows)
        model.train()(torch.randn(8, 6))
        tasks.update("b")
        model.eval()
        with pytest.raises(ValueError, match="agree with the model in its buffers, got 'a'"):
            tasks.tasks("abab").__enter__()


class TestReplacedHead:
    @pytest.mark.parametrize("how", ["reset_classifier", "assigned", "sequential"])
    def test_it_is_saved_as_it_is(self, adapted, make_vit, tmp_path, how):
        def replace(model):
            if how == "reset_classifier":
                model.reset_classifier(7)
            else:
                head = nn.Linear(12, 7)
                model.head = head if how == "assigned" else nn.Sequential(nn.LayerNorm(12), head)

        model, adapter = adapted()
        replace(model)
        adapter.save(tmp_path / "a")
        other = make_vit().eval()
        replace(other)
        load(other, tmp_path / "a")
        assert torch.equal(other(IMAGES), model(IMAGES)) and other(IMAGES).shape == (2, 7)
        with pytest.raises(ValueError, match=r"head.*got.* first, timm's by model\.reset_classi"):
            load(make_vit(), tmp_path / "a")

    def test_by_none(self, adapted, make_vit, tmp_path):
        """For features: there is a module of that name, and nothing of it to train."""
        model, adapter = adapted()
        model.reset_classifier(0)
        adapter.save(tmp_path / "a")
        other = make_vit().eval()
        other.reset_classifier(0)
        assert load(other, tmp_path / "a").modules_to_train == ()
        assert torch.equal(other(IMAGES), model(IMAGES)) and other(IMAGES).shape == (2, 12)

    def test_a_head_that_is_gone(self, adapted, tmp_path):
        model, adapter = adapted()
        del model.head
        with pytest.raises(RuntimeError, match=r"must have the module 'head'"):
            adapter.save(tmp_path / "a")
        assert not (tmp_path / "a").exists()

    def test_an_adapted_linear_that_was_replaced(self, adapted):
        model, adapter = adapted()
        model.blocks[1].mlp.fc1 = nn.Linear(12, 48)
        weight = model.blocks[0].attn.qkv.weight.clone()
        with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.fc1 must be the adapted layer"):
            adapter.merge()
        assert torch.equal(model.blocks[0].attn.qkv.weight, weight)


class TestImageSize:
    def test_an_adapter_loads_at_another_size(self, adapted, make_vit, tmp_path):
        _, adapter = adapted()
        adapter.save(tmp_path / "a")
        other = make_vit(img_size=16).eval()
        base = other.pos_embed.clone()
        loaded = load(other, tmp_path / "a")
        assert torch.equal(other.pos_embed, base)
        deltas = adapter.delta_weights()
        assert all(torch.equal(deltas[n], delta) for n, delta in loaded.delta_weights().items())

    def test_a_model_resized_after_attach_is_saved_as_it_is(self, adapted, make_vit, tmp_path):
        model, adapter = adapted()
        model.set_input_size(img_size=16)
        adapter.save(tmp_path / "a")
        with safe_open(tmp_path / "a", "pt") as file:
            assert '"pos_embed": [1, 17, 12]' in file.metadata()["base_shapes"]

    def test_trained_positions_must_fit(self, tmp_path):
        class Embedded(nn.Module):
            def __init__(self, tokens):
                super().__init__()
                self.position_embedding = nn.Embedding(tokens, 4)
                self.fc1 = nn.Linear(4, 4)

        for trained, fits in (((), True), (("position_embedding",), False)):
            adapter = attach(Embedded(5), METHOD, targets="fc1", modules_to_train=trained)
            adapter.save(tmp_path / "a")
            if fits:
                load(Embedded(6), tmp_path / "a")
            else:
                with pytest.raises(ValueError, match=r"expected \[5, 4\], got \[6, 4\]"):
                    load(Embedded(6), tmp_path / "a")

    @pytest.mark.parametrize("shape", [(1, 5, 4), None])
    def test_positions_of_another_kind_are_another_model(self, tmp_path, shape):
        class Embedded(nn.Module):
            def __init__(self, shape):
                super().__init__()
                self.fc1 = nn.Linear(4, 4)
                if shape is not None:
                    self.pos_embed = nn.Parameter(torch.zeros(shape))

        attach(Embedded((5, 4)), METHOD, targets="fc1").save(tmp_path / "a")
        got = "none" if shape is None else r"\[1, 5, 4\]"
        with pytest.raises(ValueError, match=rf"pos_embed expected \[5, 4\], got {got}"):
            load(Embedded(shape), tmp_path / "a")

    def test_which_parameters_go_with_the_image_size(self):
        tables = (
            "pos_embed",  # timm
            "absolute_pos_embed",
            "pos_embed_win",
            "blocks.0.attn.rel_pos_h",
            "layers.0.blocks.1.attn.relative_position_bias_table",
            "stages.0.blocks.0.attn.attention_biases",
            "encoder.pos_embedding",  # torchvision
            "visual.positional_embedding",  # open_clip
            "vit.embeddings.position_embeddings",  # Hugging Face
            "vision_model.embeddings.position_embedding.weight",
            "vision_encoder.pos_embed",
            "pos_embed1",  # Visformer
            "patch_pos",  # TNT
        )
        others = (
            "cls_token",
            "patch_embed.proj.weight",
            "blocks.0.attn.qkv.weight",
            "pos_block.0.proj.weight",
            "pos_embed.proj.weight",
            "head.bias",
        )
        assert all(map(is_position_table, tables)) and not any(map(is_position_table, others))


class TestMerged:
    @pytest.mark.parametrize("into_merged", [False, True])
    @pytest.mark.parametrize("taken_merged", [False, True])
    def test_a_models_state_is_the_same_model(self, adapted, make_vit, taken_merged, into_merged):
        model, adapter = adapted()
        expected = model(IMAGES)
        if taken_merged:
            adapter.merge()
        state = bits(model)
        other = make_vit(seed=8).eval()
        twin = attach(other, adapter.method)
        if into_merged:
            twin.merge()
        other.load_state_dict(state)
        assert torch.equal(other(IMAGES), expected) and not twin.merged
        twin.merge()
        torch.testing.assert_close(other(IMAGES), expected)
        twin.unmerge()
        assert torch.equal(other(IMAGES), expected)

    def test_a_plain_model_takes_none_by_mistake(self, adapted, make_vit):
        model, adapter = adapted()
        adapter.merge()
        state = {n: t for n, t in model.state_dict().items() if "factor_bank" not in n}
        with pytest.raises(RuntimeError, match="base_weight"):
            make_vit().load_state_dict(state)
        adapter.detach()
        plain = make_vit().eval()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(IMAGES), model(IMAGES))

    def test_merging_is_all_or_nothing(self, adapted):
        model, adapter = adapted()
        prune.l1_unstructured(model.blocks[1].mlp.fc2, "weight", 0.5)
        before = bits(model)
        with pytest.raises(RuntimeError, match="weight must be a parameter"):
            adapter.merge()
        assert not adapter.merged and bits(model).keys() == before.keys()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    def test_detaching_is_all_or_nothing(self, adapted):
        model, adapter = adapted()
        nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc2)
        expected, modules = model(IMAGES), [id(module) for module in model.modules()]
        described = adapter.describe()
        with pytest.raises(RuntimeError, match=r"cannot become a plain one.*remove_param"):
            adapter.detach()
        assert [id(module) for module in model.modules()] == modules
        assert adapter.describe() == described
        assert torch.equal(model(IMAGES), expected)

    def test_pruned_since_it_is_detached_pruned(self, adapted):
        model, adapter = adapted()
        prune.l1_unstructured(model.blocks[1].mlp.fc2, "weight", 0.5)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.zero_()
        expected = model(IMAGES)
        torch.testing.assert_close(adapter.detach()(IMAGES), expected)

    def test_in_inference_mode(self, adapted):
        model, adapter = adapted()
        before = bits(model)
        with torch.inference_mode():
            adapter.merge()
        images = IMAGES.clone().requires_grad_()
        model(images).sum().backward()
        assert images.grad.norm() > 0
        adapter.unmerge()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class TestInferenceMode:
    def test_what_is_loaded_in_it_can_be_trained(self, adapted, make_vit, tmp_path):
        _, adapter = adapted()
        adapter.save(tmp_path / "a")
        other = make_vit()
        with torch.inference_mode():
            loaded = load(other, tmp_path / "a")
            other(IMAGES)
        other(IMAGES).sum().backward()
        assert all(p.grad is not None for p in loaded.parameters())

    def test_a_set_filled_in_it_works_outside(self, adapted, randomize):
        model, adapter = adapted()
        tasks = AdapterSet(adapter)
        with torch.inference_mode():
            tasks.add("a")
        expected = model(IMAGES)
        randomize(adapter)
        tasks.use("a")
        assert torch.equal(model(IMAGES), expected)
        tasks.update("a")


class TestMeta:
    def test_attached_on_meta_and_filled_from_a_state(self, adapted, make_vit):
        model, adapter = adapted()
        with torch.device("meta"):
            other = make_vit().eval()
        twin = attach(other, adapter.method)
        assert all(p.is_meta for p in twin.parameters()) and len(twin.state_dict()) == 5
        other.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(other(IMAGES), model(IMAGES))

    def test_statistics_unknown_at_attach_are_saved(self, fresh, trained, tmp_path):
        """Whatever they were: nothing to compare with."""
        model, _ = trained()
        with torch.device("meta"):
            other = fresh()
        twin = attach(other, METHOD, targets=TARGETS)
        other.to_empty(device="cpu")
        other.load_state_dict(model.state_dict())
        twin.save(tmp_path / "a")
        third = fresh().eval()
        load(third, tmp_path / "a")
        assert torch.equal(third(inputs()), model(inputs()))
        twin.detach()
        assert torch.equal(other.norm.running_mean, model.norm.running_mean)

    def test_numbers_are_not_lost_on_it(self, adapted, make_vit, tmp_path):
        _, adapter = adapted()
        adapter.save(tmp_path / "a")
        with torch.device("meta"):
            other = make_vit()
        names = [name for name, _ in other.named_modules()]
        with pytest.raises(ValueError, match=r"must have storage.*on the meta device.*to_empty"):
            load(other, tmp_path / "a")
        assert [name for name, _ in other.named_modules()] == names
        attach(other, METHOD)
        with pytest.raises(ValueError, match=r"numbers to be saved.*on the meta device"):
            Adapter(other).save(tmp_path / "b")
        with pytest.raises(ValueError, match=r"numbers to be saved.*on the meta device"):
            export_peft_lora(Adapter(other), tmp_path / "b")
        assert not (tmp_path / "b").exists()


class TestChecksum:
    def test_a_flipped_bit_is_found(self, adapted, make_vit, unchanged, tmp_path):
        adapted()[1].save(tmp_path / "a")
        content = bytearray((tmp_path / "a").read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        for place in range(start, len(content), 97):
            content[place] ^= 4
            (tmp_path / "a").write_bytes(content)
            model = make_vit()
            with unchanged(model), pytest.raises(ValueError, match=r"damaged or changed.*sha256"):
                load(model, tmp_path / "a")
            content[place] ^= 4
        (tmp_path / "a").write_bytes(content)
        load(make_vit(), tmp_path / "a")

    def test_a_file_without_one_is_loaded(self, adapted, make_vit, tmp_path):
        model, adapter = adapted()
        adapter.save(tmp_path / "a")
        with safe_open(tmp_path / "a", "pt") as file:
            metadata = file.metadata()
        assert len(metadata.pop("sha256")) == 64
        save_file(load_file(tmp_path / "a"), tmp_path / "b", metadata=metadata)
        other = make_vit().eval()
        load(other, tmp_path / "b")
        assert torch.equal(other(IMAGES), model(IMAGES))

    def test_a_set_finds_it_too(self, adapted, tmp_path):
        _, adapter = adapted()
        adapter.save(tmp_path / "a")
        content = bytearray((tmp_path / "a").read_bytes())
        content[-1] ^= 1
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match="damaged or changed"):
            AdapterSet(adapter).add("a", tmp_path / "a")

    def test_the_key_is_the_formats_own(self, adapted, tmp_path):
        with pytest.raises(ValueError, match=r"format's own, got \['sha256'\]"):
            adapted()[1].save(tmp_path / "a", {"sha256": "0"})


def test_mobilevits_statistics(tmp_path):
    """A real model with BatchNorm among its attention blocks."""

    def make():
        torch.manual_seed(1)
        return timm.create_model("mobilevit_xxs", num_classes=3)

    model = make()
    adapter = attach(model, EFFT2(rank=2))
    images = torch.randn(2, 3, 64, 64)
    model.train()(images)
    adapter.save(tmp_path / "a")
    other = make().eval()
    load(other, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(other(images), model.eval()(images))
    adapter.detach()
    base = make().state_dict()
    assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())


class TestTrainedElsewhere:
    """What trains but is no part of the file is named."""

    def test_a_head_under_another_name(self, fresh, tmp_path):
        model = fresh()
        adapter = attach(model, METHOD, targets=TARGETS)
        model.head = nn.Linear(5, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter.save(tmp_path / "whole.safetensors")
        model.second = nn.Linear(5, 4)
        model.norm.bias.requires_grad_()
        with pytest.warns(
            UserWarning, match=r"norm\.bias; second\.weight; second\.bias require"
        ) as said:
            adapter.save(tmp_path / "a.safetensors")
        assert len(said) == 1 and "modules_to_train=[...]" in str(said[0].message)
        assert said[0].filename == __file__
        model.second.requires_grad_(False)
        model.norm.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter.save(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_number_may_have_any_shape(make_vit, shape):
    """A learnt scale had no dimensions once, and has none in files."""
    adapter = attach(make_vit(), EFFT2(rank=2, learn_scale=True))
    state = adapter.state_dict()
    scales = [name for name in state if name.endswith("scale")]
    changed = {name: torch.full(shape, 0.625) for name in scales}
    adapter.load_state_dict(state | changed)
    assert scales and all(adapter.state_dict()[name].item() == 0.625 for name in scales)


def test_two_numbers_may_not_have_any_shape(make_vit):
    adapter = attach(make_vit(), LoRA(rank=2), modules_to_train=["head"])
    state = adapter.state_dict()
    name = next(name for name in state if name.endswith("bias"))
    with pytest.raises(ValueError, match=r"must be \[5\], got \[1, 5\]"):
        adapter.load_state_dict(state | {name: state[name][None]})


def test_buffers_that_hold_the_same_numbers():
    x, meta = torch.tensor([1.0, 2.0]), torch.empty(2, device="meta")
    for tensor, base, same in (
        (x, x.clone(), True),
        (x, x.double(), True),
        (x, x + 1, False),
        (x, x[None], False),
        (x, meta, False),
        (meta, meta, True),
        (meta, x, False),
    ):
        assert same_numbers(tensor, base) is same


def test_the_buffers_of_a_state_dict():
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.ModuleDict({"c": nn.BatchNorm1d(3)})})
    model.a.register_buffer("scratch", torch.ones(1), persistent=False)
    names = ("running_mean", "running_var", "num_batches_tracked")
    found = [name for name, _ in state_buffers(model)]
    assert found == [f"{prefix}.{name}" for prefix in ("a", "b.c") for name in names]
    assert [name for name, _ in state_buffers(model, ["b"])] == found[:3]
    assert [name for name, _ in state_buffers(model, ["a", "b.c"])] == []
