"""The activation with its thin products, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton.compiler import CompilationError
from triton.runtime.errors import InterpreterError

from efft_kernels.ops.backends.triton.act import ActConfig, launch_act_bwd, launch_act_fwd
from efft_kernels.ops.backends.triton.tuning import cdiv
from efft_kernels.testing.error_budget import assert_within_budget

M, C, RA, RB = 37, 41, 5, 3
TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
}
CONFIGS = [ActConfig(16, 16, 2, 4, 1), ActConfig(32, 64, 1, 4, 1)]


def operands(dtype, device):
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "y": (M, C),
        "bias": (C,),
        "thin": (M, RB),
        "up": (C, RB),
        "down": (C, RA),
        "dout": (M, C),
        "s": (M, RA),
    }
    return {
        name: torch.randn(size, generator=generator).to(device, dtype)
        for name, size in sizes.items()
    }


def exact_forward(o, act, bias, thin, down):
    h = o["y"]
    if bias:
        h = h + o["bias"]
    if thin:
        h = torch.addmm(h, o["thin"], o["up"].T)
    a = TORCH[act](h)
    return {"h": h, "a": a, **({"p": a @ o["down"]} if down else {})}


def exact_backward(o, h, act, thin, down):
    h = h.detach().requires_grad_()
    a = TORCH[act](h)
    da = torch.addmm(o["dout"], o["s"], o["down"].T) if down else o["dout"]
    (dh,) = torch.autograd.grad(a, h, da)
    found = {"dh": dh}
    if thin:
        found |= {"q": dh @ o["up"], "d_up": dh.T @ o["thin"]}
    if down:
        found["d_down"] = a.detach().T @ o["s"]
    return found


def doubled(o):
    return {name: t.double() for name, t in o.items()}


@pytest.mark.every_other(0)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("act", TORCH)
def test_every_activation(act, config, dtype, device):
    check(operands(dtype, device), act, True, True, True, config)


@pytest.mark.parametrize(
    ("bias", "thin", "down"), [(False, False, False), (True, False, True), (False, True, False)]
)
def test_only_what_is_given(bias, thin, down, dtype, device):
    check(operands(dtype, device), "gelu", bias, thin, down, CONFIGS[0])


def check(o, act, bias, thin, down, config):
    thin_pair = (o["thin"], o["up"]) if thin else (None, None)
    got = launch_act_fwd(
        o["y"],
        o["bias"] if bias else None,
        *thin_pair,
        o["down"] if down else None,
        act=act,
        config=config,
    )
    found = {"h": got.h, "a": got.a}
    if down:
        assert got.p.shape == ((M, RA) if config.parts == 1 else (config.parts, M, 16))
        found["p"] = got.p if got.p.dim() == 2 else got.p.sum(0)[:, :RA]
    assert (got.h is o["y"]) == (not bias and not thin)
    terms = bias, thin, down
    assert_within_budget(
        found, exact_forward(o, act, *terms), exact_forward(doubled(o), act, *terms)
    )

    factors = (o["s"], o["down"]) if down else (None, None)
    back = launch_act_bwd(o["dout"], got.h, *factors, *thin_pair, act=act, config=config)
    found = {"dh": back.dh}
    if thin:
        assert back.q.shape == (cdiv(C, config.block_c), M, 16)
        assert back.d_up.shape == (config.parts, C, 16)
        found |= {"q": back.q.sum(0)[:, :RB], "d_up": back.d_up.sum(0)[:, :RB]}
    if down:
        assert back.d_down.shape == (config.parts, C, 16)
        found["d_down"] = back.d_down.sum(0)[:, :RA]
    assert_within_budget(
        found,
        exact_backward(o, got.h, act, thin, down),
        exact_backward(doubled(o), got.h.double(), act, thin, down),
    )


def test_in_place_and_into_wider_rows(dtype, device):
    """h over y, dh over dout, and a into the first columns of a buffer: the same bits."""
    o = operands(dtype, device)
    tensors = o["bias"], o["thin"], o["up"], o["down"]
    apart = launch_act_fwd(o["y"], *tensors, config=CONFIGS[0])
    y, a = o["y"].clone(), o["y"].new_empty(M, C + 7)[:, :C]
    over = launch_act_fwd(y, *tensors, in_place=True, a=a, config=CONFIGS[0])
    assert over.h is y
    for name in ("h", "a", "p"):
        # By columns: the padding of partial sums is zero in both.
        assert torch.equal(getattr(apart, name), getattr(over, name)), name
    factors = o["s"], o["down"], o["thin"], o["up"]
    dout = o["dout"].clone()
    expected = launch_act_bwd(o["dout"], apart.h, *factors, config=CONFIGS[0]).dh
    assert launch_act_bwd(dout, apart.h, *factors, in_place=True, config=CONFIGS[0]).dh is dout
    assert torch.equal(dout, expected)


def test_large_values_stay_finite(dtype, device):
    """Where exp and its square would overflow, gelu is h or 0 and its slope 1 or 0."""
    h = torch.tensor([[-60.0, -20.0, 0.0, 20.0, 60.0]], device=device, dtype=dtype)
    for act in TORCH:
        a = launch_act_fwd(h, None, None, None, None, act=act, config=CONFIGS[0]).a
        torch.testing.assert_close(a, h.clamp_min(0), atol=1e-6, rtol=0)
        back = launch_act_bwd(
            torch.ones_like(h), h, None, None, None, None, act=act, config=CONFIGS[0]
        )
        expected = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device, dtype=dtype)
        torch.testing.assert_close(back.dh, expected, atol=1e-6, rtol=0)


def test_another_activation(device):
    h = torch.ones(3, 5, device=device)
    with pytest.raises((InterpreterError, CompilationError)):
        launch_act_fwd(h, None, None, None, None, act="relu", config=CONFIGS[0])


def test_complete_da(dtype, device):
    """S without its factor: dout is da already, and only d_down comes of S."""
    o = operands(dtype, device)
    da = o["dout"] + o["s"] @ o["down"].T
    thin = o["thin"], o["up"]
    back = launch_act_bwd(da, o["y"], o["s"], None, *thin, config=CONFIGS[0])
    expected = launch_act_bwd(da, o["y"], None, None, *thin, config=CONFIGS[0])
    assert torch.equal(back.dh, expected.dh)
    d_down = launch_act_bwd(da, o["y"], o["s"], o["down"], *thin, config=CONFIGS[0]).d_down
    assert torch.equal(back.d_down, d_down)
