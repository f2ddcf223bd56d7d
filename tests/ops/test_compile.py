"""torch.compile: one graph, our two operators in it, and no new graph for a new number of rows."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from efft_kernels import EFFT2, FusedEFFTLinear, attach, low_rank_linear
from efft_kernels.ops.backends import cpp_backend, torch_backend
from efft_kernels.testing.operands import Shape, leaves, operands

FWD = torch.ops.efft_kernels.low_rank_linear_fwd.default
BWD = torch.ops.efft_kernels.low_rank_linear_bwd.default
SHAPE = Shape(K=7, n=5, Ra=3, Rb=2)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Graphs:
    """A compiler backend that keeps what it is given and counts our operators in it."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []

        def keep(graphs):
            def compiler(graph, inputs):
                graphs.append(graph)
                return make_boxed_func(graph.forward)

            return compiler

        self.backend = aot_autograd(fw_compiler=keep(self.forward), bw_compiler=keep(self.backward))

    @staticmethod
    def count(graphs, operator) -> int:
        return sum(node.target is operator for graph in graphs for node in graph.graph.nodes)


@pytest.fixture
def backward_rows(monkeypatch, no_entry_point):
    """M of every backward that really ran, compiled or eager."""
    rows = []

    def recording(real):
        def backward(dy, *args, **kwargs):
            rows.append(dy.shape[0])
            return real(dy, *args, **kwargs)

        return backward

    for backend in (torch_backend, cpp_backend):
        monkeypatch.setattr(backend, "backward", recording(backend.backward))
    return rows


def leaves_of(m, lead=None):
    return leaves(operands(SHAPE, lead=lead or (m,), seed=m))


def gradients(function, tensors):
    loss = function(**tensors)
    return loss.detach(), torch.autograd.grad(loss, list(tensors.values()))


def assert_same_gradients(compiled, eager, tensors, **tolerance):
    loss, grads = gradients(compiled, tensors)
    loss_expected, expected = gradients(eager, tensors)
    torch.testing.assert_close(loss, loss_expected)
    for name, found, right in zip(tensors, grads, expected, strict=True):
        assert right.norm() > 0
        torch.testing.assert_close(found, right, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("strategy", ["auto", "split", "merged"])
def test_training_step_runs_our_operators(strategy, backward_rows):
    def loss(**tensors):
        return low_rank_linear(**tensors, strategy=strategy).tanh().sum()

    graphs = Graphs()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=graphs.backend)
    assert_same_gradients(compiled, loss, leaves_of(11))
    assert Graphs.count(graphs.forward, FWD) == 1
    assert Graphs.count(graphs.backward, BWD) == 1
    assert backward_rows == [11, 11]  # compiled, eager


@pytest.mark.parametrize("lead", [None, (2, 3)])
def test_one_compilation_for_every_number_of_rows(lead):
    def loss(**tensors):
        return low_rank_linear(**tensors).tanh().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for m in (11, 2, 5, 64, 4097):
        tensors = leaves_of(m, None if lead is None else (m, *lead))
        assert_same_gradients(compiled, loss, tensors)
    assert counter.frame_count == 1


def test_marked_dynamic_rows():
    """mark_dynamic raises if anything in the operator pins M to the first value it saw."""

    def loss(**tensors):
        return low_rank_linear(**tensors).tanh().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for m in (11, 7, 130):
        tensors = leaves_of(m)
        torch._dynamo.mark_dynamic(tensors["x"], 0)
        assert_same_gradients(compiled, loss, tensors)
    assert counter.frame_count == 1


def test_default_mode_compiles_twice_at_most():
    """Without dynamic=True the first new M makes rows symbolic; later ones are free."""

    def loss(**tensors):
        return low_rank_linear(**tensors).tanh().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for m in (11, 7, 5, 130, 64):
        assert_same_gradients(compiled, loss, leaves_of(m))
    assert counter.frame_count == 2


