"""Other projects' files: PEFT LoRA checkpoints, read and written, and the FacT release's, read.

All or nothing both ways: a file is checked whole before the model is touched, and a folder is
written beside its place and renamed. Tensors come from safetensors, or from `torch.load` with
weights_only=True where the format knows nothing else; nothing beyond that is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter import Adapter, is_attached, shorten
from .attach import attach
from .methods import FacTTT, LoRA
from .methods.base import Factors, Site, check_choice, check_number
from .methods.tensor_train import TensorTrainGroup
from .sites import find_sites

_CONFIG, _WEIGHTS, _OLD_WEIGHTS = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# Fields of PEFT's LoraConfig that say which modules, how they were made or where they came from,
# or that are read below. Any other field that is set asks for another computation than W + s·B·A.
_PLAIN_FIELDS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config eva_config"
    " exclude_modules inference_mode init_lora_weights layers_pattern layers_to_transform"
    " loftq_config lora_alpha lora_dropout lora_ga_config megatron_core modules_to_save peft_type"
    " peft_version qalora_group_size r rank_pattern revision runtime_config target_modules"
    " task_type use_rslora".split()
)
# The others (pissa, olora, corda, loftq, lora_ga, ...) change the base weights at the start.
_BASE_KEEPING_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


class _Pair(NamedTuple):
    """One linear's LoRA factors, ΔW = scale·b·a."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    scale: float


@dataclass(frozen=True)
class _PeftConfig:
    """What of PEFT's LoraConfig decides the function."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    modules_to_save: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """α/r, or α/√r where rank-stabilised."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module)
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
            LoRA (DoRA, biases, LoHa, PiSSA, ...); tensors that fit neither the configuration nor
            the model.
    """
    _require_plain(model)
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be a PEFT checkpoint folder, found none at {folder}")
    config = _read_peft_config(folder / _CONFIG)
    tensors = _read_peft_tensors(folder)
    pairs, others = _split_peft_tensors(config, tensors, folder)
    _check_pairs_fit(model, pairs)
    trained = _saved_modules(model, config.modules_to_save, others)
    _check_trained_tensors(model, trained, others, folder)

    rank = max(pair.a.shape[0] for pair in pairs.values())
    scales = {pair.scale for pair in pairs.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    method = LoRA(rank=rank, scale=scale, matrices=None)
    adapter = attach(model, method, targets=list(pairs), modules_to_train=trained)

    def state() -> dict[str, Tensor]:
        if surplus := sorted({site.name for site in adapter.sites} - set(pairs)):
            raise ValueError(
                f"module names must tell the adapted linears apart, also got {shorten(surplus)}"
            )
        filled = {}
        for module, pair in pairs.items():
            group, missing = adapter.bank.group_of[module], rank - pair.a.shape[0]
            b = pair.b if pair.scale == scale else pair.b.double() * (pair.scale / scale)
            filled[f"factors.{group}.A"] = nn.functional.pad(pair.a, (0, 0, 0, missing))[None]
            filled[f"factors.{group}.B"] = nn.functional.pad(b, (0, missing))[None]
        return filled

    return _fill(adapter, state, others, folder)


def export_peft_lora(adapter: Adapter, path: str | os.PathLike[str]) -> dict[str, int]:
    """Write the adapter as a PEFT LoRA checkpoint folder: per linear two factors with B·A = ΔW.

    ΔW[slice g] = (down·core[g]·up[g]^T)^T is a product of two matrices already: the smaller of
    A = down^T with the fold B = stack of up[g]·core[g]^T, of rank Ra, and A = stack of
    (down·core[g])^T with B = blockdiag(up[g]), of rank G·Rb. So every method is exact, with no
    decomposition: the products are taken in float64 and rounded once to the factors' dtype. Scales
    are folded in, alpha = r. Columns that are zero in both factors are left out. The
    modules_to_train become `modules_to_save`; dropout is not written.

    Args:
        adapter: of any method, merged or not; it stays as it is.
        path: the folder to make; its parent must exist, and it must not, or be empty.

    Returns:
        Module name → the rank written.

    Raises:
        TypeError: not an Adapter.
        FileExistsError: something is at `path`.
        OSError: the folder cannot be written.
        RuntimeError: the adapter was detached.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter, got {type(adapter).__name__}")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in adapter.layers().items():
        with torch.no_grad():
            factors = layer.current_factors()
            a, b = _exact_pair(factors)
        ranks[name] = a.shape[0]
        for side, factor in (("A", a), ("B", b)):
            factor = factor.to(factors.down.dtype).contiguous()
            tensors[f"{_PREFIX}{name}.lora_{side}.weight"] = factor
    for module in adapter.modules_to_train:
        for name, tensor in adapter.model.get_submodule(module).state_dict().items():
            copy = tensor.detach().clone(memory_format=torch.contiguous_format)
            tensors[f"{_PREFIX}{module}.{name}"] = copy
    if adapter.bank.attachment.separated_bias:  # type: ignore[union-attr]
        warnings.warn(
            "PEFT leaves the qkv of this model as it is unless qkv_bias_separate is set on each"
            " attention module: set it before PeftModel.from_pretrained",
            stacklevel=2,
        )
    with _new_folder(Path(path)) as folder:
        config = _peft_config(ranks, adapter.modules_to_train)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    return ranks


