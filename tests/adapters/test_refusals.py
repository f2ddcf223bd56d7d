"""Misuse that once passed silently or died obscurely: each is refused with what was expected."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from efft_kernels import EFFT2, AdapterSet, LoRA, attach, load, use_backend
from efft_kernels.baselines import BitFit, attach_baseline


def small_vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=3
    ).eval()


@pytest.fixture
def adapter():
    return attach(small_vit(), EFFT2(rank=2))


def test_use_backend_checks_the_name_without_a_with():
    with pytest.raises(ValueError, match="'zzz'"):
        use_backend("zzz")
    with pytest.raises(RuntimeError, match="'cuda' was asked for"):
        use_backend("cuda")


def test_merging_within_a_mixed_batch(adapter):
    tasks = AdapterSet(adapter)
    tasks.add("a")
    with tasks.tasks(["a"]), pytest.raises(RuntimeError, match=r"within AdapterSet\.tasks"):
        adapter.merge()
    assert not adapter.merged


def test_adapter_set_arguments(adapter):
    with pytest.raises(TypeError, match="adapter must be an Adapter, got VisionTransformer"):
        AdapterSet(adapter.model)
    with pytest.raises(TypeError, match="name must be a str, got 3"):
        AdapterSet(adapter).add(3)


def test_integer_factors_in_a_file(adapter, tmp_path):
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "sha256"}
    tensors = load_file(path)
    save_file({name: t.to(torch.int32) for name, t in tensors.items()}, path, metadata=metadata)
    model = small_vit()
    with pytest.raises(ValueError, match=r"must be float64.* got torch\.int32"):
        load(model, path)
    assert type(model.blocks[0].attn.qkv) is nn.Linear


def test_save_and_load_arguments(adapter, tmp_path):
    with pytest.raises(TypeError, match="metadata must map str to str, got 'epoch': 3"):
        adapter.save(tmp_path / "a.safetensors", metadata={"epoch": 3})
    with pytest.raises(FileNotFoundError, match=r"existing folder, got .*no/such/a\.safetensors"):
        adapter.save(tmp_path / "no" / "such" / "a.safetensors")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        load("model", tmp_path)


def test_float8_weights():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(
        model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(TypeError, match=r"targeted weights must be float64.*float8_e4m3fn"):
        attach(model, LoRA(rank=2), targets="0", modules_to_train=())


def test_a_model_without_a_classifier():
    """None is asked for by default; a head that was asked for is missed."""
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"modules_to_train=\(\) where there is no classifier"):
        attach(model, LoRA(rank=2), targets="0", modules_to_train="head")
    description = attach(model, LoRA(rank=2), targets="0").describe()
    assert description.trained == ()
    assert "there is no classifier" in " ".join(str(description).split())


def put(model, kind, **options):
    if kind == "method":
        return attach(model, EFFT2(rank=2), **options)
    return attach_baseline(model, BitFit(), **options)


def requirements(model):
    return [
        (name, type(model.get_submodule(name.rpartition(".")[0])), p.requires_grad)
        for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize("kind", ["method", "baseline"])
def test_a_model_made_in_inference_mode(kind):
    """What torch does not let train is refused before anything has changed."""
    with torch.inference_mode():
        model = small_vit()
    before = requirements(model)
    with pytest.raises(ValueError, match=r"can be trained, got '.*' that torch\.inference_mode"):
        put(model, kind)
    assert requirements(model) == before


def test_a_model_made_in_inference_mode_is_served():
    with torch.inference_mode():
        model = small_vit()
    adapter = attach(model, EFFT2(rank=2), modules_to_train=())
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 32, 32))
    adapter.merge()
    adapter.unmerge()
    assert type(adapter.detach().blocks[0].attn.qkv) is nn.Linear
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.ones(1, 3, 32, 32)), expected)


@pytest.mark.parametrize("kind", ["method", "baseline"])
def test_whole_numbers_in_a_module_that_is_trained(kind):
    """A table of codes, as quantized heads have: it is saved with the head, and is not trained."""
    model = small_vit()
    codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    model.head.register_parameter("codes", codes)
    handle = put(model, kind)
    assert model.head.weight.requires_grad and not codes.requires_grad
    assert handle.detach().head.codes is codes


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models(wrap):
    model = small_vit()
    with pytest.raises(
        ValueError, match=r"must not be wrapped, got .*attach before torch\.compile"
    ):
        attach(wrap(model), EFFT2(rank=2))
    assert type(model.blocks[0].attn.qkv) is nn.Linear


def test_a_model_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_vit(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(ValueError, match=r"got a PeftModel; merge_and_unload\(\) first"):
        attach(model, LoRA(rank=2))
