"""What training left, opened again: the model that it adapted, its classes and its transform.

A source is a run's folder, an adapter file that training wrote, or a merged model, which is a
folder that timm opens by itself too (timm.create_model("local-dir:FOLDER", pretrained=True)):

model.safetensors  the plain model's weights, with `MODEL_KEY` in the header
config.json        architecture, classes and preprocessing, as timm and the hub have them
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..adapters.attach import resolve_modules_to_train
from ..atomic_files import replacing, write_text
from . import images, run_folder
from .backbone import Notify, build_backbone, fingerprint
from .methods import load_trained
from .reproducible import epoch_seed, seed_everything
from .settings import require, resolve_device

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODEL_KEY = "efft_kernels.model"
PROGRAMS = (".pt2", ".onnx")  # what `export` writes for others


@dataclass(frozen=True)
class Trained:
    """A trained model, in evaluation mode.

    Attributes:
        model: plain where it was merged, else with its adapter on it.
        facts: what a merged model's header says: "model", "classes", "img_size", "normalize".
        device: where the model is.
    """

    model: nn.Module
    facts: Mapping[str, Any]
    device: torch.device

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the order of the logits."""
        return tuple(self.facts["classes"])

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """An image as the model takes it, [C, H, W]."""
        _, transform = images.make_transforms(
            self.model, img_size=self.facts["img_size"], normalize=self.facts["normalize"]
        )
        return transform

    @property
    def input_size(self) -> tuple[int, ...]:
        """(C, H, W)."""
        size = self.facts["img_size"]
        args = None if size is None else {"img_size": size}
        return tuple(resolve_model_data_config(self.model, args=args)["input_size"])


def open_trained(
    source: Path,
    *,
    checkpoint: Path | None = None,
    pretrained: bool | None = None,
    merge: bool = False,
    device: str = "auto",
    notify: Notify = lambda message: None,
) -> Trained:
    """Rebuild what training left.

    Args:
        source: a run's folder, an adapter file, or a merged model.
        checkpoint: file of the backbone's weights; None for what training used, as for pretrained.
        pretrained: fetch timm's weights where no checkpoint is given.
        merge: fold the adapter into the weights, and leave a plain model.
        device: "auto" is CUDA where there is one.
        notify: called with lines for the user.

    Raises:
        ValueError: source is none of these, or the backbone does not fit; it names what.
    """
    path = _file_of(source)
    torch_device = resolve_device(device)
    facts = _merged_facts(path)
    if facts is not None:
        model = build_backbone(
            facts["model"],
            num_classes=len(facts["classes"]),
            checkpoint=path,
            img_size=facts["img_size"],
            notify=notify,
        )
        return Trained(model.to(torch_device).eval(), facts, torch_device)
    recorded = run_folder.read_adapter_header(path)
    settings, identity = recorded["settings"], recorded["identity"]
    if checkpoint is None and pretrained is None and settings["checkpoint"] is not None:
        checkpoint = Path(settings["checkpoint"])
        there = checkpoint.is_file()
        require("checkpoint", there, f"given, as {checkpoint} is no longer there", "none")
    seed_everything(epoch_seed(settings["seed"], 0))
    model = build_backbone(
        settings["model"],
        num_classes=len(identity["classes"]),
        checkpoint=checkpoint,
        pretrained=settings["pretrained"] if pretrained is None else pretrained,
        img_size=settings["img_size"],
        drop_path=settings["drop_path"],
    )
    if fingerprint(model, resolve_modules_to_train(model, "head")) != identity["backbone"]:
        notify(
            "the backbone's weights differ from those the adapter was trained on:"
            " what it computes may mean nothing"
        )
    adapter = load_trained(model, path, settings["method"])
    model.to(torch_device).eval()
    if merge:
        adapter.merge()
        adapter.detach()
    kept = {name: settings[name] for name in ("model", "img_size", "normalize")}
    return Trained(model, {**kept, "classes": identity["classes"]}, torch_device)


def _file_of(source: Path) -> Path:
    if not source.is_dir():
        what = "a run's folder, its adapter.safetensors or a merged model's .safetensors"
        require("source", source.suffix not in PROGRAMS, what, source)
        return source
    names = (run_folder.ADAPTER, WEIGHTS)
    found = [source / name for name in names if (source / name).is_file()]
    what = f"a run's folder or a merged model, with {' or '.join(names)}"
    require("source", bool(found), what, source)
    return found[0]


def _merged_facts(path: Path) -> Mapping[str, Any] | None:
    """What a merged model's header says; None for any other file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(MODEL_KEY)
    except SafetensorError:
        return None
    if text is None:
        return None
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    known = {"model", "classes", "img_size", "normalize"}
    if not isinstance(facts, dict) or not known <= facts.keys():
        raise ValueError(f"source must have a readable header, got {path}")
    return facts


def write_weights(trained: Trained, path: Path) -> None:
    """Write the plain model's weights as safetensors, with its name and classes in the header.

    Args:
        trained: merged.
        path: the file, replaced in one step.
    """
    state = {name: tensor.contiguous().cpu() for name, tensor in trained.model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, {"format": "pt", MODEL_KEY: json.dumps(dict(trained.facts))})


def write_folder(trained: Trained, folder: Path) -> None:
    """Write a merged model as the folder that is described above."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(trained, folder / WEIGHTS)
    write_text(folder / CONFIG, json.dumps(timm_config(trained), indent=2) + "\n")


def timm_config(trained: Trained) -> dict[str, Any]:
    """config.json as timm writes it for the hub."""
    model: Any = trained.model
    size, own = trained.facts["img_size"], dict(model.pretrained_cfg)
    data = images.data_config(model, size, trained.facts["normalize"])
    kept = ("first_conv", "classifier", "fixed_input_size", "pool_size")
    return {
        "architecture": own["architecture"],
        "num_classes": len(trained.classes),
        "num_features": model.num_features,
        "label_names": list(trained.classes),
        "model_args": {} if size is None else {"img_size": size},
        "pretrained_cfg": {
            **{name: own[name] for name in kept if own.get(name) is not None},
            **data,
            "num_classes": len(trained.classes),
        },
    }
