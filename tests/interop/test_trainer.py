"""transformers' Trainer with checkpoints of the adapter alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from efft_kernels import EFFT2, Adapter, attach, load

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from efft_kernels.interop.trainer import AdapterCheckpoints  # noqa: E402


def build() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def train(model: nn.Module, folder: Path, steps: int, **given: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    data = [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": index % 3}
        for index in range(16)
    ]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, callbacks=[AdapterCheckpoints()]
    )
    trainer.train(**given)


def test_a_checkpoint_holds_the_adapter_and_resumes(tmp_path: Path) -> None:
    # A norm within the blocks, which transformers' save_pretrained writes under another name.
    norm = next(n for n, _ in build().named_modules() if n.endswith("layernorm_before"))
    trained = ("classifier", norm)
    whole = attach(build(), EFFT2(rank=2), modules_to_train=trained)
    train(whole.model, tmp_path / "whole", 4)
    for step in (2, 4):
        weights = load_file(tmp_path / "whole" / f"checkpoint-{step}" / "model.safetensors")
        assert set(weights) == {n for n, p in whole.model.named_parameters() if p.requires_grad}

    stopped = attach(build(), EFFT2(rank=2), modules_to_train=trained)
    train(stopped.model, tmp_path / "stopped", 2)
    resumed = attach(build(), EFFT2(rank=2), modules_to_train=trained)
    checkpoint = tmp_path / "stopped" / "checkpoint-2"
    train(resumed.model, tmp_path / "stopped", 4, resume_from_checkpoint=str(checkpoint))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name

    images = torch.ones(1, 3, 8, 8)
    again = load(build(), tmp_path / "whole" / "checkpoint-4" / "adapter.safetensors")
    with torch.inference_mode():
        expected = whole.model.eval()(images).logits
        assert torch.equal(again.model.eval()(images).logits, expected)


@pytest.mark.parametrize("family", ["ViT", "Beit", "DeiT", "Dinov2", "Swin", "CLIP"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_nothing_of_the_backbone_stays_whatever_names_it_is_saved_under(
    family: str, shard: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": 8, "patch_size": 4, "intermediate_size": 32}
    if family == "Swin":
        sizes = {"embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 2}
        sizes |= {"image_size": 8, "patch_size": 4}
    given = {"vision_config": sizes} if family == "CLIP" else sizes
    config = getattr(transformers, f"{family}Config")(**given, num_labels=3)
    model = getattr(transformers, f"{family}ForImageClassification")(config)
    attach(model, EFFT2(rank=2))
    folder = tmp_path / "checkpoint-1"
    model.save_pretrained(folder, max_shard_size=shard)
    trainer = SimpleNamespace(output_dir=tmp_path)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    AdapterCheckpoints().on_save(trainer, state, None, model=model)
    assert {path.name for path in folder.glob("model*")} == {"model.safetensors"}
    kept = load_file(folder / "model.safetensors")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {*[f"factor_bank.{n}" for n in Adapter(model).bank.state_dict()]} | {
        "classifier.weight",
        "classifier.bias",
    }
    assert trained == set(kept) - {name for name, _ in model.named_buffers()}


def test_factors_that_are_frozen_by_now_are_kept(tmp_path: Path) -> None:
    adapter = attach(build(), EFFT2(rank=2), modules_to_train=("classifier",))
    adapter.bank.requires_grad_(False)
    train(adapter.model, tmp_path, 2)
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert {f"factor_bank.{name}" for name, _ in adapter.named_parameters()} <= set(weights)


def test_accelerate_saves_and_loads_its_state(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    adapters = [attach(build(), EFFT2(rank=2), modules_to_train=("classifier",)) for _ in "ab"]
    with torch.no_grad():
        for factor in adapters[0].parameters():
            factor.normal_()
    accelerator.prepare(adapters[0].model)
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    accelerator.prepare(adapters[1].model)
    accelerator.load_state(str(tmp_path))
    expected = adapters[0].state_dict()
    for name, tensor in adapters[1].state_dict().items():
        assert torch.equal(tensor, expected[name]), name
