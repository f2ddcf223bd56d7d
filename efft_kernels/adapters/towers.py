"""Which linears of a model that reads text as well as images are no part of its vision tower."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from torch import nn

TEXT, FUSION = "text tower", "fusion of text and image"

_VISION_NAMES = frozenset(
    {"vision_model", "vision_tower", "vision_encoder", "visual", "image_encoder"}
)
_TEXT_NAMES = frozenset({"text_model", "text_tower", "text_encoder", "text", "language_model"})
_TOKENS = re.compile(r"(?:word|token|tok)_embeddings?|embed_tokens|wte|shared")


def beside_vision(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Linear → "text tower" or "fusion of text and image", for those beside a vision tower.

    A tower is the smallest module that holds an embedding of tokens, or a convolution of pixels,
    and linears; some are known by their names alone. A linear is of the innermost tower around it.
    One that reads both (ViLT) is a vision tower; what is in neither, while the model has both
    (FLAVA's multimodal encoder), joins them. Without an embedding of tokens there is nothing
    beside.

    Args:
        model: the model.
        names: its linears.
    """
    text = set(_known(names, _TEXT_NAMES)) | set(_owners(_token_embeddings(model), names))
    if not text:
        return {}
    stems = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    vision = set(_known(names, _VISION_NAMES)) | set(_owners(stems, names))
    if not vision:
        return {}
    # A tower of convolutions alone has no linears: what holds it and the text is no tower.
    vision = {v for v in vision if v in text or not any(_inside(t, v) for t in text)}
    found = {}
    for name in names:
        tower = next((outer for outer in _around(name) if outer in text | vision), None)
        if tower is None:
            found[name] = FUSION
        elif tower not in vision:
            found[name] = TEXT
    return found


def _token_embeddings(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _TOKENS.fullmatch(name.rpartition(".")[2]):
            yield name


def _known(names: Collection[str], towers: Collection[str]) -> Iterator[str]:
    """The modules around linears whose own name is one of `towers`."""
    for name in names:
        yield from (outer for outer in _around(name) if outer.rpartition(".")[2] in towers)


def _owners(modules: Iterator[str] | list[str], names: Collection[str]) -> Iterator[str]:
    """For each module the innermost one around it that holds linears."""
    holders = {outer for name in names for outer in _around(name)}
    for module in modules:
        yield from [outer for outer in _around(module) if outer in holders][:1]


def _around(name: str) -> Iterator[str]:
    """The modules that a module is in, from the innermost to the model itself, "" at last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))
