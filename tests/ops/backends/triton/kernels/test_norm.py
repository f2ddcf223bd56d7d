"""LayerNorm and RMSNorm with their thin products, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops.backends.triton.configs import PassConfig
from efft_kernels.ops.backends.triton.norm import (
    Branch,
    NormConfig,
    launch_norm_bwd,
    launch_norm_down_grad,
    launch_norm_fwd,
)
from efft_kernels.ops.backends.triton.tuning import cdiv
from efft_kernels.testing.error_budget import assert_within_budget, relative_error

M, K, RA, RB = 37, 41, 5, 3
EPS = 1e-6
# Several chunks of columns, one chunk, and fewer rows than tl.dot takes.
FORWARD = [
    *(NormConfig(16, 16, hold, 4) for hold in (True, False)),
    NormConfig(32, 64, True, 4),
    NormConfig(4, 16, True, 4),
]
BACKWARD = [
    *(NormConfig(16, 16, hold, 4, programs=2) for hold in (True, False)),
    NormConfig(32, 64, True, 4),
]


def operands(dtype, device):
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "x": (M, K),
        "y": (M, K),
        "thin": (M, RB),
        "up": (K, RB),
        "gamma": (K,),
        "weight": (K,),
        "bias": (K,),
        "down": (K, RA),
        "dout": (M, K),
        "s": (M, RA),
        "residual": (M, K),
    }
    return {
        name: torch.randn(size, generator=generator).to(device, dtype)
        for name, size in sizes.items()
    }


def doubled(o):
    return {name: t.double() for name, t in o.items()}


def normalised(o, z, rms):
    if rms:
        return torch.nn.functional.rms_norm(z, (K,), o["weight"], EPS) + o["bias"]
    return torch.nn.functional.layer_norm(z, (K,), o["weight"], o["bias"], EPS)


def plain_forward(o, branch, gamma, rms):
    z = o["x"]
    if branch:
        y = torch.addmm(o["y"], o["thin"], o["up"].T)
        z = z + (y * o["gamma"] if gamma else y)
    out = normalised(o, z, rms)
    return {"z": z, "out": out, "p": out @ o["down"]}


def plain_backward(o, z, rms):
    z = z.detach().requires_grad_()
    out = normalised(o, z, rms)
    dout = torch.addmm(o["dout"], o["s"], o["down"].T)
    (dz,) = torch.autograd.grad(out, z, dout)
    return {"dz": dz + o["residual"], "d_down": out.detach().T @ o["s"]}


def branch_of(o, gamma):
    return Branch(o["y"], o["thin"], o["up"], o["gamma"] if gamma else None)


@pytest.mark.every_other(0)
@pytest.mark.parametrize("config", FORWARD, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("branch", [False, True], ids=["", "branch"])
def test_forward(branch, rms, config, dtype, device):
    if branch and config.block_m < 16:
        pytest.skip("T·up^T takes a block of 16 rows")
    o = operands(dtype, device)
    got = launch_norm_fwd(
        o["x"], branch_of(o, branch) if branch else None, o["weight"], o["bias"], o["down"],
        eps=EPS, rms=rms, config=config,
    )  # fmt: skip
    found = {"z": got.z, "out": got.out, "p": got.p}
    assert_within_budget(
        found,
        plain_forward(o, branch, branch, rms),
        plain_forward(doubled(o), branch, branch, rms),
    )
    z = got.z.double()
    square = (z.square() if rms else (z - z.mean(1, keepdim=True)).square()).mean(1)
    torch.testing.assert_close(got.rstd.double(), (square + EPS).rsqrt(), rtol=1e-5, atol=0)
    assert (got.mean is None) == rms
    assert branch or got.z is o["x"]


@pytest.mark.every_other(1)
@pytest.mark.parametrize("config", BACKWARD, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_backward(rms, config, dtype, device):
    o = operands(dtype, device)
    weights = o["weight"], o["bias"]
    fwd = launch_norm_fwd(o["x"], None, *weights, None, eps=EPS, rms=rms, config=FORWARD[0])
    saved = fwd.z, fwd.mean, fwd.rstd, *weights, o["s"]
    got = launch_norm_bwd(o["dout"], *saved, o["down"], o["residual"], config=config)
    apart = launch_norm_down_grad(*saved, config=PassConfig(16, 32, 2, 4, 1))
    plain, exact = plain_backward(o, o["x"], rms), plain_backward(doubled(o), o["x"].double(), rms)
    assert got.d_down.shape == (config.programs or cdiv(M, config.block_m), K, 16)
    assert apart.shape == (2, K, 16)
    for partial in (got.d_down, apart):
        found = {"dz": got.dz, "d_down": partial.sum(0)[:, :RA]}
        assert_within_budget(found, plain, exact)


def test_gradient_of_the_branch(device):
    """dz of a float32 stream, and the same rounded to the dtype of the branch."""
    o = operands(torch.float32, device)
    weights = o["weight"], o["bias"]
    fwd = launch_norm_fwd(o["x"], None, *weights, None, eps=EPS, config=FORWARD[0])
    few_rows = NormConfig(4, 16, True, 4)  # no product, so fewer than tl.dot takes
    rest = fwd.z, fwd.mean, fwd.rstd, *weights, None, None, o["residual"]
    dout = o["dout"].half()
    got = launch_norm_bwd(dout, *rest, branch_grad=True, config=few_rows)
    assert got.dz.dtype == torch.float32
    assert got.dy is not None and torch.equal(got.dy, got.dz.half())
    expected = launch_norm_bwd(dout, *rest, config=BACKWARD[0])
    assert expected.dy is None
    torch.testing.assert_close(got.dz, expected.dz)


def test_only_what_is_given(dtype, device):
    """No weights, no projection, no factor: the norm alone; an addend alone; γ without a factor."""
    o = operands(dtype, device)
    got = launch_norm_fwd(o["x"], None, None, None, None, eps=EPS, config=FORWARD[0])
    assert got.p is None
    exact = torch.nn.functional.layer_norm(o["x"].double(), (K,), eps=EPS)
    plain = torch.nn.functional.layer_norm(o["x"], (K,), eps=EPS)
    assert_within_budget({"out": got.out}, {"out": plain}, {"out": exact})
    branch = Branch(o["y"], gamma=o["gamma"])
    z = launch_norm_fwd(o["x"], branch, None, None, None, eps=EPS, config=FORWARD[1]).z
    exact = o["x"].double() + o["gamma"].double() * o["y"].double()
    assert_within_budget({"z": z}, {"z": o["x"] + o["gamma"] * o["y"]}, {"z": exact})
    back = launch_norm_bwd(
        o["dout"], o["x"], got.mean, got.rstd, None, None, None, None, None, config=BACKWARD[0]
    )
    assert back.d_down is None
    d_down = launch_norm_down_grad(
        o["x"], got.mean, got.rstd, None, None, o["s"], config=PassConfig(16, 32, 2, 4, 1)
    )
    out = torch.nn.functional.layer_norm(o["x"].double(), (K,), eps=EPS)
    plain = {"d_down": got.out.T @ o["s"]}
    exact = {"d_down": out.T @ o["s"].double()}
    assert_within_budget({"d_down": d_down.sum(0)[:, :RA]}, plain, exact)
    x = o["x"].double().requires_grad_()
    (exact,) = torch.autograd.grad(
        torch.nn.functional.layer_norm(x, (K,), eps=EPS), x, o["dout"].double()
    )
    x = o["x"].clone().requires_grad_()
    (plain,) = torch.autograd.grad(torch.nn.functional.layer_norm(x, (K,), eps=EPS), x, o["dout"])
    assert_within_budget({"dz": back.dz}, {"dz": plain}, {"dz": exact})


def test_rows_far_from_zero(device):
    """A mean of 1000 standard deviations costs no more than its own rounding."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0)).to(device) + 1000
    exact = torch.nn.functional.layer_norm(x.double(), (K,), eps=EPS)
    for config in FORWARD:
        got = launch_norm_fwd(x, None, None, None, None, eps=EPS, config=config).out
        assert relative_error(got, exact) < 1e-4


