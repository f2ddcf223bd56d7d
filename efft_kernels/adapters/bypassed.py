"""Whether a linear's parent uses its weight without calling it, as far as its source tells."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch import nn

from .torch_attention import AdaptedMultiheadAttention, unsupported


def why_bypassed(model: nn.Module, name: str) -> str | None:
    """What uses the weight of the linear `name` without calling it; None where nothing does or
    nobody can tell.

    Args:
        model: the model.
        name: the linear's dotted name.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return unsupported(parent)
    parts = name.split(".")
    for depth in range(len(parts)):
        module, path = model.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:])
        if isinstance(module, nn.TransformerEncoderLayer | AdaptedMultiheadAttention):
            continue  # their fast paths are kept off
        used = _attributes_used(type(module))  # type: ignore[arg-type]
        if f"{path}.weight" in used and not {path, f"{path}.forward"} & used:
            return f"{type(module).__name__}.forward"
    return None


@functools.cache
def _attributes_used(kind: type[nn.Module]) -> frozenset[str]:
    """The dotted names that a module's forward reads of `self`, its own methods included; the
    longest ones: "qkv.weight", but "qkv" where that is called or passed on. None of a forward whose
    source is not at hand."""
    found: set[str] = set()
    methods = ["forward"]
    for method in methods:
        found |= (chains := _attributes_of(getattr(kind, method)))
        heads = {chain.split(".")[0] for chain in chains} - set(methods)
        methods += sorted(name for name in heads if inspect.isfunction(getattr(kind, name, None)))
    return frozenset(found)


def _attributes_of(function: object) -> set[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError, ValueError):
        return set()
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    whole = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and id(n) not in inner)
    return {chain for node in whole if (chain := _of_self(node)) is not None}


def _of_self(attribute: ast.Attribute) -> str | None:
    """ "a.b" of the expression self.a.b, None of any other."""
    parts: list[str] = []
    node: ast.expr = attribute
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id != "self":
        return None
    return ".".join(reversed(parts))
