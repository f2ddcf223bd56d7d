"""Adapted linears that make their x again: on every family, gradients as ever and next to nothing
kept beside what the frozen model keeps."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from efft_kernels import EFFT1, EFFT2, FacTTK, FacTTT, LoRA, attach, load

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
# The families, and what of x their linears cannot make again: (first block, later ones).
TIMM = {
    "vit_tiny_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "deit3_small_patch16_224": SMALL,
    "beit_base_patch16_224": SMALL,
    "eva02_tiny_patch14_224": SMALL | {"patch_size": 4},
    "vit_base_patch16_clip_quickgelu_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "vit_small_patch14_dinov2": SMALL,
    "vit_small_patch16_dinov3": SMALL,
}
SWIN = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "window_size": 4,
}
HUGGING_FACE = ["ViTForImageClassification", "Dinov2ForImageClassification", "CLIPVisionModel",
                "Dinov2 with SwiGLU"]  # fmt: skip
MODELS = [*TIMM, "swin_tiny_patch4_window7_224", *HUGGING_FACE]
METHOD = EFFT2(rank=2, scale=0.7, dropout=0.0)
ALL_FOUR = LoRA(rank=2, scale=0.7, matrices=("q", "k", "v", "o", "fc1", "fc2"))


def build(name):
    """(a small model with all parameters at random values, its images)."""
    torch.manual_seed(4)
    size = 16
    if name in TIMM:
        model = timm.create_model(name, num_classes=3, **TIMM[name])
    elif name.startswith("swin"):
        size, model = 32, timm.create_model(name, num_classes=3, **SWIN)
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "image_size": 16, "patch_size": 4}  # fmt: skip
        if name.startswith("Dinov2"):
            config = transformers.Dinov2Config(
                **sizes, num_labels=3, mlp_ratio=4, use_swiglu_ffn="SwiGLU" in name
            )
            model = transformers.Dinov2ForImageClassification(config)
        elif name.startswith("CLIP"):
            config = transformers.CLIPVisionConfig(**sizes, intermediate_size=64)
            model = transformers.CLIPVisionModel(config)
        else:
            config = transformers.ViTConfig(**sizes, num_labels=3, intermediate_size=64)
            model = transformers.ViTForImageClassification(config)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train(), torch.randn(2, 3, size, size, dtype=torch.float64)


def forward(model, images):
    found = model(images)
    return found if isinstance(found, torch.Tensor) else found[-1]


def adapt(model, method, fuse, with_head=True, targets=None):
    with_head = with_head and type(model).__name__ != "CLIPVisionModel"
    trained = ("head",) if with_head else ()
    adapter = attach(model, method, targets=targets, modules_to_train=trained, fuse=fuse)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return adapter


def step(model, images, run=forward):
    """[outputs, all gradients of what trains] of one training step."""
    model.zero_grad()
    torch.manual_seed(8)  # of drop paths
    y = run(model, images)
    y.sin().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def compare(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", [METHOD, ALL_FOUR], ids=["EFFT2", "LoRA"])
@pytest.mark.parametrize("name", [*MODELS, "swinv2_tiny_window8_256"])
def test_gradients_are_as_ever(name, method):
    model, images = build(name)
    twin = copy.deepcopy(model)
    adapter = adapt(model, method, "pairs")
    adapt(twin, method, "off")
    compare(step(model, images), step(twin, images))
    assert {row["input"] for row in adapter.describe().rows} > {"kept"}


def kept_bytes(model, images):
    """Bytes kept for the backward: each storage once, parameters and buffers apart."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(model, images.requires_grad_())
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    y.sum().backward()
    return total


