"""PEFT LoRA checkpoints: a folder of adapter_config.json and adapter_model.safetensors.

PEFT itself is not needed, neither to read nor to write.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_file import buffers_of, check_has_numbers, errors_about, shorten
from ..adapters.architectures import PEFT_QKV_WARNING
from ..adapters.attach import attach
from ..adapters.attachment import require_plain
from ..adapters.sites import find_sites
from ..methods.base import Factors
from ..methods.lora import LoRA
from ..methods.sharded import whole
from .files import (
    check_floating,
    check_shape,
    check_trained,
    detached_on_error,
    fill,
    is_number,
    new_folder,
    read_json,
    read_safetensors,
    read_torch_file,
)
from .name_patterns import NamePatterns

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_OLD_WEIGHTS = "adapter_model.bin"
_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# Fields of PEFT's LoraConfig that are read below, or say which modules, how they started or where
# they came from. Any other field that is set asks for another computation than W + s·B·A.
_PLAIN_FIELDS = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_core", "merge_weights", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
)  # fmt: skip
# The others (pissa, olora, corda, loftq, lora_ga, ...) change the base weights at the start.
_BASE_KEEPING_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class _Pair(NamedTuple):
    """One linear's LoRA factors, ΔW = scale·b·a."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    scale: float


@dataclass(frozen=True)
class _Config:
    """What of PEFT's LoraConfig decides the function."""

    rank: int
    alpha: float
    ranks: NamePatterns
    alphas: NamePatterns
    rank_stabilised: bool
    modules_to_save: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        return int(self.ranks.value_of(module, self.rank))

    def scale_of(self, module: str, rank: int) -> float:
        """α/r, or α/√r where rank-stabilised."""
        alpha = self.alphas.value_of(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def import_peft_lora(model: nn.Module, path: str | os.PathLike[str]) -> Adapter:
    """Attach the LoRA of a PEFT checkpoint folder to `model`, the plain model it was trained on.

    ΔW = s·B·A of each adapted nn.Linear becomes `LoRA(matrices=None)`, one matrix per linear (a
    fused qkv included); `modules_to_save` become the adapter's modules_to_train. Where
    `rank_pattern` gave several ranks, all get the largest, padded with zero rows of A and zero
    columns of B: these change nothing and their gradients are zero, so each linear keeps its own
    rank in training too. Where the scales differ they are multiplied into B. `lora_dropout` is not
    carried over. All or nothing: on any error the model is as it was.

    Args:
        model: the base model, e.g. timm's or Hugging Face's ViT, without an adapter.
        path: a folder with adapter_config.json and adapter_model.safetensors (or, from older
            releases of PEFT, adapter_model.bin).

    Returns:
        The adapter, whose outputs are the PEFT model's.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        TypeError: `model` is no nn.Module, or an adapted module is no plain nn.Linear.
        ValueError: the model carries an adapter; unreadable files; a checkpoint that is not plain
            LoRA (DoRA, biases, LoHa, PiSSA, ...); tensors that do not fit the configuration or
            the model.
    """
    require_plain(model)
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be a PEFT checkpoint folder, found none at {folder}")
    with errors_about(folder):
        return _attach(model, folder)


def _attach(model: nn.Module, folder: Path) -> Adapter:
    config = _read_config(folder / _CONFIG)
    pairs, others = _split_tensors(config, _read_tensors(folder), folder)
    _check_pairs_fit(model, pairs)
    trained = _saved_modules(model, config.modules_to_save, others)
    check_trained(model, trained, others, folder)
    found = {site.name for site in find_sites(model, list(pairs), exclude=trained)}
    if further := sorted(set(pairs) - found):
        raise ValueError(
            "adapted linears must go by the first of their names in the model, got"
            f" {shorten(further)}"
        )

    rank = max(pair.a.shape[0] for pair in pairs.values())
    scales = {pair.scale for pair in pairs.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    method = LoRA(rank=rank, scale=scale, matrices=None)
    adapter = attach(model, method, targets=list(pairs), modules_to_train=trained)
    with detached_on_error(adapter):
        state = {}
        for module, pair in pairs.items():
            group, missing = adapter.bank.group_of[module], rank - pair.a.shape[0]
            b = pair.b if pair.scale == scale else pair.b.double() * pair.scale
            state[f"{group}.A"] = F.pad(pair.a, (0, 0, 0, missing))[None]
            state[f"{group}.B"] = F.pad(b, (0, missing))[None]
        fill(adapter, state, others)
    return adapter


def export_peft_lora(adapter: Adapter, path: str | os.PathLike[str]) -> dict[str, int]:
    """Write the adapter as a PEFT LoRA checkpoint folder: two factors per linear, B·A = ΔW.

    ΔW[slice g] = (down·core[g]·up[g]^T)^T is a product of two matrices already: either A = down^T
    with the fold B = stack of up[g]·core[g]^T, of rank Ra, or A = stack of (down·core[g])^T with
    B = blockdiag(up[g]), of rank G·Rb. The smaller is written, so every method is exact with no
    decomposition: products are taken in float64 and rounded once, to the factors' dtype. Scales
    are folded in and alpha = r; a rank index that is zero in both A and B is left out. The
    modules_to_train become `modules_to_save`; dropout is not written.

    Args:
        adapter: of any method, merged or not; it stays as it is.
        path: the folder to make; its parent must exist, and it must not, or be empty.

    Returns:
        Module name → the rank written.

    Raises:
        TypeError: not an Adapter.
        ValueError: an adapted projection of nn.MultiheadAttention, which PEFT passes by; tensors on
            the meta device.
        FileExistsError: something is at `path`.
        OSError: the folder cannot be written.
        RuntimeError: the adapter was detached.
    """
    if not isinstance(adapter, Adapter) or not adapter.sites:  # a baseline has none
        raise TypeError(f"adapter must be an Adapter, got {type(adapter).__name__}")
    check_has_numbers(adapter.required_state())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in adapter.layers().items():
        if isinstance(adapter.model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(
                f"adapter must be of linears that PEFT calls, got {name!r} of an"
                " nn.MultiheadAttention: merge and detach it, and save the model"
            )
        with torch.no_grad():
            factors = layer.current_factors()
            a, b = _exact_pair(factors)
        ranks[name] = a.shape[0]
        for side, factor in (("A", a), ("B", b)):
            tensors[f"{_PREFIX}{name}.lora_{side}.weight"] = factor.to(factors.down.dtype)
    for module in adapter.modules_to_train:
        for name, tensor in adapter.model.get_submodule(module).state_dict().items():
            tensors[f"{_PREFIX}{module}.{name}"] = whole(tensor).detach()
    # A copy of its own for each tensor: safetensors refuses those that share memory.
    tensors = {k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    if adapter.bank.attachment.separated_bias:
        warnings.warn(PEFT_QKV_WARNING, stacklevel=2)
    if buffers := list(buffers_of(adapter.state_dict())):
        warnings.warn(
            f"PEFT's format has no place for the {len(buffers)} buffers that training changed"
            f" ({', '.join(buffers[:3])}): give them to the base model that it is put on",
            stacklevel=2,
        )
    with new_folder(Path(path)) as folder:
        config = json.dumps(_config_for(ranks, adapter.modules_to_train), indent=2)
        (folder / _CONFIG).write_text(config + "\n", encoding="utf-8")
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    return ranks


def _read_config(path: Path) -> _Config:
    if not path.is_file():
        raise FileNotFoundError(f"path must hold {_CONFIG}, found none at {path}")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} must have peft_type 'LORA', got {repr(config.get('peft_type'))}")
    for field, value in config.items():
        if field not in _PLAIN_FIELDS and value:
            raise ValueError(f"{path} must be of plain LoRA, got {field}={repr(value)}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path} must have bias='none', got bias={repr(config['bias'])}")
    init = config.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _BASE_KEEPING_INITS:
        raise ValueError(
            f"{path} must be of LoRA on unchanged base weights, got init_lora_weights={repr(init)}"
            " (PEFT's path_initial_model_for_weight_conversion saves such an adapter as plain LoRA)"
        )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise ValueError(f"{path} must have names in modules_to_save, got {repr(saved)}")
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ValueError(f"{path} must have an object as {name}, got {repr(pattern)}")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    for value in (rank, *patterns["rank_pattern"].values()):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{path} must have whole numbers from 1 as ranks, got {repr(value)}")
    for value in (alpha, *patterns["alpha_pattern"].values()):
        if not is_number(value):
            raise ValueError(f"{path} must have finite numbers as alphas, got {repr(value)}")
    return _Config(
        rank=rank,
        alpha=alpha,
        ranks=NamePatterns(patterns["rank_pattern"]),
        alphas=NamePatterns(patterns["alpha_pattern"]),
        rank_stabilised=bool(config.get("use_rslora")),
        modules_to_save=tuple(saved),
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / _WEIGHTS).is_file():
        return read_safetensors(folder / _WEIGHTS)
    if (folder / _OLD_WEIGHTS).is_file():
        return read_torch_file(folder / _OLD_WEIGHTS)
    raise FileNotFoundError(f"path must hold {_WEIGHTS}, found none in {folder}")


def _split_tensors(
    config: _Config, tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """(module → its pair, the other tensors), both by the names of the plain model."""
    sides: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name == key or not (match := _LORA_KEY.fullmatch(name)):
            if name == key or "lora_" in name or ".base_layer." in name:
                raise ValueError(
                    "path must hold lora_A.weight, lora_B.weight and modules_to_save under"
                    f" {_PREFIX!r}, got {folder} with {key}"
                )
            others[name] = tensor
        else:
            check_floating(key, tensor)
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise ValueError(f"path must hold at least one lora_A.weight, got {folder} without")
    pairs = {}
    for module, pair in sides.items():
        for side in "AB":
            if side not in pair:
                raise ValueError(
                    f"path must hold {module}.lora_{side}.weight, got {folder} without"
                )
        rank, a, b = config.rank_of(module), pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
            raise ValueError(
                f"{module} must have lora_A [r={rank}, K] and lora_B [N, r={rank}], got"
                f" {list(a.shape)} and {list(b.shape)}"
            )
        pairs[module] = _Pair(a, b, config.scale_of(module, rank))
    return pairs, others


def _check_pairs_fit(model: nn.Module, pairs: Mapping[str, _Pair]) -> None:
    """Raise unless each pair belongs to an nn.Linear that also holds the largest rank."""
    modules = dict(model.named_modules(remove_duplicate=False))
    rank = max(pair.a.shape[0] for pair in pairs.values())
    for name, pair in pairs.items():
        if name not in modules:
            raise ValueError(
                f"model must have the adapted module {name!r}, got a {type(model).__name__} without"
            )
        linear = modules[name]
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"the adapted module {name!r} must be an nn.Linear itself, got"
                f" {type(linear).__name__}"
            )
        n, k, own = linear.out_features, linear.in_features, pair.a.shape[0]
        check_shape(f"{name}.lora_A.weight", pair.a, (own, k), "[r, K]")
        check_shape(f"{name}.lora_B.weight", pair.b, (n, own), "[N, r]")
        if rank > min(k, n):
            raise ValueError(
                f"r must be at most min(K, N)={min(k, n)} of {name!r} (K={k}, N={n}), got {rank},"
                " the largest rank in the checkpoint, which all its linears get"
            )


def _saved_modules(
    model: nn.Module, endings: Sequence[str], tensors: Mapping[str, Tensor]
) -> list[str]:
    """The outermost modules that `modules_to_save` name and the checkpoint has tensors of.

    As in PEFT, an ending of the dotted name is enough.
    """
    chosen: list[str] = []
    for module, _ in model.named_modules():
        fits = module.endswith(tuple(endings))
        saved = any(name.startswith(module + ".") for name in tensors)
        if fits and saved and not any(module.startswith(outer + ".") for outer in chosen):
            chosen.append(module)
    return chosen


def _exact_pair(factors: Factors) -> tuple[Tensor, Tensor]:
    """(A [R, K], B [N, R]) in float64 with B·A = ΔW [N, K].

    R is the smallest that needs no decomposition: min(Ra, G·Rb, K, N), unused indices left out.
    """
    # On the CPU: not every device has float64.
    down = factors.down.to("cpu", torch.float64)  # [K, Ra]
    up = factors.up.to("cpu", torch.float64)  # [1 or G, N/G, Rb]
    if factors.core is None:
        a, b = down.T, up.flatten(0, 1)
    else:
        core = factors.core.to("cpu", torch.float64)  # [G, Ra, Rb]
        slices = core.shape[0]
        if down.shape[1] <= slices * up.shape[2]:
            a, b = down.T, (up @ core.mT).flatten(0, 1)
        else:
            a = (down @ core).mT.flatten(0, 1)  # [G·Rb, K]
            b = torch.block_diag(*up.expand(slices, *up.shape[1:]))  # [N, G·Rb]
    used = (a != 0).any(1) | (b != 0).any(0)
    used[0] |= ~used.any()
    a, b = a[used], b[:, used]
    n, k = b.shape[0], a.shape[1]
    if a.shape[0] > min(k, n):
        delta, eye = b @ a, torch.eye(min(k, n), dtype=a.dtype)
        return (eye, delta) if k <= n else (delta, eye)
    return a, b


def _config_for(ranks: Mapping[str, int], modules_to_train: Sequence[str]) -> dict[str, Any]:
    """PEFT's LoraConfig with alpha = r for each linear.

    Patterns only where ranks differ, the longest name first: PEFT takes the first that fits.
    """
    several = len(set(ranks.values())) > 1
    pattern = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True) if several}
    rank = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": list(ranks),
        "modules_to_save": list(modules_to_train) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
