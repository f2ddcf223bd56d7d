"""How alike the subspaces are that factors span (EFFT, arXiv:2311.06749, Eq. 4 and Fig. 10).

Every ΔW is compared through a small matrix with the same leading singular vectors, so that a whole
ViT costs a few thin QR decompositions: with ΔW = B·down^T, B [N, Ra] and B = Q·R,

    ΔW^T [K, N] = (down·R^T)·Q^T    has the left singular vectors of    down·R^T [K, Ra],

and the same with the two sides exchanged. Side "in" is the space of the features a linear reads,
[K]; side "out" that of the features it writes, [N].

Factors shared by layers make part of the answer trivial: ΔW of EFFT and FacT lie in the span of U
and V, so two blocks of one group agree wholly once i and j reach the rank. Look at smaller i, j.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_file import buffers_of, read_adapter_file, read_header, trained_of
from ..adapters.attach import load
from ..methods.base import FFN_ROLES, MHSA_ROLES, FactorGroup, Factors, Site

SIDES = ("in", "out")
PARTS = {"mhsa": MHSA_ROLES, "ffn": FFN_ROLES}

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Two matrices compared by Eq. 4 for every i and j.

    Attributes:
        kind: "groups" or "seeds".
        first: what was compared.
        second: with what.
        side: "in", "out", or "factor" for a factor itself.
        dim: of the space both live in.
        similarity: [I, J], entry (i-1, j-1) for the top-i of first and the top-j of second.
        baseline: [I, J], what random subspaces of the space would give.
    """

    kind: str
    first: str
    second: str
    side: str
    dim: int
    similarity: Matrix
    baseline: Matrix

    @property
    def above_random(self) -> Matrix:
        """[I, J], similarity with the random baseline subtracted (Fig. 10)."""
        return self.similarity - self.baseline

    def to_json(self) -> dict[str, Any]:
        """The fields and `above_random` in JSON's own types."""
        arrays = ("similarity", "baseline", "above_random")
        return asdict(self) | {name: getattr(self, name).tolist() for name in arrays}


@dataclass(frozen=True)
class BlockComparison:
    """ΔW of one role in every block against every other block.

    Attributes:
        role: "qkv", "o", "fc1", ...
        side: "in" or "out".
        dim: of the space.
        top: i = j in Eq. 4.
        blocks: block indices, L of them.
        similarity: [L, L].
        baseline: what random subspaces would give.
    """

    role: str
    side: str
    dim: int
    top: int
    blocks: tuple[int, ...]
    similarity: Matrix
    baseline: float

    @property
    def above_random(self) -> Matrix:
        """[L, L], similarity with the random baseline subtracted."""
        return self.similarity - self.baseline

    def to_json(self) -> dict[str, Any]:
        """The fields and `above_random` in JSON's own types."""
        arrays = ("similarity", "above_random")
        return asdict(self) | {name: getattr(self, name).tolist() for name in arrays}


