"""Blocks as a chain of two operators each, in float64 through the steps of plain torch."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from efft_kernels import use_backend
from efft_kernels.ops import chain_passes, chains, compiled_chain
from efft_kernels.ops.backends import cuda_chain
from efft_kernels.ops.backends.chain_steps import Norm, TorchSteps
from efft_kernels.ops.backends.triton import chain as triton_chain
from efft_kernels.ops.chains import (
    Attention,
    Engine,
    engine_for,
    refusal,
)
from efft_kernels.testing.cpu_chain import (
    CPU_ATTENTION,
    Adapted,
    Layer,
    cpu_engine,
    operands,
    run_chain,
)

IMAGES, TOKENS, K, C, HEADS = 2, 3, 8, 11, 2
RANKS = {"qkv": 2, "proj": 3, "fc1": 1, "fc2": 2}
SIZES = {"qkv": (3 * K, K), "proj": (K, K), "fc1": (C, K), "fc2": (K, C)}


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """Keeps what is no tensor too, as a GPU's attention does."""
    o, kept = CPU_ATTENTION.forward(q, k, v)
    return o, (*kept, None, q.shape[2])


def attention_grad(*given: Any) -> Any:
    *tensors, nothing, tokens = given
    assert nothing is None and tokens == TOKENS
    return CPU_ATTENTION.backward(*tensors)


ATTENTION = Attention(attention, attention_grad, 1, lambda kept, tokens: (*kept, None, tokens))
ENGINE = cpu_engine(torch.float64)._replace(attention=ATTENTION)


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
        norms = [Norm(1 + draw(K), draw(K), eps) for eps in (1e-5, 1e-2)]
        qkv, proj, fc1, fc2 = map(adapted, SIZES)
        return Layer(norms[0], qkv, proj, norms[1], fc1, fc2, HEADS)

    return [layer(), layer()]


def factors(layers: list[Layer]) -> list[Tensor]:
    linears = [a for layer in layers for a in (layer.qkv, layer.proj, layer.fc1, layer.fc2)]
    return [factor for a in linears for factor in (a.down, a.b)]


def lower(value: Any) -> Any:
    """The same in float32."""
    if isinstance(value, tuple):
        return type(value)(*map(lower, value))
    if isinstance(value, Tensor):
        return value.detach().float().requires_grad_(value.requires_grad)
    return value


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
    made: list[int] = []

    class Steps(TorchSteps):
        def norm_grad(self, *given: Any) -> Any:
            made.append(1)
            return super().norm_grad(*given)

    x, engine = draw(IMAGES, TOKENS, K), ENGINE._replace(steps=Steps())
    results = [
        torch.autograd.grad(run(x, layers).tanh().sum(), factors(layers))
        for run in (lambda *a: run_chain(*a, engine), plain)
    ]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert len(made) == 2 * len(layers) - 1