def test_outputs_into_one_buffer(dtype, device):
    """x̂ and P side by side, as a GEMM over K + Ra columns takes them: the same bits."""
    o = operands(dtype, device)
    arguments = o["x"], None, o["weight"], o["bias"], o["down"]
    apart = launch_norm_fwd(*arguments, eps=EPS, config=FORWARD[0])
    buffer = o["x"].new_empty(M, K + RA)
    launch_norm_fwd(*arguments, eps=EPS, out=buffer[:, :K], p=buffer[:, K:], config=FORWARD[0])
    assert torch.equal(buffer, torch.cat([apart.out, apart.p], 1))


def test_a_float32_stream_beside_half_precision(device):
    """x, z and the norm's weights in float32, all else in float16, as under autocast."""
    o = operands(torch.float16, device)
    for name in ("x", "weight", "bias", "residual"):
        o[name] = o[name].float()
    branch = Branch(o["y"], o["thin"], o["up"])
    got = launch_norm_fwd(
        o["x"], branch, o["weight"], o["bias"], o["down"],
        eps=EPS, dtype=torch.float16, config=FORWARD[0],
    )  # fmt: skip
    exact = plain_forward(doubled(o), True, False, False)
    assert got.z.dtype == torch.float32
    assert relative_error(got.z, exact["z"]) < 1e-6
    for name in ("out", "p"):
        assert getattr(got, name).dtype == torch.float16
        assert relative_error(getattr(got, name), exact[name]) < 1e-3
    saved = got.z, got.mean, got.rstd, o["weight"], o["bias"], o["s"]
    back = launch_norm_bwd(o["dout"], *saved, o["down"], o["residual"], config=BACKWARD[0])
    exact = plain_backward(doubled(o), got.z.double(), False)
    assert back.dz.dtype == torch.float32
    assert relative_error(back.dz, exact["dz"]) < 1e-5
    assert relative_error(back.d_down.sum(0)[:, :RA], exact["d_down"]) < 1e-3