def import_fact(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    method: str,
    scale: float,
    dropout: float = 0.1,
) -> Adapter:
    """Attach an adapter saved by the FacT release (fact_tt.py or fact_tk.py) to `model`.

    Both become FacTTT with the cores Σ_i [r, r] of y += s·x·U·Σ_i·V^T. The release's FacT-TK cuts
    the d×4d cores of fc1 and fc2 out of Σ_t C[:, :, t]·P[t, i] by a reshape that interleaves the
    four slices, so that they are no Tucker form (Eq. 10) of its own C; as FacTTT they are exact.
    The head in the file, if any, becomes trained. All or nothing: on any error the model is as it
    was.

    Args:
        model: timm's ViT with a fused qkv and 4d hidden features, the head as wide as the file's.
        path: the .pt file, a dictionary of tensors; read with weights_only=True.
        method: "fact_tt" or "fact_tk", the script that wrote the file.
        scale: s. It is not in the file: the release takes it from the task's configuration.
        dropout: of the rank-r activation, should training go on; the release's is 0.1.

    Raises:
        FileNotFoundError: no such file.
        TypeError: `model` is no nn.Module, or scale or dropout no number.
        ValueError: the model carries an adapter or is no such ViT; a file of another layout or
            method; a tensor that is missing, unknown or of another shape.

    Source: FacT (arXiv:2212.03145), Eq. 8 to 11, and the layout of its published code.
    """
    _require_plain(model)
    check_choice("method", method, ("fact_tt", "fact_tk"))
    check_number("scale", scale)
    file = Path(path)
    tensors = _torch_load(file)
    factors = {name: tensor for name, tensor in tensors.items() if "FacT" in name}
    others = {name: tensor for name, tensor in tensors.items() if "FacT" not in name}
    tucker = {"FacTp", "FacTc"} <= set(factors)
    if "FacTu.weight" not in factors or "FacTv.weight" not in factors:
        raise ValueError(
            f"path must hold FacTu.weight and FacTv.weight, got {file} with"
            f" {shorten(sorted(tensors)) or 'no tensors'}"
        )
    if tucker != (method == "fact_tk"):
        raise ValueError(
            f"method must be {'fact_tk' if tucker else 'fact_tt'!r} for {file}, which holds"
            f" {'FacTp and FacTc' if tucker else 'no FacTp and FacTc'}, got {method!r}"
        )
    trained = _owners(model, others, file)
    _check_trained_tensors(model, trained, others, file)
    sites = _fact_sites(model, trained)
    cores = _fact_cores(factors, sites, tucker)
    rank = factors["FacTu.weight"].shape[0]
    config = FacTTT(rank=rank, scale=scale, dropout=dropout)
    adapter = attach(model, config, targets=list(cores), modules_to_train=trained)

    def state() -> dict[str, Tensor]:
        group_name = adapter.bank.group_of[sites[0].name]
        group: Any = adapter.bank.group(sites[0].name)
        assert isinstance(group, TensorTrainGroup)
        core = torch.zeros(group.core.shape, dtype=torch.float64)
        for site, place in group.placements.items():
            core[place.first_core : place.first_core + place.slices] = cores[site]
        return {
            f"factors.{group_name}.U": factors["FacTu.weight"].T,
            f"factors.{group_name}.V": factors["FacTv.weight"],
            f"factors.{group_name}.core": core,
        }

    return _fill(adapter, state, others, file)


