"""Dropout on the rank-r activation: the masks' statistics, what is kept of them, and the gradients
they give."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from efft_kernels import available_backends, low_rank_linear
from efft_kernels.ops import dispatch, dropout, dropout_mask, recompute, reference
from efft_kernels.ops.backends import cpp_backend
from efft_kernels.ops.backends.triton import keep
from efft_kernels.ops.dropout import low_rank_linear_with_dropout
from efft_kernels.ops.dropout_mask import keep_mask, new_seed
from efft_kernels.testing.operands import NAMES, Shape, cast, forms, leaves, operands

SHAPE = Shape(M=7, K=11, n=13, Ra=5, Rb=2)
M, K, G, RA, RB, WIDTH = SHAPE.M, SHAPE.K, SHAPE.G, SHAPE.Ra, SHAPE.Rb, SHAPE.n
FORMS = {name: shape for name, shape in forms(SHAPE).items() if name != "one slice"}


def with_mask(x, weight, bias, down, core, up, mask):
    """The formula, slice by slice, for a given mask [M, G, Rb] of 0 and 1/(1 - p)."""
    slices = up.shape[0] if core is None else core.shape[0]
    parts = []
    for g in range(slices):
        t = x @ down if core is None else x @ down @ core[g]
        parts.append((t * mask[:, g if mask.shape[1] > 1 else 0]) @ up[g % up.shape[0]].T)
    return F.linear(x, weight, bias) + torch.cat(parts, dim=-1)


def drawn_mask(form, p):
    """The mask [M, G, Rb] of the next call for an activation of this form, scaled."""
    shape = (1, RA) if "no core" in form else (G, RB)
    seed = new_seed(torch.device("cpu"))
    return keep_mask(seed, M, shape[0] * shape[1], p, torch.float64).unflatten(1, shape) / (1 - p)


@pytest.mark.parametrize("form", FORMS)
def test_no_dropout_is_the_operator(form):
    t = operands(FORMS[form])
    torch.testing.assert_close(
        low_rank_linear_with_dropout(**t, p=0.0), low_rank_linear(**t), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_for_a_known_mask(form):
    found, right = (leaves(operands(FORMS[form])) for _ in range(2))
    torch.manual_seed(3)
    y = low_rank_linear_with_dropout(**found, p=0.4)
    torch.manual_seed(3)
    mask = drawn_mask(form, 0.4)
    assert 0 < (mask == 0).sum() < mask.numel()
    expected = with_mask(**right, mask=mask)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for name, tensor in right.items():
        if tensor is not None:
            assert tensor.grad.norm() > 1e-3
            torch.testing.assert_close(found[name].grad, tensor.grad, rtol=1e-11, atol=1e-11)


def test_an_entry_is_dropped_with_probability_p_by_slice_and_row():
    """y shows the masked activation itself where W and bias are zero and up is the identity."""
    p, rows = 0.3, 4000
    t = operands(SHAPE, lead=(rows,)) | {
        "weight": torch.zeros(G * RB, K, dtype=torch.float64),
        "bias": None,
        "up": torch.eye(RB, dtype=torch.float64)[None],
    }
    y = low_rank_linear_with_dropout(**t, p=p).unflatten(-1, (G, RB))
    activation = torch.einsum("mk,ka,gab->mgb", t["x"], t["down"], t["core"])
    kept = y != 0
    torch.testing.assert_close(y[kept], activation[kept] / (1 - p), rtol=1e-11, atol=1e-11)
    rate = kept.double().mean(0)  # [G, RB]; sigma of each is 0.0072
    assert ((rate - (1 - p)).abs() < 0.036).all()
    flat = kept.flatten(1).double()
    correlation = torch.corrcoef(flat.T) - torch.eye(G * RB, dtype=torch.float64)
    assert correlation.abs().max() < 0.1


def test_without_a_core_the_slices_share_the_mask():
    t = operands(FORMS["no core"], lead=(500,)) | {
        "weight": torch.zeros(G * RA, K, dtype=torch.float64),
        "bias": None,
        "up": torch.eye(RA, dtype=torch.float64).expand(G, -1, -1),
    }
    kept = low_rank_linear_with_dropout(**t, p=0.5).unflatten(-1, (G, RA)) != 0
    assert torch.equal(kept[:, 0], kept[:, 1]) and torch.equal(kept[:, 0], kept[:, 2])
    assert kept.double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_unbiased(form):
    t = operands(FORMS[form], lead=(1,))
    expected = low_rank_linear(**t)[0]
    t["x"] = t["x"].expand(30_000, -1)
    y = low_rank_linear_with_dropout(**t, p=0.6)
    sigma = y.std(0) / len(y) ** 0.5
    assert sigma.min() > 0
    assert ((y.mean(0) - expected).abs() < 5 * sigma).all()


@pytest.mark.parametrize("form", FORMS)
def test_seed_repeats_the_masks(form):
    t = operands(FORMS[form])
    torch.manual_seed(1)
    first, second = (low_rank_linear_with_dropout(**t, p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(low_rank_linear_with_dropout(**t, p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_replays_the_masks(form, use_reentrant):
    t = leaves(operands(FORMS[form]))
    present = [tensor for tensor in t.values() if tensor is not None]

    def gradients(run):
        torch.manual_seed(9)
        y = run(lambda x: low_rank_linear_with_dropout(**(t | {"x": x}), p=0.5).tanh(), t["x"])
        torch.randn(5)
        y.sum().backward()
        grads = [leaf.grad for leaf in present]
        for leaf in present:
            leaf.grad = None
        return grads

    expected = gradients(lambda f, x: f(x))
    found = gradients(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 1e-3 and torch.equal(a, b)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3, 4)])
def test_leading_dimensions(lead):
    t = operands(SHAPE, lead=lead)
    y = low_rank_linear_with_dropout(**t, p=0.0)
    assert y.shape == (*lead, G * WIDTH)
    torch.testing.assert_close(y, low_rank_linear(**t), rtol=1e-12, atol=1e-12)


def test_non_contiguous_x():
    t = operands(FORMS["own up"], lead=(3, 4))
    x = t["x"].transpose(0, 1)
    torch.manual_seed(2)
    found = low_rank_linear_with_dropout(**(t | {"x": x}), p=0.5)
    torch.manual_seed(2)
    expected = low_rank_linear_with_dropout(**(t | {"x": x.contiguous()}), p=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    """y in the ambient dtype, gradients in each tensor's own."""
    t = leaves(operands(FORMS[form], torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank_linear_with_dropout(**t, p=0.0)
        expected = low_rank_linear(**t)
    assert y.dtype == torch.bfloat16
    scale = expected.float().abs().max()
    assert (y.float() - expected.float()).abs().max() < 0.02 * scale
    y.float().sum().backward()
    for tensor in t.values():
        assert tensor is None or tensor.grad.dtype == torch.float32


def test_half_precision_with_float32_factors():
    halves = operands(SHAPE, torch.bfloat16, factor_dtype=torch.float32)
    y = low_rank_linear_with_dropout(**halves, p=0.0)
    exact = low_rank_linear(**cast(halves, torch.float64))
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("x", (M, K + 1), r"x must be \[..., K=11\]"),
        ("down", (K + 1, RA), r"down must be \[K=11"),
        ("core", (G, RA + 1, RB), r"core must be \[G, Ra=5, Rb\]"),
        ("up", (2, WIDTH, RB), r"up must be \[1 or 3, N/G=13, Rb=2\]"),
    ],
)
def test_shapes_are_checked(name, shape, text):
    t = operands(SHAPE) | {name: torch.randn(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=text):
        low_rank_linear_with_dropout(**t, p=0.5)


@pytest.mark.parametrize("form", FORMS)
def test_the_specification_takes_the_mask(form):
    t, mask = operands(FORMS[form]), drawn_mask(form, 0.4)
    keep = (mask[:, 0] if "no core" in form else mask).bool().double()
    found = reference.low_rank_linear(**t, keep=keep, dropout=0.4)
    torch.testing.assert_close(found, with_mask(**t, mask=mask), rtol=1e-12, atol=1e-12)
    all_kept = reference.low_rank_linear(**t, keep=torch.ones_like(keep))
    torch.testing.assert_close(all_kept, reference.low_rank_linear(**t), rtol=1e-12, atol=1e-12)


class TestMask:
    """Counted, so that every bound is a multiple of the deviation of independent entries."""

    @staticmethod
    def kept(seed, rows, columns, p):
        keep = keep_mask(torch.tensor(seed), rows, columns, p, torch.float64)
        assert keep.unique().tolist() == [0, 1]
        return keep.bool()

    @classmethod
    def by_hand(cls, seed, row, column, p):
        """The rule of the module's docstring, in whole numbers of any size."""
        return cls.number(seed, row, column) >= round(p * 2**31)

    @staticmethod
    def number(seed, row, column):
        ones = (1 << 31) - 1

        def mix(z):
            z ^= z >> 16
            z = z * 0x21F0AAAD & ones
            z ^= z >> 15
            z = z * 0x735A2D97 & ones
            return z ^ z >> 15

        def word(i):
            return mix((i ^ (seed & ones) * 0x1E3779B9) & ones)

        return mix(word(row) ^ word(-1 - column) ^ seed >> 31)

    @pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 0x2545F4914F6CDD1D, 2**62 - 1])
    def test_is_the_rule(self, seed):
        kept = self.kept(seed, 13, 7, 0.4)
        expected = [[self.by_hand(seed, i, j, 0.4) for j in range(7)] for i in range(13)]
        assert kept.tolist() == expected

    def test_a_product_in_a_graph_has_64_bits(self, monkeypatch):
        """One that overflows 32 is undefined in Inductor's C++; without a compiler it is not."""
        mix, widths = dropout_mask._mix_, []
        monkeypatch.setattr(dropout_mask, "_mix_", lambda z: widths.append(z.dtype) or mix(z))
        eager = self.kept(3, 31, 7, 0.4)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(self.kept(3, 31, 7, 0.4), eager)
        assert widths == [torch.int32] * 2 + [torch.int64] * 2

    def test_the_last_number_that_is_dropped(self):
        number = self.number(5, 2, 1)
        for dropped in (0, 1):
            keep = keep_mask(torch.tensor(5), 3, 2, (number + dropped) / 2**31, torch.float64)
            assert keep[2, 1] == 1 - dropped

    def test_far_rows(self):
        """Where the 31 bits of products have long overflowed."""
        kept = self.kept(77, 100_000, 2, 0.5)[-5:]
        assert kept.tolist() == [
            [self.by_hand(77, i, j, 0.5) for j in range(2)] for i in range(99_995, 100_000)
        ]

    def test_an_entry_depends_on_its_place_alone(self):
        large = self.kept(5, 300, 40, 0.3)
        assert torch.equal(self.kept(5, 200, 11, 0.3), large[:200, :11])

    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize("kind", ["drawn", "counted", "counted above"])
    def test_entries_are_independent(self, kind, rate):
        """Of their neighbours in row, column and seed, along the diagonal, and in fours at the
        corners of a rectangle, which share both their words; and kept with probability 1 - p in
        every row, column and seed."""
        seeds = {
            "drawn": [int(new_seed(torch.device("cpu"))) for _ in range(24)],
            "counted": list(range(24)),
            "counted above": [i << 31 for i in range(24)],
        }[kind]
        d = torch.stack([self.kept(seed, 401, 48, rate).double() for seed in seeds]) - (1 - rate)
        variance = rate * (1 - rate)

        def deviations(product, power):
            return abs(product.sum().item()) / (product.numel() * variance**power) ** 0.5

        four = d[:, 1:, 1:] * d[:, :-1, 1:] * d[:, 1:, :-1] * d[:, :-1, :-1]
        assert deviations(d, 1) < 4
        for lag in (1, 2, 16):
            assert deviations(d[:, lag:] * d[:, :-lag], 2) < 4
            assert deviations(d[:, :, lag:] * d[:, :, :-lag], 2) < 4
            assert deviations(d[lag:] * d[:-lag], 2) < 4
        assert deviations(d[:, 1:, 1:] * d[:, :-1, :-1], 2) < 4
        assert deviations(four, 4) < 4
        for others in ((0, 1), (0, 2), (1, 2)):
            z = d.mean(others) * (d.numel() / d.mean(others).numel() / variance) ** 0.5
            assert z.abs().max() < 4.5
            assert abs(z.square().mean().item() - 1) < 4 * (2 / z.numel()) ** 0.5

    def test_rates_at_the_ends(self):
        for p in (0.0, 1e-12):
            assert keep_mask(torch.tensor(3), 50, 7, p, torch.float64).all()
        assert not keep_mask(torch.tensor(3), 50, 7, 1 - 2.0**-40, torch.float64).any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_in_every_dtype(self, dtype):
        keep = keep_mask(torch.tensor(9), 31, 6, 0.3, dtype)
        assert keep.dtype == dtype
        assert torch.equal(keep.double(), keep_mask(torch.tensor(9), 31, 6, 0.3, torch.float64))

    def test_seeds_are_of_torchs_generator(self):
        torch.manual_seed(4)
        first, second = (new_seed(torch.device("cpu")) for _ in range(2))
        torch.manual_seed(4)
        assert torch.equal(new_seed(torch.device("cpu")), first) and not torch.equal(first, second)

    def test_a_seed_has_62_bits(self):
        ones = 0
        for _ in range(64):
            seed = int(new_seed(torch.device("cpu")))
            assert 0 <= seed < 2**62
            ones |= seed
        assert ones == 2**62 - 1


