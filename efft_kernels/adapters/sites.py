"""Which linears of a model a method adapts: names to roles, blocks and stages."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from ..methods.base import FFN_ROLES, MHSA_ROLES, Site
from .torch_attention import IN_PROJ, InProjection, unsupported

Key = TypeVar("Key", bound=Hashable)

# The tail of a module's name, after its block's prefix, for each role; the first that fits counts.
_ROLE_TAILS: tuple[tuple[str, str], ...] = (
    (r"attn\.qkv|(?:self_)?(?:attn|attention)\.in_proj", "qkv"),
    (r"(?:self_)?(?:attn|attention)\.q_proj|attention\.(?:attention|self)\.query", "q"),
    (r"(?:self_)?(?:attn|attention)\.k_proj|attention\.(?:attention|self)\.key", "k"),
    (r"(?:self_)?(?:attn|attention)\.v_proj|attention\.(?:attention|self)\.value", "v"),
    (r"attn\.proj|(?:self_)?(?:attn|attention)\.(?:o|out)_proj|attention\.output\.dense", "o"),
    (r"mlp\.(?:fc1_g|gate_proj)", "gate"),
    (r"mlp\.(?:fc1(?:_x)?|up_proj|lin1|c_fc|0)|intermediate\.dense|linear1", "fc1"),
    (r"mlp\.weights_in", "gate_fc1"),
    (r"mlp\.(?:fc2|weights_out|down_proj|lin2|c_proj|3)|output\.dense|linear2", "fc2"),
)
_TAIL = re.compile(
    r"^(?P<block>.*\d)\.(?:" + "|".join(f"({tail})" for tail, _ in _ROLE_TAILS) + r")$"
)
_ALIASES = {"mhsa": MHSA_ROLES, "ffn": FFN_ROLES}


def split_name(name: str) -> tuple[str, str]:
    """(block prefix, role) of a dotted name; role "linear" where the name tells nothing."""
    match = _TAIL.match(name)
    if match is None:
        prefix = re.match(r"^(.*\.\d+)\.", name)
        return (prefix.group(1) if prefix else ""), "linear"
    position = next(i for i, group in enumerate(match.groups()[1:]) if group is not None)
    return match["block"], _ROLE_TAILS[position][1]


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
        targets: None for every attention and FFN linear whose role is known by name; else names,
            dotted endings ("attn.qkv"), globs ("blocks.*.attn.*"), or "mhsa" / "ffn", one or
            several.
        layers: block indices from 0 over the whole model; None for all.
        exclude: module names whose linears are left alone (those that are trained whole).

    Raises:
        TypeError: targets or layers of the wrong kind.
        ValueError: a pattern or a block index that matches nothing, or nothing left to adapt.
    """
    shapes, aliases = _linears(model, exclude)
    named = {name: split_name(name) for name in shapes}
    known = [block for block, role in named.values() if role != "linear"]
    blocks = _numbered(known or [block for block, _ in named.values() if block])
    chosen = _match_targets(named, targets, type(model).__name__, aliases)
    everywhere = {
        name: Site(name, role, blocks.get(block, 0), 0, *shapes[name])
        for name, (block, role) in named.items()
    }
    _mark_packed_gates(everywhere, {name: block for name, (block, _) in named.items()})
    stages = _numbered(site.width for site in everywhere.values() if site.role != "linear")
    sites = [
        replace(everywhere[name], stage=stages.get(everywhere[name].width, 0)) for name in chosen
    ]
    inside = {name for name, (block, _) in named.items() if block in blocks}
    return _filter_layers(sites, layers, len(blocks), inside)


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


def _mark_packed_gates(sites: dict[str, Site], block_of: dict[str, str]) -> None:
    """Give each fc1 that holds the gate as well, so twice as wide as fc2 takes in, its own role."""
    hidden = {block_of[s.name]: s.in_features for s in sites.values() if s.role == "fc2"}
    for name, site in sites.items():
        if site.role == "fc1" and site.out_features == 2 * hidden.get(block_of[name], 0):
            sites[name] = replace(site, role="gate_fc1")


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
    named: dict[str, tuple[str, str]],
    targets: str | Sequence[str] | None,
    model_name: str,
    aliases: dict[str, str],
) -> list[str]:
    if targets is None:
        found = [name for name, (_, role) in named.items() if role != "linear"]
        if not found:
            raise ValueError(
                f"targets=None finds the linears of the vision transformers it knows, none in"
                f" {model_name}; name them, e.g. targets=['query', 'value']"
            )
        return found
    if not isinstance(targets, Iterable):
        raise TypeError(f"targets must be a name, a pattern or several, got {targets!r}")
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"targets must be a name, a pattern or several, got {targets!r}")
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {name for name, (_, role) in named.items() if _matches(name, role, pattern)}
        hits |= {name for other, name in aliases.items() if _matches(other, "", pattern)}
        pattern_name = aliases.get(pattern, pattern)
        hits = {pattern_name} if pattern_name in named else hits & named.keys()
        if not hits:
            examples = ", ".join(list(named)[:4])
            raise ValueError(
                f"targets pattern {pattern!r} matches no nn.Linear of {model_name}; it has"
                f" {examples}, ..."
            )
        chosen |= hits
    return [name for name in named if name in chosen]


def _matches(name: str, role: str, pattern: str) -> bool:
    if pattern in _ALIASES:
        return role in _ALIASES[pattern]
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


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
