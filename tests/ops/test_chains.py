"""Blocks as a chain of two operators each, in float64 through the steps of plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efft_kernels import use_backend
from efft_kernels.ops import chains
from efft_kernels.ops.backends.chain_steps import Norm
from efft_kernels.ops.chains import Adapted, Engine, Layer, engine_for, refusal, run_chain
from efft_kernels.testing.cpu_chain import cpu_engine

IMAGES, TOKENS, K, C, HEADS = 2, 3, 8, 11, 2
RANKS = {"qkv": 2, "proj": 3, "fc1": 1, "fc2": 2}
SIZES = {"qkv": (3 * K, K), "proj": (K, K), "fc1": (C, K), "fc2": (K, C)}
ENGINE = cpu_engine(torch.float64)


def draw(*size: int, grad: bool = False) -> Tensor:
    return (torch.randn(size, dtype=torch.float64) / 2).requires_grad_(grad)


@pytest.fixture(params=[False, True], ids=["", "LayerScale"])
def layers(request: pytest.FixtureRequest) -> list[Layer]:
    def adapted(kind: str) -> Adapted:
        (n, k), r = SIZES[kind], RANKS[kind]
        bias = None if kind == "proj" else draw(n)
        gamma = 1 + draw(n) if request.param and kind in ("proj", "fc2") else None
        return Adapted(draw(n, k), bias, draw(k, r, grad=True), draw(n, r, grad=True), gamma)

    def layer() -> Layer:
        norms = [Norm(1 + draw(K), draw(K), 1e-5) for _ in range(2)]
        qkv, proj, fc1, fc2 = map(adapted, SIZES)
        return Layer(norms[0], qkv, proj, norms[1], fc1, fc2, HEADS)

    return [layer(), layer()]


def factors(layers: list[Layer]) -> list[Tensor]:
    linears = [a for layer in layers for a in (layer.qkv, layer.proj, layer.fc1, layer.fc2)]
    return [factor for a in linears for factor in (a.down, a.b)]


def plain(x: Tensor, layers: list[Layer]) -> Tensor:
    """The blocks in torch's operators, as timm writes them."""

    def linear(x: Tensor, a: Adapted) -> Tensor:
        y = F.linear(x, a.weight, a.bias) + x @ a.down @ a.b.T
        return y if a.gamma is None else a.gamma * y

    def norm(x: Tensor, n: Norm) -> Tensor:
        return F.layer_norm(x, [K], n.weight, n.bias, n.eps)

    for layer in layers:
        qkv = linear(norm(x, layer.norm1), layer.qkv).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), layer.proj)
        x = x + linear(F.gelu(linear(norm(x, layer.norm2), layer.fc1)), layer.fc2)
    return x


