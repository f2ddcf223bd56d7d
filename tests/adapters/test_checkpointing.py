"""Activation checkpointing that keeps some results, and in compiled graphs."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from efft_kernels import EFFT1, EFFT2, FacTTK, KAdaptation, LoRA, attach, use_backend

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default}


SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
         "patch_size": 4}  # fmt: skip


def keep_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("method", [LoRA(rank=2), EFFT2(rank=2, dropout=0.0)], ids=lambda m: m.name)
def test_kept_products_are_not_written_to(randomize, method, backend):
    """With q, k and v apart, so that they share x·down."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, intermediate_size=24)
    model = transformers.ViTModel(config, add_pooling_layer=False).double().eval()
    adapter = attach(model, method, modules_to_train=())
    randomize(adapter)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def gradients():
        with use_backend(backend):
            y = model(pixel_values=images).last_hidden_state
            return torch.autograd.grad(y.tanh().sum(), list(adapter.parameters()))

    expected = gradients()
    for layer in model.layers:
        layer.forward = partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, keep_products),
        )
    for found, wanted in zip(gradients(), expected, strict=True):
        assert wanted.norm() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "method",
    [EFFT2(rank=2, dropout=0.3), KAdaptation(products=2, scale=0.7)],
    ids=lambda method: method.name,
)
def test_compiled_for_any_batch_size(make_vit, randomize, method):
    """Two checkpointed blocks use one group's numbers, its scale and rate of dropout."""
    model = make_vit()
    randomize(attach(model, method, strict=True))
    model.set_grad_checkpointing(True)
    compiled = torch.compile(model.train(), backend="eager", dynamic=True)
    for batch in (2, 3):
        compiled(torch.randn(batch, 3, 8, 8)).sum().backward()
        assert all(p.grad.norm() > 0 for p in model.factor_bank.parameters())


def gradients(model, run, seed=1):
    """A gradient of each factor for the loss of `run` over two images, the seed's masks drawn."""
    torch.manual_seed(seed)
    images = torch.linspace(-1, 1, 2 * 192, dtype=torch.float64).view(2, 3, 8, 8)
    y = run(images)
    y = y if isinstance(y, torch.Tensor) else y.last_hidden_state
    return torch.autograd.grad(y.tanh().sum(), list(model.factor_bank.parameters()))


def equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.fixture
def of_hugging_face(randomize):
    """A model in training, in float64, with an adapter that is not at its start."""
    transformers = pytest.importorskip("transformers")
    makers = {
        "ViT": lambda: transformers.ViTModel(
            transformers.ViTConfig(**SIZES, intermediate_size=48), add_pooling_layer=False
        ),
        "DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
        "CLIP": lambda: transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**SIZES, intermediate_size=48)
        ),
    }

    def make(name, method):
        torch.manual_seed(0)
        model = makers[name]().double().train()
        randomize(attach(model, method, modules_to_train=(), strict=True))
        return model

    return make


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
class TestHuggingFacesOwn:
    """Its layers are checkpointed inside one graph, which may write to no object of the model's."""

    @pytest.mark.parametrize(
        ("name", "method", "use_reentrant"),
        [
            ("ViT", EFFT2(rank=2, dropout=0.0), False),
            ("DINOv2", EFFT1(rank=2, dropout=0.0), True),
            ("CLIP", FacTTK(rank=2, dropout=0.0), False),
        ],
        ids=["ViT", "DINOv2 reentrant", "CLIP"],
    )
    def test_in_one_graph(self, of_hugging_face, name, method, use_reentrant):
        model = of_hugging_face(name, method)
        expected = gradients(model, model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        backend = CompileCounterWithBackend("aot_eager")
        equal(gradients(model, torch.compile(model, fullgraph=True, backend=backend)), expected)
        (graph,) = backend.graphs
        checkpoints = [n for n in graph.graph.nodes if "tag_activation_checkpoint" in str(n.target)]
        assert len(checkpoints) == 2

    def test_masks_are_drawn_once(self, of_hugging_face):
        """A segment that is run again takes the masks that it had."""
        model = of_hugging_face("ViT", EFFT2(rank=2, dropout=0.3))
        plain = copy.deepcopy(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found, expected = (
            gradients(m, torch.compile(m, fullgraph=True, backend="aot_eager"))
            for m in (model, plain)
        )
        equal(found, expected)
        other = gradients(plain, plain, seed=2)
        assert all(not torch.allclose(a, b) for a, b in zip(other, expected, strict=True))

    @pytest.mark.usefixtures("in_torch")
    def test_between_graph_breaks(self, of_hugging_face):
        """A hook that no graph takes leaves several graphs, and what is between them eager."""
        model = of_hugging_face("ViT", EFFT2(rank=2, dropout=0.3))
        for layer in model.layers:
            layer.attention.k_proj.register_forward_pre_hook(
                lambda module, args: torch._dynamo.graph_break()
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})
        expected = gradients(model, model)
        equal(gradients(model, torch.compile(model, backend="aot_eager")), expected)
        assert not any(linear.shared_input.active for linear in _sharing(model))


def _sharing(model):
    found = [m for m in model.modules() if getattr(m, "shared_input", None) is not None]
    assert len(found) == 3 * len(model.layers)
    return found


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_model_inside_a_checkpoint(make_vit, randomize):
    """In one graph, which still takes slices of the cores, as for all blocks at once."""
    model = make_vit(dtype=torch.float64)
    randomize(attach(model, EFFT2(rank=2, dropout=0.0), strict=True))
    backend = CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=False), fullgraph=True, backend=backend
    )
    equal(gradients(model, run), gradients(model, model))
    (graph,) = backend.graphs
    targets = [str(n.target) for m in graph.modules() for n in m.graph.nodes]
    assert "linear" in " ".join(targets) and "pick_rows" not in " ".join(targets)
