"""Tensor-Train groups: ΔW_i = s·U·Σ_i·V^T, U and V shared by all slices (FacT Eq. 8, EFFT Eq. 2).

One class serves EFFT1, EFFT2, FacT-TT and a standalone layer; FacT-TK's Σ_i come from a Tucker
core.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    FFN_ROLES,
    MHSA_ROLES,
    FactorGroup,
    Factors,
    Method,
    Rank,
    Site,
    by_stage,
    check_choice,
    check_number,
    check_rank_fits,
    check_ranks,
    constant_float,
    is_older,
    require_roles,
    wide,
)
from .joint import keep_graph
from .picked_rows import picked_rows

Draw = Callable[["TensorTrainGroup", nn.Parameter], None]


@dataclass(frozen=True)
class Placement:
    """Where one site sits in the group's tensor.

    Attributes:
        first_core: index of the site's first Σ_i; the following slices take the following cores.
        slices: how many cores the site takes.
        u_side: "in" where U spans the site's in_features (y += x·U·Σ·V^T), "out" where it spans its
            out_features (y += x·V·Σ^T·U^T).
        u_rows: (start, stop), the rows of U that the site uses.
        stacked: the axis along which the slices are stacked, "out" (each gives part of y) or "in"
            (each takes part of x, and their products add up).
        u_chunks: how many matrices, stacked along out, have rows of U each of their own for the
            whole of x, and one Σ together.
    """

    first_core: int
    slices: int
    u_side: str
    u_rows: tuple[int, int]
    stacked: str = "out"
    u_chunks: int = 1


class CoreIndex:
    """Hands out Σ indices: each (block, kind) has cores of its own, numbered as they are taken.

    Args:
        shared: cores belong to the kind alone, whatever the block.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.total = 0
        self._first: dict[tuple[int | None, str], int] = {}

    def take(self, block: int, kind: str, count: int = 1) -> int:
        """The index of the first of `count` consecutive cores."""
        key = (None if self.shared else block, kind)
        if key not in self._first:
            self._first[key] = self.total
            self.total += count
        return self._first[key]


class _Position:
    """A site's place in the tensor for a graph that blocks share.

    Attributes:
        place: the placement, but for its cores.
        whole: whether the site uses all rows of U.
        cores: [slices], int64, the indices of its cores.
    """

    cores: Tensor

    def __init__(self, place: Placement, whole: bool) -> None:
        self.place = dataclasses.replace(place, first_core=0)
        self.whole = whole


