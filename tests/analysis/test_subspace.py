"""Eq. 4 on subspaces made by hand, its baseline, and comparisons of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from efft_kernels import EFFT1, EFFT2, Adapter, FacTTK, FacTTT, KAdaptation, LoRA, attach
from efft_kernels.analysis import subspace
from efft_kernels.analysis.subspace import (
    between_blocks,
    between_groups,
    between_seeds,
    load_alone,
    part_matrix,
    random_baseline,
    reduced,
    similarity_grid,
    subspace_similarity,
    top_left_singular_vectors,
)
from efft_kernels.methods.base import Method


def basis(*axes: int, dim: int = 11) -> Tensor:
    """Unit vectors along these axes, falling in length, so that the order is certain."""
    matrix = torch.zeros(dim, len(axes), dtype=torch.float64)
    for column, axis in enumerate(axes):
        matrix[axis, column] = len(axes) - column
    return matrix


def rotation(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def test_identical_orthogonal_and_nested() -> None:
    a = basis(0, 1, 2)
    assert subspace_similarity(a, a, 3, 3) == pytest.approx(1)
    assert subspace_similarity(a, basis(3, 4), 3, 2) == pytest.approx(0)
    assert subspace_similarity(a, basis(2, 0), 3, 2) == pytest.approx(1)
    assert subspace_similarity(a, basis(2, 5), 3, 2) == pytest.approx(1 / 2)
    assert subspace_similarity(a, basis(2, 5), 2, 2) == pytest.approx(0)  # 2 is a's third


def test_an_angle_gives_its_squared_cosine() -> None:
    a = torch.tensor([[1.0], [0.0]])
    b = torch.tensor([[3.0], [4.0]])
    assert subspace_similarity(a, b, 1, 1) == pytest.approx(0.36)


def test_a_rotation_of_the_space_and_of_the_columns_changes_nothing() -> None:
    a, b = torch.randn(13, 5, dtype=torch.float64), torch.randn(13, 7, dtype=torch.float64)
    before = similarity_grid(a, b)
    both = rotation(13)
    assert np.allclose(similarity_grid(both @ a, both @ b), before)
    assert np.allclose(similarity_grid(a @ rotation(5), -2 * b @ rotation(7)), before)
    assert not np.allclose(similarity_grid(both @ a, b), before, atol=1e-3)


def test_the_grid_holds_every_pair() -> None:
    a, b = torch.randn(13, 3), torch.randn(13, 5)
    grid = similarity_grid(a, b)
    assert grid.shape == (3, 5)
    for i in range(1, 4):
        for j in range(1, 6):
            assert grid[i - 1, j - 1] == pytest.approx(subspace_similarity(a, b, i, j))
    assert np.array_equal(similarity_grid(a, b, 2, 4), grid[:2, :4])
    assert grid.min() >= 0
    assert grid.max() <= 1


def test_vectors_beyond_the_rank_are_refused() -> None:
    thin = torch.randn(9, 2) @ torch.randn(2, 6)
    assert top_left_singular_vectors(thin).shape == (9, 2)
    with pytest.raises(ValueError, match=r"within 1\.\.2, the matrix's rank, got 3"):
        subspace_similarity(thin, thin, 3, 1)
    with pytest.raises(ValueError, match=r"\[D, R1\] and \[D, R2\]"):
        subspace_similarity(thin, torch.randn(8, 2), 1, 1)
    with pytest.raises(ValueError, match="a must not be zero"):
        similarity_grid(torch.zeros(9, 2), thin)
    with pytest.raises(ValueError, match="finite"):
        similarity_grid(thin / 0, thin)


@pytest.mark.parametrize(("i", "j"), [(1, 1), (2, 7), (5, 3)])
def test_the_baseline_is_what_gaussian_matrices_give(i: int, j: int) -> None:
    exact = random_baseline(23, i, j)
    assert exact == max(i, j) / 23
    measured = random_baseline(23, i, j, samples=400, seed=5)
    assert measured == pytest.approx(exact, rel=0.1)
    assert measured == random_baseline(23, i, j, samples=400, seed=5)
    with pytest.raises(ValueError, match=r"1\.\.dim=23"):
        random_baseline(23, i, 24)


METHODS = [
    EFFT1(rank=4, dropout=0.0),
    EFFT2(rank=4, dropout=0.0),
    FacTTT(rank=4),
    FacTTK(rank=4),
    LoRA(rank=3),
    KAdaptation(products=2, rank=1),
]


def adapted(
    make_vit: Callable[..., nn.Module],
    randomize: Callable[..., None],
    method: Method,
    seed: int = 0,
    **options: Any,
) -> Adapter:
    adapter = attach(make_vit(), method, **options)
    torch.manual_seed(seed)
    randomize(adapter.bank)
    return adapter


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("side", subspace.SIDES)
def test_reduced_matrices_have_the_singular_vectors_of_the_dense_ones(
    make_vit: Any, randomize: Any, method: Method, side: str
) -> None:
    adapter = adapted(make_vit, randomize, method)
    for name, layer in adapter.layers().items():
        with torch.no_grad():
            small = reduced(layer.current_factors(), side)
        delta = adapter.delta_weights()[name].double()
        dense = delta.T.unsqueeze(0) if side == "in" else delta.unflatten(0, (small.shape[0], -1))
        assert torch.allclose(small @ small.mT, dense @ dense.mT, atol=1e-5)


def test_groups_of_one_adapter(make_vit: Any, randomize: Any) -> None:
    adapter = adapted(make_vit, randomize, EFFT2(rank=4, dropout=0.0))
    found = {(item.first, item.second, item.side): item for item in between_groups(adapter)}
    assert set(found) == {
        ("MHSA ΔW", "FFN ΔW", "in"),
        ("MHSA ΔW", "FFN ΔW", "out"),
        ("mhsa.U", "ffn.V", "factor"),
        ("mhsa.V", "ffn.V", "factor"),
    }
    deltas = adapter.delta_weights()
    reads = [
        torch.cat([delta.T for name, delta in deltas.items() if part in name], dim=1)
        for part in ("attn", "fc1")
    ]
    item = found["MHSA ΔW", "FFN ΔW", "in"]
    assert item.dim == 12
    assert item.similarity.shape == (4, 4)
    for i, j in ((1, 1), (2, 4), (3, 2)):
        expected = subspace_similarity(*reads, i, j)
        assert item.similarity[i - 1, j - 1] == pytest.approx(expected, abs=1e-4)
        assert item.above_random[i - 1, j - 1] == pytest.approx(expected - max(i, j) / 12, abs=1e-4)
    writes = [delta for name, delta in deltas.items() if "fc2" in name]
    matrix = part_matrix(adapter, "ffn", "out")
    assert matrix is not None
    dense = torch.cat(writes, dim=1).double()
    assert torch.allclose(matrix @ matrix.T, dense @ dense.T, atol=1e-5)


def test_an_adapter_with_one_part_has_no_groups_to_compare(make_vit: Any, randomize: Any) -> None:
    adapter = adapted(make_vit, randomize, EFFT2(rank=4), targets="mhsa")
    assert between_groups(adapter) == []
    assert part_matrix(adapter, "ffn", "in") is None


def test_seeds(make_vit: Any, randomize: Any) -> None:
    method = EFFT2(rank=4)
    a, b = (adapted(make_vit, randomize, method, seed=seed) for seed in (1, 2))
    same = between_seeds(a, a)
    assert len(same) == 2 * 2 + 4
    assert all(np.diag(item.similarity) == pytest.approx(1) for item in same)
    different = between_seeds(a, b, limit=2)
    assert all(item.similarity.shape == (2, 2) for item in different)
    assert all(item.similarity[0, 0] < 0.99 for item in different)
    mhsa = adapted(make_vit, randomize, EFFT2(rank=4), targets="mhsa")
    ffn = adapted(make_vit, randomize, EFFT2(rank=4), targets="ffn")
    assert {item.first for item in between_seeds(a, mhsa)} == {"MHSA ΔW", "mhsa.U", "mhsa.V"}
    with pytest.raises(ValueError, match="none in common"):
        between_seeds(mhsa, ffn)


def test_blocks(make_vit: Any, randomize: Any) -> None:
    adapter = adapted(make_vit, randomize, LoRA(rank=3, matrices=None))
    (item,) = between_blocks(adapter, "fc1", "in", top=2)
    first, second = (adapter.delta_weights()[f"blocks.{block}.mlp.fc1"].T for block in (0, 1))
    assert item.blocks == (0, 1)
    assert item.similarity[0, 1] == pytest.approx(
        subspace_similarity(first, second, 2, 2), abs=1e-4
    )
    assert np.diag(item.similarity) == pytest.approx(1)
    assert item.baseline == 2 / 12
    assert between_blocks(adapter, "fc1", "in", top=99)[0].top == 3
    with pytest.raises(ValueError, match="role must be one of"):
        between_blocks(adapter, "q", "in")


def test_blocks_that_share_a_factor_agree_wholly_at_its_rank(make_vit: Any, randomize: Any) -> None:
    adapter = adapted(make_vit, randomize, EFFT2(rank=4))
    (item,) = between_blocks(adapter, "qkv", "in", top=4)
    assert item.similarity == pytest.approx(np.ones((2, 2)))
    (item,) = between_blocks(adapter, "qkv", "in", top=1)
    assert item.similarity[0, 1] < 0.99


def test_an_untrained_adapter_is_refused(make_vit: Any) -> None:
    adapter = attach(make_vit(), EFFT2(rank=4))
    with pytest.raises(ValueError, match="zero: it spans no subspace"):
        between_groups(adapter)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv must not be zero"):
        between_blocks(adapter, "qkv", "in")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_file_alone_is_enough(
    make_vit: Any, randomize: Any, method: Method, tmp_path: Path
) -> None:
    adapter = adapted(make_vit, randomize, method)
    adapter.save(tmp_path / "a.safetensors")
    alone = load_alone(tmp_path / "a.safetensors")
    assert alone.sites == adapter.sites
    deltas = adapter.delta_weights()
    for name, delta in alone.delta_weights().items():
        assert torch.equal(delta, deltas[name])
    stored = {
        p.untyped_storage().nbytes()
        for n, p in alone.model.named_parameters()
        if n.startswith("blocks")
    }
    assert stored == {4}  # no memory for the backbone


def test_a_swin_is_compared_stage_by_stage(randomize: Any, tmp_path: Path) -> None:
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=16,
        patch_size=2,
        window_size=2,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 2),
        num_classes=3,
    )
    adapter = attach(model, EFFT2(rank=[2, 3]))
    randomize(adapter.bank)
    adapter.save(tmp_path / "swin.safetensors")
    alone = load_alone(tmp_path / "swin.safetensors")
    dims = {item.dim for item in between_groups(alone)}
    assert dims == {8, 16}
    assert [item.dim for item in between_blocks(alone, "qkv", "in")] == [8, 16]
