"""Lightning's Trainer with checkpoints of the adapter alone."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from efft_kernels import EFFT2, Adapter, attach, load

pytest.importorskip("lightning")

from efft_kernels.interop.lightning import AdapterCheckpoints

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
IMAGES = torch.linspace(-1, 1, 8 * 192).view(8, 3, 8, 8)


def plain(width: int = 12) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes: Any = {"img_size": 8, "patch_size": 4, "num_classes": 3, "depth": 2, "num_heads": 3}
    return VisionTransformer(embed_dim=width, **sizes)


def module_of(package: str, model: nn.Module) -> Any:
    pl = importlib.import_module(package)

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    return Classifier()


def build(package: str = "lightning.pytorch", **options: Any) -> Any:
    model = plain(**options)
    attach(model, EFFT2(rank=2))
    return module_of(package, model)


def trainer_of(
    folder: Path, epochs: int, package: str = "lightning.pytorch", **options: Any
) -> Any:
    pl = importlib.import_module(package)
    keep = pl.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
    return pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
        | {"enable_model_summary": False, "max_epochs": epochs, "default_root_dir": folder}
        | {"callbacks": [keep, AdapterCheckpoints()]}
        | options
    )


def batches() -> Any:
    return DataLoader(TensorDataset(IMAGES, torch.arange(8) % 3), batch_size=4)


def fit(module: Any, folder: Path, epochs: int, package: str = PACKAGES[0], **given: Any) -> Any:
    trainer = trainer_of(folder, epochs, package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches(), **given)
    return trainer


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_checkpoint_holds_the_adapter_and_resumes(tmp_path: Path, package: str) -> None:
    pytest.importorskip(package)
    whole = build(package)
    fit(whole, tmp_path / "whole", 2, package)
    saved = read(tmp_path / "whole" / "epoch=1.ckpt")
    assert {name.split(".")[1] for name in saved["state_dict"]} == {"factor_bank", "head"}
    assert len(saved["optimizer_states"][0]["state"]) == 8

    stopped, resumed = build(package), build(package)
    fit(stopped, tmp_path / "stopped", 1, package)
    checkpoint = tmp_path / "stopped" / "epoch=0.ckpt"
    trainer = fit(resumed, tmp_path / "stopped", 2, package, ckpt_path=checkpoint)
    expected = Adapter(whole.model).state_dict()
    for name, tensor in Adapter(resumed.model).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    ours, theirs = read(tmp_path / "after.ckpt"), saved
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    for index, moments in ours["optimizer_states"][0]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, theirs["optimizer_states"][0]["state"][index][name])

    again = load(plain(), tmp_path / "whole" / "epoch=1.safetensors")
    with torch.inference_mode():
        assert torch.equal(again.model.eval()(IMAGES), whole.model.eval()(IMAGES))


def test_the_file_goes_with_its_checkpoint(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    trainer = trainer_of(
        tmp_path, 3, callbacks=[ModelCheckpoint(tmp_path), AdapterCheckpoints("model")]
    )
    trainer.fit(build(), batches())
    assert {path.suffix for path in tmp_path.iterdir()} == {".ckpt", ".safetensors"}
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_missing_or_another_model_is_told(tmp_path: Path) -> None:
    fit(build(), tmp_path, 1)
    checkpoint = tmp_path / "epoch=0.ckpt"
    with pytest.raises(ValueError, match=r"must have model\.\S+ of \[.*12.*\].*, got \[.*24"):
        fit(build(width=24), tmp_path, 2, ckpt_path=checkpoint)
    content = read(checkpoint)
    del content["state_dict"]["model.factor_bank.mhsa.U"]
    torch.save(content, checkpoint)
    with pytest.raises(RuntimeError, match=r"Missing.*factor_bank\.mhsa\.U"):
        fit(build(), tmp_path, 2, ckpt_path=checkpoint)


def test_factors_that_are_frozen_by_now_are_kept(tmp_path: Path) -> None:
    module = build()
    Adapter(module.model).bank.requires_grad_(False)
    fit(module, tmp_path, 1)
    assert "model.factor_bank.mhsa.U" in read(tmp_path / "epoch=0.ckpt")["state_dict"]


def test_a_module_without_one_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Classifier must hold one adapted model, got none"):
        fit(module_of(PACKAGES[0], plain()), tmp_path, 1)
    several = build()
    several.other = build().model
    with pytest.raises(ValueError, match="got 'model', 'other'"):
        fit(several, tmp_path, 1)


class Disk:
    """A CheckpointIO that keeps everything in memory."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.files[str(path)] = checkpoint

    def load_checkpoint(self, path: Any) -> Any:
        return dict(self.files[str(path)])

    def remove_checkpoint(self, path: Any) -> None:
        del self.files[str(path)]