@pytest.mark.parametrize("method", [METHOD, ALL_FOUR], ids=["EFFT2", "LoRA"])
@pytest.mark.parametrize("name", MODELS)
def test_next_to_nothing_is_kept(name, method):
    """Beside the frozen model's own: a P [M, Ra] for each linear, and what its factors are made of.
    A whole x [M, K] of any one linear would be more than is allowed."""
    model, images = build(name)
    images = images.repeat(16, 1, 1, 1)  # so that rows outweigh factors
    model.requires_grad_(False)
    frozen = kept_bytes(model, images)
    # A pooling head's linears each read something of their own.
    targets = "blocks.*" if name == "vit_base_patch16_siglip_224" else None
    adapter = adapt(model, method, "pairs", with_head=False, targets=targets)
    rows = {}

    def count(module, inputs, output):
        rows[module] = inputs[0].numel() // inputs[0].shape[-1]

    handles = [layer.register_forward_hook(count) for layer in adapter.layers().values()]
    forward(model, images)
    for handle in handles:
        handle.remove()
    layers = adapter.layers().values()
    projections = sum(8 * rows[layer] * layer.current_factors().down.shape[1] for layer in layers)
    factors = sum(
        8 * t.numel() for layer in layers for t in layer.current_factors() if t is not None
    )
    found = kept_bytes(model, images)
    assert frozen < found
    assert found - frozen <= projections + 6 * factors
    allowed = found - frozen - projections
    assert allowed < min(8 * rows[layer] * layer.in_features for layer in layers)


def test_what_describe_tells():
    model, images = build("vit_tiny_patch16_224")
    adapter = adapt(model, METHOD, "auto")
    assert {row["input"] for row in adapter.describe().rows} == {None}
    forward(model, images)
    inputs = {row["name"]: row["input"] for row in adapter.describe().rows}
    # The first block's x needs no gradient, so its norm keeps nothing.
    assert inputs["blocks.0.attn.qkv"] == "kept"
    assert inputs["blocks.1.attn.qkv"] == inputs["blocks.1.mlp.fc1"] == "LayerNorm"
    assert inputs["blocks.0.mlp.fc2"] == "GELU"
    assert inputs["blocks.1.attn.proj"] == "kept"  # by the attention too
    assert "made again, out of GELU: 2: blocks.*.mlp.fc2" in str(adapter.describe())


def test_off_keeps_every_x():
    model, images = build("vit_tiny_patch16_224")
    adapter = adapt(model, METHOD, "off")
    forward(model, images)
    assert {row["input"] for row in adapter.describe().rows} == {"kept"}


def test_fuse_is_checked_and_load_takes_it(tmp_path):
    model, images = build("vit_tiny_patch16_224")
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"fuse must be .*auto.*pairs.*off.*'all'"):
        attach(model, METHOD, fuse="all")
    adapter = adapt(model, METHOD, "pairs")
    adapter.save(tmp_path / "a.safetensors")
    loaded = load(twin, tmp_path / "a.safetensors", fuse="off")
    compare(step(model, images), step(twin, images))
    assert {row["input"] for row in loaded.describe().rows} == {"kept"}
    assert {row["input"] for row in adapter.describe().rows} > {"kept"}


def replaced(model):
    """A hook that puts another tensor in the place of the norm's output."""
    model.blocks[1].norm2.register_forward_hook(lambda module, inputs, output: output + 0.5)


def shared_by_blocks(model):
    """One norm for two linears of different blocks."""
    model.blocks[1].norm2 = model.blocks[0].norm2


def written(model):
    """A hook that writes to the norm's output behind autograd's back."""

    def write(module, inputs, output):
        with torch.no_grad():
            output.mul_(1.5)

    model.blocks[1].norm2.register_forward_hook(write)


def subclassed(model):
    class Other(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x).sin()

    model.blocks[1].norm2.__class__ = Other


@pytest.mark.parametrize(
    ("broken", "input_from"),
    [
        (replaced, "kept"),
        (shared_by_blocks, "LayerNorm"),
        (written, "kept"),
        (subclassed, "kept"),
    ],
)
def test_a_pair_that_is_broken_on_purpose(broken, input_from):
    model, images = build("vit_tiny_patch16_224")
    broken(model)
    twin = copy.deepcopy(model)
    adapter = adapt(model, METHOD, "pairs")
    adapt(twin, METHOD, "off")
    compare(step(model, images), step(twin, images))
    inputs = {row["name"]: row["input"] for row in adapter.describe().rows}
    assert inputs["blocks.1.mlp.fc1"] == input_from


