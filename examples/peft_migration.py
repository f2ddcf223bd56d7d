"""Take a LoRA checkpoint of PEFT over, train it further here, and give it back.

    python examples/peft_migration.py

It makes the checkpoint first, on a small ViT of random weights, with no network. A folder of yours
that PEFT's save_pretrained wrote serves as well, on the model that it was trained on.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from efft_kernels import export_peft_lora, import_peft_lora


def build_model() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=3, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(images).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=4, help="PEFT's r")
    parser.add_argument("--alpha", type=int, default=8, help="PEFT's lora_alpha")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, help="new folder for the result")
    args = parser.parse_args()
    scratch = tempfile.TemporaryDirectory()
    folder, images = Path(scratch.name), torch.randn(8, 1, 8, 8)

    # As PEFT has it. Its r is `rank` here, and lora_alpha / r is `scale`.
    config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=["q_proj", "v_proj"],
                        modules_to_save=["classifier"], init_lora_weights=False)  # fmt: skip
    theirs = get_peft_model(build_model(), config)
    theirs.save_pretrained(folder / "peft")

    # Here. PEFT need not be installed for this.
    adapter = import_peft_lora(build_model(), folder / "peft")
    print(adapter, adapter.method)
    difference = (logits(adapter.model, images) - logits(theirs, images)).abs().max()
    print(f"taken over: logits differ by {difference:.1e}")

    labels = torch.arange(8)
    trained = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(args.steps):
        loss = nn.functional.cross_entropy(adapter.model.train()(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained further: loss {loss:.3f}")

    # And back, for whoever serves it with PEFT; EFFT and FacT have an exact LoRA as well.
    ranks = export_peft_lora(adapter, args.output or folder / "back")
    back = PeftModel.from_pretrained(build_model(), args.output or folder / "back")
    difference = (logits(back, images) - logits(adapter.model, images)).abs().max()
    print(f"given back, {len(ranks)} linears: logits differ by {difference:.1e}")
    scratch.cleanup()


if __name__ == "__main__":
    main()
