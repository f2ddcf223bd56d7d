"""Whatever composes, merges, exports or analyses factors gives the same bits under autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from efft_kernels import (
    AdapterSet,
    attach,
    export_peft_lora,
    import_peft_lora,
    load,
)
from efft_kernels.analysis import subspace
from efft_kernels.methods import METHODS

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def merge(adapter, folder):
    adapter.merge()
    weights = {name: layer.weight.clone() for name, layer in adapter.layers().items()}
    adapter.unmerge()
    return weights


def merge_in_training(adapter, folder):
    """Dropout is for forwards alone."""
    adapter.model.train()
    try:
        return merge(adapter, folder)
    finally:
        adapter.model.eval()


def detach_merged(adapter, folder):
    model = copy.deepcopy(adapter.model)
    twin = type(adapter)(model)
    twin.merge()
    return dict(twin.detach().state_dict())


def delta_weights(adapter, folder):
    return adapter.delta_weights()


def factors(adapter, folder):
    found = {}
    for name, layer in adapter.layers().items():
        for part, tensor in layer.current_factors()._asdict().items():
            if tensor is not None:
                found[f"{name} {part}"] = tensor
    return found


def joint(adapter, folder):
    found = {}
    for group in adapter.bank.children():
        if group.joint:
            for site, operands in group.joint_factors(False).items():
                found |= {f"{site} down": operands.down, f"{site} up": operands.up}
    return found


def gradients(adapter, folder):
    """Of what was composed, in a backward outside the context as in a training loop."""
    loss = sum(
        (down.sum() if core is None else core.square().sum() * down.sum()) * up.square().sum()
        for down, core, up in (layer.current_factors() for layer in adapter.layers().values())
    )
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    with torch.autocast("cpu", enabled=False):
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def save(adapter, folder):
    adapter.save(folder / "a.safetensors")
    other = load(adapter.plain, folder / "a.safetensors")
    found = {name: delta.clone() for name, delta in other.delta_weights().items()}
    other.detach()
    return found | load_file(folder / "a.safetensors")


def export(adapter, folder):
    export_peft_lora(adapter, folder / "peft")
    other = import_peft_lora(adapter.plain, folder / "peft")
    found = {name: delta.clone() for name, delta in other.delta_weights().items()}
    other.detach()
    return found | load_file(folder / "peft" / "adapter_model.safetensors")


def analyse(adapter, folder):
    found = {f"factor {k}": v for k, v in subspace.factor_matrices(adapter).items()}
    for part in subspace.PARTS:
        for side in subspace.SIDES:
            if (matrix := subspace.part_matrix(adapter, part, side)) is not None:
                found[f"{part} {side}"] = matrix
                found[f"{part} {side} vectors"] = subspace.top_left_singular_vectors(matrix)
                grid = subspace.similarity_grid(matrix, matrix.flip(1) + 0.1)
                found[f"{part} {side} grid"] = torch.as_tensor(grid)
    comparisons = subspace.between_groups(adapter)
    for side in subspace.SIDES:
        for role in subspace.roles(adapter):
            comparisons += subspace.between_blocks(adapter, role, side)
    return found | {
        str(i): torch.tensor(list(map(ord, repr(c)))) for i, c in enumerate(comparisons)
    }


def alone(adapter, folder):
    """The adapter of a file without its model."""
    adapter.save(folder / "alone.safetensors")
    return subspace.load_alone(folder / "alone.safetensors").delta_weights()


def task_factors(adapter, folder):
    tasks = AdapterSet(adapter)
    tasks.add("a")
    with tasks.tasks("aa"), torch.no_grad():
        found = {name: adapter.bank.task_factors(name) for name in adapter.layers()}
    return {f"{n} {side}": getattr(f, side) for n, f in found.items() for side in ("down", "up")}


USES = [
    merge, merge_in_training, detach_merged, delta_weights, factors, joint, gradients, save, export,
    analyse, alone, task_factors,
]  # fmt: skip


@pytest.fixture(scope="module")
def adapters():
    """One adapted model of each method, with the plain model."""
    from timm.models.vision_transformer import VisionTransformer

    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(3)
            sizes = {"img_size": 8, "patch_size": 4, "num_classes": 5}
            model = VisionTransformer(**sizes, embed_dim=16, depth=2, num_heads=2).eval()
            plain = copy.deepcopy(model)
            adapter = attach(model, METHODS[name]())
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.normal_(std=0.3)
            adapter.plain = plain
            made[name] = adapter
        return made[name]

    return make


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_autocast_changes_no_bit(adapters, tmp_path, name, use, half):
    adapter = adapters(name)
    (tmp_path / "out").mkdir(), (tmp_path / "in").mkdir()
    expected = use(adapter, tmp_path / "out")
    with torch.autocast("cpu", dtype=half):
        found = use(adapter, tmp_path / "in")
    assert expected or use is joint
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