def test_the_norms_output_may_be_used_twice():
    model, images = build("vit_tiny_patch16_224")
    mlp = model.blocks[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + x.tanh()
    twin = copy.deepcopy(model)
    twin.blocks[1].mlp.forward = lambda x: type(mlp).forward(twin.blocks[1].mlp, x) + x.tanh()
    adapt(model, METHOD, "pairs")
    adapt(twin, METHOD, "off")
    compare(step(model, images), step(twin, images))


@pytest.mark.parametrize("method", [EFFT1(rank=2), FacTTT(rank=2), FacTTK(rank=2)])
def test_other_methods(method):
    model, images = build("vit_tiny_patch16_224")
    twin = copy.deepcopy(model)
    adapt(model, method, "pairs")
    adapt(twin, method, "off")
    compare(step(model, images), step(twin, images))


def checkpointed(reentrant):
    def run(model, images):
        x = model.patch_embed(images.requires_grad_())
        x = model._pos_embed(x)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.forward_head(model.norm(x))

    return run


def accumulated(model, images):
    y = forward(model, images)
    y.cos().sum().backward(retain_graph=True)
    return y


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit_tiny_patch16_224", METHOD),
        ("vit_tiny_patch16_224", FacTTT(rank=2, dropout=0.3)),  # on x·down·core
        ("swin_tiny_patch4_window7_224", FacTTT(rank=2, dropout=0.3)),
        ("ViTForImageClassification", METHOD),  # q, k and v share x·down
    ],
    ids=["EFFT2", "dropout", "dropout, windows", "shared"],
)
def test_many_gradients_at_once(name, method):
    model, images = build(name)
    adapter = adapt(model, method, "pairs")
    y = forward(model, images)
    rows = torch.randn(3, *y.shape, dtype=y.dtype)
    trained = list(adapter.parameters())

    def gradients(dy, **options):
        return torch.autograd.grad(y, trained, dy, retain_graph=True, **options)

    found = gradients(rows, is_grads_batched=True)
    compare(found, map(torch.stack, zip(*map(gradients, rows), strict=True)))


def in_two_halves(model, images):
    return torch.cat([forward(model, half) for half in images.chunk(2)])


def as_a_copy(model, images):
    """The copy's gradients, put on the model."""
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    forward(twin, images).sin().sum().backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        own.grad = other.grad
    return forward(model, images) * 0 + forward(twin, images).detach()


@pytest.mark.parametrize(
    "run",
    [checkpointed(False), checkpointed(True), accumulated, in_two_halves, as_a_copy],
    ids=["checkpoint", "reentrant checkpoint", "accumulated", "two halves", "a copy"],
)
def test_ways_of_training(run):
    model, images = build("vit_tiny_patch16_224")
    twin = copy.deepcopy(model)
    adapt(model, METHOD, "pairs")
    adapt(twin, METHOD, "off")
    compare(step(model, images, run), step(twin, images, run))


def test_trainable_norms_and_biases():
    model, images = build("vit_tiny_patch16_224")
    twin = copy.deepcopy(model)
    adapt(model, METHOD, "pairs")
    adapt(twin, METHOD, "off")
    for either in (model, twin):
        for module in either.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
            elif getattr(module, "bias", None) is not None:
                module.bias.requires_grad_(True)
    compare(step(model, images), step(twin, images))
    torch.optim.SGD(model.parameters(), 0.1).step()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    compare(step(model, images), step(twin, images))


def test_only_some_linears():
    for targets in ("ffn", "mhsa", "mlp.fc2", "attn.qkv"):
        model, images = build("vit_tiny_patch16_224")
        twin = copy.deepcopy(model)
        for either, fuse in ((model, "pairs"), (twin, "off")):
            torch.manual_seed(6)
            attach(either, ALL_FOUR, targets=targets, fuse=fuse)
        compare(step(model, images), step(twin, images))


