"""What a factorisation method is: parameters for groups of linears, and how they make factors.

A method sees the linears it adapts as `Site`s, gathers them into groups, and gives each group its
own parameters (`FactorGroup`). In forward a group answers, for one site, with the three tensors of
the operator, `Factors(down, core, up)`; autograd carries their gradients back to the parameters.
The kernels know nothing of methods and a method knows nothing of kernels, models or files.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

_RESERVED = frozenset(dir(nn.ParameterDict()))

Rank = int | tuple[int, int]

_PAPER_ORDER = ("q", "k", "v", "o", "gate", "fc1", "fc2", "linear")
MHSA_ROLES = ("qkv", "qk", "kv", "q", "k", "v", "o")
FFN_ROLES = ("gate", "fc1", "gate_fc1", "fc2")
_STACKED = {
    "qkv": ("q", "k", "v"),
    "qk": ("q", "k"),
    "kv": ("k", "v"),
    "gate_fc1": ("gate", "fc1"),
}


class Factors(NamedTuple):
    """The low-rank operands of `low_rank_linear`, ΔW[slice g] = (down·core[g]·up[g]^T)^T."""

    down: Tensor  # [K, Ra]
    core: Tensor | None  # [G, Ra, Rb], scale folded in
    up: Tensor  # [1 or G, N/G, Rb]


def wide(tensor: Tensor) -> Tensor:
    """What products of parameters are made from: float32 where they are stored in half precision,
    since rows may be of the other half precision, and a product leave float16's range."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass(frozen=True)
class Site:
    """One nn.Linear of the model, as a method sees it.

    Attributes:
        name: dotted module name, e.g. "blocks.0.attn.qkv".
        role: "qkv", "qk" or "kv" (fused), "q", "k", "v", "o", "fc1", "fc2", "gate" (a gated FFN's
            other fc1), "gate_fc1" (these two fused), or "linear" where the name tells nothing.
        block: index of the transformer block, counted over the whole model from 0; 0 as well where
            the linear is in none.
        stage: index of the block's width among the model's widths (0 throughout a plain ViT).
        in_features: K.
        out_features: N.
    """

    name: str
    role: str
    block: int
    stage: int
    in_features: int
    out_features: int

    @property
    def slices(self) -> int:
        """How many of the papers' matrices the weight stacks along out_features: 3 for a qkv."""
        return len(self.matrices)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The papers' matrices that the weight stacks, in order: ("q", "k", "v") for a qkv."""
        return _STACKED.get(self.role, (self.role,))

    @property
    def width(self) -> int:
        """The model dimension d of the site's block."""
        return self.out_features if self.role in ("o", "fc2") else self.in_features


class FactorGroup(nn.Module, ABC):
    """The parameters of one aggregated group of sites.

    Attributes:
        factor_matrices: names of the group's parameters that are factors [D, r] shared by its
            sites (U and V of a tensor); what analysis compares.
        activation_dropout: probability of dropping an entry of the rank-r activation in training
            (FacT); the layer applies it, since it acts on x·down.
        joint: whether there are `joint_factors`.
    """

    factor_matrices: ClassVar[tuple[str, ...]] = ()
    joint: ClassVar[bool] = False
    activation_dropout: float = 0.0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if is_older(cls, "factors_at", "factors"):
            cls.factors_at = FactorGroup.factors_at  # type: ignore[method-assign]
        if is_older(cls, "joint_products", "joint_factors"):
            for name in ("joint_products", "from_products", "stack_plan"):
                setattr(cls, name, getattr(FactorGroup, name))
        if is_older(cls, "stacked", "joint_products") or is_older(cls, "stacked", "from_products"):
            cls.stack_plan = FactorGroup.stack_plan  # type: ignore[method-assign]

    def forward(self, site: str, dropout: bool) -> Factors:
        """`factors`, as a module's forward: torch.func calls it with other parameters."""
        return self.factors(site, dropout)

    @abstractmethod
    def factors(self, site: str, dropout: bool) -> Factors:
        """The operands for one site, differentiable in this group's parameters.

        Args:
            site: the site's name.
            dropout: apply the method's dropout (training).

        Returns:
            down [K, Ra], core [G, Ra, Rb] or None, up [1 or G, N/G, Rb].
        """

    def position(self, site: str) -> Any:
        """What `factors_at` takes for a site: an object that is equal for sites at the same place
        in different blocks, but for the tensors in it. None where sites are told apart by name.

        Args:
            site: the site's name.
        """
        return None

    def factors_at(self, position: Any, dropout: bool) -> Factors | None:
        """The operands of a site as `factors` makes them, in a graph of torch.compile: one that
        blocks share if it reads no name, nor a number that tells which block it is.

        Args:
            position: the site's.
            dropout: as in `factors`.

        Returns:
            As `factors`; or None, where they have to be made from the site's name: because the
            position does not fit the parameters, or a subclass has a `factors` of its own.
        """
        return None

    def joint_factors(self, dropout: bool) -> dict[str, Factors]:
        """Site → its operands, computed for all sites at once, with the core folded into up.

        For groups whose sites share parameters; `joint` says so. Losses of several sites may go
        backward through them one after the other (`joint.keep_graph`).

        Args:
            dropout: as in `factors`.

        Returns:
            down [K, Ra], None, up [G, N/G, Ra].
        """
        raise NotImplementedError

    def joint_products(self, dropout: bool) -> Any:
        """What `joint_factors` gives each site a part of; `from_products` takes it apart.

        Args:
            dropout: as in `factors`.
        """
        return self.joint_factors(dropout)

    def from_products(self, products: Any) -> dict[str, Factors]:
        """`joint_factors` of what `joint_products` made."""
        found: dict[str, Factors] = products
        return found

    def stack_plan(self, sites: Sequence[str]) -> Any:
        """What `stacked` takes to find these sites' factors in the products; None where they do
        not lie there side by side.

        Args:
            sites: equal linears of different blocks.
        """
        return None

    def stacked(self, products: Any, plan: Any) -> tuple[Tensor, Tensor]:
        """The factors of all of a plan's L sites: down [L, K, Ra] and B [L, N, Ra]."""
        raise NotImplementedError

    def down_key(self, site: str) -> Hashable | None:
        """Sites with the same key share their `down`; None where the site shares it with none."""
        return None

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise in place so that every site's ΔW is exactly zero."""


