"""A run's folder: what lies in it, what may be resumed, and how its files are read and written.

config.json          settings, what they led to (classes, images, backbone), library versions
state.pt             all that an epoch changes, replaced in one step; tensors and plain values only
adapter.safetensors  the adapter of the last or the best epoch, derived from the state
metrics.csv          a row per epoch, derived from the state
curves.png           the same as a picture, once all epochs are done
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from .. import __version__
from ..adapters.adapter_file import FORMAT as ADAPTER_FORMAT
from ..adapters.adapter_file import read_adapter_file
from ..atomic_files import remove, write_bytes, write_text
from ..baselines import BASELINE_FORMAT
from .settings import BEFORE_THERE_WAS, TrainSettings, check_recorded

CONFIG, STATE, METRICS, ADAPTER = "config.json", "state.pt", "metrics.csv", "adapter.safetensors"
CURVES = "curves.png"
HEADER_KEY = "efft_kernels.train"

# May differ when a run is resumed: without effect on the result, or compared by what they lead to
# (the images' names, the backbone's bits, the recipe's settings).
FREE_ON_RESUME = {"data", "checkpoint", "pretrained", "workers", "recipe", "task"}

Config = dict[str, Any]


def check_output(output: Path, *, resume: bool) -> None:
    """Check that a run may begin, or be resumed, in `output`.

    Raises:
        ValueError: it may not.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    names = {path.name for path in output.iterdir() if not _is_leftover(path)}
    if resume:
        if names and CONFIG not in names:
            raise ValueError(f"output must be a run to resume, got {output} without {CONFIG}")
        return
    if CONFIG in names:
        raise ValueError(
            f"output must be a new or empty folder, got {output}, which holds a run:"
            " pass --resume to continue it, or another --output"
        )
    if names:
        raise ValueError(
            f"output must be a new or empty folder, got {output}, which holds {min(names)}:"
            " pass another --output"
        )


def remove_leftovers(output: Path) -> None:
    """Delete the half-written files of a run that was killed while saving."""
    for path in output.iterdir():
        if _is_leftover(path):
            remove(path)


def _is_leftover(path: Path) -> bool:
    names = (CONFIG, STATE, METRICS, ADAPTER, CURVES)
    return path.name.startswith(tuple(f".{name}." for name in names))


def library_versions() -> dict[str, str]:
    """The versions that decide a run's bits."""
    return {"efft_kernels": __version__, "torch": str(torch.__version__), "timm": timm.__version__}


def write_config(output: Path, config: Config) -> None:
    """Make the folder and write its config.json."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / CONFIG, json.dumps(config, indent=2) + "\n")


def read_config(output: Path) -> Config | None:
    """The configuration of the run in `output`, or None.

    Raises:
        ValueError: the file is damaged.
    """
    path = output / CONFIG
    if not path.is_file():
        return None
    try:
        return _checked(json.loads(path.read_text()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be the configuration of a run ({error})") from error


def read_adapter_header(path: Path) -> Config:
    """The configuration that training wrote into an adapter file.

    Raises:
        ValueError: the file is missing, damaged, or was not written by training.
    """
    if not path.is_file():
        raise ValueError(f"adapter must be a file, got {path} (nothing there)")
    metadata, _ = read_adapter_file(path, formats=(ADAPTER_FORMAT, BASELINE_FORMAT))
    if HEADER_KEY not in metadata:
        raise ValueError(
            f"adapter must be one that `efft-kernels train` wrote, got {path}, which names no"
            " model: load it with efft_kernels.load on a model of your own"
        )
    try:
        return _checked(json.loads(metadata[HEADER_KEY]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"adapter must have a readable header, got {path} ({error})") from error


def _checked(config: Any) -> Config:
    wanted = {
        "settings": {item.name for item in dataclasses.fields(TrainSettings)},
        "identity": {"classes", "data", "skipped_images", "backbone"},
        "versions": set[str](),
    }
    for part, names in wanted.items():
        if not isinstance(config, dict) or not isinstance(config.get(part), dict):
            raise ValueError(f"no {part}")
        if part == "settings":
            config[part] = BEFORE_THERE_WAS | config[part]
        if missing := sorted(names - set(config[part])):
            raise ValueError(f"{part} without {', '.join(missing)}")
    lists = {"classes": config["identity"]["classes"], "skipped_images": left_out(config)}
    for name, items in lists.items():
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{name} that are no names")
    check_recorded(config["settings"])
    return config


def left_out(config: Mapping[str, Any]) -> list[str]:
    """The relative paths of the images that the run skipped, before it held any out.

    Runs of the first format recorded their number alone, and skipped them afterwards.
    """
    skipped = config["identity"]["skipped_images"]
    return skipped if isinstance(skipped, list) else []


def compare_settings(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that a run is resumed with the settings it began with.

    Raises:
        ValueError: a setting that decides the result differs; it names the first.
    """
    names = [*settings, *recorded["options"], *settings["options"]]
    for name in dict.fromkeys(name for name in names if name != "options"):
        before, value = (
            values[name] if name in values else values["options"].get(name)
            for values in (recorded, settings)
        )
        if name == "layers" and before and value and set(before) == set(value):
            continue  # their order means nothing
        if name not in FREE_ON_RESUME and before != value:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{name} must be {_shown(before)} as when the run began, got {_shown(value)}:"
                f" resume with the same {flag}, or start anew with another --output"
            )


def compare_identity(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Check that a run is resumed with the images and the backbone it began with.

    Raises:
        ValueError: they changed; it names what.
    """
    meaning = {
        "classes": ("data", "the classes"),
        "data": ("data", "the image files"),
        "backbone": ("checkpoint", "the backbone's weights"),
    }
    for name, (setting, what) in meaning.items():
        if recorded[name] != identity[name]:
            raise ValueError(
                f"{setting} must be as when the run began, but {what} changed:"
                " put it back, or start anew with another --output"
            )


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def save_state(output: Path, state: Mapping[str, Any]) -> None:
    """Replace the folder's state."""
    # To memory first: torch's writer says nothing of a full disk but "unexpected pos".
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(output / STATE, buffer.getbuffer())


def read_state(output: Path, device: torch.device) -> dict[str, Any] | None:
    """The folder's state, or None before an epoch ended.

    Raises:
        ValueError: the file is damaged.
    """
    path = output / STATE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # pickle, zipfile and torch share no base class
        raise damaged_state(output, error) from error
    if not isinstance(state, dict):
        raise damaged_state(output, TypeError(f"holds a {type(state).__name__}"))
    return state


def damaged_state(output: Path, error: Exception) -> ValueError:
    """The error for a state that cannot be used."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(
        f"{output / STATE} must be the state of this run ({reason}):"
        " start anew with another --output"
    )