def test_nothing_is_kept_where_nothing_trains():
    model, images = build("vit_tiny_patch16_224")
    adapter = adapt(model, METHOD, "pairs")
    kept = []
    with torch.no_grad(), saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        forward(model, images)
        adapter.merge()
        forward(model.eval(), images)
        adapter.unmerge()
    assert kept == []


def fake(model, images):
    """A model's step in a mode in which tensors have shapes alone, as one asks for memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {name: mode.from_tensor(t) for name, t in model.state_dict(keep_vars=True).items()}
    with mode:
        y = torch.func.functional_call(model, state, (mode.from_tensor(images),))
        y = y if isinstance(y, torch.Tensor) else y[-1]
        y.sum().backward()


def meta(model, images):
    """A step of a copy without memory."""
    forward(copy.deepcopy(model).to("meta"), images.to("meta")).sum().backward()


@pytest.mark.parametrize("run", [fake, meta])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit_tiny_patch16_224", METHOD),
        ("swin_tiny_patch4_window7_224", FacTTT(rank=2, dropout=0.3)),
        ("ViTForImageClassification", METHOD),
    ],
    ids=["EFFT2", "dropout, windows", "shared"],
)
def test_tensors_without_values(name, method, run):
    """They cannot tell whether x is made again, and leave nothing behind for those that can."""
    model, images = build(name)
    twin = copy.deepcopy(model)
    adapter = adapt(model, method, "pairs")
    adapt(twin, method, "off")
    run(model, images)
    assert not any(layer._recipes for layer in adapter.layers().values())
    if run is fake:
        assert {row["input"] for row in adapter.describe().rows} > {"kept"}
    compare(step(model, images), step(twin, images))
    run(model, images)
    compare(step(model, images), step(twin, images))


def test_detach_gives_plain_linears():
    model, images = build("vit_tiny_patch16_224")
    adapter = adapt(model, METHOD, "pairs")
    forward(model, images)
    adapter.detach()
    for name in ("remakes_input", "input_from"):
        assert not hasattr(model.blocks[0].mlp.fc1, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    model, images = build("vit_tiny_patch16_224")
    model, images = model.float(), images.float()
    twin = copy.deepcopy(model)
    adapt(model, METHOD, "pairs")
    adapt(twin, METHOD, "off")

    def run(model, images):
        with torch.autocast("cpu", dtype):
            return forward(model, images).float()

    found, expected = step(model, images, run), step(twin, images, run)
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 0.03 * b.abs().max()


def test_compiled_with_the_partitioners_switch():
    """torch.compile decides itself what to keep; the switch that README names lets it make again
    what a custom operator reads."""
    model, images = build("vit_tiny_patch16_224")
    model, images = model.float(), images.float().repeat(16, 1, 1, 1)
    model.requires_grad_(False)
    backend = "aot_eager_decomp_partition"
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        torch._dynamo.reset()
        frozen = kept_bytes(torch.compile(model, backend=backend), images)
        adapter = adapt(model, METHOD, "pairs", with_head=False)
        torch._dynamo.reset()
        found = kept_bytes(torch.compile(model, backend=backend), images)
    factors = sum(
        4 * t.numel() for layer in adapter.layers().values() for t in layer.current_factors()
    )
    projections = 4 * 544 * 2 * len(adapter.layers())
    assert found <= frozen + projections + 2 * factors


def test_an_input_that_hooks_watch():
    """Full backward hooks on the producers see what they saw."""

    def watched(fuse):
        model, images = build("vit_tiny_patch16_224")
        adapt(model, METHOD, fuse)
        seen = []
        for block in model.blocks:
            for module in (block.norm1, block.norm2, block.mlp.act):
                module.register_full_backward_hook(
                    lambda module, inputs, outputs: seen.extend(outputs)
                )
        step(model, images)
        return seen

    compare(watched("pairs"), watched("off"))