@pytest.mark.parametrize("m", [0, 1])
def test_compiled_with_no_row_or_one(m):
    def loss(**tensors):
        return low_rank_linear(**tensors).tanh().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = leaves_of(m)
    found, expected = gradients(compiled, tensors), gradients(loss, tensors)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_weight_asks_for_no_weight_gradient():
    """The compiled backward is given the same `needs` as the eager one."""
    tensors = leaves_of(11)
    for name in ("weight", "bias"):
        tensors[name].requires_grad_(False)
    graphs = Graphs()
    compiled = torch.compile(
        lambda **t: low_rank_linear(**t).sum(), fullgraph=True, backend=graphs.backend
    )
    compiled(**tensors).backward()
    (node,) = [n for g in graphs.backward for n in g.graph.nodes if n.target is BWD]
    assert list(node.args[7]) == [True, False, False, True, True, True]
    assert tensors["weight"].grad is None and tensors["down"].grad is not None


def test_autocast_inside_a_compiled_step():
    def loss(**tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = low_rank_linear(**{name: t.float() for name, t in tensors.items()})
        assert y.dtype == torch.bfloat16
        return y.float().tanh().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (11, 5):
        assert_same_gradients(compiled, loss, leaves_of(m), rtol=1e-5, atol=1e-5)


def test_compiled_inference():
    layer = FusedEFFTLinear(7, 15, rank=3, slices=3).eval()
    with torch.no_grad():
        for parameter in layer.factors.parameters():
            parameter.normal_()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
        for m in (11, 2, 64):
            x = torch.randn(m, 7)
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_checkpointed_and_compiled(backward_rows):
    def loss(**tensors):
        y = torch.utils.checkpoint.checkpoint(
            lambda x: low_rank_linear(**(tensors | {"x": x})).tanh(),
            tensors["x"],
            use_reentrant=False,
        )
        return y.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_gradients(compiled, loss, leaves_of(11))
    assert backward_rows == [11, 11]


def test_whole_vit_training_step(make_vit, randomize, backward_rows):
    """Forward, loss and backward of an adapted ViT in one graph for every batch size."""
    model = make_vit(dtype=torch.float64, depth=1)
    adapter = attach(model, EFFT2(rank=3, dropout=0.0))
    randomize(adapter)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(images, labels):
        return torch.nn.functional.cross_entropy(model(images), labels)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for batch in (2, 4, 7):
        images, labels = torch.randn(batch, 3, 8, 8).double(), torch.arange(batch) % 5
        found = torch.autograd.grad(compiled(images, labels), trained)
        # 4 layers of 5 tokens an image; the compiled step went through our backward in each
        assert backward_rows == [batch * 5] * 4
        backward_rows.clear()
        expected = torch.autograd.grad(loss(images, labels), trained)
        backward_rows.clear()
        for a, b in zip(found, expected, strict=True):
            assert b.norm() > 0
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


def test_factor_dropout_in_a_compiled_step(make_vit, randomize):
    """Masks are drawn anew in every step, and the same seed gives the same gradients."""
    model = make_vit(depth=1)
    adapter = attach(model, EFFT2(rank=3, dropout=0.5))
    randomize(adapter)
    model.train()
    images = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(
        lambda: model(images).tanh().sum(), fullgraph=True, backend="aot_eager"
    )
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(torch.autograd.grad(compiled(), list(adapter.parameters())))
    for first, again, other in zip(*results, strict=True):
        torch.testing.assert_close(first, again)
        assert not torch.allclose(first, other)


def test_inductor_runs_a_training_step():
    """The default compiler, with nothing but our operators in the graph, so no C++ is compiled."""
    compiled = torch.compile(low_rank_linear, fullgraph=True, dynamic=True)
    for m in (11, 64):
        tensors = leaves_of(m)
        dy = torch.randn(m, 15, dtype=torch.float64)
        results = [
            torch.autograd.grad(function(**tensors), list(tensors.values()), dy)
            for function in (compiled, low_rank_linear)
        ]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
