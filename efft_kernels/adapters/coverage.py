"""Which attention and FFN linears of a model are adapted, and which are left as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ..methods.base import FFN_ROLES, MHSA_ROLES, Method, Site
from ..methods.lora import LoRA, chosen_slices
from .hints import endings, listed
from .roles import kind_of, split_name
from .sites import linear_shapes
from .torch_attention import unsupported
from .towers import FUSION, TEXT, beside_vision

TAKES_ANY = "LoRA(matrices=None), which takes any linear,"


@dataclass(frozen=True)
class Coverage:
    """The attention and FFN linears of a model.

    Attributes:
        model: the name of its class.
        adapted: names of those that are adapted.
        left: name → "attention", "FFN", "text tower" or "fusion of text and image", of those that
            are not.
        out_of_reach: name → what it is, of what no method takes: a 1×1 convolution in the place of
            a linear, an attention that keeps its projections to itself.
        narrowest: name → min(K, N), the highest rank, of those left.
    """

    model: str
    adapted: tuple[str, ...]
    left: dict[str, str]
    out_of_reach: dict[str, str]
    narrowest: dict[str, int]

    def warning(self, method: Method, targeted: Sequence[Site]) -> str | None:
        """What `targets=None` passed over and the way out; None where that is nothing.

        Args:
            method: what adapts the model.
            targeted: the linears that are known by name.
        """
        if not self.left and not self.out_of_reach:
            return None
        passed = len(self.left) + len(self.out_of_reach)
        unchosen = [site.name for site in not_chosen(method, targeted)]
        taken = [site.name for site in method.select(targeted)]
        text = (
            f"{len(taken)} of {len(targeted) + passed} attention and FFN layers of {self.model}"
            f" are adapted; left as they are: {'; '.join(self.lines())}"
        )
        if unchosen:
            text += f"; not of {_matrices(method)}: {listed(unchosen)}"
        roles = {site.role for site in targeted}
        parts = [("mhsa", MHSA_ROLES), ("ffn", FFN_ROLES)]
        own = [alias for alias, known in parts if roles.intersection(known)]
        own = endings(taken, [*unchosen, *self.left]) if unchosen else own
        keep = f"targets={own} if that is meant"
        only_text = bool(self.left) and {*self.left.values()} <= {TEXT, FUSION}
        if only_text:
            more = endings([*taken, *(name for name in self.left if _takes(method, name))])
            way = f"targets={more[:12]}"
        else:
            highest = _highest_rank(method)
            fitting = [name for name in self.left if self.narrowest[name] >= highest]
            if not fitting:
                return f"{text}. Pass {keep}"
            narrow = [name for name in self.left if name not in fitting]
            more = [*own, *endings(fitting, [*unchosen, *narrow])]
            way = f"targets={more[:12]}"
            way += "" if isinstance(method, LoRA) else f" and {TAKES_ANY}"
            if narrow:
                way += f" (without {listed(narrow)}, which are narrower than rank={highest})"
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
    shapes = linear_shapes(model, exclude)
    beside = beside_vision(model, shapes)
    left: dict[str, str] = {}
    for name in shapes:
        if name not in adapted and (kind := kind_of(name)):
            left[name] = beside.get(name, kind)
    narrowest = {name: min(shapes[name]) for name in left}
    return Coverage(type(model).__name__, adapted, left, _out_of_reach(model, exclude), narrowest)


def not_chosen(method: Method, targeted: Sequence[Site]) -> list[Site]:
    """Those of the targeted linears that hold none of the kinds in the method's `matrices`."""
    matrices = getattr(method, "matrices", None)
    return [site for site in targeted if not chosen_slices(site, matrices)[0]]


def not_taken(method: Method, targeted: Sequence[Site]) -> str | None:
    """Which linears that `targets` names the method leaves, and the way out; None where none."""
    unchosen = [site.name for site in not_chosen(method, targeted)]
    if not unchosen:
        return None
    taken = [site.name for site in method.select(targeted)]
    return (
        f"{len(taken)} of {len(targeted)} linears that targets names are adapted; not of"
        f" {_matrices(method)}: {listed(unchosen)}. Pass matrices=None to adapt them as well, or"
        f" targets={endings(taken, unchosen)[:12]} if that is meant"
    )


def _matrices(method: Method) -> str:
    kinds = ", ".join(getattr(method, "matrices", None) or ())
    return f"{type(method).__name__}'s matrices ({kinds})"


def _takes(method: Method, name: str) -> bool:
    """Whether a method takes a linear of this name, shapes aside."""
    role = split_name(name)[1]
    known = role != "linear" or hasattr(method, "matrices")
    return known and not not_chosen(method, [Site(name, role, 0, 0, 1, 1)])


def _highest_rank(method: Method) -> int:
    """The highest of a method's ranks, for LoRA in its place as well."""
    rank = getattr(method, "rank", 1)
    pairs = rank if isinstance(rank, list) else [rank]
    return max(max(pair) if isinstance(pair, tuple) else pair for pair in pairs)


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
