"""Fastfood against the dense matrices of its definition, and what it leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from efft_kernels.analysis.fastfood import Fastfood, hadamard_transform, random_subspace


def dense(fastfood: Fastfood) -> Tensor:
    """P [D, d] from the definition, in dense matrices."""
    blocks, n = fastfood.signs.shape
    h = torch.from_numpy(hadamard(n)).to(torch.float64)
    rows = []
    for block in range(blocks):
        b = torch.diag(fastfood.signs[block].double())
        pi = torch.eye(n, dtype=torch.float64)[fastfood.permutation[block]]
        g = torch.diag(fastfood.gaussian[block].double())
        s = torch.diag(fastfood.lengths[block].double())
        rows.append(s @ h @ g @ pi @ h @ b)
    return torch.cat(rows)[: fastfood.rows, : fastfood.dim]


def matrix(fastfood: Fastfood) -> Tensor:
    """P [D, d], a column at a time."""
    eye = torch.eye(fastfood.dim, dtype=fastfood.gaussian.dtype)
    return torch.stack([fastfood(column) for column in eye], dim=1)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_transform_is_the_hadamard_matrix(n: int) -> None:
    x = torch.randn(3, 5, n, dtype=torch.float64)
    assert torch.allclose(hadamard_transform(x), x @ torch.from_numpy(hadamard(n)).double())
    assert torch.allclose(hadamard_transform(hadamard_transform(x)), n * x)


def test_the_transform_is_exact_on_small_integers() -> None:
    x = torch.randint(-8, 9, (7, 32)).float()
    assert torch.equal(hadamard_transform(x), x @ torch.from_numpy(hadamard(32)).float())


def test_the_transform_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(torch.zeros(2, 12))


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (37, 1), (37, 5), (37, 8), (37, 37), (64, 16)])
def test_it_is_the_product_of_its_matrices(rows: int, dim: int) -> None:
    fastfood = Fastfood(rows, dim, seed=3, dtype=torch.float64)
    assert torch.allclose(matrix(fastfood), dense(fastfood))
    if dim > 1:
        assert torch.linalg.matrix_rank(matrix(fastfood)) == dim


def test_columns_are_orthonormal_and_entries_normal_on_average() -> None:
    rows, dim = 4099, 24
    p = matrix(Fastfood(rows, dim, seed=1, dtype=torch.float64))
    gram = p.T @ p
    noise = (2 / rows) ** 0.5  # standard deviation of a column's squared length, were P Gaussian
    assert (gram.diagonal() - 1).abs().max() < 6 * noise
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 6 * noise
    entries = p.flatten() * rows**0.5
    assert entries.mean().abs() < 0.02
    assert entries.var() == pytest.approx(1, abs=0.03)
    assert (entries**4).mean() == pytest.approx(3, abs=0.3)


def test_row_lengths_are_those_of_gaussian_rows() -> None:
    p = matrix(Fastfood(4096, 32, seed=1, dtype=torch.float64)) * 64
    squares = p.square().sum(1)  # chi-squared with 32 degrees of freedom
    assert squares.mean() == pytest.approx(32, rel=0.03)
    assert squares.var() == pytest.approx(64, rel=0.15)


def test_the_seed_decides_everything() -> None:
    theta = torch.randn(6)
    one = Fastfood(50, 6, seed=9)(theta)
    assert torch.equal(one, Fastfood(50, 6, seed=9)(theta))
    assert not torch.allclose(one, Fastfood(50, 6, seed=10)(theta))


def test_gradients() -> None:
    fastfood = Fastfood(19, 5, seed=0, dtype=torch.float64)
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fastfood, theta)
    grad = torch.randn(19, dtype=torch.float64)
    fastfood(theta).backward(grad)
    assert theta.grad is not None
    assert torch.allclose(theta.grad, dense(fastfood).T @ grad)


@pytest.mark.parametrize("dim", [3, 1000, 4096])
def test_memory_grows_with_the_rows_alone(dim: int) -> None:
    rows = 40_000
    fastfood = Fastfood(rows, dim, seed=0)
    assert sum(b.nbytes for b in fastfood.buffers()) <= 17 * (rows + 4096)
    assert fastfood.state_dict() == {}
    assert fastfood(torch.zeros(dim)).abs().max() == 0


def test_a_module_moves_along_the_subspace_and_comes_back(make_vit: Any) -> None:
    model = make_vit().eval()
    before = copy.deepcopy(model)
    image = torch.randn(2, 3, 8, 8)
    expected = model(image)
    identities = {name: id(p) for name, p in model.named_parameters()}
    frozen = model.blocks[0].attn.proj.bias.requires_grad_(False)
    attention = model.blocks[0].attn
    kinds = [type(module) for module in attention.modules()]
    starts = torch.cat([p.detach().flatten() for p in attention.parameters()])

    with random_subspace(attention, 7, seed=4) as theta:
        assert torch.allclose(model(image), expected, atol=1e-6)
        learning = [p for p in attention.parameters() if p.requires_grad]
        assert len(learning) == 1
        assert learning[0] is theta
        model(image).square().sum().backward()
        assert theta.grad is not None
        assert theta.grad.abs().min() > 0
        with torch.no_grad():
            theta.copy_(torch.randn(7))
        assert not torch.allclose(model(image), expected, atol=1e-3)
        moved = torch.cat([getattr(m, n).detach().flatten() for m, n in linear_tensors(attention)])
        # D is small: P keeps the length of θ to about √(d/D)
        assert (moved - starts).norm() == pytest.approx(theta.detach().norm().item(), rel=0.3)

    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert list(model.state_dict()) == list(before.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name])
    assert [type(module) for module in attention.modules()] == kinds
    assert not frozen.requires_grad
    assert attention.qkv.weight.requires_grad
    assert torch.equal(model(image), expected)


def linear_tensors(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (child, name)
        for child in module.modules()
        if isinstance(child, nn.Linear)
        for name in ("weight", "bias")
    ]


def test_an_error_inside_restores_too(make_vit: Any) -> None:
    model = make_vit()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(KeyError), random_subspace(model.blocks[1].mlp, 3):
        raise KeyError
    assert [name for name, _ in model.named_parameters()] == names


def test_half_precision_stays_half(make_vit: Any) -> None:
    layer = nn.Linear(5, 3).to(torch.bfloat16)
    with random_subspace(layer, 2) as theta:
        assert theta.dtype == torch.float32
        assert layer(torch.ones(5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_cannot_be_projected_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.\.D=8, got 9"), random_subspace(nn.Linear(3, 2), 9):
        pass
    with pytest.raises(ValueError, match="got a ReLU without"), random_subspace(nn.ReLU(), 1):
        pass
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"tied, got 1\.weight"), random_subspace(tied, 1):
        pass
    layer = nn.Linear(3, 2)
    with (
        random_subspace(layer, 1),
        pytest.raises(ValueError, match="parametrised already"),
        random_subspace(layer, 1),
    ):
        pass
