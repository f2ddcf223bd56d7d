"""Which linears of a model a method adapts: names to roles, blocks and stages."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from ..methods.base import FFN_ROLES, MHSA_ROLES, Site
from .hints import matches, none_known, none_matches
from .roles import fit_roles, split_name
from .torch_attention import IN_PROJ, InProjection, unsupported
from .towers import beside_vision

Key = TypeVar("Key", bound=Hashable)

_ALIASES = {"mhsa": MHSA_ROLES, "ffn": FFN_ROLES}


def find_sites(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    layers: int | Iterable[int] | None = None,
    exclude: Sequence[str] = (),
) -> list[Site]:
    """The sites that `targets` and `layers` choose, in the model's order.

    A linear's whole name in `targets` stands for that linear alone. A module that the model uses
    under several names, or at several depths, is one site, under the first of its names. The
    stacked query, key and value weights of an nn.MultiheadAttention are a linear named in_proj.

    Args:
        model: the model to look through.
        targets: None for every attention and FFN linear whose role is known by name, of a model
            that reads text as well those of its vision tower; else names, dotted endings
            ("attn.qkv"), globs ("blocks.*.attn.*"), or "mhsa" / "ffn", one or several.
        layers: block indices from 0 over the whole model; None for all.
        exclude: module names whose linears are left alone (those that are trained whole).

    Raises:
        TypeError: targets or layers of the wrong kind.
        ValueError: a pattern or a block index that matches nothing, or nothing left to adapt.
    """
    shapes, aliases = _linears(model, exclude)
    block_of = {name: split_name(name)[0] for name in shapes}
    everywhere = fit_roles(
        {name: Site(name, split_name(name)[1], 0, 0, *shape) for name, shape in shapes.items()},
        block_of,
    )
    known = [block_of[name] for name, site in everywhere.items() if site.role != "linear"]
    blocks = _numbered(known or filter(None, block_of.values()))
    chosen = _match_targets(model, everywhere, targets, aliases, exclude)
    stages = _numbered(site.width for site in everywhere.values() if site.role != "linear")
    sites = [
        replace(site, block=blocks.get(block_of[name], 0), stage=stages.get(site.width, 0))
        for name, site in everywhere.items()
        if name in chosen
    ]
    inside = {name for name, block in block_of.items() if block in blocks}
    return _filter_layers(sites, layers, len(blocks), inside)


def linear_shapes(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Name → (K, N) of all linears that could be adapted, each once.

    Args:
        model: the model to look through.
        exclude: module names whose linears are left alone.
    """
    return _linears(model, exclude)[0]


def _linears(
    model: nn.Module, exclude: Sequence[str]
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """(name → K, N of each linear, an attention's stacked q, k and v included; other name → name).

    A module that is found under several names has the first of them.
    """
    shapes: dict[str, tuple[int, int]] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, str], str] = {}
    excluded: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        stacked = isinstance(module, nn.MultiheadAttention) and not unsupported(module)
        if stacked:
            own = f"{name}.{IN_PROJ}".removeprefix(".")
            shape = module.embed_dim, 3 * module.embed_dim  # type: ignore[operator]
        elif isinstance(module, nn.Linear) and name and not isinstance(module, InProjection):
            own, shape = name, (module.in_features, module.out_features)
        else:
            continue
        known = first.setdefault((id(module), IN_PROJ if stacked else ""), own)
        shapes[known] = shape  # type: ignore[assignment]
        if known != own:
            aliases[own] = known
        if any(_inside(own, outer) for outer in exclude):
            excluded.add(known)
    return {name: shapes[name] for name in shapes if name not in excluded}, aliases


def _inside(name: str, outer: str) -> bool:
    """Whether a module is `outer` or lies in it."""
    return name == outer or name.startswith(outer + ".")


def _numbered(keys: Iterable[Key]) -> dict[Key, int]:
    """Distinct keys → 0, 1, 2, ... in their order."""
    numbers: dict[Key, int] = {}
    for key in keys:
        numbers.setdefault(key, len(numbers))
    return numbers


def _match_targets(
    model: nn.Module,
    sites: Mapping[str, Site],
    targets: str | Sequence[str] | None,
    aliases: Mapping[str, str],
    exclude: Sequence[str],
) -> set[str]:
    beside = beside_vision(model, sites)
    known = {
        name: site.role
        for name, site in sites.items()
        if site.role != "linear" and name not in beside
    }
    if targets is None:
        if not known:
            raise ValueError(none_known(model, list(sites), exclude))
        return set(known)
    if not isinstance(targets, Iterable):
        raise TypeError(f"targets must be a name, a pattern or several, got {targets!r}")
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"targets must be a name, a pattern or several, got {targets!r}")
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {name for name in sites if matches(name, pattern)}
        hits |= {name for other, name in aliases.items() if matches(other, pattern)}
        if pattern in _ALIASES:
            hits |= {name for name, role in known.items() if role in _ALIASES[pattern]}
        pattern_name = aliases.get(pattern, pattern)
        hits = {pattern_name} if pattern_name in sites else hits & sites.keys()
        if not hits:
            raise ValueError(none_matches(model, pattern, list(sites), exclude))
        chosen |= hits
    return chosen


def _filter_layers(
    sites: list[Site], layers: int | Iterable[int] | None, blocks: int, inside: set[str]
) -> list[Site]:
    if layers is None:
        return sites
    if not isinstance(layers, int | Iterable):
        raise TypeError(f"layers must be block indices (int), got {layers!r}")
    wanted = [layers] if isinstance(layers, int) else list(layers)
    if not wanted:
        raise ValueError("layers must name at least one block, got none")
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers must be block indices (int), got {layer!r}")
        if not 0 <= layer < blocks:
            raise ValueError(f"layers must be within 0..{blocks - 1}, got {layer}")
    chosen = [site for site in sites if site.block in wanted and site.name in inside]
    if not chosen:
        raise ValueError(f"layers {wanted} hold none of the linears that targets chose")
    return chosen
