"""The operator for a given P = x·down, alone and as three linears that share one x."""

from __future__ import annotations

import itertools
import threading
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from efft_kernels import available_backends, reference, use_backend
from efft_kernels.ops import recompute, shared_projection
from efft_kernels.ops.shared_projection import SharedInput, linear_plus_projected, project
from efft_kernels.testing.operands import Shape, cast, forms, leaves, operands

SHAPE = Shape(M=7, K=11, n=13, Ra=5, Rb=2)
M, K = SHAPE.M, SHAPE.K
FORMS = forms(SHAPE)


def composed(x, weight, bias, down, core, up):
    return linear_plus_projected(x, weight, bias, project(x, down), core, up)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lead", [(M,), (), (0,), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("form", FORMS)
def test_is_the_reference(form, lead):
    t = operands(FORMS[form], lead=lead)
    expected = reference.low_rank_linear(**t)
    plain = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    assert expected.numel() == 0 or (expected - plain).abs().max() > 0.1
    close(composed(**t), expected)


@pytest.mark.parametrize("form", FORMS)
def test_p_is_taken_as_given(form):
    """Linear in P by itself: P of another x gives that x's increment."""
    t = operands(FORMS[form])
    other = torch.randn(M, K, dtype=torch.float64)
    y = linear_plus_projected(
        t["x"], t["weight"], t["bias"], project(other, t["down"]), t["core"], t["up"]
    )
    increment = reference.low_rank_linear(**(t | {"x": other})) - torch.nn.functional.linear(
        other, t["weight"], t["bias"]
    )
    close(y, torch.nn.functional.linear(t["x"], t["weight"], t["bias"]) + increment)


def gradients(function, t, needed, dy=None):
    copies = leaves(t, needed)
    y = function(**copies)
    y.backward(torch.ones((), dtype=y.dtype).expand_as(y) if dy is None else dy)
    return {name: copies[name].grad for name in needed}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_references_whatever_is_asked_for(form):
    """Every subset of the tensors asked for; a dY of stride 0 as well."""
    t = operands(FORMS[form])
    names = [name for name, tensor in t.items() if tensor is not None]
    dy = torch.randn(reference.low_rank_linear(**t).shape, dtype=torch.float64)
    expected = gradients(reference.low_rank_linear, t, names, dy)
    for count in range(1, len(names) + 1):
        for needed in itertools.combinations(names, count):
            for name, grad in gradients(composed, t, needed, dy).items():
                assert expected[name].norm() > 1e-3
                close(grad, expected[name])
    flat = gradients(reference.low_rank_linear, t, names)
    for name, grad in gradients(composed, t, names).items():
        close(grad, flat[name])


def test_gradcheck():
    t = operands(SHAPE, lead=(2, 3))
    names = list(t)

    def function(*tensors):
        return composed(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in t.values()])


def three(x, down, linears, share):
    """Three linears' outputs, from one P or each from its own."""
    if share:
        p = project(x, down)
        return [linear_plus_projected(x, w, b, p, core, up) for w, b, core, up in linears]
    return [reference.low_rank_linear(x, w, b, down, core, up) for w, b, core, up in linears]