def test_is_the_blocks_of_plain_torch(layers: list[Layer]) -> None:
    x = draw(IMAGES, TOKENS, K, grad=True)
    results = []
    for run in (lambda: run_chain(x, layers, ENGINE), lambda: plain(x, layers)):
        y = run()
        results.append([y, *torch.autograd.grad(y.tanh().sum(), [x, *factors(layers)])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradients_of_one_layer(layers: list[Layer]) -> None:
    first = layers[:1]
    x = draw(IMAGES, TOKENS, K, grad=True)
    given = [x, *factors(first)]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        pairs = iter(zip(values[::2], values[1::2], strict=True))
        own = {}
        for kind in SIZES:
            down, b = next(pairs)
            own[kind] = getattr(first[0], kind)._replace(down=down, b=b)
        return run_chain(x, [first[0]._replace(**own)], ENGINE)

    assert torch.autograd.gradcheck(call, given)


def test_a_stream_that_needs_no_gradient(layers: list[Layer]) -> None:
    x = draw(IMAGES, TOKENS, K)
    results = [
        torch.autograd.grad(run(x, layers).tanh().sum(), factors(layers))
        for run in (lambda *a: run_chain(*a, ENGINE), plain)
    ]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_gradients_of_any_strides(layers: list[Layer]) -> None:
    x = draw(IMAGES, TOKENS, K, grad=True)
    grads = [draw(1, 1, 1).expand(IMAGES, TOKENS, K), draw(K, TOKENS, IMAGES).permute(2, 1, 0)]
    for dy in grads:
        results = [
            torch.autograd.grad(run(), [x, *factors(layers)], dy)
            for run in (lambda: run_chain(x, layers, ENGINE), lambda: plain(x, layers))
        ]
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_input_of_any_strides(layers: list[Layer]) -> None:
    x = draw(K, TOKENS, IMAGES).permute(2, 1, 0)
    torch.testing.assert_close(run_chain(x, layers, ENGINE), plain(x, layers))


def test_backward_again(layers: list[Layer]) -> None:
    x = draw(IMAGES, TOKENS, K, grad=True)
    loss = run_chain(x, layers, ENGINE).tanh().sum()
    first = torch.autograd.grad(loss, [x, *factors(layers)], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [x, *factors(layers)]), first)


def test_a_second_derivative_is_refused(layers: list[Layer]) -> None:
    x = draw(IMAGES, TOKENS, K, grad=True)
    y = run_chain(x, layers, ENGINE).sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*fuse='pairs'"):
        dx.sum().backward()


def test_the_backward_does_not_run_under_autocast(layers: list[Layer]) -> None:
    x = draw(IMAGES, TOKENS, K, grad=True)
    y = run_chain(x, layers, ENGINE).tanh().sum()
    expected = torch.autograd.grad(y, [x, *factors(layers)], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, [x, *factors(layers)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_stream_in_float32_and_gemms_in_bfloat16(layers: list[Layer]) -> None:
    """The dtypes of autocast: of the stream and factors, and of the products."""

    def low(t: Tensor) -> Tensor:
        return t.detach().float().requires_grad_(t.requires_grad)

    def lower(value):
        if isinstance(value, tuple):
            return type(value)(*map(lower, value))
        return low(value) if isinstance(value, Tensor) else value

    singles = [lower(layer) for layer in layers]
    x = low(draw(IMAGES, TOKENS, K, grad=True))
    y = run_chain(x, singles, cpu_engine(torch.bfloat16))
    grads = torch.autograd.grad(y.tanh().sum(), [x, *factors(singles)])
    assert {t.dtype for t in (y, *grads)} == {torch.float32}
    expected = plain(x.double(), layers)
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_says_why_nothing_runs_it() -> None:
    x = torch.randn(IMAGES, TOKENS, K)
    assert "is on cpu" in str(refusal(x))
    for other in (torch.nn.Parameter(x), x[0], x[:0]):
        assert "no plain tensor" in str(refusal(other))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    HEADS = 3

    @pytest.fixture
    def x(self) -> Tensor:
        return torch.randn(2, 5, 3 * 64, device="cuda")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_runs_under_autocast(self, x: Tensor, dtype: torch.dtype) -> None:
        with torch.autocast("cuda", dtype):
            assert refusal(x) is None
            found = engine_for(x, self.HEADS, 16)
        assert isinstance(found, Engine) and found.dtype == dtype

    def test_circumstances(self, x: Tensor) -> None:
        assert "autocast" in str(refusal(x))
        with torch.autocast("cuda", torch.bfloat16):
            assert "float64" in str(refusal(x.double()))
            with use_backend("torch"):
                assert "'torch'" in str(refusal(x))
            torch.use_deterministic_algorithms(True)
            try:
                assert "deterministic" in str(refusal(x))
            finally:
                torch.use_deterministic_algorithms(False)
            assert "rank" in str(engine_for(x, self.HEADS, 129))
            assert "heads" in str(engine_for(x, 64, 16))
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                assert "heads" in str(engine_for(x, self.HEADS, 16))

    @pytest.mark.parametrize("backend", list(chains.ATTENTION), ids=lambda b: b.name)
    def test_attention_is_torchs(self, backend: torch.nn.attention.SDPBackend) -> None:
        qkv = torch.randn(2, 5, 3, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        do = torch.randn(2, 3, 5, 64, device="cuda", dtype=torch.bfloat16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        with torch.nn.attention.sdpa_kernel(backend):
            try:
                expected = F.scaled_dot_product_attention(q, k, v)
            except RuntimeError as error:
                pytest.skip(str(error))
            grads = torch.autograd.grad(expected, (q, k, v), do)
        q, k, v = (t.detach() for t in (q, k, v))
        o, kept = chains.ATTENTION[backend].forward(q, k, v)
        found = chains.ATTENTION[backend].backward(do, q, k, v, o, *kept)
        for a, b in zip((o, *found), (expected, *grads), strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
