"""An attached model in the formats of torch: copies, exported programs, TorchScript, ONNX."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efft_kernels import EFFT2, Adapter, LoRA, attach

IMAGES = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)


@pytest.fixture
def model(make_vit: Callable[..., nn.Module], randomize: Callable[[Any], None]) -> nn.Module:
    model = make_vit().eval()
    randomize(attach(model, EFFT2(rank=2)))
    return model


def through(write: Callable[[Any, io.BytesIO], None], read: Callable[[io.BytesIO], Any]) -> Any:
    def there_and_back(value: Any) -> Any:
        file = io.BytesIO()
        write(value, file)
        file.seek(0)
        return read(file)

    return there_and_back


saved = through(torch.save, lambda file: torch.load(file, weights_only=False))
program = through(torch.export.save, torch.export.load)
script = through(torch.jit.save, torch.jit.load)


def onnx(model: nn.Module, images: Tensor, **options: Any) -> Callable[[Tensor], Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    torch.onnx.export(model, (images,), file, verbose=False, **options)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "export": lambda model: program(torch.export.export(model, (IMAGES,))).module(),
    "trace": lambda model: script(torch.jit.trace(model, IMAGES)),
    "onnx": lambda model: onnx(model, IMAGES),
    "onnx of a program": lambda model: onnx(torch.export.export(model, (IMAGES,)), IMAGES),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("way", WAYS)
def test_there_and_back(model: nn.Module, way: str) -> None:
    with torch.no_grad():
        expected = model(IMAGES)
    found = WAYS[way](model)  # with gradients, as a user would
    with torch.no_grad():
        torch.testing.assert_close(found(IMAGES), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(IMAGES), expected)


def test_linears_that_share_their_input(randomize: Callable[[Any], None]) -> None:
    """q, k and v of their own, as Hugging Face has them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.ViTForImageClassification(config).eval()
            randomize(attach(self.model, EFFT2(rank=2)))

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).logits  # type: ignore[no-any-return]

    model = Logits()
    with torch.no_grad():
        expected = model(IMAGES)
        for way in ("export", "trace", "onnx of a program"):
            found = WAYS[way](model)(IMAGES)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_jit_script_names_the_way_out(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"call merge\(\) and detach\(\)"):
        torch.jit.script(model)


class TestPeft:
    @pytest.fixture
    def peft(self) -> Any:
        return pytest.importorskip("peft")

    @pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "OFTConfig"])
    def test_an_attached_model_is_refused(
        self, model: nn.Module, peft: Any, kind: str, unchanged: Any
    ) -> None:
        options: dict[str, Any] = {"target_modules": ["qkv", "fc1"]}
        options |= {"feedforward_modules": ["fc1"]} if kind == "IA3Config" else {}
        options |= {"r": 2} if kind == "LoraConfig" else {}
        options |= {"r": 0, "oft_block_size": 2} if kind == "OFTConfig" else {}
        message = r"is adapted by efft_.*merge\(\) and detach\(\).*export_peft_lora"
        for _ in range(2):
            with unchanged(model), pytest.raises(TypeError, match=message):
                peft.get_peft_model(model, getattr(peft, kind)(**options))
        with unchanged(model), pytest.raises(TypeError, match=message):
            peft.inject_adapter_in_model(getattr(peft, kind)(**options), model)
        Adapter(model).detach()
        assert "peft_config" not in vars(model)
        # A linear that the adapter leaves is no way in: PEFT would freeze the factors.
        adapter = attach(model, LoRA(rank=2, matrices=("o",)))
        with unchanged(model), pytest.raises(TypeError, match=message):
            peft.get_peft_model(model, getattr(peft, kind)(**options), mixed=kind == "LoraConfig")
        assert all(factor.requires_grad for factor in adapter.parameters())

    def test_a_model_of_peft_is_refused(
        self, make_vit: Callable[..., nn.Module], peft: Any, unchanged: Any
    ) -> None:
        config = peft.LoraConfig(r=2, target_modules=["qkv"])
        wrapped = peft.get_peft_model(make_vit(), config)
        way = r"merge_and_unload\(\) first, or read its adapter with import_peft_lora"
        for inner in (wrapped, wrapped.base_model, wrapped.base_model.model):
            with unchanged(inner), pytest.raises(ValueError, match=way):
                attach(inner, LoRA(rank=2), targets="qkv", modules_to_train=())
        mixed = peft.get_peft_model(make_vit(), config, mixed=True)
        with pytest.raises(ValueError, match=way):
            attach(mixed, LoRA(rank=2), modules_to_train=())
        plain = wrapped.merge_and_unload()
        attach(plain, LoRA(rank=2))

    def test_peft_takes_it_once_detached(self, model: nn.Module, peft: Any) -> None:
        with torch.no_grad():
            expected = model(IMAGES)
        adapter = Adapter(model)
        adapter.merge()
        config = peft.LoraConfig(r=2, target_modules=["qkv"])
        theirs = peft.get_peft_model(adapter.detach(), config)
        with torch.no_grad():
            torch.testing.assert_close(theirs(IMAGES), expected, rtol=1e-5, atol=1e-5)
