"""Which attention and FFN linears of a model are adapted, and which are left as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ..methods.base import FFN_ROLES, MHSA_ROLES, Site
from .hints import endings, listed
from .roles import beside_vision, kind_of
from .sites import find_all_linears
from .torch_attention import unsupported


@dataclass(frozen=True)
class Coverage:
    """The attention and FFN linears of a model.

    Attributes:
        model: the name of its class.
        adapted: names of those that are adapted.
        left: name → "attention", "FFN" or "text tower", of those that are not.
        out_of_reach: name → what it is, of what no method takes: a 1×1 convolution in the place of
            a linear, an attention that keeps its projections to itself.
    """

    model: str
    adapted: tuple[str, ...]
    left: dict[str, str]
    out_of_reach: dict[str, str]

    def warning(self, sites: Sequence[Site], takes_any: bool) -> str | None:
        """What `targets=None` passed over and the way out; None where that is nothing.

        Args:
            sites: what it found.
            takes_any: whether the method takes linears of any role.
        """
        if not self.left and not self.out_of_reach:
            return None
        passed = len(self.left) + len(self.out_of_reach)
        text = (
            f"{len(self.adapted)} of {len(self.adapted) + passed} attention and FFN layers of"
            f" {self.model} are known by name and targeted; left as they are:"
            f" {'; '.join(self.lines())}"
        )
        roles = {site.role for site in sites}
        parts = [("mhsa", MHSA_ROLES), ("ffn", FFN_ROLES)]
        meant = [alias for alias, known in parts if roles.intersection(known)]
        keep = f"targets={meant} if that is meant"
        if not self.left:
            return f"{text}. Pass {keep}"
        only_text = set(self.left.values()) == {"text tower"}
        more = endings([*self.adapted, *self.left]) if only_text else meant + endings(self.left)
        way = f"targets={more[:12]}"
        way += "" if takes_any or only_text else " and LoRA, which takes any linear,"
        return f"{text}. Pass {way} to adapt them as well, or {keep}"

    def lines(self) -> list[str]:
        """What is left, one line a kind."""
        kinds = dict.fromkeys([*self.left.values(), *self.out_of_reach.values()])
        everything = self.left | self.out_of_reach
        return [
            f"{kind}: {listed([name for name, its in everything.items() if its == kind])}"
            for kind in kinds
        ]


def coverage(model: nn.Module, adapted: Iterable[str], trained: Collection[str] = ()) -> Coverage:
    """What is adapted and what is left of a model, attached or not.

    Args:
        model: the model.
        adapted: names of the linears that are, or would be.
        trained: modules that are trained whole.
    """
    adapted = tuple(adapted)
    exclude = list(trained)
    names = find_all_linears(model, exclude)
    beside = beside_vision(names)
    left: dict[str, str] = {}
    for name in names:
        if name not in adapted and (kind := kind_of(name)):
            left[name] = "text tower" if name in beside else kind
    return Coverage(type(model).__name__, adapted, left, _out_of_reach(model, exclude))


def _out_of_reach(model: nn.Module, exclude: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name == outer or name.startswith(f"{outer}.") for outer in exclude):
            continue
        if isinstance(module, nn.MultiheadAttention) and (why := unsupported(module)):
            found[f"{name}.in_proj"] = why
        elif _is_pointwise(module) and kind_of(name):
            found[name] = "nn.Conv2d, which no method takes"
    return found


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