def test_the_gradient_of_the_stream_alone(layers: list[Layer]) -> None:
    for factor in factors(layers):
        factor.requires_grad_(False)
    x = draw(IMAGES, TOKENS, K, grad=True)
    results = [
        torch.autograd.grad(run(x, layers).tanh().sum(), x)
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


def test_the_result_may_be_changed_in_place(layers: list[Layer]) -> None:
    """Which autograd refuses of a view that a Function made."""
    x = draw(IMAGES, TOKENS, K, grad=True)
    results = []
    for y in (run_chain(x, layers, ENGINE), plain(x, layers)):
        y += 1
        y[:, 0] = 0
        results.append(torch.autograd.grad(y.tanh().sum(), [x, *factors(layers)]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_nothing_is_kept_where_nothing_learns(layers: list[Layer]) -> None:
    living: list[StorageWeakRef] = []
    most: list[int] = []

    class Steps(TorchSteps):
        def gelu(self, h: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
            living.append(StorageWeakRef(h.untyped_storage()))
            most.append(sum(not one.expired() for one in living))
            return super().gelu(h, down)

    for factor in factors(layers):
        factor.requires_grad_(False)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda t: t):
        x, three = draw(IMAGES, TOKENS, K), [*layers, layers[0]]
        y = run_chain(x, three, ENGINE._replace(steps=Steps()))
    torch.testing.assert_close(y, plain(x, three))
    assert most == [1, 1, 1] and not packed and not y.requires_grad


@pytest.mark.parametrize("copies", [False, True])
def test_a_norm_that_changes_before_the_backward(layers: list[Layer], copies: bool) -> None:
    """Is told, or, where hooks have copied it, is the forward's."""
    x = draw(IMAGES, TOKENS, K, grad=True)
    wanted = [x, *factors(layers)]
    expected = torch.autograd.grad(run_chain(x, layers, ENGINE).tanh().sum(), wanted)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    with hooks if copies else contextlib.nullcontext():
        y = run_chain(x, layers, ENGINE).tanh().sum()
    layers[1].norm1.weight.mul_(3)
    if not copies:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, wanted)
        return
    torch.testing.assert_close(torch.autograd.grad(y, wanted), expected, rtol=0, atol=0)


@pytest.mark.parametrize("again", [False, True])
def test_memory_is_given_back_on_the_way(layers: list[Layer], again: bool) -> None:
    """What a half kept is gone when the next half's gradient is made, unless there is another
    backward to come."""
    kept: list[StorageWeakRef] = []
    gone: list[bool] = []

    class Steps(TorchSteps):
        def gelu(self, h: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
            kept.append(StorageWeakRef(h.untyped_storage()))
            return super().gelu(h, down)

        def pair_grad(self, *given: Tensor) -> tuple[Tensor, Tensor]:
            gone.append(kept[-1 - len(gone) % len(layers)].expired())
            return super().pair_grad(*given)

    loss = run_chain(
        draw(IMAGES, TOKENS, K, grad=True), layers, ENGINE._replace(steps=Steps())
    ).sum()
    loss.backward(retain_graph=again)
    assert gone == [not again] * len(layers)
    if again:
        loss.backward()
        assert gone[len(layers) :] == [True] * len(layers)


@pytest.mark.parametrize("again", [False, True])
def test_what_hooks_took_comes_back_half_by_half(layers: list[Layer], again: bool) -> None:
    """As torch.autograd.graph.save_on_cpu does it, for which a GPU is too small otherwise."""
    out: list[Tensor] = []
    counts: list[int] = []
    packed: list[weakref.ref[Any]] = []

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.clone()
            packed.append(weakref.ref(self))

    class Steps(TorchSteps):
        def thin_grad(self, *given: Tensor) -> Any:
            counts.append(len(out))
            return super().thin_grad(*given)

    def unpack(box: Box) -> Tensor:
        out.append(box.tensor)
        return box.tensor

    x = draw(IMAGES, TOKENS, K, grad=True)
    wanted = [x, *factors(layers)]
    expected = torch.autograd.grad(run_chain(x, layers, ENGINE).tanh().sum(), wanted)
    with torch.autograd.graph.saved_tensors_hooks(Box, unpack):
        y = run_chain(x, layers, ENGINE._replace(steps=Steps()))
    found = torch.autograd.grad(y.tanh().sum(), wanted, retain_graph=again)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(out) == len(packed) and counts[0] + 12 < len(out)  # 12 of the layers behind it
    assert any(box() for box in packed) == again
    if again:
        found = torch.autograd.grad(y.tanh().sum(), wanted)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert not any(box() for box in packed)
    with pytest.raises(RuntimeError, match="a second time"):
        y.tanh().sum().backward()


def test_one_half_at_a_time_comes_back(layers: list[Layer]) -> None:
    """Beside x, the norms and the stacks, which are read throughout."""
    living: list[StorageWeakRef] = []
    most: list[int] = []

    def unpack(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        living.append(StorageWeakRef(copy.untyped_storage()))
        most.append(sum(not one.expired() for one in living))
        return copy

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = run_chain(draw(IMAGES, TOKENS, K, grad=True), layers, ENGINE)
    y.sum().backward()
    # Of an attention's half, and P of fc2 before it.
    assert max(most) == 1 + 4 * len(layers) + 12 + 7 + 1


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
    singles = [lower(layer) for layer in layers]
    x = lower(draw(IMAGES, TOKENS, K, grad=True))
    y = run_chain(x, singles, cpu_engine(torch.bfloat16))
    grads = torch.autograd.grad(y.tanh().sum(), [x, *factors(singles)])
    assert {t.dtype for t in (y, *grads)} == {torch.float32}
    expected = plain(x.double(), layers)
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_a_gradient_that_no_kernel_takes_is_refused(layers: list[Layer]) -> None:
    z = draw(IMAGES, TOKENS, K, grad=True)
    y = run_chain(z, layers, ENGINE)

    def gradient(dy: Tensor, **options: bool) -> Tensor:
        return torch.autograd.grad(y, z, dy, retain_graph=True, **options)[0]

    many = draw(2, *y.shape)
    with pytest.raises(RuntimeError, match=r"no batched gradients.*fuse='pairs'"):
        gradient(many, is_grads_batched=True)
    with pytest.raises(RuntimeError, match=r"no batched gradients.*fuse='pairs'"):
        torch.func.vmap(gradient)(many)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"no forward-mode derivative.*fuse='pairs'"),
    ):
        gradient(forward_ad.make_dual(*many))
    assert gradient(many[0]).isfinite().all()


def test_the_norms_own_gradients_are_not_made() -> None:
    z, norm = draw(5, K), Norm(draw(K), draw(K), 1e-5)
    normed = ENGINE.steps.norm(z, None, norm, draw(K, 2), z.dtype)
    with Recorded("aten") as calls:
        ENGINE.steps.norm_grad(z, z, normed.mean, normed.rstd, norm, z, draw(5, 2))
    masks = [given[-1] for call, given in calls if call.__name__.startswith("native_layer_norm_b")]
    assert masks == [[True, False, False]]


def test_without_biases(layers: list[Layer]) -> None:
    bare = [
        layer._replace(**{kind: getattr(layer, kind)._replace(bias=None) for kind in SIZES})
        for layer in layers
    ]
    x = draw(IMAGES, TOKENS, K)
    torch.testing.assert_close(run_chain(x, bare, ENGINE), plain(x, bare))


def test_linears_that_are_several(layers: list[Layer]) -> None:
    """The weights one under the other, as of q, k and v; with and without biases."""
    x = draw(IMAGES, TOKENS, K, grad=True)
    expected = run_chain(x, layers, ENGINE)
    frozen, thin = operands(layers)
    kinds = []
    for parts, kind in zip((3, 2, 1, 4), frozen.kinds, strict=True):
        weights = [w for weight in kind.weights for w in weight.chunk(parts)]
        biases = [
            b
            for bias in kind.biases
            for b in ([None] * parts if bias is None else bias.chunk(parts))
        ]
        kinds.append(kind._replace(weights=weights, biases=biases))
    found = chains.run_stacks(x, frozen._replace(kinds=kinds), thin, ENGINE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(y.tanh().sum(), [x, *factors(layers)]) for y in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("one_down", [False, True])
def test_several_linears_of_one_input(one_down: bool) -> None:
    down = draw(2, K, 3)
    downs = [down] * 3 if one_down else [draw(2, K, rank) for rank in (3, 1, 2)]
    pairs = [(each, draw(2, n, each.shape[2])) for each, n in zip(downs, (5, 4, 6), strict=True)]
    whole, b = chains.side_by_side(pairs, one_down)
    assert whole.shape == (2, K, 3 if one_down else 6)
    expected = torch.cat([part @ own.mT for own, part in pairs], 1)
    torch.testing.assert_close(b @ whole.mT, expected)
    assert chains.side_by_side(pairs[:1], one_down) == pairs[0]


def test_what_watches_the_model() -> None:
    assert chains.watched() is None
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(chains.watched())
        return x

    x = torch.zeros(2, 3)
    torch.func.vmap(look)(x)
    with forward_ad.dual_level():
        look(x)
    with Recorded():
        look(x)
    with torch.device("cpu"):
        look(x)
    torch.jit.trace(look, x, check_trace=False)
    texts = ["a transform of torch.func"] * 2 + ["a dispatch or function mode is on"] * 2
    for found, text in zip(seen, [*texts, "torch.jit traces the model"], strict=True):
        assert found is not None and found.startswith(text)


def forget() -> None:
    for cached in (chains._steps, chains._in_cuda):
        cached.cache_clear()


@pytest.mark.parametrize("takes", [False, True])
def test_steps_on_a_gpu(monkeypatch: pytest.MonkeyPatch, takes: bool) -> None:
    """CUDA's where they take the sizes, Triton's elsewhere; the same for every call."""
    monkeypatch.setattr(cuda_chain, "takes", lambda *sizes: takes and sizes == (24, 16, 1))
    monkeypatch.setattr(triton_chain, "configs_for", lambda *sizes: sizes)
    measured = dict.fromkeys(cuda_chain.CHOSEN, False) | {"before": True}
    monkeypatch.setattr(cuda_chain, "chosen", lambda *sizes: measured)
    x = SimpleNamespace(shape=(2, 5, 24), numel=lambda: 240, get_device=lambda: 1)
    forget()
    steps = chains.steps_for(x, 16)
    assert not takes or (steps._before and not steps._native_pair)
    assert type(steps) is (cuda_chain.CudaSteps if takes else triton_chain.TritonSteps)
    assert steps.configs == (24, 16, 1) and chains.steps_for(x, 16) is steps
    measured["before"] = False  # another table
    assert (chains.steps_for(x, 16) is steps) != takes
    forget()
    monkeypatch.setattr(chains, "available_backends", lambda: {"triton": "no Triton"})
    assert chains._triton.__wrapped__() == "no Triton"


def test_says_why_nothing_runs_it() -> None:
    x = torch.randn(IMAGES, TOKENS, K)
    assert "is on cpu" in str(refusal(x))
    for other in (torch.nn.Parameter(x), x[0], x[:0]):
        assert "no plain tensor" in str(refusal(other))


def in_graph(x: Tensor, layers: list[Layer], dtype: torch.dtype = torch.float64) -> Tensor:
    return compiled_chain.run_stacks(x, *operands(layers), SDPBackend.MATH.value, dtype)


class TestAsTwoOperators:
    """compiled_chain.py, called in eager mode."""

    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        """(columns, rank) of each engine that computed, in plain torch, and of each stream whose
        gradient it took."""
        found: list[tuple[int, int]] = []

        class Steps(TorchSteps):
            def norm_grad(self, dout: Tensor, z: Tensor, *others: Any) -> Any:
                found.append((z.shape[0], z.shape[1]))
                return super().norm_grad(dout, z, *others)

        def steps_for(x: Tensor, rank: int) -> TorchSteps:
            found.append((x.shape[2], rank))
            return Steps()

        monkeypatch.setitem(chains.ATTENTION, SDPBackend.MATH, ATTENTION)
        monkeypatch.setattr(chains, "steps_for", steps_for)
        return found

    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("learns", [False, True])
    def test_is_the_blocks_of_plain_torch(
        self, layers: list[Layer], made: list[tuple[int, int]], count: int, learns: bool
    ) -> None:
        layers = layers[:count]
        x = draw(IMAGES, TOKENS, K, grad=learns)
        dy = draw(K, TOKENS, IMAGES).permute(2, 1, 0)
        wanted = [*factors(layers), *([x] if learns else [])]
        results = []
        for y in (
            in_graph(x, layers),
            plain(x, layers),
        ):
            results.append([y, *torch.autograd.grad(y, wanted, dy)])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
        streams = 2 * count if learns else 2 * count - 1  # of x none where it needs no gradient
        assert made == [(K, max(RANKS.values()))] * 2 + [(IMAGES * TOKENS, K)] * streams

    def test_no_more_is_copied_than_what_was_given(
        self, layers: list[Layer], made: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own: list[Tensor] = []
        forward = chain_passes.forward

        def kept_by(*given: Any) -> tuple[Tensor, list[Tensor]]:
            y, own[:] = forward(*given)
            return y, own

        with Recorded() as calls:
            in_graph(draw(IMAGES, TOKENS, K), layers)
        monkeypatch.setattr(chain_passes, "forward", kept_by)
        ((operator, arguments),) = calls
        _, kept = operator(*arguments)
        given = {factor.data_ptr() for factor in arguments[2]}
        for found, tensor in zip(kept, own, strict=True):
            same = found.data_ptr() == tensor.data_ptr()
            assert same != (tensor.data_ptr() in given)

    @pytest.mark.parametrize("learns", [False, True])
    def test_what_a_graph_is_told(
        self, layers: list[Layer], made: list[tuple[int, int]], learns: bool
    ) -> None:
        """Shapes, strides and dtypes of both operators' results, of which autocast changes none."""
        singles = [lower(layer) for layer in layers]
        x = draw(IMAGES, TOKENS, K).float().requires_grad_(learns)
        dy = draw(K, TOKENS, IMAGES).permute(2, 1, 0).float()
        results = []
        for autocast in (False, True):
            with Recorded() as calls, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = in_graph(x, singles, torch.float32)
                results.append([y, *torch.autograd.grad(y, factors(singles), dy)])
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert len(calls) == 2
        for operator, arguments in calls:
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(operator, arguments, test_utils=tests)
        made.clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            for operator, arguments in calls:
                operator(*arguments)
        assert not made  # no kernel is asked for

    def test_a_second_derivative_is_refused(
        self, layers: list[Layer], made: list[tuple[int, int]]
    ) -> None:
        x = draw(IMAGES, TOKENS, K, grad=True)
        y = in_graph(x, layers)
        (dx,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivative.*fuse='pairs'"):
            dx.sum().backward()

    def test_what_another_version_kept_is_refused(
        self, layers: list[Layer], made: list[tuple[int, int]]
    ) -> None:
        with Recorded() as calls:
            x = draw(IMAGES, TOKENS, K, grad=True)
            in_graph(x, layers).sum().backward()
        operator, arguments = calls[1]
        kept = arguments[4]
        for other in (kept[:-1], [*kept, x]):
            with pytest.raises(RuntimeError, match=r"kept must have 37 tensors, got 3[68]: "):
                operator(*arguments[:4], other, *arguments[5:])


class Recorded(TorchDispatchMode):
    """(operator, arguments) of all calls of the operators in a namespace."""

    def __init__(self, namespace: str = "efft_kernels") -> None:
        super().__init__()
        self.namespace = namespace

    def __enter__(self) -> list[tuple[Any, Any]]:
        super().__enter__()
        self.calls: list[tuple[Any, Any]] = []
        return self.calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.namespace == self.namespace:
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


class TestOnAGpuThatIsNotThere:
    """Fake tensors on it, under autocast, with Triton; torch chooses cuDNN's attention."""

    @pytest.fixture
    def choice(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
        found: dict[str, Any] = {"backend": CUDNN}

        def choose(q: Tensor, k: Tensor, v: Tensor) -> int:
            assert q.requires_grad and q.shape == k.shape == v.shape
            found.update(shape=tuple(q.shape), dtype=q.dtype, device=q.device)
            return found["backend"].value

        monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
        monkeypatch.setattr(chains, "Tensor", FakeTensor)
        monkeypatch.setattr(chains, "_triton", lambda: None)
        monkeypatch.setattr(chains, "too_old", lambda index: "too old" if index == 2 else None)
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with FakeTensorMode():
            autocast_to(torch.bfloat16)
            yield found
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])

    def test_what_a_chain_runs_over(
        self, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def both(x: Tensor) -> tuple[str | None, bool]:
            return refusal(x), chains.refusal_of_graph(x)

        x = torch.empty(2, 5, 64, device="cuda")
        for dtype in (torch.float16, torch.bfloat16):
            autocast_to(dtype)
            assert both(x) == (None, False)
        assert both(torch.empty(2, 5, 64)) == (
            "the blocks' input is on cpu, and the chain is for CUDA",
            True,
        )
        assert both(x.half()) == (
            "the blocks' input is torch.float16, and the chain's is float32",
            True,
        )
        for dtype in (None, torch.float32):
            autocast_to(dtype)
            assert both(x) == ("autocast to float16 or bfloat16 is off", True)
        autocast_to(torch.bfloat16)
        with use_backend("torch"):
            assert both(x) == ("backend 'torch' was asked for", True)
        for other in (x[0], x[:0]):
            assert "no plain tensor" in str(refusal(other))
        assert refusal(torch.empty(2, 5, 64, device="cuda:2")) == "too old"
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert refusal(x) == "deterministic algorithms were asked for"
        assert chains.attention_of_graph(5, 64, 2, 16, torch.float16, 0) is None

    def test_what_runs_it(self, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chains, "steps_for", lambda x, rank: (x.shape, rank))
        x = torch.empty(2, 5, 3 * 8, device="cuda:1")
        for backend in (CUDNN, FLASH):
            choice["backend"] = backend
            found = engine_for(x, 3, 128)
            assert found == ((x.shape, 128), chains.ATTENTION[backend], torch.bfloat16)
            asked = {"shape": (2, 3, 5, 8), "dtype": torch.bfloat16, "device": x.device}
            assert choice == asked | {"backend": backend}
            number = chains.attention_of_graph(7, 24, 3, 128, torch.float16, 1)
            assert number == backend.value
            asked = {"shape": (1, 3, 7, 8), "dtype": torch.float16, "device": x.device}
            assert choice == asked | {"backend": backend}
        assert chains.attention_of_graph(7, 24, 3, 128, torch.float16, None) == FLASH.value
        assert choice["device"] == torch.device("cuda", 0)

    @pytest.mark.parametrize(
        ("k", "heads", "rank", "backend", "why"),
        [
            (24, 3, 129, CUDNN, "no stream of 24 columns with a rank of 129"),
            (
                triton_chain.MAX_WIDTH + 8,
                1,
                16,
                CUDNN,
                "with a rank of 16",
            ),
            (24, 3, 16, SDPBackend.MATH, "for these heads"),
            (25, 3, 16, CUDNN, "for these heads"),
            (36, 3, 16, CUDNN, "for these heads"),  # heads of 12 columns
            (triton_chain.MAX_WIDTH, 4, 16, CUDNN, None),
        ],
    )
    def test_sizes(
        self, choice: dict[str, Any], k: int, heads: int, rank: int, backend: Any, why: str | None
    ) -> None:
        choice["backend"] = backend
        found = engine_for(torch.empty(2, 5, k, device="cuda"), heads, rank) if why else None
        assert why is None or why in str(found)
        number = chains.attention_of_graph(5, k, heads, rank, torch.float16, 0)
        assert number == (None if why else backend.value)

    def test_what_cannot_run_is_not_in_a_graph(
        self, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def found(index: int) -> int | None:
            return chains.attention_of_graph(5, 24, 3, 16, torch.float16, index)

        assert found(0) == CUDNN.value and found(2) is None
        monkeypatch.setattr(chains, "_triton", lambda: "no Triton")
        assert found(0) is None and refusal(torch.empty(2, 5, 24, device="cuda")) == "no Triton"

    @pytest.mark.parametrize("backend", [CUDNN, FLASH], ids=lambda b: b.name)
    def test_attention(self, choice: dict[str, Any], backend: Any) -> None:
        """No dropout and no mask, and all that the backward needs goes through a graph."""
        q, k, v = (torch.empty(2, 3, 5, 64, device="cuda", dtype=torch.float16) for _ in range(3))
        attention = chains.ATTENTION[backend]
        with Scalars() as given:
            o, kept = attention.forward(q, k, v)
            tensors = [t for t in kept if isinstance(t, Tensor)]
            assert len(tensors) == attention.kept
            assert [*attention.restore(tensors, 5)] == [*kept]
            assert len(attention.backward(o, q, k, v, o, *kept)) == 3
        forward, backward = given
        assert forward == ([True] if backend == CUDNN else [])  # whether it gives log-sum-exp
        assert backward == [5, 5, 0.0, False]


def autocast_to(dtype: torch.dtype | None) -> None:
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or torch.float16)


class Scalars(TorchDispatchMode):
    """The numbers among the arguments of all calls of an attention."""

    def __enter__(self) -> list[list[Any]]:
        super().__enter__()
        self.calls: list[list[Any]] = []
        return self.calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if "attention" in function.__name__:
            self.calls.append([a for a in args if isinstance(a, int | float)])
        return function(*args, **(kwargs or {}))


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
