"""What to pass instead, in names of the model at hand."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from .roles import kind_of


def patterns(names: Iterable[str]) -> Counter[str]:
    """Names with their numbers as *, each with how many they are, in their order."""
    return Counter(
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
    )


def endings(names: Iterable[str], besides: Iterable[str] = ()) -> list[str]:
    """Patterns of `targets` for linears: what follows the last number of each name, each once.

    Args:
        names: the linears.
        besides: linears that the patterns must not match; a name whose ending does stands whole.
    """
    besides = list(besides)
    found: dict[str, None] = {}
    for name in names:
        ending = re.sub(r"^(?:.*[._])?\d+\.(?=\w*[a-zA-Z])", "", name)
        found[name if any(matches(other, ending) for other in besides) else ending] = None
    return list(found)


def matches(name: str, pattern: str) -> bool:
    """Whether a linear's name is a name, a dotted ending or a glob of `targets`."""
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def listed(names: Sequence[str], most: int = 6) -> str:
    """ "10 blocks.*.attn.qk, 2 blocks.*.attn.v" and how many patterns more."""
    shown = [f"{count} {pattern}" for pattern, count in patterns(names).items()]
    more = [f"and {len(shown) - most} patterns more"] if len(shown) > most else []
    return ", ".join(shown[:most] + more)


def none_known(model: nn.Module, names: Sequence[str], exclude: Sequence[str]) -> str:
    """Why `targets=None` finds nothing, and what to pass.

    Args:
        model: the model.
        names: its linears.
        exclude: modules that are trained whole.
    """
    kind = type(model).__name__
    of_heads = {name.partition(".")[0] for name in exclude} & {"head", "classifier"}
    names = [name for name in names if name.partition(".")[0] not in of_heads]
    if not names:
        return f"targets=None finds nothing to adapt: {_no_linears(model, exclude)}"
    of_blocks = [name for name in names if kind_of(name)] or list(names)
    return (
        f"targets=None finds the attention and FFN linears of the vision transformers it knows,"
        f" none in {kind}; name some of its own and use LoRA(matrices=None), which takes any"
        f" linear, e.g. targets={endings(of_blocks)[:4]}"
    )


def none_matches(
    model: nn.Module, pattern: str, names: Sequence[str], exclude: Sequence[str]
) -> str:
    """Why a pattern matches nothing, and what there is.

    Args:
        model: the model.
        pattern: the one of `targets`.
        names: the model's linears.
        exclude: modules that are trained whole.
    """
    kind = type(model).__name__
    text = f"targets pattern {pattern!r} matches no nn.Linear of {kind}"
    same = next(
        (m for name, m in model.named_modules() if name.endswith(f".{pattern}") or name == pattern),
        None,
    )
    if isinstance(same, nn.Linear):
        text += f" besides those trained whole ({', '.join(exclude)})"
    elif same is not None:
        text += f", it is a {type(same).__name__}"
    if not names:
        return f"{text}; {_no_linears(model, exclude)}"
    own = endings(names)
    close = difflib.get_close_matches(pattern, own, n=2)
    shown = [*close, *(name for name in own if name not in close)][:6]
    return f"{text}; it has {', '.join(shown)}" + (", ..." if len(own) > 6 else "")


def _no_linears(model: nn.Module, exclude: Sequence[str]) -> str:
    besides = f" besides {', '.join(exclude)}, which is trained whole" if exclude else ""
    text = f"{type(model).__name__} has no nn.Linear{besides}"
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        text += "; its layers are nn.Conv2d, which no method takes, but the baseline BitFit does"
    return text