def disk_of(module: nn.Module) -> tuple[Any, Disk]:
    """(what a Trainer reads and writes by, what lies behind it)."""
    disk = Disk()
    strategy = SimpleNamespace(checkpoint_io=disk)
    for _ in range(2):  # once more, as for a second fit
        AdapterCheckpoints().setup(SimpleNamespace(strategy=strategy), module, "fit")
    return strategy.checkpoint_io, disk


def test_all_but_the_base_goes_to_the_disk_and_comes_back(tmp_path: Path) -> None:
    """A parameter of two names included."""
    module = nn.ModuleDict({"model": build().model})
    module["model"].again = module["model"].blocks[0]
    io, disk = disk_of(module)
    path = tmp_path / "x.ckpt"
    io.save_checkpoint({"state_dict": module.state_dict(), "epoch": 3}, path)
    saved = disk.files[str(path)]
    assert {name.split(".")[1] for name in saved["state_dict"]} == {"factor_bank", "head"}
    found = io.load_checkpoint(path)
    assert found["epoch"] == 3 and found["state_dict"].keys() == module.state_dict().keys()
    assert {file.name for file in tmp_path.iterdir()} == {"x.safetensors"}
    (tmp_path / "x.safetensors").unlink()  # by hand
    io.remove_checkpoint(path)
    assert not disk.files and io.files is disk.files


def test_weights_alone_and_other_checkpoints_are_left_as_they_are(tmp_path: Path) -> None:
    io, _ = disk_of(nn.ModuleDict({"model": build().model}))
    weights = {"model.head.bias": torch.ones(3)}
    io.save_checkpoint(weights, tmp_path / "weights")
    assert io.load_checkpoint(tmp_path / "weights") == weights
    assert not list(tmp_path.iterdir())


def test_no_file_lies_beside_a_checkpoint_at_an_address() -> None:
    module = nn.ModuleDict({"model": build().model})
    io, disk = disk_of(module)
    with pytest.warns(UserWarning, match=r"s3://x\.ckpt is on no local disk") as told:
        io.save_checkpoint({"state_dict": module.state_dict()}, "s3://x.ckpt")
    assert told[0].filename == __file__ and "s3://x.ckpt" in disk.files
    io.remove_checkpoint("s3://x.ckpt")
    assert not disk.files


def test_a_strategy_that_writes_by_itself_is_refused() -> None:
    class FSDPStrategy:
        pass

    class Trainer:
        strategy = FSDPStrategy()

    with pytest.raises(ValueError, match=r"as 'ddp' does.*got FSDPStrategy"):
        AdapterCheckpoints().setup(Trainer(), nn.Identity(), "fit")


def test_one_of_several_processes_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = tmp_path / "saves"
    save = Adapter.save

    def noted(self: Adapter, path: Any, *given: Any) -> None:
        with saves.open("a") as file:
            file.write(f"{path}\n")
        save(self, path, *given)

    monkeypatch.setattr(Adapter, "save", noted)
    folder = tmp_path / "checkpoints"
    trainer = trainer_of(folder, 1, strategy="ddp_fork", devices=2)
    trainer.fit(build(), batches())
    assert saves.read_text().split() == [str(folder / "epoch=0.safetensors")]
    load(plain(), folder / "epoch=0.safetensors")
    resumed = trainer_of(folder, 2, strategy="ddp_fork", devices=2)
    resumed.fit(build(), batches(), ckpt_path=folder / "epoch=0.ckpt")
    assert len(saves.read_text().split()) == 2
