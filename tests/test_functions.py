"""`functions.apply`: what an autograd.Function is given, and when leaves get a view first."""

from __future__ import annotations

import threading

import pytest
import torch

from efft_kernels import functions


class Scaled(torch.autograd.Function):
    """(2·t, whether t is the very tensor that was passed)"""

    @staticmethod
    def forward(ctx, t, expected):
        return 2 * t, t is expected

    @staticmethod
    def backward(ctx, grad, _):
        return 2 * grad, None


@pytest.fixture
def viewed(monkeypatch):
    """The tensors of which a view was made."""
    seen = []
    real = torch.Tensor.view_as

    def view_as(self, other):
        seen.append(self)
        return real(self, other)

    monkeypatch.setattr(torch.Tensor, "view_as", view_as)
    return seen


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: request.param)
    return request.param


def test_leaves_get_a_view_where_there_are_threads(threads, viewed):
    leaf = torch.nn.Parameter(torch.ones(3))
    y, same = functions.apply(Scaled, leaf, leaf)
    assert same and all(t is leaf for t in viewed)
    assert len(viewed) == (2 if threads > 1 else 0)  # it is passed twice
    y.sum().backward()
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))


def test_nothing_else_does(threads, viewed):
    frozen, leaf = torch.ones(3), torch.ones(3, requires_grad=True)
    of_a_graph = 2 * leaf
    for t in (frozen, of_a_graph):
        functions.apply(Scaled, t, None)
    with torch.no_grad():
        functions.apply(Scaled, leaf, None)
    torch.func.vmap(lambda t: 2 * t)(leaf)
    assert viewed == []


def test_compiled(threads):
    leaf = torch.nn.Parameter(torch.ones(3))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(t):
        return functions.apply(Scaled, t, None)[0]

    run(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))