def is_older(cls: type, name: str, other: str) -> bool:
    """Whether a class has its method `name` from further up than its method `other`, which `name`
    should agree with."""
    owners = [next(i for i, c in enumerate(cls.__mro__) if n in c.__dict__) for n in (name, other)]
    return owners[0] > owners[1]


@dataclass(frozen=True)
class Method(ABC):
    """A method's configuration; `build` turns sites into groups of parameters.

    Attributes:
        name: what adapter files and the command line call the method.
        free_fields: fields that may differ between the adapters of one AdapterSet: the shapes of
            the tensors tell them, or they matter in training alone.
    """

    name: ClassVar[str]
    free_fields: ClassVar[frozenset[str]] = frozenset({"rank", "init", "factor_init", "dropout"})

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Those of the targeted sites that the method adapts; all unless it says otherwise."""
        return list(sites)

    def members(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        """Which selected sites each group holds, in order; one group unless it says otherwise.

        Raises:
            ValueError: the method has no place for one of the sites.
        """
        return {self.name: list(sites)}

    @abstractmethod
    def build(self, sites: Sequence[Site]) -> dict[str, FactorGroup]:
        """The groups that `members` names, with parameters on the default device, initialised.

        Raises:
            ValueError: the method has no place for one of the sites, or a rank does not fit it.
        """

    def to_config(self) -> dict[str, Any]:
        """The configuration as data for JSON, a tuple marked as {"tuple": [...]}."""
        fields = {f.name: encode(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"name": self.name, **fields}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Method:
        """The inverse of `to_config`.

        Raises:
            ValueError: an unknown field.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        given = {key: decode(value) for key, value in config.items() if key != "name"}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"{cls.__name__} has fields {sorted(known)}, got unknown {unknown}")
        return cls(**given)


def encode(value: Any) -> Any:
    """A field's value as data for JSON, a tuple marked as {"tuple": [...]}."""
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, dict):
        return tuple(decode(item) for item in value["tuple"])
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def by_stage(sites: Sequence[Site], part: Callable[[Site], str]) -> dict[str, list[Site]]:
    """Sites by part, and by stage where they span several: "mhsa", or "stage0_mhsa", ...

    Within a group: by block, then in the papers' order q, k, v, o, gate, fc1, fc2.

    Raises:
        ValueError: a group of several widths.
    """
    stages = {site.stage for site in sites}
    groups: dict[str, list[Site]] = {}
    for site in sorted(sites, key=lambda s: (s.block, _PAPER_ORDER.index(s.matrices[0]))):
        name = part(site) if len(stages) == 1 else f"stage{site.stage}_{part(site)}"
        groups.setdefault(name, []).append(site)
    for name, members in groups.items():
        widths = sorted({site.width for site in members})
        if len(widths) > 1:
            raise ValueError(f"targets of group {name!r} must have one width d, got {widths}")
    return groups


