"""The steps of a chain, against the same steps of plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from efft_kernels.ops.backends.chain_steps import Norm, TorchSteps
from efft_kernels.ops.backends.triton.act import ActConfig
from efft_kernels.ops.backends.triton.chain import Configs, TritonSteps, configs_for
from efft_kernels.ops.backends.triton.configs import PassConfig
from efft_kernels.ops.backends.triton.merge_stack import launch_merge_stack
from efft_kernels.ops.backends.triton.norm import NormConfig
from efft_kernels.ops.chains import ATTENTION, Engine
from efft_kernels.testing.cpu_chain import CPU_ATTENTION, Adapted, Layer, run_chain
from efft_kernels.testing.error_budget import assert_within_budget

M, K, C, R = 37, 41, 53, 5
K_CHAIN, HIDDEN = 32, 64  # HIDDEN: of whole blocks in SMALL
# Several tiles in every direction.
SMALL = Configs(
    norm=NormConfig(16, 16, True, 4),
    norm_grad=NormConfig(4, 16, True, 4),
    norm_down_grad=PassConfig(32, 16, 2, 4, 1),
    gather=PassConfig(32, 16, 2, 4, 1),
    pair_grad=PassConfig(32, 16, 2, 4, 1),
    gelu=ActConfig(32, 16, 2, 4, 1),
    gelu_grad=ActConfig(32, 16, 2, 4, 1),
)
PASSES = SMALL._replace(norm=NormConfig(4, 16, True, 4), gelu=None, gelu_grad=None)


def steps_of(index):
    """(step, its operands by name; those of the stream are float32)."""
    return {
        "merge": (
            lambda s, o, _: s.merge([o["W_z"], 2 * o["W_z"]] * 3, o["B_stack"], o["down_stack"])
        ),
        "scaled merge": lambda s, o, _: s.merge(
            [o["W_z"], 2 * o["W_z"]] * 3, o["B_stack"], o["down_stack"], o["gammas_z"]
        ),
        "first norm": lambda s, o, d: s.norm(o["z"], None, norm(o), o["down"], d),
        "norm": lambda s, o, d: s.norm(o["z"], o["y"], norm(o), o["down"], d),
        "norm_grad": lambda s, o, _: norm_grad(s, o),
        "norm_grad, with a linear before": lambda s, o, _: norm_grad(s, o, (o["down"], o["s"])),
        "pair_grad": lambda s, o, _: pair_grad(s, o, o["y"]),
        "pair_grad, even": lambda s, o, _: pair_grad(s, o, o["hidden"]),
        "thin": lambda s, o, _: s.thin(o["y"], o["down"]),
        "sums": lambda s, o, _: sums(s, o),
        "gather_grad": lambda s, o, _: gather_grad(s, o, True),
        "gather_grad, no copy": lambda s, o, _: gather_grad(s, o, False),
        "gelu": lambda s, o, _: s.gelu(o["hidden"], o["B_hidden"]),
        "gelu, ragged": lambda s, o, _: s.gelu(o["h"], o["B"]),
        "gelu_grad": lambda s, o, _: gelu_grad(
            *(s, o, o["da"], o["hidden"], o["B_hidden"], o["s_wide"][:, :R].contiguous())
        ),
        "gelu_grad, ragged": lambda s, o, _: gelu_grad(s, o, o["h"] * 2, o["h"], o["B"], o["s"]),
    }[index]


def norm_grad(steps, o, before=None):
    got = steps.norm_grad(o["y"], *normed(o), norm(o), o["dz"], o["s"], before)
    outs = [wide(o, K, R) for _ in range(2 if before else 1)]
    steps.finish(list(zip([got.sum_down, got.sum_b], outs, strict=False)))
    return got.dz, got.dy, *([got.s] if before else []), *outs


def sums(steps, o):
    """All that is added up by `finish`, of two ranks and more than a launch takes."""
    s_out, sum_b = steps.thin_grad(o["h"], o["B"], o["s"])
    found = [
        (sum_b, wide(o, C, R)),
        (steps.tall_grad(o["y"], o["s"]), wide(o, K, R)),
        (steps.norm_down_grad(*normed(o), norm(o), o["s_wide"]), wide(o, K, 19)),
    ] * 2
    outs = [out for _, out in found]
    steps.finish(found)
    assert not found
    return s_out, *outs


def later(steps, o):
    """Sums that wait for the next launch, and what they will be."""
    outs = wide(o, C, R), wide(o, K, 19)
    sums = steps.thin_grad(o["h"], o["B"], o["s"])[1], steps.tall_grad(o["y"], o["s_wide"])
    return list(zip(sums, outs, strict=True)), outs


def pair_grad(steps, o, x):
    n = x.shape[1]
    b = o["B_hidden"] if x is o["hidden"] else o["B"]
    dy, down = (o["da"], o["B_hidden"] * 2) if x is o["hidden"] else (o["h"], o["down"])
    outs = wide(o, n, R), wide(o, dy.shape[1], R)
    steps.finish(list(zip(steps.pair_grad(x, dy, down, b), outs, strict=True)))
    return outs


def gather_grad(steps, o, copy):
    waiting, outs = later(steps, o)
    d_b = wide(o, 3 * K, R)
    whole, s = steps.gather_grad(parts(o), o["B_qkv"], o["s"], copy, d_b, waiting)
    assert not waiting
    return whole, s, d_b, *outs


def gelu_grad(steps, o, da, h, b, p):
    waiting, outs = later(steps, o)
    d_b, d_down = wide(o, h.shape[1], R), wide(o, h.shape[1], R)
    dh, s = steps.gelu_grad(da, h, o["s"], b, p, d_b, d_down, waiting)
    assert not waiting
    return dh, s, d_b, d_down, *outs


def wide(o, *size):
    """To be filled; aligned to 4 bytes."""
    dtype = torch.promote_types(o["y"].dtype, torch.float32)
    return torch.full((size[0] + 1, *size[1:]), torch.nan, dtype=dtype, device=o["y"].device)[1:]


def operands(dtype, device):
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "z": (M, K), "dz": (M, K), "w_z": (K,), "b_z": (K,), "W_z": (C, K), "y": (M, K),
        "down": (K, R), "s": (M, R), "h": (M, C), "da": (M, HIDDEN), "B": (C, R),
        "B_qkv": (3 * K, R), "qkv": (M, 3 * K), "s_wide": (M, 19), "B_stack": (6, C, R),
        "down_stack": (6, K, R), "gammas_z": (6, C), "hidden": (M, HIDDEN), "B_hidden": (HIDDEN, R),
    }  # fmt: skip
    return {
        name: torch.randn(size, generator=generator).to(
            device, torch.float32 if name in ("z", "dz") or name.endswith("_z") else dtype
        )
        for name, size in sizes.items()
    }


def norm(o):
    return Norm(o["w_z"], o["b_z"], 1e-6)


def normed(o):
    z = o["z"]
    _, mean, rstd = torch.ops.aten.native_layer_norm(z, [K], *norm(o))
    return z, mean, rstd


def parts(o):
    return o["qkv"].chunk(3, 1)


def tensors(found):
    found = found if isinstance(found, tuple) else (found,)
    return {str(i): t for i, t in enumerate(found) if t is not None}


@pytest.mark.parametrize(
    "step",
    [
        "merge", "scaled merge", "first norm", "norm", "norm_grad",
        "norm_grad, with a linear before", "pair_grad", "pair_grad, even",
        "thin", "sums", "gather_grad",
        "gather_grad, no copy", "gelu", "gelu, ragged", "gelu_grad", "gelu_grad, ragged",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "configs", [SMALL, PASSES, configs_for(K, R, None)], ids=["small", "passes", "default"]
)
def test_is_the_step_of_plain_torch(step, configs, dtype, device):
    call, o = steps_of(step), operands(dtype, device)
    doubled = {name: t.double() for name, t in o.items()}
    exact = tensors(call(TorchSteps(), doubled, torch.float64))
    plain = tensors(call(TorchSteps(), o, dtype))
    found = tensors(call(TritonSteps(configs), o, dtype))
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        assert tensor.dtype == plain[name].dtype
        assert tensor.numel() == plain[name].numel()
        own = {name: tensor.view(exact[name].shape)}
        assert_within_budget(own, {name: plain[name]}, {name: exact[name]})


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (3, 5, 2, 17)], ids=str)
def test_a_whole_chain(ranks, dtype, device):
    """Two blocks, forward and backward: launches of equal and of different sizes share caches."""
    generator = torch.Generator().manual_seed(3)  # none where plain torch errs little by chance

    def draw(*size):
        return torch.randn(size, generator=generator).to(device) / 4

    def adapted(n, k, r):
        down, b = draw(k, r).requires_grad_(), draw(n, r).requires_grad_()
        return Adapted(draw(n, k), draw(n), down, b)

    def layer():
        norms = [Norm(1 + draw(K_CHAIN), draw(K_CHAIN), 1e-6) for _ in range(2)]
        sizes = (3 * K_CHAIN, K_CHAIN), (K_CHAIN, K_CHAIN), (HIDDEN, K_CHAIN), (K_CHAIN, HIDDEN)
        linears = [adapted(n, k, r) for (n, k), r in zip(sizes, ranks, strict=True)]
        return Layer(norms[0], *linears[:2], norms[1], *linears[2:], 2)

    def doubled(value):
        if isinstance(value, tuple):
            return type(value)(*map(doubled, value))
        return value.double().detach().requires_grad_() if torch.is_tensor(value) else value

    def results(x, layers, steps, dtype):
        factors = [
            t for one in layers for a in one if isinstance(a, Adapted) for t in (a.down, a.b)
        ]
        y = run_chain(x, layers, Engine(steps, attention, dtype))
        return [y, *torch.autograd.grad(y.tanh().sum(), [x, *factors])]

    attention = CPU_ATTENTION if device == "cpu" else ATTENTION[SDPBackend.FLASH_ATTENTION]
    if device != "cpu" and dtype == torch.float32:
        pytest.skip("FlashAttention takes half precisions")
    x, layers = draw(2, 7, K_CHAIN).requires_grad_(), [layer(), layer()]
    found, plain = (results(x, layers, s, dtype) for s in (TritonSteps(SMALL), TorchSteps()))
    # Attention in float64 is there on the CPU alone.
    attention, device = CPU_ATTENTION, "cpu"
    x, layers = doubled(x).cpu(), [_on_cpu(doubled(one)) for one in layers]
    exact = results(x.detach().requires_grad_(), layers, TorchSteps(), torch.float64)
    for one in zip(found, plain, exact, strict=True):
        assert_within_budget(*({"": t.cpu()} for t in one))


def _on_cpu(value):
    if isinstance(value, tuple):
        return type(value)(*map(_on_cpu, value))
    return value.detach().cpu().requires_grad_() if torch.is_tensor(value) else value


def test_merges_from_the_weights_as_they_are_stored(device):
    """An increment below half an ulp of the rounded weight counts where W's own digits do."""
    weight = torch.full((1, 16), 1 + 3 * 2**-12, device=device)  # 1 in float16
    b = torch.ones(1, 1, 1, device=device, dtype=torch.float16)
    down = torch.full((1, 16, 1), 2.0**-11, device=device, dtype=torch.float16)
    assert launch_merge_stack([weight], b, down).eq(1 + 2**-10).all()


@pytest.mark.parametrize("layers", [1, 4, 7])
def test_merges_each_layer_from_its_own_weight(layers, device):
    weights = [torch.full((24, 40), float(i), device=device) for i in range(layers)]
    weights[-1] = torch.full((24 * 40 + 1,), layers - 1.0, device=device)[1:].view(24, 40)
    b = torch.ones(layers, 24, 3, device=device, dtype=torch.float16)
    down = torch.ones(layers, 40, 3, device=device, dtype=torch.float16)
    for merged, weight in zip(launch_merge_stack(weights, b, down), weights, strict=True):
        assert merged.eq(weight + 3).all()
