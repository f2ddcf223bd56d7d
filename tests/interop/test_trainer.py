"""transformers' Trainer with checkpoints of the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from efft_kernels import EFFT2, attach, load

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
    whole = attach(build(), EFFT2(rank=2), modules_to_train=("classifier",))
    train(whole.model, tmp_path / "whole", 4)
    frozen = {name for name, p in whole.model.named_parameters() if not p.requires_grad}
    for step in (2, 4):
        weights = load_file(tmp_path / "whole" / f"checkpoint-{step}" / "model.safetensors")
        assert weights
        assert not frozen & set(weights)

    stopped = attach(build(), EFFT2(rank=2), modules_to_train=("classifier",))
    train(stopped.model, tmp_path / "stopped", 2)
    resumed = attach(build(), EFFT2(rank=2), modules_to_train=("classifier",))
    checkpoint = tmp_path / "stopped" / "checkpoint-2"
    train(resumed.model, tmp_path / "stopped", 4, resume_from_checkpoint=str(checkpoint))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name

    images = torch.ones(1, 3, 8, 8)
    again = load(build(), tmp_path / "whole" / "checkpoint-4" / "adapter.safetensors")
    with torch.inference_mode():
        expected = whole.model.eval()(images).logits
        assert torch.equal(again.model.eval()(images).logits, expected)


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