def top_left_singular_vectors(matrix: Tensor, count: int | None = None) -> Tensor:
    """The top left singular vectors of a matrix, by falling singular value.

    Args:
        matrix: [D, R]; singular values below max(D, R)·eps·σ_max of its dtype count as zero.
        count: how many; None for as many as the rank.

    Returns:
        [D, count], orthonormal columns, float64.

    Raises:
        ValueError: no finite matrix, or a rank below count: the vectors would be arbitrary.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"matrix must be [D, R] with D, R >= 1, got {list(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"matrix [{matrix.shape[0]}, {matrix.shape[1]}] must be finite")
    eps = torch.finfo(matrix.dtype).eps if matrix.is_floating_point() else 0.0
    vectors, values, _ = torch.linalg.svd(matrix.detach().cpu().double(), full_matrices=False)
    tolerance = max(matrix.shape) * max(eps, torch.finfo(torch.float64).eps) * values[0]
    rank = int((values > tolerance).sum())
    if count is None:
        count = rank
    elif not 1 <= count <= rank:
        raise ValueError(f"i and j must be within 1..{rank}, the matrix's rank, got {count}")
    return vectors[:, :count]


def subspace_similarity(a: Tensor, b: Tensor, i: int, j: int) -> float:
    """How much of the smaller subspace lies in the larger: ‖U_i^T·U_j‖_F² / min(i, j), in [0, 1].

    U_i and U_j are the top-i and top-j left singular vectors of a and b.

    Args:
        a: [D, R1].
        b: [D, R2].
        i: 1 to rank(a).
        j: 1 to rank(b).

    Raises:
        ValueError: different D, or i or j beyond the rank.

    Source: EFFT (arXiv:2311.06749), Eq. 4; LoRA (arXiv:2106.09685), Eq. 4.
    """
    _check_same_space(a, b)
    product = top_left_singular_vectors(a, i).T @ top_left_singular_vectors(b, j)
    return min(1.0, float(product.square().sum()) / min(i, j))


def similarity_grid(
    a: Tensor, b: Tensor, max_i: int | None = None, max_j: int | None = None
) -> Matrix:
    """`subspace_similarity` for all i and j, from one decomposition of each matrix.

    Args:
        a: [D, R1].
        b: [D, R2].
        max_i: largest i; beyond the rank of a, or None, it is the rank.
        max_j: largest j, likewise.

    Returns:
        [I, J], entry (i-1, j-1) for i and j.

    Raises:
        ValueError: different D, a limit below 1, or a zero matrix, which spans nothing.
    """
    _check_same_space(a, b)
    bases = []
    for name, matrix, limit in (("a", a, max_i), ("b", b, max_j)):
        if limit is not None and limit < 1:
            raise ValueError(f"max_i and max_j must be at least 1, got {limit}")
        basis = top_left_singular_vectors(matrix)[:, :limit]
        if basis.shape[1] == 0:
            raise ValueError(f"{name} must not be zero: it spans no subspace")
        bases.append(basis)
    squares = (bases[0].T @ bases[1]).square()
    sums = squares.cumsum(0).cumsum(1).numpy()
    counts = np.minimum.outer(np.arange(1, sums.shape[0] + 1), np.arange(1, sums.shape[1] + 1))
    return np.minimum(sums / counts, 1.0)


def _check_same_space(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(
            f"a and b must be [D, R1] and [D, R2], got {list(a.shape)} and {list(b.shape)}"
        )


def random_baseline(dim: int, i: int, j: int, *, samples: int = 0, seed: int = 0) -> float:
    """What Eq. 4 gives for two independent random subspaces of ℝ^dim, on average.

    Exactly max(i, j)/dim: each of the i·j squared inner products is 1/dim on average. With
    `samples` it is measured on so many pairs of Gaussian matrices instead, as the paper does.

    Raises:
        ValueError: i or j outside 1..dim, or samples below 0.
    """
    if not (1 <= i <= dim and 1 <= j <= dim):
        raise ValueError(f"i and j must be within 1..dim={dim}, got {i} and {j}")
    if samples < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")
    if samples == 0:
        return max(i, j) / dim
    generator = torch.Generator().manual_seed(seed)

    def gaussian(columns: int) -> Tensor:
        return torch.randn(dim, columns, generator=generator, dtype=torch.float64)

    pairs = ((gaussian(i), gaussian(j)) for _ in range(samples))
    return float(np.mean([subspace_similarity(a, b, i, j) for a, b in pairs]))


def _compare(
    kind: str, first: str, second: str, side: str, a: Tensor, b: Tensor, limit: int | None
) -> Comparison:
    try:
        similarity = similarity_grid(a, b, limit, limit)
    except ValueError as error:
        raise ValueError(f"{first} and {second} must be comparable: {error}") from None
    rows, columns = (np.arange(1, size + 1) for size in similarity.shape)
    baseline = np.maximum.outer(rows, columns) / a.shape[0]
    return Comparison(kind, first, second, side, a.shape[0], similarity, baseline)


def reduced(factors: Factors, side: str) -> Tensor:
    """Small matrices with the left singular vectors and values of ΔW^T or ΔW; in float64.

    Returns:
        Side "in": [1, K, R], for ΔW^T [K, N]. Side "out": [G, N/G, R], for ΔW[slice g] [N/G, K].
    """
    down, up = factors.down.detach().cpu().double(), factors.up.detach().cpu().double()
    folded = up if factors.core is None else up @ factors.core.detach().cpu().double().mT
    if side == "in":
        return (down @ _triangle(folded.flatten(0, 1)).mT).unsqueeze(0)
    return folded @ _triangle(down).mT


def _triangle(matrix: Tensor) -> Tensor:
    """R of matrix = Q·R."""
    return torch.linalg.qr(matrix, mode="r").R


def factor_matrices(adapter: Adapter) -> dict[str, Tensor]:
    """The factors U and V by their names in the bank, [D, r]; none for LoRA and KAdaptation."""
    return {
        f"{name}.{factor}": group.get_parameter(factor).detach()
        for name, group in adapter.bank.named_children()
        if isinstance(group, FactorGroup)
        for factor in group.factor_matrices
    }


def part_matrix(adapter: Adapter, part: str, side: str, stage: int = 0) -> Tensor | None:
    """All ΔW of one part of a stage side by side, in the space of the stage's width d.

    Side "in" takes every ΔW^T [d, N] that reads d features, side "out" every d×K slice of a ΔW that
    writes d features.

    Args:
        adapter: attached, trained.
        part: "mhsa", "ffn", or a role such as "qkv".
        side: "in" or "out".
        stage: of a Swin; 0 for a plain ViT.

    Returns:
        [d, R], or None where the adapter has no such linear.
    """
    pieces: list[Tensor] = []
    layers = adapter.layers()
    for site in _sites_of(adapter, part):
        if site.stage != stage:
            continue
        with torch.no_grad():
            small = reduced(layers[site.name].current_factors(), _check_side(side))
        pieces += [piece for piece in small.unbind() if piece.shape[0] == site.width]
    return torch.cat(pieces, dim=1) if pieces else None


def _sites_of(adapter: Adapter, part: str) -> list[Site]:
    roles = PARTS.get(part, (part,))
    return [site for site in adapter.sites if site.role in roles]


def _check_side(side: str) -> str:
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")
    return side


def between_groups(adapter: Adapter, limit: int | None = None) -> list[Comparison]:
    """MHSA against FFN of one adapter: their factors where the dimensions agree, and their ΔW.

    Args:
        adapter: attached, trained.
        limit: largest i and j; None for the ranks.

    Returns:
        One comparison per pair of factors of equal height and per side; empty where the adapter has
        only one of the two parts.

    Raises:
        ValueError: a part that has learnt nothing (ΔW = 0).

    Source: EFFT, section 4.4.
    """
    found: list[Comparison] = []
    stages = sorted({site.stage for site in adapter.sites})
    for stage in stages:
        suffix = f" of stage {stage}" if len(stages) > 1 else ""
        for side in SIDES:
            a, b = (part_matrix(adapter, part, side, stage) for part in PARTS)
            if a is not None and b is not None:
                names = (f"MHSA ΔW{suffix}", f"FFN ΔW{suffix}")
                found.append(_compare("groups", *names, side, a, b, limit))
    stage_of = {adapter.bank.group_of[site.name]: site.stage for site in adapter.sites}
    factors = list(factor_matrices(adapter).items())
    for index, (first, a) in enumerate(factors):
        for second, b in factors[index + 1 :]:
            groups = [name.rpartition(".")[0] for name in (first, second)]
            apart = groups[0] != groups[1] and stage_of[groups[0]] == stage_of[groups[1]]
            if apart and a.shape[0] == b.shape[0]:
                found.append(_compare("groups", first, second, "factor", a, b, limit))
    return found


def between_seeds(a: Adapter, b: Adapter, limit: int | None = None) -> list[Comparison]:
    """Two adapters of one architecture, trained with different seeds (or parts): the factors and
    the parts' ΔW that both have.

    Raises:
        ValueError: nothing in common, or a part that has learnt nothing.

    Source: EFFT, section 4.4.
    """
    found: list[Comparison] = []
    stages = sorted({site.stage for site in a.sites} & {site.stage for site in b.sites})
    for stage in stages:
        suffix = f" of stage {stage}" if len(stages) > 1 else ""
        for part in PARTS:
            for side in SIDES:
                one, other = (part_matrix(adapter, part, side, stage) for adapter in (a, b))
                if one is not None and other is not None:
                    name = f"{part.upper()} ΔW{suffix}"
                    found.append(_compare("seeds", name, name, side, one, other, limit))
    others = factor_matrices(b)
    for name, factor in factor_matrices(a).items():
        if name in others and others[name].shape[0] == factor.shape[0]:
            found.append(_compare("seeds", name, name, "factor", factor, others[name], limit))
    if not found:
        raise ValueError("the two adapters must adapt linears of the same kind, got none in common")
    return found


def between_blocks(adapter: Adapter, role: str, side: str, top: int = 4) -> list[BlockComparison]:
    """ΔW of one role, every block against every other, at i = j = top.

    Args:
        adapter: attached, trained.
        role: "qkv", "o", "fc1", ... of `adapter.sites`.
        side: "in" or "out".
        top: i and j; lowered to the smallest rank among the blocks.

    Returns:
        One comparison per stage with two blocks or more.

    Raises:
        ValueError: no linear of that role, top below 1, or a ΔW that is zero.
    """
    _check_side(side)
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    layers = adapter.layers()
    bases: dict[int, dict[int, Tensor]] = {}
    for site in adapter.sites:
        if site.role != role:
            continue
        with torch.no_grad():
            small = reduced(layers[site.name].current_factors(), side).flatten(0, 1)
        basis = top_left_singular_vectors(small)
        if basis.shape[1] == 0:
            raise ValueError(f"ΔW of {site.name} must not be zero: it spans no subspace")
        bases.setdefault(site.stage, {})[site.block] = basis
    if not bases:
        roles = sorted({site.role for site in adapter.sites})
        raise ValueError(f"role must be one of {roles}, got {role!r}")
    return [
        _compare_blocks(role, side, top, of_stage)
        for of_stage in bases.values()
        if len(of_stage) > 1
    ]


def _compare_blocks(role: str, side: str, top: int, bases: dict[int, Tensor]) -> BlockComparison:
    top = min(top, *(basis.shape[1] for basis in bases.values()))
    stacked = torch.stack([basis[:, :top] for basis in bases.values()])  # [L, D, top]
    overlaps = torch.einsum("adi,bdj->abij", stacked, stacked).square().sum((2, 3)) / top
    dim = stacked.shape[1]
    return BlockComparison(
        role,
        side,
        dim,
        top,
        tuple(bases),
        overlaps.clamp(max=1.0).numpy(),
        random_baseline(dim, top, top),
    )


def roles(adapter: Adapter) -> list[str]:
    """The roles of the adapted linears, in the model's order."""
    return list(dict.fromkeys(site.role for site in adapter.sites))


