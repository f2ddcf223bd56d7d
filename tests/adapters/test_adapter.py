"""The adapter's handle and file: merging, detaching, saving, loading, and every bad file."""

from __future__ import annotations

import copy
import json
import os
import pickle
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from efft_kernels import EFFT1, EFFT2, Adapter, FusedEFFTLinear, attach, load
from efft_kernels.adapters import adapter_file

METHODS = [EFFT1(rank=3, scale=0.5), EFFT2(rank=(3, 2), init="u", cores="shared", learn_scale=True)]
IMAGES = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)


@pytest.fixture
def adapted(make_vit, randomize):
    """(model, adapter) with random factors and a head that has moved."""

    def make(method=METHODS[0], distilled=False, dtype=torch.float32, **options):
        model = make_vit(distilled, dtype)
        adapter = attach(model, method, **options)
        randomize(adapter)
        with torch.no_grad():
            model.head.weight.add_(1.0)
        return model.eval(), adapter

    return make


def bits(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def adapter_snapshot(model):
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
    )


class TestHandle:
    def test_found_again_on_the_model(self, adapted):
        model, adapter = adapted()
        again = Adapter(model)
        assert again.method == adapter.method and again.sites == adapter.sites
        assert again.modules_to_train == ("head",)
        assert all(a is b for a, b in zip(again.parameters(), adapter.parameters(), strict=True))

    def test_refuses_a_model_without_one(self, make_vit):
        with pytest.raises(
            ValueError, match="model must carry an adapter, got a VisionTransformer"
        ):
            Adapter(make_vit())

    def test_num_parameters_counts_the_factors(self, adapted):
        model, adapter = adapted()
        assert adapter.num_parameters() == 5 * 12 * 3 + 3 * 2 * 9
        assert adapter.num_parameters() == sum(p.numel() for p in model.factor_bank.parameters())

    def test_repr(self, adapted):
        _, adapter = adapted()
        assert "EFFT1(rank=3" in repr(adapter) and "8 linears of VisionTransformer" in repr(adapter)


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("method", METHODS, ids=repr)
    def test_unmerge_restores_every_bit(self, adapted, method, dtype):
        model, adapter = adapted(method, dtype=dtype)
        before, parameters = bits(model), dict(model.named_parameters())
        output = model(IMAGES.to(dtype))
        adapter.merge()
        assert adapter.merged
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        assert changed == {f"{site.name}.weight" for site in adapter.sites}
        adapter.unmerge()
        assert not adapter.merged and same_bits(bits(model), before)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert torch.equal(model(IMAGES.to(dtype)), output)

    @pytest.mark.parametrize("distilled", [False, True])
    @pytest.mark.parametrize("method", METHODS, ids=repr)
    def test_merged_model_is_the_same_function(self, adapted, method, distilled, make_vit):
        model, adapter = adapted(method, distilled, torch.float64)
        expected = model(IMAGES.double())
        plain = make_vit(distilled, torch.float64).eval()
        plain.head.load_state_dict(model.head.state_dict())
        assert (expected - plain(IMAGES.double())).abs().max() > 1e-3
        adapter.merge()
        torch.testing.assert_close(model(IMAGES.double()), expected, rtol=1e-10, atol=1e-10)

    def test_adds_delta_weights(self, adapted):
        model, adapter = adapted()
        deltas = adapter.delta_weights()
        base = {name: layer.weight.clone() for name, layer in adapter.layers().items()}
        adapter.merge()
        for name, delta in deltas.items():
            assert torch.equal(model.get_submodule(name).weight, base[name] + delta)
            assert delta.dtype == torch.float32 and not delta.requires_grad
        assert all(torch.equal(d, deltas[n]) for n, d in adapter.delta_weights().items())

    def test_training_while_merged_is_refused(self, adapted):
        model, adapter = adapted()
        adapter.merge()
        model.train()
        with pytest.raises(RuntimeError, match=r"merged.*unmerge\(\)"):
            model(IMAGES)
        adapter.unmerge()
        model(IMAGES).sum().backward()
        assert all(p.grad is not None for p in adapter.parameters())

    def test_moved_while_merged(self, adapted):
        model, adapter = adapted()
        before = bits(model)
        adapter.merge()
        model.to(torch.float64)
        adapter.unmerge()
        assert same_bits(bits(model), {name: t.double() for name, t in before.items()})