def _require_plain(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if is_attached(model):
        raise ValueError(
            f"model must carry no adapter, got a {type(model).__name__} that has one:"
            " detach it first"
        )


def _fill(
    adapter: Adapter,
    factors: Callable[[], dict[str, Tensor]],
    others: Mapping[str, Tensor],
    source: Path,
) -> Adapter:
    """Load the factors and the trained modules' tensors, or take the adapter off again."""
    try:
        state = {**adapter.state_dict(), **factors()}
        for name, tensor in others.items():
            module = next(m for m in adapter.modules_to_train if name.startswith(m + "."))
            state[f"modules.{module}.{name[len(module) + 1 :]}"] = tensor
        adapter.load_state_dict(state)
    except BaseException as error:
        adapter.detach()
        if isinstance(error, ValueError):
            raise ValueError(f"path must hold tensors for this model, got {source}: {error}") from (
                None
            )
        raise
    return adapter


def _check_trained_tensors(
    model: nn.Module, trained: Sequence[str], others: Mapping[str, Tensor], source: Path
) -> None:
    """Raise ValueError unless `others` are the whole state of the `trained` modules."""
    expected = {
        f"{module}.{name}": tensor
        for module in trained
        for name, tensor in model.get_submodule(module).state_dict().items()
    }
    if unknown := sorted(set(others) - set(expected)):
        raise ValueError(
            f"path must hold factors and modules trained whole ({', '.join(trained) or 'none'}),"
            f" got {source} with {shorten(unknown)}"
        )
    if missing := sorted(set(expected) - set(others)):
        raise ValueError(f"path must hold {shorten(missing)}, got {source} without")
    for name, tensor in others.items():
        _check_shape(name, tensor, tuple(expected[name].shape))


def _owners(model: nn.Module, others: Mapping[str, Tensor], source: Path) -> list[str]:
    """The modules that the tensors named in `others` belong to."""
    modules = dict(model.named_modules())
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in others))
    if unknown := [name for name in owners if not name or name not in modules]:
        raise ValueError(
            f"path must hold tensors of modules of {type(model).__name__}, got {source} with"
            f" tensors of {shorten(sorted(unknown))}"
        )
    return owners


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], symbols: str = "") -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} must be {symbols + '=' if symbols else ''}{list(expected)}, got"
            f" {list(tensor.shape)}"
        )