def test_three_linears_of_one_p_are_three_linears():
    t = operands(FORMS["one slice"], lead=(2, 5))
    linears = [[torch.randn_like(t[name]) for name in ("weight", "bias", "core")] for _ in range(3)]

    def run(share):
        shared = [t[name].clone().requires_grad_() for name in ("x", "down", "up")]
        cores = [core.clone().requires_grad_() for _, _, core in linears]
        up = shared[2]
        outputs = three(
            *shared[:2],
            [(w, b, core, up) for (w, b, _), core in zip(linears, cores, strict=True)],
            share,
        )
        q, k, v = outputs
        ((q * k).tanh().sum() + v.square().sum()).backward()
        return [o.detach() for o in outputs], [leaf.grad for leaf in (*shared, *cores)]

    for found, expected in zip(run(True), run(False), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert b.norm() > 1e-3
            close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_beside_float32_factors(dtype):
    t = operands(SHAPE, dtype, factor_dtype=torch.float32)
    y = composed(**t)
    exact = reference.low_rank_linear(**cast(t, torch.float64))
    naive = reference.low_rank_linear(**cast(t, dtype))
    assert y.dtype == dtype
    budget = 2 * (naive.double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= budget
    grads = gradients(composed, t, list(t))
    assert all(grad.dtype == t[name].dtype for name, grad in grads.items())


def test_float32_is_not_rounded_to_less():
    t = operands(SHAPE, torch.float32)
    dy = torch.randn(M, SHAPE.N)
    expected = gradients(reference.low_rank_linear, cast(t, torch.float64), list(t), dy.double())
    close_to = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(composed(**t), reference.low_rank_linear(**t), **close_to)
    for name, grad in gradients(composed, t, list(t), dy).items():
        torch.testing.assert_close(grad.double(), expected[name], **close_to)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x_dtype):
    t = operands(SHAPE, torch.float32)
    t["x"] = t["x"].to(x_dtype)
    copies = leaves(t)
    with torch.autocast("cpu", torch.bfloat16):
        x, weight, bias, down, core, up = copies.values()
        p = project(x, down)
        y = linear_plus_projected(x, weight, bias, p, core, up)
    assert p.dtype == y.dtype == torch.bfloat16
    exact = reference.low_rank_linear(**cast(t, torch.float64))
    assert (y.double() - exact).abs().max() < 0.03 * exact.abs().max()
    y.float().square().sum().backward()
    for name, leaf in copies.items():
        assert leaf.grad.dtype == t[name].dtype and leaf.grad.norm() > 0


def test_autocast_leaves_float64_alone():
    t = operands(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        y = composed(**t)
    assert y.dtype == torch.float64
    close(y, reference.low_rank_linear(**t))


@pytest.mark.parametrize("autocast", [False, True])
def test_whole_numbers_are_refused(autocast):
    """Rather than computed with a weight cut to whole numbers."""
    t = operands(SHAPE, torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=r"x must be float64, .* got torch\.int64"),
    ):
        project(t["x"].long(), t["down"])


def test_non_contiguous_operands():
    t = operands(SHAPE, lead=(3, 4))
    turned = {
        "x": t["x"].transpose(0, 1),
        "weight": t["weight"].T.contiguous().T,
        "down": t["down"].T.contiguous().T,
    }
    dy = torch.randn(4, 3, SHAPE.N, dtype=torch.float64).transpose(0, 1).contiguous()
    dy = dy.transpose(0, 1)
    expected = gradients(reference.low_rank_linear, t | turned, list(t), dy)
    for name, grad in gradients(composed, t | turned, list(t), dy).items():
        close(grad, expected[name])


def test_a_nan_in_x_stays_in_its_row():
    t = operands(SHAPE)
    t["x"][2, 3] = float("nan")
    bad = composed(**t).isnan()
    assert bad[2].all() and not bad[[0, 1, 3, 4, 5, 6]].any()


class Kept(TorchDispatchMode):
    """Every operator's first result, and a copy."""

    def __enter__(self):
        super().__enter__()
        self.results = []
        return self.results

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.results.append((result, result.clone()))
        return result


def test_y_is_written_in_place_where_nothing_keeps_it():
    """As selective activation checkpointing does."""
    t = leaves(operands(SHAPE))
    with torch.autograd.profiler.profile() as profile:
        composed(**t)
    assert "aten::addmm_" in {event.name for event in profile.function_events}
    with Kept() as results:
        composed(**t)
    for result, copy in results:
        assert torch.equal(result, copy)


def test_second_derivatives():
    t = operands(SHAPE, lead=(2,))
    names = list(t)

    def function(*tensors):
        return composed(**dict(zip(names, tensors, strict=True)))

    inputs = [x.requires_grad_() for x in t.values()]
    assert torch.autograd.gradgradcheck(function, inputs)
    (grad,) = torch.autograd.grad(function(*inputs).square().sum(), t["up"], create_graph=True)
    assert torch.autograd.grad(grad.sum(), t["x"])[0].norm() > 1e-3


X = torch.zeros(2, 3)


def serves(shared, x=X, backend="auto", strategy="auto"):
    return shared.serves(x, backend, strategy)


class TestSharedInput:
    @pytest.fixture
    def shared(self):
        shared = SharedInput()
        assert not serves(shared, backend="torch")
        shared.open(None, ())
        return shared

    def test_serves_plain_torch_while_it_is_open(self, shared, monkeypatch):
        assert serves(shared, backend="torch") is True
        assert serves(shared) is (available_backends()["cpp"] is not None)
        monkeypatch.setattr(shared_projection, "why_not", lambda name: f"{name} is not built")
        assert serves(shared) is True
        elsewhere = torch.empty(2, 3, device="meta")
        assert serves(shared, elsewhere, "torch") is True
        for refused in (
            serves(shared, elsewhere),
            serves(shared, backend="cpp"),
            serves(shared, strategy="split"),
            torch.func.vmap(lambda x: x + serves(shared, x, "torch"))(torch.zeros(2, 3))
            .any()
            .item(),
        ):
            assert refused is False
        with use_backend("reference"):
            assert not serves(shared)
        with use_backend("torch"):
            assert serves(shared)
        seen = []
        torch.jit.trace(
            lambda x: seen.append(serves(shared, x, "torch")) or x, X, check_trace=False
        )
        assert seen == [False]
        shared.close(None, (), None)
        assert serves(shared, backend="torch") is False

    def test_p_is_made_once_for_one_x(self, shared):
        x, down = operands(SHAPE)["x"], operands(SHAPE)["down"]
        p = shared.projection(x, down)
        assert shared.projection(x, down) is p
        close(shared.projection(x + 1, down), (x + 1) @ down)
        again = shared.projection(x, down)
        assert again is not p
        x.mul_(2)
        close(shared.projection(x, down), 2 * p)
        narrow = x.float()
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                assert shared.projection(narrow, down).dtype == dtype
        with torch.inference_mode():
            shared.open(None, ())
            assert serves(shared, x, "torch")
            assert not serves(shared, x.clone(), "torch")  # which nobody counts
            p = shared.projection(x, down)
            assert shared.projection(x, down) is p
            x.mul_(2)
            close(shared.projection(x, down), 2 * p)

    def test_the_first_down_is_that_of_all(self, shared):
        x, first = operands(SHAPE)["x"], operands(SHAPE)["down"]
        second = first.clone()
        group = torch.nn.Linear(2, 2)

        def of(x, down, training=True):
            return shared.down_for(x, down, training, group)

        assert of(x, first) is first and of(x, second) is first
        assert of(x, second, training=False) is second  # nothing of it is dropped
        assert of(x, first) is first and of(x + 1, second) is second
        assert of(x, first) is first
        x.mul_(2)
        assert of(x, second) is second and of(x, first) is second
        with torch.no_grad():
            group.bias.mul_(2)  # of which down is made
        assert of(x, first) is first and of(x, second) is first
        with torch.inference_mode():
            shared.open(None, ())
            clone = x.clone()  # what is written to it in place is not counted
            assert of(x, first) is first and of(x, second) is first
            assert of(clone, second) is second
            group = torch.nn.Linear(2, 2)  # as little as to those
            assert of(x, first) is first and of(x, second) is second
        shared.close(None, (), None)
        assert of(x, second) is second and not shared.active

    def test_p_is_of_one_down(self, shared):
        x, down = operands(SHAPE)["x"], operands(SHAPE)["down"]
        p = shared.projection(x, down)
        for factor in (2, 3):  # the one before is held, or another might come to lie where it lay
            close(shared.projection(x, factor * down), factor * p)

    def test_p_is_of_down_as_it_is(self, shared):
        """A hook may write to it between two linears."""
        x, down = operands(SHAPE)["x"], operands(SHAPE)["down"]
        p = shared.projection(x, down)
        down.mul_(2)
        close(shared.projection(x, down), 2 * p)
        with torch.inference_mode():
            shared.open(None, ())
            uncounted = down.clone()
            close(shared.projection(x, uncounted), 2 * p)
            uncounted.mul_(2)
            close(shared.projection(x, uncounted), 4 * p)

    def test_another_thread_opens_for_itself(self, shared, monkeypatch):
        """Even between one thread's look at what is shared and what it leaves there."""
        x, down = operands(SHAPE)["x"], operands(SHAPE)["down"]
        found = []

        def other():
            shared.open(None, ())
            opened.set()
            written.wait(60)
            found.append(shared.projection(x, down))
            shared.close(None, (), None)

        opened, written = threading.Event(), threading.Event()
        thread = threading.Thread(target=other)
        real = shared_projection.project

        def interrupted(*given):
            monkeypatch.setattr(shared_projection, "project", real)
            thread.start()
            assert opened.wait(60)
            return real(*given)

        monkeypatch.setattr(shared_projection, "project", interrupted)
        p = shared.projection(x, down)
        assert shared.projection(x, down) is not p  # it is the other's now
        written.set()
        thread.join(60)
        assert len(found) == 1 and found[0] is not p
        close(found[0], p)

    def test_nothing_is_shared_forward_and_in_an_export(self, shared, monkeypatch):
        """A projection has no forward derivative; an export does not count writes in place."""
        assert serves(shared, backend="torch")
        with forward_ad.dual_level():
            assert not serves(shared, backend="torch")
        assert serves(shared, backend="torch")
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not serves(shared, backend="torch")

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_part_that_is_run_again_shares_nothing(self, shared, use_reentrant):
        """Within the attention module: what is open in its forward is not in the second run."""
        x, down = operands(SHAPE)["x"].requires_grad_(), operands(SHAPE)["down"]
        seen = []

        def part(x):
            own = shared.down_for(x, down, True, group)
            seen.append((own is down, serves(shared, x, "torch")))
            return x.sin()

        group = torch.nn.Linear(2, 2)
        shared.down_for(x, down.clone(), True, group)
        y = checkpoint(part, x, use_reentrant=use_reentrant)
        assert serves(shared, x, "torch")
        shared.close(None, (), None)
        y.sum().backward()
        assert seen == [(True, False)] * 2

    @pytest.mark.parametrize("end", ["open", "close"])
    def test_p_is_let_go(self, shared, end):
        x, down = operands(SHAPE)["x"], operands(SHAPE)["down"]
        p = weakref.ref(shared.projection(x, down))
        assert p() is not None
        shared.open(None, ()) if end == "open" else shared.close(None, (), None)
        assert p() is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wanted", [("h",), ("down",), ("h", "down")], ids=str)
def test_p_of_an_x_that_is_made_again(wanted, autocast):
    """In float32, as autocast would show: P and its gradients are those of an x that is kept."""
    values = {"h": torch.randn(2, 3, 4, K), "down": torch.randn(K, 5)}
    results, kept = [], []

    def pack(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    for remakes in (True, False):
        kept.clear()
        t = {name: v.clone().requires_grad_(name in wanted) for name, v in values.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            x = torch.nn.functional.silu(t["h"] * 1)
            source = recompute.find(x) if remakes else None
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                p = project(x, t["down"], source)
        assert (source is not None) == (remakes and "h" in wanted)
        assert p.shape == (2, 3, 4, 5) and p.dtype == (torch.bfloat16 if autocast else x.dtype)
        assert source is None or x.data_ptr() not in kept
        p.sin().sum().backward()
        results.append([p.detach(), *(t[name].grad for name in wanted)])
    tolerance = 1e-2 if autocast else 1e-6
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