class _Family(NamedTuple):
    """The sites whose factors one batched product makes: they use the same rows of U, on one side.

    The factor that stays as it is stands on the one side of the product with x, the fold of the
    other one with the cores on the other.
    """

    keeps_u: bool  # whether it is U that stays as it is; else V
    folds_down: bool  # whether the fold is `down`, stacked along x, and V is `up`
    u_rows: tuple[int, int]
    sites: dict[str, int]  # site → how many cores it takes
    cores: tuple[slice, ...]  # these cores one after another,
    times: int  # all this often

    @classmethod
    def of(cls, places: Mapping[str, Placement]) -> _Family:
        first = next(iter(places.values()))
        indices = [p.first_core + i for p in places.values() for i in range(p.slices)]
        n = len(indices)
        period = next(p for p in itertools.count(1) if indices == indices[:p] * (n // p))
        return cls(
            keeps_u=first.stacked == "out" and first.u_side == "in",
            folds_down=first.stacked == "in",
            u_rows=first.u_rows,
            sites={site: place.slices for site, place in places.items()},
            cores=tuple(_progressions(indices[:period])),
            times=n // period,
        )

    def pick(self, cores: Tensor) -> Tensor:
        """The cores of every site, [T, r1, r2]."""
        picked = [cores[run] for run in self.cores]
        joined = picked[0] if len(picked) == 1 else torch.cat(picked)
        return joined if self.times == 1 else joined.repeat(self.times, 1, 1)

    def per_core(self, per_site: Tensor) -> Tensor:
        """[sites, ...] → [T, ...], each as often as its site has cores."""
        pieces = zip(per_site.unbind(), self.sites.values(), strict=True)
        return torch.cat([piece.expand(count, *piece.shape) for piece, count in pieces])


class _StackPlan(NamedTuple):
    """Where the sites of one kind lie in their family's products."""

    family: int
    kept: slice
    period: int  # cores of all kinds that come again and again,
    cores: slice  # and which of them are this kind's

    @classmethod
    def of(cls, index: int, family: _Family, sites: Sequence[str]) -> _StackPlan | None:
        """None where they do not lie at even distances."""
        names = list(family.sites)
        places = [names.index(site) for site in sites]
        starts = list(itertools.accumulate(family.sites.values(), initial=0))
        firsts, counts = [starts[p] for p in places], {family.sites[site] for site in sites}
        period, rest = divmod(starts[-1], len(sites))
        if rest or len(counts) > 1 or firsts != [firsts[0] + i * period for i in range(len(sites))]:
            return None
        kept, *others = _progressions(places)
        if others:
            return None
        return cls(index, kept, period, slice(firsts[0], firsts[0] + counts.pop()))


def _progressions(indices: Sequence[int]) -> Iterator[slice]:
    """The indices as slices, as few as one pass finds."""
    start = 0
    while start < len(indices):
        stop, first, step = start + 1, indices[start], 1
        if stop < len(indices):
            step = max(indices[stop] - first, step)
        while stop < len(indices) and indices[stop] == first + (stop - start) * step:
            stop += 1
        yield slice(first, indices[stop - 1] + 1, step)
        start = stop


def draw_xavier(group: TensorTrainGroup, factor: nn.Parameter) -> None:
    """The factor that does not start at zero, and each Σ_i as an r1×r2 matrix: xavier_uniform_."""
    nn.init.xavier_uniform_(factor)
    for matrix in group.core.unbind():
        nn.init.xavier_uniform_(matrix)


class TensorTrainGroup(FactorGroup):
    """U [D1, r1], V [D2, r2], core Σ [n, r1, r2] and a scale s, a float or a learnable scalar.

    The factor that `init` names starts at zero, so that ΔW does; `draw` draws the others.

    Args:
        placements: site → where it sits.
        dims: (D1, D2), the rows of U and of V.
        rank: (r1, r2).
        cores: n, the number of Σ_i.
        scale: s.
        learn_scale: make s a learnable scalar.
        init: the factor that starts at zero, "v" or "u".
        draw: called with (this group, the factor that does not start at zero); fills it and `core`.
        dropout: probability of dropping an entry of U, V and Σ in training; masks are drawn anew
            for each site.
        activation_dropout: probability of dropping an entry of x·U·Σ in training.
    """

    factor_matrices: ClassVar[tuple[str, ...]] = ("U", "V")
    joint: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Others are made by what is written here, not by what a subclass has written since.
        if is_older(cls, "joint_factors", "factors") or is_older(cls, "_all_cores", "cores"):
            cls.joint = False
        if is_older(cls, "_picked_cores", "cores"):
            cls.factors_at = FactorGroup.factors_at  # type: ignore[method-assign]

    U: nn.Parameter
    V: nn.Parameter
    core: nn.Parameter
    dropout: float = constant_float("dropout")
    activation_dropout: float = constant_float("activation_dropout")
    initial_scale: float = constant_float("initial_scale")
    scale: float | nn.Parameter

    def __init__(
        self,
        placements: Mapping[str, Placement],
        *,
        dims: tuple[int, int],
        rank: tuple[int, int],
        cores: int,
        scale: float,
        learn_scale: bool,
        init: str = "v",
        draw: Draw = draw_xavier,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.placements = dict(placements)
        self.init = init
        self._draw = draw
        self.initial_scale = float(scale)
        # Settled here: torch.compile would guard a comparison in factors(), vmap refuse it.
        self._scaled = learn_scale or self.initial_scale != 1.0
        self._whole = {name for name, p in self.placements.items() if p.u_rows == (0, dims[0])}
        self._positions = {
            name: _Position(place, name in self._whole) for name, place in self.placements.items()
        }
        families: dict[object, dict[str, Placement]] = {}
        for name, p in self.placements.items():
            families.setdefault((p.u_side, p.u_rows, p.stacked), {})[name] = p
        self._families = [_Family.of(places) for places in families.values()]
        self.dropout = dropout
        self.activation_dropout = activation_dropout
        self.U = nn.Parameter(torch.empty(dims[0], rank[0]))
        self.V = nn.Parameter(torch.empty(dims[1], rank[1]))
        self._add_cores(cores, rank)
        self.scale = nn.Parameter(torch.empty(1)) if learn_scale else self.initial_scale
        self._put_positions()
        self.reset_parameters()

    def _put_positions(self) -> None:
        """The indices of the cores where the cores are. A graph in which two linears read one
        tensor does for none in which they read two: each site has its own."""
        with torch.inference_mode(False):
            for name, position in self._positions.items():
                first, count = self.placements[name].first_core, self.placements[name].slices
                position.cores = torch.arange(first, first + count, device=self.core.device)

    def _apply(self, *args: Any, **kwargs: Any) -> TensorTrainGroup:
        super()._apply(*args, **kwargs)
        self._put_positions()
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Older releases had a scale without dimensions, which FSDP2 takes for no parameter."""
        state, name = dict(state_dict), prefix + "scale"
        if name in state:
            state[name] = state[name].reshape(1)
        super()._load_from_state_dict(state, prefix, *args, **kwargs)
        self._put_positions()  # tensors that are assigned may be elsewhere

    def _add_cores(self, count: int, rank: tuple[int, int]) -> None:
        self.core = nn.Parameter(torch.empty(count, *rank))

    def reset_parameters(self) -> None:
        zero, random = (self.V, self.U) if self.init == "v" else (self.U, self.V)
        nn.init.zeros_(zero)
        self._draw(self, random)
        if isinstance(self.scale, nn.Parameter):
            nn.init.constant_(self.scale, self.initial_scale)

    def cores(self, first: int, count: int) -> Tensor:
        """Σ_first ... Σ_(first+count-1), [count, r1, r2], without scale and dropout."""
        return self.core[first : first + count]

    def _picked_cores(self, indices: Tensor) -> Tensor:
        """As `cores`, those of these indices."""
        return picked_rows(self.core, indices)

    def _core_parameters(self) -> tuple[Tensor, ...]:
        """What `_all_cores` takes."""
        return (self.core,)

    def _all_cores(self, *parameters: Tensor) -> Tensor:
        """Every Σ_i, [n, r1, r2], without scale and dropout."""
        (core,) = parameters
        return core

    def down_key(self, site: str) -> tuple[object, ...] | None:
        place = self.placements[site]
        if place.stacked == "in":
            return None
        return ("U", place.u_rows, place.u_chunks) if place.u_side == "in" else ("V",)

    def factors(self, site: str, dropout: bool) -> Factors:
        place = self.placements[site]
        cores = self.cores(place.first_core, place.slices)
        return self._compose(place, site in self._whole, cores, dropout)

    def position(self, site: str) -> _Position:
        return self._positions[site]

    def factors_at(self, position: _Position, dropout: bool) -> Factors | None:
        if any(p.device != position.cores.device for p in self._core_parameters()):
            return None
        cores = self._picked_cores(position.cores)
        return self._compose(position.place, position.whole, cores, dropout)

    def _compose(self, place: Placement, whole: bool, cores: Tensor, dropout: bool) -> Factors:
        # A slice's backward fills a gradient of U's size with zeros, for every linear of the group.
        u: Tensor = self.U if whole else self.U[place.u_rows[0] : place.u_rows[1]]
        v: Tensor = self.V
        u, v, core = (wide(t) for t in (u, v, cores))
        if dropout and self.dropout > 0:
            u, v, core = (t * self._mask(t.shape, self.dropout) for t in (u, v, core))
        if self._scaled:
            learnt = isinstance(self.scale, Tensor)
            core = core * (self.scale if learnt else self.initial_scale)
        if place.stacked == "in":
            return Factors(torch.matmul(u, core).flatten(0, 1), None, v.unsqueeze(0))
        if place.u_chunks > 1:
            core = _each_its_own(core[0], place.u_chunks, "gh,ab->ghab").flatten(1, 2)
            return Factors(_side_by_side(u, place.u_chunks), core, v.unsqueeze(0))
        if place.u_side == "in":
            return Factors(u, core, v.unsqueeze(0))
        return Factors(v, core.transpose(-2, -1), u.unsqueeze(0))

    def joint_factors(self, dropout: bool) -> dict[str, Factors]:
        # By name: a subclass with a `joint_factors` of its own has products made of that.
        products = TensorTrainGroup.joint_products(self, dropout)
        return TensorTrainGroup.from_products(self, products)

    def joint_products(self, dropout: bool) -> tuple[Tensor, ...]:
        """For each family the factors that stay as they are [sites, D, r], and the other ones times
        their cores [T, D, r]."""
        rate = self.dropout if dropout else 0.0
        masks = [self._masks(family, rate) for family in self._families] if rate else []
        scale = (self.scale,) if isinstance(self.scale, Tensor) else ()

        def compute(*parameters: Tensor) -> tuple[Tensor, ...]:
            u, v, *rest = map(wide, parameters)
            cores = self._all_cores(*rest[len(scale) :])
            if self._scaled:
                cores = cores * (rest[0] if scale else self.initial_scale)
            stacks: list[Tensor] = []
            for i, family in enumerate(self._families):
                rows = u[slice(*family.u_rows)]
                kept, other = (rows, v) if family.keeps_u else (v, rows)
                matrices = family.pick(cores)
                kept = kept.expand(len(family.sites), -1, -1)
                other = other.expand(matrices.shape[0], -1, -1)
                if masks:
                    kept, other, matrices = (
                        t * m for t, m in zip((kept, other, matrices), masks[i], strict=True)
                    )
                matrices = matrices.mT if family.keeps_u else matrices
                stacks += kept, _products(other, matrices, _CUDA_PARTS if u.is_cuda else 1)
            return tuple(stacks)

        return keep_graph(compute, self.U, self.V, *scale, *self._core_parameters())

    def from_products(self, products: tuple[Tensor, ...]) -> dict[str, Factors]:
        factors: dict[str, Factors] = {}
        pairs = zip(products[::2], products[1::2], strict=True)
        for family, (kept_stack, folded_stack) in zip(self._families, pairs, strict=True):
            kept = kept_stack.unbind()
            folded = folded_stack.split(list(family.sites.values()))
            for site, plain, fold in zip(family.sites, kept, folded, strict=True):
                if (chunks := self.placements[site].u_chunks) > 1:
                    up = _each_its_own(fold[0], chunks, "gh,nr->gnhr").flatten(2)
                    factors[site] = Factors(_side_by_side(plain, chunks), None, up)
                    continue
                factors[site] = (
                    Factors(fold.flatten(0, 1), None, plain.unsqueeze(0))
                    if family.folds_down
                    else Factors(plain, None, fold)
                )
        return factors

    def stack_plan(self, sites: Sequence[str]) -> _StackPlan | None:
        index = next(i for i, f in enumerate(self._families) if sites[0] in f.sites)
        family = self._families[index]
        if any(s not in family.sites or self.placements[s].u_chunks > 1 for s in sites):
            return None
        return _StackPlan.of(index, family, sites)

    def stacked(self, products: tuple[Tensor, ...], plan: _StackPlan) -> tuple[Tensor, Tensor]:
        kept, folded = products[2 * plan.family : 2 * plan.family + 2]
        kept = kept[plan.kept]
        by_site = folded.unflatten(0, (-1, plan.period))[:, plan.cores].flatten(1, 2)
        return (by_site, kept) if self._families[plan.family].folds_down else (kept, by_site)

    def _masks(self, family: _Family, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Dropout's factors for a family's kept factor [sites, D, r], the other one [T, D, r],
        which a site's cores share, and its cores [T, r1, r2]."""
        sites, total = len(family.sites), sum(family.sites.values())
        (start, stop), (r1, r2) = family.u_rows, (self.U.shape[1], self.V.shape[1])

        u = self._mask((sites, stop - start, r1), rate)
        v = self._mask((sites, *self.V.shape), rate)
        kept, other = (u, v) if family.keeps_u else (v, u)
        return kept, family.per_core(other), self._mask((total, r1, r2), rate)

    def _mask(self, shape: Sequence[int], rate: float) -> Tensor:
        # By itself: where what is dropped is a view, F.dropout's backward has other strides than
        # torch's aot_eager expects (2.11), which then fails.
        with torch.no_grad():
            return F.dropout(self.U.new_ones(shape), rate)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(p.shape)}" for name, p in self.named_parameters())
        return (
            f"{shapes}, scale={self.initial_scale:g}, init={self.init!r}, dropout={self.dropout:g}"
        )


# Parts of the rows of U or V whose gradients by the cores are made apart and added up: on an H200
# 12 layers' took 126 µs as sums over 768 and 3,072 rows, by one multiprocessor each.
_CUDA_PARTS = 8


def _products(factors: Tensor, matrices: Tensor, parts: int) -> Tensor:
    """factors·matrices, [T, D, r1] and [T, r1, r2], in `parts` of the D rows if they allow."""
    if parts == 1 or factors.shape[1] % parts:
        return torch.bmm(factors, matrices)
    return torch.matmul(factors.unflatten(1, (parts, -1)), matrices.unsqueeze(1)).flatten(1, 2)


def _side_by_side(u: Tensor, chunks: int) -> Tensor:
    """[chunks·K, r] → [K, chunks·r]."""
    return u.unflatten(0, (chunks, -1)).transpose(0, 1).flatten(1)


def _each_its_own(matrix: Tensor, chunks: int, equation: str) -> Tensor:
    """`matrix` once for each slice g, at the rank indices of chunk h = g, and zero at the others'.

    Args:
        equation: "gh,ab->ghab" for a core [r1, r2] or "gh,nr->gnhr" for a factor [N, r].
    """
    eye = torch.eye(chunks, dtype=matrix.dtype, device=matrix.device)
    return torch.einsum(equation, eye, matrix)


class Layout(NamedTuple):
    """One group's tensor: where each site sits in it, its sizes, and how it starts."""

    placements: dict[str, Placement]
    dims: tuple[int, int]  # the rows of U and of V
    rank: tuple[int, int]
    cores: int
    init: str = "v"
    draw: Draw = draw_xavier


class TensorTrainMethod(Method):
    """What EFFT and FacT share: checks, groups by stage, one tensor for each.

    Not a dataclass: a subclass lists its fields in its own order, these among them.
    """

    rank: Rank | list[Rank]
    scale: float
    dropout: float
    learn_scale: bool
    factor_init: str = "xavier"

    def __post_init__(self) -> None:
        check_ranks("rank", self.rank)
        check_number("scale", self.scale)
        check_number("dropout", self.dropout, low=0.0, below=1.0)
        if not isinstance(self.learn_scale, bool):
            raise TypeError(f"learn_scale must be a bool, got {type(self.learn_scale).__name__}")
        check_choice("factor_init", self.factor_init, ("xavier", "release"))

    def part(self, site: Site) -> str:
        """The name of the group, within its stage, that a site belongs to."""
        return "all"

    @abstractmethod
    def layout(self, members: Sequence[Site], sites: Sequence[Site]) -> Layout:
        """The tensor of one group, whose sites are `members` of all `sites`."""

    @abstractmethod
    def new_group(self, layout: Layout) -> TensorTrainGroup:
        """The parameters for a layout."""

    def members(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        require_roles(self, sites, MHSA_ROLES + FFN_ROLES)
        return by_stage(sites, self.part)

    def build(self, sites: Sequence[Site]) -> dict[str, FactorGroup]:
        groups: dict[str, FactorGroup] = {}
        for name, members in self.members(sites).items():
            layout = self.layout(members, sites)
            check_rank_fits("rank", layout.rank, members)
            groups[name] = self.new_group(layout)
        return groups


def check_square(site: Site, d: int, what: str) -> None:
    """Raise ValueError unless each of the site's matrices is d×d."""
    if (site.in_features, site.out_features) != (d, site.slices * d):
        raise ValueError(
            f"{what} holds d×d matrices (d={d}), got {site.name!r} with K={site.in_features},"
            f" N={site.out_features}"
        )
