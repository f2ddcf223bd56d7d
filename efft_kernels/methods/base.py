"""What a factorisation method is: parameters for a group of linears, and the recipe from them to
factors.

A method sees the linears it adapts as `Site`s, gathers them into groups, and gives each group its
own parameters (`FactorGroup`). In forward a group answers, for one site, with the three tensors of
the operator, `Factors(down, core, up)`; autograd carries their gradients back to the parameters.
The kernels know nothing of methods and a method knows nothing of kernels, models or files.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

Rank = int | tuple[int, int]

MHSA_ROLES = ("qkv", "q", "k", "v", "o")
FFN_ROLES = ("fc1", "fc2")


class Factors(NamedTuple):
    """The low-rank operands of `low_rank_linear`, ΔW[slice g] = (down·core[g]·up[g]^T)^T."""

    down: Tensor  # [K, Ra]
    core: Tensor | None  # [G, Ra, Rb], scale folded in
    up: Tensor  # [1 or G, N/G, Rb]


@dataclass(frozen=True)
class Site:
    """One nn.Linear of the model, as a method sees it.

    Attributes:
        name: dotted module name, e.g. "blocks.0.attn.qkv".
        role: "qkv", "q", "k", "v", "o", "fc1", "fc2", or "linear" where the name tells nothing.
        block: index of the transformer block, counted over the whole model from 0.
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
        """How many of the papers' matrices the weight stacks along out_features: 3 for a fused
        qkv."""
        return 3 if self.role == "qkv" else 1

    @property
    def width(self) -> int:
        """The model dimension d of the site's block."""
        return self.out_features if self.role in ("o", "fc2") else self.in_features


class FactorGroup(nn.Module, ABC):
    """The parameters of one aggregated group of sites."""

    @abstractmethod
    def factors(self, site: str, dropout: bool) -> Factors:
        """The operands for one site, differentiable in this group's parameters.

        Args:
            site: the site's name.
            dropout: apply the method's dropout (training).
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise in place so that every site's ΔW is exactly zero."""


@dataclass(frozen=True)
class Method(ABC):
    """A method's configuration; `build` turns sites into groups of parameters."""

    name: ClassVar[str]

    @abstractmethod
    def build(self, sites: Sequence[Site]) -> dict[str, FactorGroup]:
        """Groups by name, with parameters on the default device and dtype, uninitialised or not.

        Raises:
            ValueError: the method has no place for one of the sites, or a rank does not fit it.
        """

    @abstractmethod
    def members(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        """Which sites each group holds, in order; every site in exactly one group."""

    def to_config(self) -> dict[str, Any]:
        """The configuration as JSON-ready data; tuples are marked so that they come back as
        tuples."""
        fields = {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"name": self.name, **fields}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Method:
        """The inverse of `to_config`.

        Raises:
            ValueError: an unknown field.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        given = {key: _decode(value) for key, value in config.items() if key != "name"}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"{cls.__name__} has fields {sorted(known)}, got unknown {unknown}")
        return cls(**given)


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(_decode(item) for item in value["tuple"])
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless value is one of choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_number(
    name: str, value: object, *, low: float | None = None, below: float | None = None
) -> None:
    """Raise TypeError unless value is a finite real number, ValueError unless low <= value <
    below."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if value != value or abs(value) == float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")
    if (low is not None and value < low) or (below is not None and value >= below):
        bounds = " and ".join(
            text
            for text in (
                None if low is None else f"at least {low}",
                None if below is None else f"below {below}",
            )
            if text
        )
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
