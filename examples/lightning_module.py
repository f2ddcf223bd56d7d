"""Fine-tune a timm ViT with Lightning; its checkpoints hold the adapter alone.

    python examples/lightning_module.py --epochs 3

It trains on scikit-learn's digits from random weights, with no network. For a real model:
timm.create_model("vit_base_patch16_224.augreg_in21k", pretrained=True, num_classes=10)
"""

import argparse
from pathlib import Path

import lightning as L
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from efft_kernels import EFFT2, attach, load
from efft_kernels.interop.lightning import AdapterCheckpoints


def build_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)


class Classifier(L.LightningModule):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.model = build_model()
        print(attach(self.model, EFFT2(rank=rank, scale=10.0)))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        top1 = (self.model(images).argmax(-1) == labels).float().mean()
        self.log("top1", top1, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=5e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="how many to train on")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path, help="a checkpoint, X.ckpt")
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[: args.images], labels[: args.images])
    test = TensorDataset(images[-400:], labels[-400:])

    best = ModelCheckpoint(args.output, monitor="top1", mode="max")
    trainer = L.Trainer(
        max_epochs=args.epochs,
        logger=False,
        log_every_n_steps=1,
        callbacks=[best, AdapterCheckpoints()],
    )
    loaders = DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=100)
    trainer.fit(Classifier(args.rank), *loaders, ckpt_path=args.resume)

    # Beside the checkpoint X.ckpt lies X.safetensors, which needs no Lightning.
    file = Path(best.best_model_path).with_suffix(".safetensors")
    print(load(build_model(), file), f"of {file}: top-1 {best.best_model_score:.3f}")


if __name__ == "__main__":
    main()
