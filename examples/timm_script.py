"""A training loop of timm's own parts: loader, augmentation, mixup, optimizer, scheduler, EMA.

    python examples/timm_script.py --epochs 4

It trains on scikit-learn's digits from random weights, with no network. For a real model:
--model vit_base_patch16_224.augreg_in21k --pretrained --image-size 224
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy

from efft_kernels import EFFT2, Adapter, attach


class Digits(torch.utils.data.Dataset):
    """Pictures and labels; timm's loader sets the transform."""

    def __init__(self, part: slice) -> None:
        digits = load_digits()
        pixels = (digits.images[part] * 15.9).astype("uint8")
        self.items = [(Image.fromarray(p).convert("RGB"), int(y))
                      for p, y in zip(pixels, digits.target[part])]  # fmt: skip
        self.transform = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        image, label = self.items[index]
        return self.transform(image), label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=1000, help="how many to train on")
    parser.add_argument("--output", type=Path, default=Path("adapter.safetensors"))
    args = parser.parse_args()

    torch.manual_seed(0)
    small = {} if args.pretrained else {"patch_size": 4, "embed_dim": 48, "depth": 3}
    options = {"pretrained": args.pretrained, "num_classes": 10, "img_size": args.image_size}
    model = timm.create_model(args.model, **options, **small)
    print(attach(model, EFFT2(rank=8, scale=10.0)))

    common = {"input_size": (3, args.image_size, args.image_size), "use_prefetcher": False}
    common |= {"batch_size": 32, "num_workers": 0}
    train = create_loader(Digits(slice(args.images)), is_training=True, hflip=0.0,
                          scale=(0.7, 1.0), **common)  # fmt: skip
    test = create_loader(Digits(slice(-400, None)), is_training=False, crop_pct=1.0, **common)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.5, num_classes=10, label_smoothing=0.1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05)  # what trains
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, warmup_epochs=1, warmup_lr=1e-4
    )
    ema = ModelEmaV3(model, decay=0.95)
    for epoch in range(epochs):
        model.train()
        for images, labels in train:
            mixed, targets = mixup(images, labels)
            loss = SoftTargetCrossEntropy()(model(mixed), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
        scheduler.step(epoch + 1)
        ema.module.eval()
        with torch.inference_mode():
            top1 = [accuracy(ema.module(x), y)[0] * len(y) for x, y in test]
        print(f"epoch {epoch}: loss {loss:.3f}, top-1 {float(sum(top1)) / 400:.1f}%")
    Adapter(ema.module).save(args.output)  # the averaged model carries an adapter of its own


if __name__ == "__main__":
    main()