def load_alone(path: str | os.PathLike[str]) -> Adapter:
    """An adapter from its file alone, on a stand-in for its model that has the linears' names and
    shapes but no weights.

    The file's header lists the shapes of all parameters, and the factors are all that a comparison
    needs. The stand-in cannot run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole adapter file, or one whose header lists no shapes.
    """
    metadata, tensors = read_adapter_file(path)
    header = read_header(metadata, path)
    model = _stand_in(header.base_shapes, header.modules_to_train)
    for name, tensor in {**trained_of(tensors), **buffers_of(tensors)}.items():
        if name not in header.base_shapes:
            owner, _, last = name.rpartition(".")
            _descend(model, owner, linear=False).register_buffer(last, torch.empty_like(tensor))
    return load(model, path)


def _stand_in(shapes: dict[str, tuple[int, ...]], trained: Sequence[str]) -> nn.Module:
    """Modules with parameters of these names and shapes; those outside `trained` are one zero,
    expanded, and take no memory."""
    model = nn.Module()
    for name, shape in shapes.items():
        owner, _, last = name.rpartition(".")
        real = any(name.startswith(f"{module}.") for module in trained)
        zeros = torch.zeros(shape) if real else torch.zeros(()).expand(shape)
        module = _descend(model, owner, linear=last == "weight" and len(shape) == 2)
        if isinstance(module, nn.Linear) and last == "weight":
            module.out_features, module.in_features = shape
        module.register_parameter(last, nn.Parameter(zeros, requires_grad=False))
    return model


def _descend(model: nn.Module, path: str, linear: bool) -> nn.Module:
    module = model
    parts = path.split(".") if path else []
    for depth, part in enumerate(parts):
        child = module._modules.get(part)
        if child is None:
            is_linear = linear and depth == len(parts) - 1
            child = nn.Linear(1, 1, bias=False, device="meta") if is_linear else nn.Module()
            module.add_module(part, child)
        module = child
    return module
