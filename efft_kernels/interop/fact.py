"""Adapters saved by the FacT release (arXiv:2212.03145), a .pt file of the trained tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_file import errors_about, shorten
from ..adapters.attach import attach
from ..adapters.attachment import require_plain
from ..adapters.sites import find_sites
from ..methods.base import Site, check_choice, check_number
from ..methods.fact import FacTTT
from ..methods.tensor_train import TensorTrainGroup
from .files import (
    check_floating,
    check_shape,
    check_trained,
    detached_on_error,
    fill,
    read_torch_file,
)

# Per block, in the release's order: q, k, v, proj, four of fc1, four of fc2.
_SLICES_PER_BLOCK = 12
_FIRST_SLICE = {"qkv": 0, "o": 3, "fc1": 4, "fc2": 8}
_SLICES = {"qkv": 3, "o": 1, "fc1": 4, "fc2": 4}


def import_fact(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    method: str,
    scale: float,
    dropout: float = 0.1,
) -> Adapter:
    """Attach an adapter saved by the FacT release (fact_tt.py or fact_tk.py) to `model`.

    Both become FacTTT, with the cores Σ_i [r, r] of y += s·x·U·Σ_i·V^T. The release's FacT-TK cuts
    the cores of fc1 and fc2 out of Σ_t C[:, :, t]·P[t, i] by a reshape that interleaves the four
    slices, so that they are not in the Tucker form (Eq. 10) of its own C; as FacTTT they are exact.
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

    Source: FacT (arXiv:2212.03145), Eq. 8 to 11, and the file layout of its published code.
    """
    require_plain(model)
    check_choice("method", method, ("fact_tt", "fact_tk"))
    check_number("scale", scale)
    check_number("dropout", dropout, low=0.0, below=1.0)
    source = Path(path)
    with errors_about(source):
        return _attach(model, source, method, scale, dropout)


def _attach(model: nn.Module, source: Path, method: str, scale: float, dropout: float) -> Adapter:
    tensors = read_torch_file(source)
    factors = {name: tensor for name, tensor in tensors.items() if "FacT" in name}
    others = {name: tensor for name, tensor in tensors.items() if "FacT" not in name}
    tucker = _is_tucker(factors, method, source)
    trained = _owners(model, others, source)
    check_trained(model, trained, others, source)
    sites = _vit_sites(model, trained)
    cores = _cores(factors, sites, tucker)

    rank = factors["FacTu.weight"].shape[0]
    config = FacTTT(rank=rank, scale=scale, dropout=dropout)
    adapter = attach(model, config, targets=list(cores), modules_to_train=trained)
    with detached_on_error(adapter):
        name = adapter.bank.group_of[sites[0].name]
        group = adapter.bank.group(sites[0].name)
        assert isinstance(group, TensorTrainGroup)
        core = torch.empty(group.core.shape, dtype=torch.float64)
        for site, place in group.placements.items():
            core[place.first_core : place.first_core + place.slices] = cores[site]
        state = {
            f"{name}.U": factors["FacTu.weight"].T,
            f"{name}.V": factors["FacTv.weight"],
            f"{name}.core": core,
        }
        fill(adapter, state, others)
    return adapter


def _is_tucker(factors: Mapping[str, Tensor], method: str, source: Path) -> bool:
    """Whether the file is FacT-TK's; raises ValueError unless it is of `method`."""
    if missing := sorted({"FacTu.weight", "FacTv.weight"} - set(factors)):
        raise ValueError(
            f"path must be a file of the FacT release, got {source} without {shorten(missing)}"
        )
    for name in ("FacTu.weight", "FacTv.weight"):
        if factors[name].ndim != 2:
            raise ValueError(f"{name} must be a matrix, got {list(factors[name].shape)}")
    tucker = bool({"FacTp", "FacTc"} & set(factors))
    if tucker != (method == "fact_tk"):
        raise ValueError(
            f"method must be {'fact_tk' if tucker else 'fact_tt'!r} for {source}, which holds"
            f" {'' if tucker else 'no '}FacTp and FacTc, got {method!r}"
        )
    return tucker


