"""Serve an adapted model: merge it, then torch.export, ONNX or torch.compile, as any plain model.

    python examples/serving.py --output served

It adapts a small timm ViT of random weights, with no network. A run of `efft-kernels train` is
served by the command `efft-kernels export RUN -o model.onnx`.
"""

import argparse
import importlib.util
from pathlib import Path

import timm
import torch
from torch import nn

from efft_kernels import EFFT2, attach, load


def build_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, help="a file of Adapter.save; else a random one")
    parser.add_argument("--output", type=Path, default=Path("served"), help="folder to write to")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    if args.adapter:
        adapter = load(build_model(), args.adapter)
    else:
        adapter = attach(build_model(), EFFT2(rank=8))
        with torch.no_grad():
            for factor in adapter.parameters():
                factor.normal_(std=0.3)
    images = torch.randn(4, 1, 8, 8)
    with torch.inference_mode():
        expected = adapter.model(images)

    # ΔW becomes part of the weights, and the layers plain nn.Linear: no package of ours is needed.
    adapter.merge()
    model = adapter.detach().eval()

    def report(what: str, found: torch.Tensor) -> None:
        print(f"{what}: logits differ by {(found - expected).abs().max():.1e}")

    with torch.inference_mode():
        report("merged", model(images))

    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (images,), dynamic_shapes=batch)
    torch.export.save(program, args.output / "model.pt2")
    with torch.inference_mode():
        report("model.pt2", torch.export.load(args.output / "model.pt2").module()(images))

    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        file = args.output / "model.onnx"
        torch.onnx.export(program, (images,), input_names=["images"], verbose=False).save(file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        report("model.onnx", torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))
    else:
        print("model.onnx: left out, it needs pip install 'efft-kernels[onnx]'")

    compiled = torch.compile(model, backend=args.backend, fullgraph=True)
    with torch.inference_mode():
        report(f"torch.compile ({args.backend})", compiled(images))


if __name__ == "__main__":
    main()
