"""The adapter's file: what it holds, saving whole or not at all, and every bad file refused."""

from __future__ import annotations

import json
import os
import pickle
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from efft_kernels import EFFT1, EFFT2, attach, load
from efft_kernels.adapters import adapter_file
from efft_kernels.adapters.adapter_file import _names, errors_about, shorten

METHODS = [EFFT1(rank=3, scale=0.5), EFFT2(rank=(3, 2), init="u", cores="shared", learn_scale=True)]
IMAGES = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)


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
        for further in ({"note": 1}, {1: "note"}):
            with pytest.raises(TypeError, match="metadata must map str to str, got"):
                adapter.save(tmp_path / "b.safetensors", further)
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
        metadata.pop("sha256", None)
    metadata = {k: v for k, v in (metadata | change_metadata).items() if v is not None}
    save_file(tensors, path, metadata=metadata or None)


@pytest.fixture
def assert_refused(unchanged):
    """The file is refused with these texts, and the model is as it was."""

    def check(model, path, *texts, kind=ValueError):
        with unchanged(model, swapped=True), pytest.raises(kind) as error:
            load(model, path)
        assert all(text in str(error.value) for text in texts), str(error.value)
        assert not hasattr(model, "factor_bank")

    return check


class TestBadFiles:
    @pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 0.1, 0.5, 0.9, -1])
    def test_truncated(self, assert_refused, make_vit, saved, kept):
        content = saved.read_bytes()
        kept = int(kept * len(content)) if isinstance(kept, float) else kept
        saved.write_bytes(content[:kept])
        assert_refused(make_vit(), saved, "path must be a whole safetensors file", str(saved))

    @pytest.mark.parametrize("content", [b"\0" * 64, b"\xff" * 64, b"PK\3\4" + b"x" * 60, b"{}"])
    def test_no_safetensors(self, assert_refused, make_vit, saved, content):
        saved.write_bytes(content)
        assert_refused(make_vit(), saved, "path must be a whole safetensors file", str(saved))

    def test_appended_bytes(self, assert_refused, make_vit, saved):
        saved.write_bytes(saved.read_bytes() + b"more")
        assert_refused(make_vit(), saved, "path must be a whole safetensors file", str(saved))

    @pytest.mark.parametrize("how", ["pickle", "torch.save"])
    def test_nothing_is_ever_unpickled(self, assert_refused, make_vit, saved, how):
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
    def test_foreign_safetensors(self, assert_refused, make_vit, saved, metadata):
        save_file({"lora_A": torch.ones(2)}, saved, metadata=metadata)
        assert_refused(make_vit(), saved, "written by Adapter.save", str(saved))

    def test_missing_file(self, assert_refused, make_vit, tmp_path):
        assert_refused(
            make_vit(), tmp_path / "no.safetensors", "no.safetensors", kind=FileNotFoundError
        )
        assert_refused(make_vit(), tmp_path, str(tmp_path), kind=FileNotFoundError)

    @pytest.mark.parametrize("version", ["2", "0", "1.0", "", None])
    def test_unknown_version(self, assert_refused, make_vit, saved, version):
        rewrite(saved, format_version=version)
        assert_refused(make_vit(), saved, "format_version 1", repr(version), "another release")

    @pytest.mark.parametrize("key", ["method", "targets", "modules_to_train", "base_shapes"])
    @pytest.mark.parametrize("value", [None, "", "{", "7", '"text"', "[7]", '{"name": 1}'])
    def test_unreadable_header(self, assert_refused, make_vit, saved, key, value):
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
    def test_bad_method_in_the_header(self, assert_refused, make_vit, saved, method):
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
    def test_tensors_that_do_not_fit(self, assert_refused, make_vit, saved, change, texts):
        rewrite(saved, change)
        assert_refused(make_vit(), saved, str(saved), *texts)

    def test_header_of_another_rank(self, assert_refused, make_vit, saved):
        rewrite(saved, method=json.dumps(EFFT1(rank=2).to_config()))
        assert_refused(make_vit(), saved, "factors.all", "must be", "2]", "3]")

    def test_dropped_module_to_train(self, assert_refused, make_vit, saved):
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
    def test_another_architecture(self, assert_refused, make_vit, saved, options, texts):
        model = make_vit(**options)
        assert_refused(
            model, saved, "model must be the architecture the adapter was trained on", *texts
        )

    def test_already_attached(self, make_vit, unchanged, saved):
        model = make_vit()
        attach(model, EFFT2(rank=2))
        message = r"model must carry no adapter.*detach"
        with unchanged(model), pytest.raises(ValueError, match=message):
            load(model, saved)

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


def test_three_of_several_are_named():
    assert shorten(list("abc")) == "a; b; c"
    assert shorten(list("abcd")) == "a; b; c; and 1 more"


def test_a_checksum_is_of_names_dtypes_shapes_and_bits():
    x = torch.arange(6, dtype=torch.int32).view(2, 3)
    others = [{"b": x}, {"a": x.view(3, 2)}, {"a": x.view(torch.float32)}, {"a": x + 1}]
    assert len({adapter_file.checksum(tensors) for tensors in ({"a": x}, *others)}) == 5
    assert adapter_file.checksum({"a": x.T.contiguous().T}) == adapter_file.checksum({"a": x})


def test_names_are_a_list_of_text():
    assert _names('["a"]', at_least=1) == ["a"] and _names("[]") == []
    for text, at_least in (("[]", 1), ("3", 0), ('{"a": 1}', 1), ('["a", 1]', 0)):
        with pytest.raises(TypeError):
            _names(text, at_least)


@pytest.mark.parametrize("kind", [ValueError, TypeError, UnicodeError])
def test_an_error_about_a_file_names_it_in_one_line(kind):
    expected = kind if kind is TypeError else ValueError
    for text in ("one\ntwo", "one two (in here/it)"):
        with pytest.raises(expected) as caught, errors_about("here/it"):
            raise kind(text)
        assert str(caught.value) == "one two (in here/it)"