class TestDetach:
    @pytest.mark.parametrize("distilled", [False, True])
    def test_gives_the_plain_model_back(self, make_vit, randomize, distilled):
        model = make_vit(distilled)
        model.blocks[0].attn.qkv.weight.requires_grad_(False)
        model.head.bias.requires_grad_(False)
        seen = []
        model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
        before, state = adapter_snapshot(model), bits(model)
        output = model.eval()(IMAGES)
        adapter = attach(model, METHODS[0])
        randomize(adapter)
        assert not torch.allclose(model(IMAGES), output)
        assert adapter.detach() is model
        assert adapter_snapshot(model) == before and same_bits(bits(model), state)
        plain = make_vit(distilled)
        for (name, module), expected in zip(model.named_modules(), plain.modules(), strict=True):
            assert vars(module).keys() == vars(expected).keys(), name
        seen.clear()
        assert torch.equal(model(IMAGES), output) and seen == [1]

    def test_keeps_what_the_head_learnt(self, adapted):
        model, adapter = adapted()
        head = model.head.weight.clone()
        adapter.detach()
        assert torch.equal(model.head.weight, head)

    def test_after_merge_keeps_the_merged_weights(self, adapted):
        model, adapter = adapted()
        expected = model(IMAGES)
        adapter.merge()
        merged = bits(model)
        adapter.detach()
        assert not any(isinstance(module, FusedEFFTLinear) for module in model.modules())
        torch.testing.assert_close(model(IMAGES), expected)
        assert all(torch.equal(t, merged[name]) for name, t in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())

    def test_handle_is_dead_afterwards(self, adapted, tmp_path):
        _, adapter = adapted()
        adapter.detach()
        for use in (
            adapter.detach,
            adapter.merge,
            adapter.delta_weights,
            lambda: adapter.save(tmp_path / "a.safetensors"),
        ):
            with pytest.raises(RuntimeError, match="detached"):
                use()
        assert list(tmp_path.iterdir()) == []

    def test_attach_after_detach(self, adapted):
        model, adapter = adapted()
        adapter.detach()
        again = attach(model, EFFT2(rank=2))
        assert again.num_parameters() == 7 * 12 * 2 + 12 * 4


class TestStateDict:
    def test_keys(self, adapted):
        _, adapter = adapted(METHODS[1])
        assert sorted(adapter.state_dict()) == sorted(
            [f"factors.{g}.{n}" for g in ("mhsa", "ffn") for n in ("U", "V", "core", "scale")]
            + ["modules.head.weight", "modules.head.bias"]
        )

    def test_round_trip(self, adapted, make_vit):
        model, adapter = adapted(METHODS[1])
        other = make_vit().eval()
        twin = attach(other, METHODS[1])
        twin.load_state_dict({name: t.clone() for name, t in adapter.state_dict().items()})
        assert torch.equal(other(IMAGES), model(IMAGES))

    @pytest.mark.parametrize(
        ("change", "texts"),
        [
            (lambda s: s.pop("factors.all.U"), ["missing", "factors.all.U"]),
            (lambda s: s.update(extra=torch.ones(1)), ["unknown", "extra"]),
            (
                lambda s: s.update({"factors.all.V": torch.ones(3, 12)}),
                ["factors.all.V must be [12, 3]", "[3, 12]"],
            ),
            (
                lambda s: s.update({"modules.head.bias": torch.ones(4)}),
                ["modules.head.bias must be [5]", "[4]"],
            ),
        ],
    )
    def test_nothing_is_copied_unless_all_fits(self, adapted, change, texts):
        model, adapter = adapted()
        before = bits(model)
        state = {name: torch.full_like(t, 9.0) for name, t in adapter.state_dict().items()}
        change(state)
        with pytest.raises(ValueError) as error:
            adapter.load_state_dict(state)
        assert all(text in str(error.value) for text in texts), str(error.value)
        assert same_bits(bits(model), before)

    def test_refused_while_merged(self, adapted):
        _, adapter = adapted()
        state = copy.deepcopy(adapter.state_dict())
        adapter.merge()
        with pytest.raises(ValueError, match=r"merged.*unmerge\(\)"):
            adapter.load_state_dict(state)


