"""Separate query, key and value linears that share x·down, against the same layers that do not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from efft_kernels import EFFT2, Adapter, attach
from efft_kernels.ops import layer as ops_layer
from efft_kernels.ops.shared_projection import SharedInput

pytestmark = pytest.mark.usefixtures("in_torch")

D = 12
X = torch.linspace(-1, 1, 2 * 5 * D, dtype=torch.float64).sin().view(2, 5, D)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).mT
        return torch.softmax(scores, -1) @ self.value(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Module()
        self.attention.attention = Attention()

    def forward(self, x):
        return x + self.attention.attention(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([Block(), Block()])
        self.classifier = nn.Linear(D, 3)

    def forward(self, x):
        for block in self.layer:
            x = block(x)
        return self.classifier(x.mean(-2))


@pytest.fixture
def shared_calls(monkeypatch):
    calls = []
    real = ops_layer.linear_plus_projected

    def recording(*args):
        calls.append(args[0].shape)
        return real(*args)

    monkeypatch.setattr(ops_layer, "linear_plus_projected", recording)
    return calls


@pytest.fixture
def models(randomize):
    """An adapted model twice: as it comes, and with a fixed strategy, which shares nothing."""
    model = Model().double()
    adapter = attach(model, EFFT2(rank=3, dropout=0.0, scale=1.0))
    randomize(adapter, 0.3)
    alone = copy.deepcopy(model)
    for layer in Adapter(alone).layers().values():
        layer.strategy = "split"
    return model, alone


def factors(model):
    return list(model.factor_bank.parameters())


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_first_derivatives(models, shared_calls):
    results = []
    for model in models:
        x = X.clone().requires_grad_()
        y = model(x).tanh()
        results.append([y, *torch.autograd.grad(y.sum(), [x, *factors(model)])])
    assert len(shared_calls) == 6  # of the first model alone
    close(*results)


@pytest.mark.parametrize(("targets", "shared"), [(["query", "value"], 4), (["key"], 0)])
def test_two_share_as_three_do_and_one_does_not(randomize, shared_calls, targets, shared):
    model = Model().double()
    randomize(attach(model, EFFT2(rank=3, dropout=0.0), targets=targets), 0.3)
    model(X)
    assert len(shared_calls) == shared


def test_what_is_shared_ends_with_the_attention_also_after_an_error(models):
    """Its hooks have a number in common, below torch's own: graphs of equal modules are alike."""
    model, _ = models
    attentions = [block.attention.attention for block in model.layer]
    shared = [attention.query.shared_input for attention in attentions]
    for attention in attentions:
        assert (
            list(attention._forward_hooks) == list(attention._forward_hooks_always_called) == [-1]
        )
    attentions[1].value.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X)
    assert not any(each.active for each in shared)
    Adapter(model).detach()
    for attention in attentions:
        assert not attention._forward_hooks and not attention._forward_pre_hooks
        assert not attention._forward_hooks_always_called


def test_a_hook_of_the_users_own_keeps_its_number():
    model = Model()
    attention = model.layer[0].attention.attention
    handle = attention.register_forward_hook(lambda *_: None)
    attach(model, EFFT2(rank=3))
    assert list(attention._forward_hooks) == [handle.id, -1]


def test_second_derivatives(models, shared_calls):
    results = []
    for model in models:
        first = torch.autograd.grad(model(X).tanh().sum(), factors(model), create_graph=True)
        penalty = sum(grad.pow(2).sum() for grad in first)
        results.append(torch.autograd.grad(penalty, factors(model)))
    assert len(shared_calls) == 6
    close(*results)


def test_torch_func(models):
    results = []
    for model in models:
        values = dict(model.factor_bank.named_parameters(prefix="factor_bank"))

        def loss(values, row, model=model):
            return torch.func.functional_call(model, values, (row,)).tanh().sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, X)
        results.append(list(per_sample.values()))
    close(*results)


class WritesInPlace(Attention):
    def forward(self, x):
        q = self.query(x)
        k = self.key(x.mul_(2))
        x[..., 0] = 3
        return q + k + self.value(x)


class QueryWithoutGradients(Attention):
    def forward(self, x):
        with torch.no_grad():
            q = self.query(x)
        return q * self.key(x) + self.value(x)


class QueryUnderAutocast(Attention):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert self.query(x).dtype == torch.bfloat16
        return self.key(x) + self.value(x)


def attentions_of(models, kind):
    """The first attention of each model, computing as `kind` does."""
    found = [model.layer[0].attention.attention for model in models]
    for attention in found:
        attention.__class__ = kind
    return found


@pytest.mark.parametrize(
    ("mode", "inference"),
    [(torch.no_grad, False), (torch.inference_mode, False), (torch.inference_mode, True)],
)
def test_what_is_written_in_place_is_not_shared(models, mode, inference):
    """Also where torch does not count the writes: to tensors that inference mode made."""
    with torch.inference_mode(inference):
        inputs = [X.clone() for _ in models]
    with mode():
        shared, alone = (
            attention(x)
            for attention, x in zip(attentions_of(models, WritesInPlace), inputs, strict=True)
        )
    close([shared], [alone])


def test_what_was_made_without_gradients_is_not_shared_with_what_needs_them(models):
    results = []
    for model, attention in zip(models, attentions_of(models, QueryWithoutGradients), strict=True):
        parameters = [p for name, p in model.factor_bank.named_parameters() if "mhsa" in name]
        grads = torch.autograd.grad(attention(X).tanh().sum(), parameters, allow_unused=True)
        assert None not in grads
        results.append(grads)
    close(*results)


def test_what_autocast_made_is_not_shared_outside_it(models):
    models = [model.float() for model in models]
    x = X.float()
    shared, alone = (attention(x) for attention in attentions_of(models, QueryUnderAutocast))
    assert shared.dtype == alone.dtype == torch.float32
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed(models, use_reentrant):
    results = []
    for model in models:
        x = X.clone().requires_grad_()
        y = checkpoint(model.layer[0], x, use_reentrant=use_reentrant)
        model.layer[1](y).tanh().sum().backward()
        results.append([p.grad for p in [x, *factors(model)]])
    close(*results)


def test_exported(models, shared_calls):
    """An export counts nothing that is written in place."""
    for attention in attentions_of(models, WritesInPlace):
        with torch.no_grad():
            expected = attention(X.clone())
            shared_calls.clear()
            exported = torch.export.export(attention, (X.clone(),), strict=False).module()
            assert not shared_calls
            torch.testing.assert_close(exported(X.clone()), expected, rtol=1e-11, atol=1e-11)


def test_compiled(models, shared_calls):
    """Nothing is shared in a graph, which could not hold it under checkpointing."""
    results = []
    for model in models:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results.append(torch.autograd.grad(compiled(X).tanh().sum(), factors(model)))
    close(*results)
    assert not shared_calls


def test_a_graph_leaves_what_is_shared_alone(monkeypatch):
    """What an eager forward around it has opened, that forward closes."""
    shared = SharedInput()
    for compiling, opened in ((True, False), (False, True), (True, True), (False, True)):
        for name in ("is_dynamo_compiling", "is_compiling"):
            monkeypatch.setattr(torch.compiler, name, lambda now=compiling: now)
        shared.open(None, ())
        assert shared.active is opened
        assert shared.serves(X, "auto", "auto") is not compiling
    down = torch.ones(D, 2, dtype=X.dtype)
    held = shared.projection(X, down)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    shared.open(None, ())
    shared.close(None, (), None)
    assert shared.active and shared.projection(X, down) is held
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: False)
    shared.close(None, (), None)
    assert not shared.active