def _owners(model: nn.Module, others: Mapping[str, Tensor], source: Path) -> list[str]:
    """The modules that the tensors named in `others`, the head's, belong to."""
    modules = dict(model.named_modules())
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in others))
    if unknown := sorted(name for name in others if name.rpartition(".")[0] not in modules):
        raise ValueError(
            f"path must hold tensors of modules of {type(model).__name__}, got {source} with"
            f" {shorten(unknown)}"
        )
    return owners


def _vit_sites(model: nn.Module, trained: Sequence[str]) -> list[Site]:
    """The linears that the release adapts: all of a ViT's blocks."""
    sites = find_sites(model, exclude=trained)
    d = sites[0].width
    expected = {"qkv": (d, 3 * d), "o": (d, d), "fc1": (d, 4 * d), "fc2": (4 * d, d)}
    blocks: dict[int, dict[str, tuple[int, int]]] = {}
    for site in sites:
        shape = (site.in_features, site.out_features)
        blocks.setdefault(site.block, {})[site.role] = shape
    for block, shapes in blocks.items():
        if shapes != expected:
            raise ValueError(
                f"model must be timm's ViT, each block with (K, N) of {expected}, got {shapes} in"
                f" block {block}"
            )
    return sites


def _cores(factors: Mapping[str, Tensor], sites: Sequence[Site], tucker: bool) -> dict[str, Tensor]:
    """Site → its Σ_i [slices, r, r] in float64, as in y += s·x·U·Σ_i·V^T."""
    (d,), r = {site.width for site in sites}, factors["FacTu.weight"].shape[0]
    if not 1 <= r <= d:
        raise ValueError(f"the rank of FacTu.weight must be within 1..{d}, got {r}")
    shapes: dict[str, tuple[int, ...]] = {"FacTu.weight": (r, d), "FacTv.weight": (d, r)}
    if tucker:
        blocks = 1 + max(site.block for site in sites)
        shapes |= {"FacTp": (r, _SLICES_PER_BLOCK * blocks), "FacTc": (r, r, r)}
    else:
        per_role = {"fc1": (4 * r, r), "fc2": (r, 4 * r)}
        for site in sites:
            shapes |= dict.fromkeys(_core_names(site), per_role.get(site.role, (r, r)))
    if missing := sorted(set(shapes) - set(factors)):
        raise ValueError(f"path must hold {len(shapes)} FacT tensors, missing {shorten(missing)}")
    if unknown := sorted(set(factors) - set(shapes)):
        raise ValueError(
            f"path must hold {len(shapes)} FacT tensors, got unknown {shorten(unknown)}"
        )
    for name, shape in shapes.items():
        check_shape(name, factors[name], shape)
        check_floating(name, factors[name])
    tensors = {name: tensor.double() for name, tensor in factors.items()}
    find = _tucker_cores if tucker else _train_cores
    return {site.name: find(tensors, site) for site in sites}


def _core_names(site: Site) -> list[str]:
    """The release's names of a site's cores, each the weight of an nn.Linear."""
    kinds = {"qkv": ("q", "k", "v"), "o": ("proj",)}.get(site.role, (site.role,))
    return [f"{site.name.rpartition('.')[0]}.{kind}_FacTs.weight" for kind in kinds]


def _train_cores(tensors: Mapping[str, Tensor], site: Site) -> Tensor:
    """From weights [out, in]: fc1's slices are stacked along out, fc2's along in."""
    axis = 1 if site.role == "fc2" else 0
    stacked = torch.cat([tensors[name] for name in _core_names(site)], axis)
    return torch.stack([core.T for core in stacked.chunk(_SLICES[site.role], axis)])


def _tucker_cores(tensors: Mapping[str, Tensor], site: Site) -> Tensor:
    """From C [a, b, t] and P [t, 12L]: Σ_i[a, b] = Σ_t C[a, b, t]·P[t, i].

    For fc1 and fc2 the release reads [a, (b, i)] as [a, (slice, e)], and transposes fc2's.
    """
    first = _SLICES_PER_BLOCK * site.block + _FIRST_SLICE[site.role]
    mixed = tensors["FacTc"] @ tensors["FacTp"][:, first : first + _SLICES[site.role]]  # [a, b, i]
    if site.role in ("qkv", "o"):
        return mixed.permute(2, 0, 1)
    by_slice = mixed.reshape(len(mixed), 4, -1)  # [a, slice, e]
    return by_slice.permute(1, 2, 0) if site.role == "fc2" else by_slice.transpose(0, 1)