def test_the_mask_is_one_launch_on_a_gpu(monkeypatch):
    """Not in a graph, under a mode, for a subclass, or where Triton cannot run."""
    made = []
    monkeypatch.setattr(dropout, "keep_mask", lambda *given: made.append("torch"))
    monkeypatch.setattr(keep, "launch_keep", lambda *given: made.append("launch") or given)
    monkeypatch.setattr(dropout, "Tensor", SimpleNamespace)
    available = {"triton": None}
    monkeypatch.setattr(dispatch, "available_backends", lambda: available)
    monkeypatch.setattr(dispatch, "launch_context", lambda device: contextlib.nullcontext())
    seed = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert dropout._keep(seed, 5, 3, 0.3, torch.float16) == (seed, 5, 3, 0.3, torch.float16)
    assert made.pop() == "launch"

    class Own(SimpleNamespace):
        pass

    def by_torch(seed):
        dropout._keep(seed, 5, 3, 0.3, torch.float16)
        return made.pop() == "torch"

    assert by_torch(Own(**vars(seed))) and by_torch(SimpleNamespace(is_cuda=False))
    with FlopCounterMode(display=False):
        assert by_torch(seed)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert by_torch(seed)
    available["triton"] = "no Triton"
    assert by_torch(seed)


def test_a_graph_adds_the_same_but_not_in_place(monkeypatch):
    """In place it would lose y's gradient."""
    up = operands(FORMS["own up"])["up"]
    y, d = (torch.randn(M, G * n, dtype=torch.float64) for n in (WIDTH, RB))
    expected, before = dropout._add_low_rank(y.clone(), d, up), y.clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = dropout._add_low_rank(y, d, up)
    assert torch.equal(y, before) and not torch.equal(found, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def seeded(function, t, p=0.5, seed=9, **options):
    """function(**t), always with the same mask."""
    torch.manual_seed(seed)
    return function(**t, p=p, **options)


def by_specification(x, weight, bias, down, core, up, p):
    """The specification with the mask that the operator draws next."""
    rows = x[..., 0].numel()
    shape = torch.Size((RA,) if core is None else (core.shape[0], RB))
    keep = keep_mask(new_seed(x.device), rows, shape.numel(), p, x.dtype)
    keep = keep.reshape(*x.shape[:-1], *shape)
    return reference.low_rank_linear(x, weight, bias, down, core, up, keep, p)


def gradients(y, t, retain_graph=False):
    """Of the leaves among t that y depends on, by name."""
    names = [name for name, leaf in t.items() if leaf is not None and leaf.requires_grad]
    dy = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).reshape(y.shape)
    found = torch.autograd.grad(y, [t[name] for name in names], dy, retain_graph=retain_graph)
    return dict(zip(names, found, strict=True))


