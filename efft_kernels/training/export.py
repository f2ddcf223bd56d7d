"""A trained model as a file for others: safetensors, torch.export's program, ONNX."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_files import replacing
from .settings import require
from .trained import MODEL_KEY, Trained, write_weights

MOST_ONNX_BYTES = 1_500_000_000  # beyond, torch writes the weights into a second file


def export(trained: Trained, path: Path, *, batch_size: int | None = None) -> float | None:
    """Write a merged model, in the format that the file's name ends in.

    Args:
        trained: merged.
        path: .safetensors (weights alone), .pt2 (torch.export.load) or .onnx; replaced in one step.
            Each carries the model's name and its classes.
        batch_size: of the program; None for any. Weights alone have none.

    Returns:
        How far the program's logits are from the model's at most, on images of noise; None where
        nothing that runs was written, or nothing is here to run it.

    Raises:
        ValueError: another ending, a package that is missing, or a model that cannot be exported.
    """
    check_format(path)
    require("batch_size", batch_size is None or batch_size >= 1, "at least 1", batch_size)
    if path.suffix == ".safetensors":
        write_weights(trained, path)
        return None
    images = torch.randn(batch_size or 2, *trained.input_size, device=trained.device)
    return _WRITERS[path.suffix](trained, path, images, batch_size is None)


def check_format(path: Path) -> None:
    """Check that a file of this name can be written here.

    Raises:
        ValueError: an unknown ending, or a package that is missing.
    """
    known = (".safetensors", *_WRITERS)
    require("output", path.suffix in known, f"a file ending in {', '.join(known)}", path)
    if path.suffix == ".onnx":
        missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
        if missing:
            raise ValueError(
                f"output must end in .safetensors or .pt2 where {' and '.join(missing)} are not"
                f" installed, got {path}: pip install 'efft-kernels[onnx]'"
            )


def _program(trained: Trained, images: Tensor, any_batch: bool) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    try:
        with torch.no_grad():
            return torch.export.export(trained.model, (images,), dynamic_shapes=shapes)
    except Exception as error:  # what stops the tracer is of a dozen unrelated types
        advice = ": --batch-size exports for one size of batch" if any_batch else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model must be one that torch.export can follow, got {trained.facts['model']}"
            f" ({reason}){advice}"
        ) from error


@torch.no_grad()
def _write_pt2(trained: Trained, path: Path, images: Tensor, any_batch: bool) -> float:
    program = _program(trained, images, any_batch)
    # torch.export.save asks for the ending.
    with warnings.catch_warnings():  # torch's own, about its file's buffers and its own classes
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|copyreg")
        with replacing(path) as temporary, temporary.open("wb") as file:
            facts = json.dumps(dict(trained.facts))
            torch.export.save(program, file, extra_files={MODEL_KEY: facts})
        found = torch.export.load(path).module()(images)
    return float((found - trained.model(images)).abs().max())


@torch.no_grad()
def _write_onnx(trained: Trained, path: Path, images: Tensor, any_batch: bool) -> float | None:
    weights = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
    fits = weights < MOST_ONNX_BYTES
    require("output", fits, "a .pt2 file, as ONNX takes at most 1.5 GB in one file", path)
    program = _program(trained, images, any_batch)
    exported: Any = torch.onnx.export(
        program, (images,), input_names=["images"], output_names=["logits"], verbose=False
    )
    exported.model.metadata_props[MODEL_KEY] = json.dumps(dict(trained.facts))
    with replacing(path) as temporary:
        exported.save(str(temporary))
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])
    return float((found - trained.model(images).cpu()).abs().max())


_WRITERS: dict[str, Callable[[Trained, Path, Tensor, bool], float | None]] = {
    ".pt2": _write_pt2,
    ".onnx": _write_onnx,
}
