"""Rows picked by an operator of their own, in graphs of torch.compile on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from efft_kernels.methods.picked_rows import _is_transformed, picked_rows

INDICES = torch.tensor([4, 0, 4])
ROWS = torch.linspace(-1, 1, 5 * 3 * 2, dtype=torch.float64).sin().view(5, 3, 2)


@pytest.mark.parametrize("turned", [False, True])
def test_they_are_those_rows_and_so_are_their_derivatives(turned: bool) -> None:
    rows = (ROWS.mT if turned else ROWS).detach().requires_grad_()
    picked = torch.ops.efft_kernels.pick_rows
    assert torch.equal(picked(rows, INDICES), rows[INDICES])
    assert torch.equal(picked_rows(rows, INDICES), rows[INDICES])
    assert torch.autograd.gradcheck(lambda t: picked(t, INDICES), rows)
    assert torch.autograd.gradgradcheck(lambda t: picked(t, INDICES), rows)


@pytest.mark.parametrize("turned", [False, True])
def test_the_operators_keep_what_torch_expects(turned: bool) -> None:
    rows = (ROWS.mT if turned else ROWS).detach().requires_grad_()
    opcheck(torch.ops.efft_kernels.pick_rows.default, (rows, INDICES))
    grad = rows.detach()[:3].requires_grad_()
    opcheck(torch.ops.efft_kernels.add_to_rows.default, (grad, INDICES, 7))


def test_elsewhere_and_in_exported_programs_they_are_torch_s_own() -> None:
    meta = torch.empty(5, 3, device="meta")
    assert picked_rows(meta, INDICES.to("meta")).shape == (3, 3)

    class Pick(torch.nn.Module):
        def forward(self, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
            return picked_rows(rows, indices)

    code = torch.export.export(Pick(), (ROWS, INDICES)).graph_module.code
    assert "index_select" in code and "pick_rows" not in code
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    assert torch.equal(torch.compile(Pick(), backend=keep)(ROWS, INDICES), ROWS[INDICES])
    assert "pick_rows" in graphs[0]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transforms_in_a_graph(backend: str) -> None:
    weights = torch.arange(1.0, 19.0, dtype=torch.float64).view(3, 3, 2)

    def total(rows: torch.Tensor) -> torch.Tensor:
        return (picked_rows(rows, INDICES).sin() * weights).sum()

    def transforms(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tangent = torch.func.jvp(total, (rows,), (rows.cos(),))[1]
        each = torch.func.vmap(torch.func.grad(total))(torch.stack([rows, 2 * rows]))
        return tangent, torch.func.grad(total)(rows), each

    compiled = torch.compile(transforms, fullgraph=True, backend=backend)
    for found, right in zip(compiled(ROWS), transforms(ROWS), strict=True):
        assert right.abs().max() > 1
        torch.testing.assert_close(found, right)


def test_what_is_a_transform() -> None:
    assert not _is_transformed()
    with torch.autograd.forward_ad.dual_level():
        assert _is_transformed()
    seen = []
    torch.func.vmap(lambda t: seen.append(_is_transformed()) or t)(ROWS)
    assert seen == [True] and not _is_transformed()