def assert_close(found, expected, tolerance=1e-11):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=tolerance, atol=tolerance)


def needs_backend(name):
    reason = available_backends().get(name)
    if reason is not None:
        pytest.skip(reason)


def saved_in(function):
    """(function's result, the tensors that autograd saved in it)."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(), saved


class TestKept:
    @pytest.mark.parametrize("backend", ["torch", "cpp"])
    @pytest.mark.parametrize("form", FORMS)
    def test_only_p_and_the_seed_beside_the_operands(self, form, backend):
        needs_backend(backend)
        t = leaves(operands(FORMS[form]))
        _, saved = saved_in(lambda: low_rank_linear_with_dropout(**t, p=0.5, backend=backend))
        operand = {tensor.data_ptr() for tensor in t.values() if tensor is not None}
        rest = [tensor for tensor in saved if tensor.data_ptr() not in operand]
        assert [tuple(tensor.shape) for tensor in rest] == [(M, RA), ()]
        torch.testing.assert_close(rest[0], t["x"] @ t["down"])

    def test_no_x_where_neither_down_nor_weight_learns(self):
        t = leaves(operands(SHAPE), ("x",))
        _, saved = saved_in(lambda: low_rank_linear_with_dropout(**t, p=0.5))
        assert t["x"].data_ptr() not in [tensor.data_ptr() for tensor in saved]
        assert all(tensor.shape[:1] != (M,) for tensor in saved)

    def test_nothing_without_gradients(self):
        t = leaves(operands(SHAPE))
        with torch.no_grad():
            y, saved = saved_in(lambda: low_rank_linear_with_dropout(**t, p=0.5))
        assert not saved and not y.requires_grad
        assert not low_rank_linear_with_dropout(**operands(SHAPE), p=0.5).requires_grad

    @pytest.mark.parametrize("backend", ["torch", "cpp"])
    @pytest.mark.parametrize("learns", ["down", "weight", "up"])
    def test_an_x_that_is_made_again(self, learns, backend):
        """In its place what it is made from, and neither where no gradient needs x."""
        needs_backend(backend)
        values, results = operands(SHAPE), []
        for remakes in (True, False):
            t = leaves(values, (learns,))
            h = torch.ones(M, K, dtype=torch.float64, requires_grad=True) * values["x"]
            t["x"] = F.silu(h)
            source = recompute.find(t["x"]) if remakes else None
            assert (source is not None) == remakes
            y, saved = saved_in(
                lambda t=t, source=source: seeded(
                    low_rank_linear_with_dropout, t, backend=backend, source=source
                )
            )
            kept = {tensor.data_ptr() for tensor in saved}
            needed = learns != "up"
            assert (t["x"].data_ptr() in kept) == (needed and not remakes)
            assert (h.data_ptr() in kept) == (needed and remakes)
            results.append(torch.autograd.grad(y.sin().sum(), [t[learns], h]))
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("learns", [False, True])
    def test_a_frozen_weight_is_cast_once_on_a_gpu(self, device, learns, monkeypatch):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with FakeTensorMode():
            t = {name: v.to(device) for name, v in operands(SHAPE, torch.float32).items()}
            t = leaves(t, [name for name in NAMES if learns or name != "weight"])
            try:
                torch.set_autocast_enabled(device, True)
                torch.set_autocast_dtype(device, torch.bfloat16)
                call = functools.partial(low_rank_linear_with_dropout, **t, p=0.5, backend="torch")
                _, saved = saved_in(call)
            finally:
                torch.set_autocast_enabled(device, before[0])
                torch.set_autocast_dtype(device, before[1])
        (found,) = (tensor.dtype for tensor in saved if tensor.shape == t["weight"].shape)
        assert found == (torch.bfloat16 if device == "cuda" and not learns else torch.float32)


class TestGradients:
    @pytest.mark.parametrize("form", FORMS)
    def test_the_specification(self, form):
        self.check(form, by_specification)

    @pytest.mark.parametrize("form", FORMS)
    def test_the_operator(self, form):
        self.check(form, low_rank_linear_with_dropout, torch.autograd.gradgradcheck)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_compiled_backend(self, form):
        needs_backend("cpp")
        function = functools.partial(low_rank_linear_with_dropout, backend="cpp")
        self.check(form, function, torch.autograd.gradgradcheck)

    @staticmethod
    def check(form, function, *further):
        t = leaves(operands(replace(FORMS[form], M=2, K=3, n=2)))
        names = [name for name in t if t[name] is not None]

        def call(*given):
            return seeded(function, t | dict(zip(names, given, strict=True)))

        inputs = [t[name] for name in names]
        for gradients_are_right in (torch.autograd.gradcheck, *further):
            assert gradients_are_right(call, inputs)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("name", NAMES)
    def test_of_one_operand(self, form, name):
        t = operands(FORMS[form])
        if t[name] is None:
            return
        every = leaves(t)
        expected = gradients(seeded(by_specification, every), every)[name]
        alone = t | {name: t[name].clone().requires_grad_()}
        assert_close(
            gradients(seeded(low_rank_linear_with_dropout, alone), alone), {name: expected}
        )

    def test_second_derivative_without_x_is_refused(self):
        t = leaves(operands(SHAPE), ("x", "core", "up"))
        y = low_rank_linear_with_dropout(**t, p=0.5)
        with pytest.raises(RuntimeError, match=r"second derivative needs x.*down\.requires_grad_"):
            torch.autograd.grad(y.sum(), t["up"], create_graph=True)

    def test_backward_twice_and_accumulation(self):
        t = leaves(operands(SHAPE))
        y = low_rank_linear_with_dropout(**t, p=0.5)
        y.sum().backward(retain_graph=True)
        once = {name: leaf.grad.clone() for name, leaf in t.items()}
        y.sum().backward()
        assert_close({name: leaf.grad / 2 for name, leaf in t.items()}, once)

    def test_one_set_of_factors_in_two_calls(self):
        t = leaves(operands(replace(SHAPE, K=SHAPE.N)))
        results = []
        for function in (low_rank_linear_with_dropout, by_specification):
            torch.manual_seed(6)
            y = function(**t, p=0.5)
            results.append(gradients(function(**(t | {"x": y}), p=0.5), t))
        assert_close(*results)

    @pytest.mark.parametrize("backend", ["torch", "cpp"])
    def test_many_at_once(self, backend):
        needs_backend(backend)
        t = leaves(operands(SHAPE))
        y = low_rank_linear_with_dropout(**t, p=0.5, backend=backend)
        many = torch.randn(3, *y.shape, dtype=y.dtype)
        present = list(t.values())
        found = torch.autograd.grad(y, present, many, is_grads_batched=True, retain_graph=True)
        for i, dy in enumerate(many):
            for a, b in zip(
                found, torch.autograd.grad(y, present, dy, retain_graph=True), strict=True
            ):
                torch.testing.assert_close(a[i], b, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3)])
    def test_leading_dimensions(self, form, lead):
        t = leaves(operands(FORMS[form], lead=lead))
        y, right = (seeded(f, t) for f in (low_rank_linear_with_dropout, by_specification))
        torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
        assert_close(gradients(y, t), gradients(right, t))

    @pytest.mark.parametrize("lack", [{"n": 0}, {"K": 0}])
    @pytest.mark.parametrize("form", FORMS)
    def test_nothing_to_multiply(self, form, lack):
        t = leaves(operands(replace(FORMS[form], bias=False), lead=(M,)))
        sizes = replace(FORMS[form], bias=False, **lack).sizes()
        t = {k: None if v is None else v.new_zeros(sizes[k]).requires_grad_() for k, v in t.items()}
        y = low_rank_linear_with_dropout(**t, p=0.5)
        assert y.shape == sizes["dy"] and not y.any()
        assert all(not grad.any() for grad in gradients(y, t).values())


class TestDtypes:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("how", ["autocast", "half", "half, float32 factors"])
    def test_is_the_specification_in_half_precision(self, form, dtype, how):
        """y in the half dtype and gradients in each tensor's own, no further from float64 than
        twice what the specification is in the half dtype itself."""
        own, factors = {
            "autocast": (torch.float32, None),
            "half": (dtype, None),
            "half, float32 factors": (dtype, torch.float32),
        }[how]
        t = leaves(operands(replace(FORMS[form], M=67), own, factor_dtype=factors))
        halves, exact = (leaves(cast(t, kind)) for kind in (dtype, torch.float64))
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            y = seeded(low_rank_linear_with_dropout, t)
        assert y.dtype == dtype
        found, plain, right = {"y": y}, {}, {}
        found |= gradients(y, t)
        for results, given in ((plain, halves), (right, exact)):
            results["y"] = seeded(by_specification, given)
            results |= gradients(results["y"], given)
        for name, tensor in found.items():
            assert name == "y" or tensor.dtype == t[name].dtype
            allowed = (plain[name].double() - right[name]).norm()
            assert (tensor.double() - right[name]).norm() <= 2 * allowed, name


class TestTransforms:
    def test_grad(self):
        t = operands(SHAPE)
        found = torch.func.grad(
            lambda up: seeded(low_rank_linear_with_dropout, t | {"up": up}).sum()
        )(t["up"])
        wanted = leaves(t)
        seeded(by_specification, wanted).sum().backward()
        torch.testing.assert_close(found, wanted["up"].grad, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_vmap(self, randomness):
        """Rows of x all alike: with different masks they differ, with the same they do not."""
        t = operands(SHAPE)
        x = t["x"][:1].expand(20, 1, -1)

        def call(x):
            return low_rank_linear_with_dropout(**(t | {"x": x}), p=0.5)

        y = torch.func.vmap(call, randomness=randomness)(x)
        assert (len(y.unique(dim=0)) == 1) == (randomness == "same")

    def test_vmap_asks_for_the_randomness(self):
        t = operands(SHAPE)
        with pytest.raises(RuntimeError, match="randomness"):
            torch.func.vmap(lambda x: low_rank_linear_with_dropout(**(t | {"x": x}), p=0.5))(t["x"])

    def test_per_sample_gradients(self):
        t = operands(SHAPE)

        def loss(up, row):
            return low_rank_linear_with_dropout(**(t | {"x": row, "up": up}), p=0.0).pow(2).sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")
        whole = torch.func.grad(loss)(t["up"], t["x"])
        found = each(t["up"], t["x"]).sum(0)
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("grad_elsewhere", [False, True])
    def test_forward_mode(self, grad_elsewhere):
        t = operands(SHAPE)
        t["down"].requires_grad_(grad_elsewhere)
        tangent = torch.randn_like(t["x"])
        found, right = (
            torch.func.jvp(lambda x, f=f: seeded(f, t | {"x": x}), (t["x"],), (tangent,))[1]
            for f in (low_rank_linear_with_dropout, by_specification)
        )
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
        with forward_ad.dual_level():
            dual = t | {"x": forward_ad.make_dual(t["x"], tangent)}
            y = seeded(low_rank_linear_with_dropout, dual)
            found = forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompile:
    @staticmethod
    def call(t, **options):
        return low_rank_linear_with_dropout(**t, p=0.5, **options)

    @pytest.mark.parametrize(
        ("form", "backend"),
        [("shared up", "auto"), ("own up", "auto"), ("no core", "reference")],
    )
    def test_one_graph_for_every_number_of_rows(self, form, backend):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(self.call, backend=counter, fullgraph=True, dynamic=True)
        for rows in (7, 12):
            t = leaves(operands(FORMS[form], lead=(rows,)))
            torch.manual_seed(rows)
            y = compiled(t, backend=backend)
            torch.manual_seed(rows)
            right = by_specification(**t, p=0.5)
            torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
            assert_close(gradients(y, t), gradients(right, t))
        assert counter.frame_count == 1

    def test_a_backend_by_name(self):
        needs_backend("cpp")
        compiled = torch.compile(self.call, backend="aot_eager", fullgraph=True)
        t = leaves(operands(SHAPE))
        torch.manual_seed(9)
        y = compiled(t, backend="cpp")
        torch.testing.assert_close(y, seeded(by_specification, t), rtol=1e-12, atol=1e-12)

    def test_under_autocast(self):
        t = leaves(operands(SHAPE, torch.float32))
        results = []
        for call in (torch.compile(self.call, backend="aot_eager", fullgraph=True), self.call):
            torch.manual_seed(2)
            with torch.autocast("cpu", torch.bfloat16):
                y = call(t)
            results.append(gradients(y, t) | {"y": y.detach()})
        assert results[0]["y"].dtype == torch.bfloat16
        assert_close(*results, tolerance=2e-2)

    def test_checkpointed(self):
        t = leaves(operands(SHAPE))

        def block(x):
            return self.call(t | {"x": x}).tanh()

        def run(x):
            return checkpoint(block, x, use_reentrant=False)

        torch.manual_seed(4)
        y = torch.compile(run, backend="aot_eager", fullgraph=True)(t["x"])
        torch.manual_seed(4)
        right = by_specification(**t, p=0.5).tanh()
        torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
        assert_close(gradients(y, t), gradients(right, t))

    @pytest.mark.slow
    def test_inductor_makes_the_same_mask(self):
        given = (torch.tensor(2**62 - 1), 101, 13, 0.3, torch.float32)
        compiled = torch.compile(keep_mask, fullgraph=True)
        assert torch.equal(compiled(*given), keep_mask(*given))


class TestBackends:
    @pytest.mark.parametrize("backend", ["auto", "torch", "reference", "cpp", "triton"])
    @pytest.mark.parametrize("form", FORMS)
    def test_by_name(self, form, backend):
        needs_backend(backend)
        t = leaves(operands(FORMS[form], torch.float32))
        exact = leaves(cast(t, torch.float64))
        y = seeded(low_rank_linear_with_dropout, t, backend=backend)
        right = seeded(by_specification, exact)
        found, expected = gradients(y, t) | {"y": y}, gradients(right, exact) | {"y": right}
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("preferred", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_compiled_backend_makes_the_large_products(self, dtype, preferred, monkeypatch):
        """Of a backend asked for by name, and by itself where the library is slower."""
        needs_backend("cpp")
        monkeypatch.setattr(cpp_backend, "preferred", lambda problem: preferred)
        called = []
        for name in ("forward", "backward"):
            real = getattr(cpp_backend, name)
            monkeypatch.setattr(
                cpp_backend,
                name,
                lambda *args, real=real, name=name, **options: (
                    called.append(name) or real(*args, **options)
                ),
            )
        t = leaves(operands(SHAPE, dtype))
        low_rank_linear_with_dropout(**t, p=0.5, backend="cpp").sum().backward()
        assert called == ["forward", "backward"]
        low_rank_linear_with_dropout(**t, p=0.5).sum().backward()
        assert len(called) == (4 if preferred else 2)

    @pytest.mark.parametrize("backend", ["cpp", "triton", "cuda"])
    def test_what_cannot_run_is_named(self, backend):
        """float16 is not for the C++ backend, and no GPU backend takes an x on the CPU."""
        t = operands(SHAPE, torch.float16)
        text = rf"{backend!r} was asked for but cannot (run here|take x)"
        if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("interpreted")
        with pytest.raises(RuntimeError, match=text):
            low_rank_linear_with_dropout(**t, p=0.5, backend=backend)

    def test_an_unknown_backend(self):
        with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
            low_rank_linear_with_dropout(**operands(SHAPE), p=0.5, backend="cobol")


def test_nothing_is_sent_to_the_host():
    """On the meta device, where no value can be asked for."""
    t = leaves({name: None if v is None else v.to("meta") for name, v in operands(SHAPE).items()})
    y = low_rank_linear_with_dropout(**t, p=0.5)
    y.sum().backward()
    for tensor in t.values():
        assert tensor.grad.shape == tensor.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_draws_new_masks():
    """Which is the specification's for the seed of each replay; nothing is sent to the host."""
    t = {name: v.cuda() for name, v in operands(SHAPE, torch.float32).items()}
    low_rank_linear_with_dropout(**t, p=0.5)
    torch.cuda.manual_seed(7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = low_rank_linear_with_dropout(**t, p=0.5)
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append(y.clone())
    assert not torch.equal(*drawn)
    torch.cuda.manual_seed(7)
    for found in drawn:
        torch.testing.assert_close(found, by_specification(**t, p=0.5), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_rate_that_is_none(p):
    with pytest.raises(ValueError, match=rf"p must be at least 0 and below 1, got {p}"):
        low_rank_linear_with_dropout(**operands(SHAPE), p=p)
