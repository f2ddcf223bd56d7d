"""Hugging Face's ViT and DINOv2, whose layers run as a chain, against the same model whose layers
run one module after the other.

On the CPU plain torch stands in for what runs a chain on a GPU, in float64.
"""

from __future__ import annotations

import pytest
import torch

from efft_kernels import (
    EFFT1,
    EFFT2,
    FacTTK,
    FacTTT,
    KAdaptation,
    LoRA,
    attach,
)
from efft_kernels.ops import chains
from efft_kernels.testing.cpu_chain import cpu_engine

transformers = pytest.importorskip("transformers", minversion="5.20")

EFFT = EFFT2(rank=3, dropout=0.0, scale=0.7)
NOISY = EFFT2(rank=3, dropout=0.3, scale=0.7)
METHODS = [
    EFFT1(rank=3, dropout=0.0, scale=0.7),
    EFFT1(rank=3, dropout=0.0, scale=0.7, attention_side="in"),
    EFFT,
    EFFT2(rank=(3, 2), ffn_rank=4, dropout=0.0, learn_scale=True, cores="shared"),
    NOISY,
    FacTTT(rank=(2, 3), dropout=0.0),
    FacTTK(rank=3, layer_rank=4, dropout=0.0),
    LoRA(rank=2, matrices=None),
    LoRA(rank=2, matrices=None, dropout=0.3),
    KAdaptation(products=2, matrices=None),
]
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 8,
         "patch_size": 4, "num_labels": 5}  # fmt: skip
MODELS = {
    "vit": ("ViTConfig", "ViTForImageClassification"),
    "deit": ("DeiTConfig", "DeiTForImageClassification"),
    "vit_msn": ("ViTMSNConfig", "ViTMSNForImageClassification"),
    "ijepa": ("IJepaConfig", "IJepaForImageClassification"),
    "vit_mae": ("ViTMAEConfig", "ViTMAEModel"),
    "vivit": ("VivitConfig", "VivitForVideoClassification"),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersForImageClassification",
    ),
}


def make(name="vit", kind=None, seed=5, **options):
    """A model in float64 and training, no parameter at a special value."""
    config, own = (getattr(transformers, each) for each in MODELS[name])
    own = own if kind is None else getattr(transformers, kind)
    sizes = {"mlp_ratio": 4} if name.startswith("dinov2") else {"intermediate_size": 96}
    if name == "vivit":
        sizes |= {"num_frames": 2, "tubelet_size": [2, 4, 4]}
    torch.manual_seed(seed)
    model = own(config(**(SIZES | sizes | options))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


@pytest.fixture
def runs(monkeypatch):
    """The chains that ran. What runs one takes tensors of the CPU, in any dtype."""

    def run_stacks(*arguments):
        found.append(arguments)
        return run(*arguments)

    found, run = [], chains.run_stacks
    monkeypatch.setattr(chains, "refusal", lambda x: None)
    monkeypatch.setattr(chains, "engine_for", lambda x, heads, rank: cpu_engine(x.dtype))
    monkeypatch.setattr(chains, "run_stacks", run_stacks)
    return found


@pytest.fixture
def models(randomize):
    """(a chained model, the same attached with fuse="pairs")."""

    def both(name="vit", method=EFFT, attaching=(), **options):
        pair = []
        for fuse in ("auto", "pairs"):
            model = make(name, **options)
            adapter = attach(model, method, fuse=fuse, **dict(attaching))
            torch.manual_seed(5)
            randomize(adapter)
            pair.append(model)
        return pair

    return both


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def output(result):
    return result.logits if "logits" in result else result.last_hidden_state


def step(model, images, **options):
    """The output and all gradients; the masks of dropout are the same in every call."""
    torch.manual_seed(11)
    model.zero_grad()
    y = output(model(images, **options))
    y.tanh().sum().backward()
    return [y.detach(), *(p.grad for p in trained(model))]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_is_the_model_of_lone_linears(models, images, runs, name, method):
    model, twin = models(name, method)
    close(step(model, images), step(twin, images))
    assert len(runs) == 1