def _torch_load(path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors in a file of torch.save, on the CPU; no other object is made."""
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of torch.save, found none at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"path must be a whole file of tensors, got {path}: {str(error).splitlines()[:1]}"
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"path must hold a dictionary of tensors, got {path} with something else")
    return _checked_tensors(content, path)


def _checked_tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor in {path}, got {type(tensor)}")
        if "lora_" in name or "FacT" in name:
            if not tensor.is_floating_point():
                raise ValueError(f"{name} must be floating in {path}, got {tensor.dtype}")
    return {name: tensor.detach() for name, tensor in content.items()}


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which is renamed to `path` at the end or removed on an error."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"path must not exist or be an empty folder, got {path}")
    beside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    beside.mkdir()
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _read_peft_config(path: Path) -> _PeftConfig:
    if not path.is_file():
        raise FileNotFoundError(f"path must hold {_CONFIG}, found none at {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} must have peft_type 'LORA', got {config.get('peft_type')!r}")
    for field, value in config.items():
        if field not in _PLAIN_FIELDS and value:
            raise ValueError(f"{path} must be of plain LoRA, got {field}={value!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path} must have bias 'none', got {config['bias']!r}")
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _BASE_KEEPING_INITS:
        raise ValueError(
            f"{path} must be of LoRA on unchanged base weights, got init_lora_weights={init!r}"
            " (PEFT's path_initial_model_for_weight_conversion saves such an adapter as plain LoRA)"
        )
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise ValueError(f"{path} must have modules_to_save as names, got {saved!r}")
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ValueError(f"{path} must have {name} as an object, got {pattern!r}")
    for name, values in (
        ("r", [rank, *patterns["rank_pattern"].values()]),
        ("lora_alpha", [alpha, *patterns["alpha_pattern"].values()]),
    ):
        for value in values:
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not whole and (name == "r" or not isinstance(value, float)):
                raise ValueError(f"{path} must have positive numbers as {name}, got {value!r}")
    return _PeftConfig(
        rank, alpha, patterns["rank_pattern"], patterns["alpha_pattern"],
        bool(config.get("use_rslora")), tuple(saved),
    )  # fmt: skip


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that, as a regular expression, fits the whole name or its end."""
    for key, value in pattern.items():
        try:
            fits = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise ValueError(
                f"rank_pattern and alpha_pattern must have regular expressions as keys, got"
                f" {key!r}: {error}"
            ) from None
        if fits:
            return value
    return pattern.get(module, default)


def _read_peft_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / _WEIGHTS
    if path.is_file():
        try:
            return _checked_tensors(load_file(path), path)
        except SafetensorError as error:
            raise ValueError(f"{path} must be a whole safetensors file: {error}") from None
    if (folder / _OLD_WEIGHTS).is_file():
        return _torch_load(folder / _OLD_WEIGHTS)
    raise FileNotFoundError(f"path must hold {_WEIGHTS}, found none in {folder}")


def _split_peft_tensors(
    config: _PeftConfig, tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """(module → its pair, the other tensors), both by the names of the plain model."""
    sides: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if match := _LORA_KEY.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
        elif name == key or "lora_" in name or ".base_layer." in name:
            raise ValueError(
                f"path must hold plain LoRA (lora_A.weight, lora_B.weight) and modules_to_save,"
                f" got {folder} with {key}"
            )
        else:
            others[name] = tensor
    if not sides:
        raise ValueError(f"path must hold at least one lora_A.weight, got {folder} without")
    pairs = {}
    for module, pair in sides.items():
        if missing := {"A", "B"} - set(pair):
            raise ValueError(
                f"path must hold both factors of {module}, got {folder} without"
                f" lora_{missing.pop()}.weight"
            )
        rank, a, b = config.rank_of(module), pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
            raise ValueError(
                f"{module} must have lora_A [r={rank}, K] and lora_B [N, r={rank}], got"
                f" {list(a.shape)} and {list(b.shape)}"
            )
        pairs[module] = _Pair(a, b, config.scale_of(module))
    return pairs, others


def _check_pairs_fit(model: nn.Module, pairs: Mapping[str, _Pair]) -> None:
    modules = dict(model.named_modules())
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
        _check_shape(f"{name}.lora_A.weight", pair.a, (own, k), "[r, K]")
        _check_shape(f"{name}.lora_B.weight", pair.b, (n, own), "[N, r]")
        if rank > min(k, n):
            raise ValueError(
                f"r must be at most min(K, N)={min(k, n)} of {name!r} (K={k}, N={n}), got {rank},"
                " the largest rank in the checkpoint, which all its linears get"
            )


def _saved_modules(
    model: nn.Module, names: Sequence[str], others: Mapping[str, Tensor]
) -> list[str]:
    """The outermost modules that PEFT's `modules_to_save`, which are endings, choose."""
    chosen: list[str] = []
    for module, _ in model.named_modules():
        if module.endswith(tuple(names)) and not any(module.startswith(m + ".") for m in chosen):
            if any(name.startswith(module + ".") for name in others):
                chosen.append(module)
    return chosen


def _exact_pair(factors: Factors) -> tuple[Tensor, Tensor]:
    """(A [R, K], B [N, R]) in float64 with B·A = ΔW [N, K] and the smallest R at hand."""
    down, up = factors.down.double(), factors.up.double()
    core = None if factors.core is None else factors.core.double()
    slices, rows, width = (up.shape[0] if core is None else core.shape[0]), *up.shape[1:]
    if core is None or down.shape[1] <= slices * width:
        fold = up if core is None else up @ core.mT  # [G, N/G, Ra]
        a, b = down.T, fold.flatten(0, 1)
    else:
        a = (down @ core).mT.flatten(0, 1)  # [G·Rb, K]
        b = torch.block_diag(*up.expand(slices, rows, width))
    alive = (a != 0).any(1) | (b != 0).any(0)
    alive[0] |= not alive.any()
    a, b = a[alive], b[:, alive]
    n, k = b.shape[0], a.shape[1]
    if a.shape[0] > min(k, n):
        delta = b @ a
        eye = torch.eye(min(k, n), dtype=delta.dtype, device=delta.device)
        a, b = (eye, delta) if k <= n else (delta, eye)
    return a, b


def _peft_config(ranks: Mapping[str, int], modules_to_train: Sequence[str]) -> dict[str, Any]:
    """PEFT's LoraConfig with alpha = r everywhere; patterns, longest name first since PEFT takes
    the first key that fits a name's end, only where ranks differ."""
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


_FACT_ROLES = ("qkv", "o", "fc1", "fc2")
_FACT_SLICES = 12  # per block: q, k, v, proj, four of fc1, four of fc2


def _fact_sites(model: nn.Module, trained: Sequence[str]) -> list[Site]:
    """The linears of a timm ViT that the release adapts: all of its blocks'."""
    sites = find_sites(model, exclude=trained)
    blocks: dict[int, dict[str, Site]] = {}
    for site in sites:
        blocks.setdefault(site.block, {})[site.role] = site
    for block in blocks.values():
        d = next(iter(block.values())).width
        shapes = {role: (s.in_features, s.out_features) for role, s in block.items()}
        expected = {"qkv": (d, 3 * d), "o": (d, d), "fc1": (d, 4 * d), "fc2": (4 * d, d)}
        if shapes != expected or len({site.width for site in sites}) > 1:
            name = next(iter(block.values())).name
            raise ValueError(
                f"model must be timm's ViT with blocks of {expected} (K, N), got {shapes} in the"
                f" block of {name!r}"
            )
    return sites


def _fact_cores(
    factors: Mapping[str, Tensor], sites: Sequence[Site], tucker: bool
) -> dict[str, Tensor]:
    """Site → its Σ_i [slices, r, r] in float64, as in y += s·x·U·Σ_i·V^T."""
    u, v = factors["FacTu.weight"], factors["FacTv.weight"]
    d, r = sites[0].width, u.shape[0]
    _check_shape("FacTu.weight", u, (r, d), "[r, d]")
    _check_shape("FacTv.weight", v, (d, r), "[d, r]")
    shapes = {"FacTu.weight": (r, d), "FacTv.weight": (d, r)}
    if tucker:
        blocks = 1 + max(site.block for site in sites)
        shapes |= {"FacTp": (r, _FACT_SLICES * blocks), "FacTc": (r, r, r)}
    else:
        for site in sites:
            shapes |= dict.fromkeys(_fact_names(site), _fact_shape(site, r))
    if missing := sorted(set(shapes) - set(factors)):
        raise ValueError(f"path must hold {len(shapes)} FacT tensors, missing {shorten(missing)}")
    if unknown := sorted(set(factors) - set(shapes)):
        raise ValueError(
            f"path must hold {len(shapes)} FacT tensors, got unknown {shorten(unknown)}"
        )
    for name, shape in shapes.items():
        _check_shape(name, factors[name], shape)
    tensors = {name: tensor.double() for name, tensor in factors.items()}
    return {
        site.name: _tucker_cores(tensors, site) if tucker else _train_cores(tensors, site)
        for site in sites
    }


def _fact_names(site: Site) -> list[str]:
    """The release's nn.Linear weights for a site's cores."""
    kinds = {"qkv": ("q", "k", "v"), "o": ("proj",)}.get(site.role, (site.role,))
    return [f"{site.name.rpartition('.')[0]}.{kind}_FacTs.weight" for kind in kinds]


def _fact_shape(site: Site, r: int) -> tuple[int, int]:
    return {"fc1": (4 * r, r), "fc2": (r, 4 * r)}.get(site.role, (r, r))


def _train_cores(tensors: Mapping[str, Tensor], site: Site) -> Tensor:
    """From weights in nn.Linear's [out, in]: fc1 stacks its four slices along out, fc2 along in."""
    weights = [tensors[name] for name in _fact_names(site)]
    axis = 1 if site.role == "fc2" else 0
    stacked = torch.cat(weights, axis)
    r = stacked.shape[1 - axis]
    return torch.stack([core.T for core in stacked.split(r, axis)])


def _tucker_cores(tensors: Mapping[str, Tensor], site: Site) -> Tensor:
    """From C [r, r, t] and P [t, 12L]: x·U·Σ_i with Σ_i[a, b] = Σ_t C[a, b, t]·P[t, i].

    For fc1 and fc2 the release reads [a, (b, i)] as [a, (slice, e)], and fc2's is then transposed.
    """
    first = _FACT_SLICES * site.block + {"qkv": 0, "o": 3, "fc1": 4, "fc2": 8}[site.role]
    count = {"qkv": 3, "o": 1}.get(site.role, 4)
    mixed = tensors["FacTc"] @ tensors["FacTp"][:, first : first + count]  # [a, b, i]
    r = mixed.shape[0]
    if site.role in ("qkv", "o"):
        return mixed.permute(2, 0, 1)
    interleaved = mixed.reshape(r, 4, r)  # [a, slice, e]
    return interleaved.permute(1, 2, 0) if site.role == "fc2" else interleaved.transpose(0, 1)