class TestFile:
    @pytest.mark.parametrize("distilled", [False, True])
    @pytest.mark.parametrize("method", METHODS, ids=repr)
    @pytest.mark.parametrize("options", [{}, {"targets": "mhsa", "layers": 1}], ids=str)
    def test_round_trip(self, adapted, make_vit, tmp_path, method, options, distilled):
        path = tmp_path / "adapter.safetensors"
        model, adapter = adapted(method, distilled, **options)
        adapter.save(path)
        other = make_vit(distilled).eval()
        assert not torch.allclose(other(IMAGES), model(IMAGES))
        loaded = load(other, path)
        assert torch.equal(other(IMAGES), model(IMAGES))
        assert loaded.method == adapter.method and loaded.sites == adapter.sites
        assert loaded.modules_to_train == adapter.modules_to_train
        assert {n for n, p in other.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
        loaded.merge()
        torch.testing.assert_close(other(IMAGES), model(IMAGES))

    def test_holds_factors_once_and_the_head(self, adapted, tmp_path):
        model, adapter = adapted()
        adapter.save(tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        assert set(tensors) == {
            "factors.all.U",
            "factors.all.V",
            "factors.all.core",
            "modules.head.weight",
            "modules.head.bias",
        }
        assert torch.equal(tensors["factors.all.U"], model.factor_bank.get_submodule("all").U)
        numbers = adapter.num_parameters() + sum(p.numel() for p in model.head.parameters())
        assert sum(t.numel() for t in tensors.values()) == numbers
        assert metadata["format"] == "efft-kernels.adapter" and metadata["format_version"] == "1"
        assert json.loads(metadata["method"])["name"] == "efft1"
        assert json.loads(metadata["base_shapes"])["blocks.0.attn.qkv.weight"] == [36, 12]
        assert "factor_bank" not in metadata["base_shapes"]

    def test_saved_while_merged_holds_the_same(self, adapted, tmp_path):
        _, adapter = adapted()
        contents = []
        for merge in (lambda: None, adapter.merge):
            merge()
            adapter.save(tmp_path / "a.safetensors")
            with safe_open(tmp_path / "a.safetensors", "pt") as file:
                tensors = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
                contents.append((tensors, file.metadata()))
        assert contents[0] == contents[1]

    def test_further_metadata(self, adapted, tmp_path, make_vit):
        _, adapter = adapted()
        adapter.save(tmp_path / "a.safetensors", {"note": "β"})
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.metadata()["note"] == "β"
        load(make_vit(), tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=r"metadata keys must not be the format's own.*method"):
            adapter.save(tmp_path / "b.safetensors", {"method": "mine"})
        assert not (tmp_path / "b.safetensors").exists()

    def test_mode_is_that_of_any_new_file(self, adapted, tmp_path):
        """Others can read it where the umask lets them."""
        _, adapter = adapted()
        (tmp_path / "other").write_bytes(b"")
        adapter.save(tmp_path / "a.safetensors")
        modes = [stat.S_IMODE(os.stat(tmp_path / n).st_mode) for n in ("other", "a.safetensors")]
        assert modes[0] == modes[1]

    def test_half_precision_base(self, adapted, make_vit, tmp_path):
        model, adapter = adapted(dtype=torch.bfloat16)
        adapter.save(tmp_path / "a.safetensors")
        other = make_vit(dtype=torch.bfloat16).eval()
        load(other, tmp_path / "a.safetensors")
        assert torch.equal(other(IMAGES.bfloat16()), model(IMAGES.bfloat16()))

    @pytest.mark.parametrize("stage", ["partial write", "rename"])
    def test_a_failed_save_leaves_the_old_file(self, adapted, tmp_path, monkeypatch, stage):
        _, adapter = adapted()
        path = tmp_path / "adapter.safetensors"
        adapter.save(path)
        old = path.read_bytes()

        def failing_save(tensors, filename, metadata=None):
            with open(filename, "wb") as file:
                file.write(b"half of it")
            raise OSError(28, "No space left on device")

        def failing_replace(source, target):
            raise OSError(1, "Operation not permitted")

        if stage == "partial write":
            monkeypatch.setattr(adapter_file, "save_file", failing_save)
        else:
            monkeypatch.setattr(os, "replace", failing_replace)
        with pytest.raises(OSError):
            adapter.save(path)
        assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]

    def test_interrupted_save_leaves_nothing(self, adapted, tmp_path, monkeypatch):
        _, adapter = adapted()

        def interrupted(tensors, filename, metadata=None):
            raise KeyboardInterrupt

        monkeypatch.setattr(adapter_file, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapter.save(tmp_path / "adapter.safetensors")
        assert os.listdir(tmp_path) == []

    def test_missing_folder(self, adapted, tmp_path):
        _, adapter = adapted()
        with pytest.raises(OSError):
            adapter.save(tmp_path / "there" / "is" / "none.safetensors")


@pytest.fixture
def saved(adapted, tmp_path):
    path = tmp_path / "adapter.safetensors"
    adapted()[1].save(path)
    return path


def rewrite(path, change_tensors=None, **change_metadata):
    """The file again with other tensors or header strings; None removes one."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if change_tensors is not None:
        change_tensors(tensors)
    metadata = {k: v for k, v in (metadata | change_metadata).items() if v is not None}
    save_file(tensors, path, metadata=metadata or None)


def assert_refused(model, path, *texts, kind=ValueError):
    before, state = adapter_snapshot(model), bits(model)
    with pytest.raises(kind) as error:
        load(model, path)
    assert all(text in str(error.value) for text in texts), str(error.value)
    assert adapter_snapshot(model) == before and same_bits(bits(model), state)
    assert not hasattr(model, "factor_bank")


class TestBadFiles:
    @pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 0.1, 0.5, 0.9, -1])
    def test_truncated(self, make_vit, saved, kept):
        content = saved.read_bytes()
        kept = int(kept * len(content)) if isinstance(kept, float) else kept
        saved.write_bytes(content[:kept])
        assert_refused(make_vit(), saved, "path must be a whole safetensors file", str(saved))

    @pytest.mark.parametrize("content", [b"\0" * 64, b"\xff" * 64, b"PK\3\4" + b"x" * 60, b"{}"])
    def test_no_safetensors(self, make_vit, saved, content):
        saved.write_bytes(content)
        assert_refused(make_vit(), saved, "path must be a whole safetensors file", str(saved))

    def test_appended_bytes(self, make_vit, saved):
        saved.write_bytes(saved.read_bytes() + b"more")
        assert_refused(make_vit(), saved, "path must be a whole safetensors file", str(saved))

    @pytest.mark.parametrize("how", ["pickle", "torch.save"])
    def test_nothing_is_ever_unpickled(self, make_vit, saved, how):
        witness = saved.parent / "unpickled"

        class Bomb:
            def __reduce__(self):
                return (os.mkdir, (str(witness),))

        if how == "pickle":
            saved.write_bytes(pickle.dumps(Bomb()))
        else:
            torch.save(Bomb(), saved)
        assert_refused(make_vit(), saved, "path must be a whole safetensors file")
        assert not witness.exists()

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "other"}])
    def test_foreign_safetensors(self, make_vit, saved, metadata):
        save_file({"lora_A": torch.ones(2)}, saved, metadata=metadata)
        assert_refused(make_vit(), saved, "written by Adapter.save", str(saved))

    def test_missing_file(self, make_vit, tmp_path):
        assert_refused(
            make_vit(), tmp_path / "no.safetensors", "no.safetensors", kind=FileNotFoundError
        )
        assert_refused(make_vit(), tmp_path, str(tmp_path), kind=FileNotFoundError)

    @pytest.mark.parametrize("version", ["2", "0", "1.0", "", None])
    def test_unknown_version(self, make_vit, saved, version):
        rewrite(saved, format_version=version)
        assert_refused(make_vit(), saved, "format_version 1", repr(version), "another release")

    @pytest.mark.parametrize("key", ["method", "targets", "modules_to_train", "base_shapes"])
    @pytest.mark.parametrize("value", [None, "", "{", "7", '"text"', "[7]", '{"name": 1}'])
    def test_unreadable_header(self, make_vit, saved, key, value):
        rewrite(saved, **{key: value})
        assert_refused(make_vit(), saved, kind=(ValueError, TypeError))

    @pytest.mark.parametrize(
        "method",
        [
            {"name": "efft9", "rank": 3},
            {"name": "efft1", "rank": 3, "speed": 9},
            {"name": "efft1", "rank": 0},
            {"name": "efft1", "rank": "3"},
            {"name": "efft1", "rank": 13},
            {"name": "efft1", "rank": 3, "init": "w"},
            {"name": "efft1", "rank": {"tuple": 3}},
            {"name": ["efft1"]},
        ],
    )
    def test_bad_method_in_the_header(self, make_vit, saved, method):
        rewrite(saved, method=json.dumps(method))
        assert_refused(make_vit(), saved, kind=(ValueError, TypeError))

    @pytest.mark.parametrize(
        ("change", "texts"),
        [
            (lambda t: t.pop("factors.all.core"), ["missing", "factors.all.core"]),
            (lambda t: t.pop("modules.head.bias"), ["missing", "modules.head.bias"]),
            (lambda t: t.update(more=torch.ones(1)), ["unknown", "more"]),
            (
                lambda t: t.update({"factors.all.U": torch.ones(48, 2)}),
                ["factors.all.U", "[48, 3]", "[48, 2]"],
            ),
            (
                lambda t: t.update({"factors.all.U": torch.ones(1, 1)}),
                ["factors.all.U", "[48, 3]", "[1, 1]"],
            ),
            (
                lambda t: t.update({"modules.head.weight": torch.ones(12, 5)}),
                ["modules.head.weight", "[5, 12]", "[12, 5]"],
            ),
        ],
    )
    def test_tensors_that_do_not_fit(self, make_vit, saved, change, texts):
        rewrite(saved, change)
        assert_refused(make_vit(), saved, str(saved), *texts)

    def test_header_of_another_rank(self, make_vit, saved):
        rewrite(saved, method=json.dumps(EFFT1(rank=2).to_config()))
        assert_refused(make_vit(), saved, "factors.all", "must be", "2]", "3]")

    def test_dropped_module_to_train(self, make_vit, saved):
        rewrite(saved, modules_to_train="[]")
        assert_refused(make_vit(), saved, "unknown", "modules.head.bias")

    @pytest.mark.parametrize(
        ("options", "texts"),
        [
            ({"num_classes": 4}, ["head.weight expected [5, 12], got [4, 12]", "2 differing"]),
            ({"embed_dim": 24}, ["cls_token expected [1, 1, 12], got [1, 1, 24]"]),
            ({"depth": 3}, ["blocks.2", "expected none", "and 9 more"]),
            ({"depth": 1}, ["blocks.1", "got none"]),
            ({"patch_size": 2}, ["pos_embed", "patch_embed.proj.weight"]),
            ({"distilled": True}, ["head_dist"]),
            ({"qkv_bias": False}, ["qkv.bias expected [36], got none"]),
        ],
    )
    def test_another_architecture(self, make_vit, saved, options, texts):
        model = make_vit(**options)
        assert_refused(
            model, saved, "model must be the architecture the adapter was trained on", *texts
        )

    def test_already_attached(self, make_vit, saved):
        model = make_vit()
        attach(model, EFFT2(rank=2))
        before, state = adapter_snapshot(model), bits(model)
        with pytest.raises(ValueError, match=r"model must carry no adapter.*detach"):
            load(model, saved)
        assert adapter_snapshot(model) == before and same_bits(bits(model), state)

    def test_refusal_keeps_hooks_and_module_attributes(self, make_vit, saved):
        rewrite(saved, lambda t: t.pop("factors.all.core"))
        model = make_vit()
        seen = []
        model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
        model.blocks[0].mlp.fc1.note = "mine"
        with pytest.raises(ValueError):
            load(model, saved)
        model(IMAGES)
        assert seen == [1] and model.blocks[0].mlp.fc1.note == "mine"
        assert type(model.blocks[0].mlp.fc1) is nn.Linear
