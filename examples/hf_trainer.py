"""Fine-tune a Hugging Face ViT with Trainer; its checkpoints hold the adapter alone.

    python examples/hf_trainer.py --epochs 3

It trains on scikit-learn's digits from random weights, with no network. For a real model:
model = ViTForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=10)
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from efft_kernels import EFFT2, attach, from_pretrained
from efft_kernels.interop.trainer import AdapterCheckpoints


def build_model() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=3, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="how many to train on")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/hf_trainer"))
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target)]
    model = build_model()
    adapter = attach(model, EFFT2(rank=args.rank, scale=10.0))  # the classifier is trained too
    print(adapter)

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            learning_rate=5e-3,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            report_to=[],
        ),
        train_dataset=data[: args.images],
        eval_dataset=data[-400:],
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
        callbacks=[AdapterCheckpoints()],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    print("top-1 of the best epoch:", trainer.evaluate()["eval_accuracy"])

    # A checkpoint's adapter on a fresh model: a folder, or the name of a repository on the hub.
    best = trainer.state.best_model_checkpoint
    again = from_pretrained(build_model(), best)
    with torch.inference_mode():
        x = images[:4].to(model.device)
        difference = (again.model.to(model.device).eval()(x).logits - model.eval()(x).logits).abs()
    print(f"the adapter of {best} gives the same logits to within {difference.max():.1e}")


if __name__ == "__main__":
    main()
