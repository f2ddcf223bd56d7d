"""A training loop with Hugging Face accelerate: one process or several, with gradients accumulated.

    python examples/accelerate_loop.py --epochs 3
    accelerate launch examples/accelerate_loop.py

It trains a small timm ViT on scikit-learn's digits from random weights, with no network. For a real
model: timm.create_model("vit_base_patch16_224.augreg_in21k", pretrained=True, num_classes=10)
"""

import argparse
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from efft_kernels import EFFT2, attach, load


def build_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="how many to train on")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2, help="batches per step")
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--resume", action="store_true", help="from the last epoch's state")
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[: args.images], labels[: args.images])
    test = DataLoader(TensorDataset(images[-400:], labels[-400:]), batch_size=100)

    model = build_model()
    adapter = attach(model, EFFT2(rank=args.rank, scale=10.0))  # before prepare wraps the model
    accelerator.print(adapter)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model, optimizer, loader, test = accelerator.prepare(model, optimizer, loader, test)
    state = args.output / "state"  # everything, to resume from: the backbone as well
    if args.resume:
        accelerator.load_state(str(state))

    for epoch in range(args.epochs):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        right = []
        with torch.inference_mode():
            for x, y in test:
                right.append(accelerator.gather_for_metrics(model(x).argmax(-1) == y))
        accelerator.print(f"epoch {epoch}: top-1 {torch.cat(right).float().mean():.3f}")
        accelerator.save_state(str(state))

    if accelerator.is_main_process:
        adapter.save(args.output / "adapter.safetensors")  # the handle keeps the unwrapped model
        print(load(build_model(), args.output / "adapter.safetensors"), "is in", args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