def undotted_names(sites: Sequence[Site]) -> dict[str, str]:
    """Site name → a name for a child module or parameter, with _ for dots.

    Further _ are added where that is another site's name or one of torch's own.
    """
    names: dict[str, str] = {}
    for site in sites:
        name = site.name.replace(".", "_")
        while name in _RESERVED or name in names.values():
            name += "_"
        names[site.name] = name
    return names


def require_roles(method: Method, sites: Sequence[Site], roles: Sequence[str]) -> None:
    """Raise ValueError for a site whose role is none of `roles`."""
    for site in sites:
        if site.role not in roles:
            raise ValueError(
                f"targets must be attention or FFN linears for {type(method).__name__}, which"
                f" places {', '.join(roles)}; {site.name!r} is none of these"
                " (LoRA(matrices=None) takes it)"
            )


def stage_rank(
    name: str, rank: Rank | list[Rank], sites: Sequence[Site], stage: int
) -> tuple[int, int]:
    """(r1, r2) for one stage among those that `sites` span.

    Raises:
        ValueError: a list whose length is not the number of stages.
    """
    if not isinstance(rank, list):
        return rank_pair(name, rank)
    stages = sorted({site.stage for site in sites})
    if len(rank) != len(stages):
        raise ValueError(f"{name} must have one entry per stage ({len(stages)}), got {len(rank)}")
    return rank_pair(name, rank[stages.index(stage)])


def check_ranks(name: str, rank: object) -> None:
    """Raise unless rank is an int, a pair of ints, or a list of these, all at least 1."""
    if isinstance(rank, list) and not rank:
        raise ValueError(f"{name} must have one entry per stage, got an empty list")
    for item in rank if isinstance(rank, list) else [rank]:
        rank_pair(name, item)


def ffn_hidden(sites: Sequence[Site]) -> int:
    """The one hidden width of a group's FFN linears.

    Raises:
        ValueError: they have several.
    """
    hidden = {s.in_features if s.role == "fc2" else s.out_features // s.slices for s in sites}
    if len(hidden) > 1:
        raise ValueError(
            f"targets of one FFN group must share a hidden width, got {sorted(hidden)}"
        )
    return hidden.pop()


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless value is one of choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def constant_float(name: str) -> Any:
    """A float attribute of a group that torch.compile takes for a constant.

    With dynamic=True it would make a symbol of a module's float, and fails (torch 2.11) where two
    checkpointed blocks use the same one. A module's integers are constants: the float is kept as
    the ratio of two, exactly.

    Args:
        name: the attribute's.
    """
    kept = f"_{name}_ratio"

    def get(group: nn.Module) -> float:
        above, below = getattr(group, kept)
        return above / below  # type: ignore[no-any-return]

    def put(group: nn.Module, value: float) -> None:
        object.__setattr__(group, kept, float(value).as_integer_ratio())

    return property(get, put)


def check_number(
    name: str, value: object, *, low: float | None = None, below: float | None = None
) -> None:
    """Check that value is a finite real number with low <= value < below.

    Raises:
        TypeError: no number.
        ValueError: not finite, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(value) <= sys.float_info.max:  # NaN, infinite, or an int that no float can hold
        raise ValueError(f"{name} must be finite, got {value}")
    if (low is not None and value < low) or (below is not None and value >= below):
        limits = (("at least", low), ("below", below))
        bounds = " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None)
        raise ValueError(f"{name} must be {bounds}, got {value}")


def rank_pair(name: str, rank: object) -> tuple[int, int]:
    """(r1, r2) of an int or a pair.

    Raises:
        TypeError: neither an int nor a pair of ints.
        ValueError: a rank below 1.
    """
    pair = (rank, rank) if isinstance(rank, int) else rank
    if (
        not isinstance(pair, tuple)
        or len(pair) != 2
        or any(isinstance(r, bool) or not isinstance(r, int) for r in pair)
    ):
        raise TypeError(f"{name} must be an int or a pair (r1, r2) of ints, got {rank!r}")
    if min(pair) < 1:
        raise ValueError(f"{name} must be at least 1, got {rank!r}")
    return pair


def check_rank_fits(name: str, rank: tuple[int, int], sites: Sequence[Site]) -> None:
    """Raise ValueError where a rank is above min(K, N) of a site it is used for."""
    for site in sites:
        limit = min(site.in_features, site.out_features)
        if max(rank) > limit:
            raise ValueError(
                f"{name} must be at most min(K, N)={limit} for {site.name!r}"
                f" (K={site.in_features}, N={site.out_features}), got {max(rank)}"
            )
