"""What a checkpoint leaves out of a module that holds an adapted model."""

from __future__ import annotations

import pytest
from torch import nn

from efft_kernels import LoRA, attach
from efft_kernels.interop.left_out import adapted_module, base_parameters


@pytest.fixture
def make_adapted(make_vit):
    """A ViT with an adapter, whose head is trained whole."""

    def make():
        model = make_vit(depth=1)
        attach(model, LoRA(rank=2))
        return model

    return make


def test_the_one_adapted_model_is_found(make_adapted):
    model = make_adapted()
    path, adapter = adapted_module(model)
    assert (path, adapter.model) == ("", model)
    outer = nn.ModuleDict({"first": nn.Linear(2, 2), "model": model})
    for name in (None, "model"):
        path, adapter = adapted_module(outer, name)
        assert (path, adapter.model) == ("model", model)
    for name in ("first", "absent"):
        with pytest.raises(ValueError, match=f"hold an adapted model '{name}', got 'model':"):
            adapted_module(outer, name)


def test_of_several_adapted_models_one_has_to_be_named(make_adapted):
    models = nn.ModuleDict({"a": make_adapted(), "b": make_adapted()})
    with pytest.raises(ValueError, match="ModuleDict must hold one adapted model, got 'a', 'b':"):
        adapted_module(models)
    path, adapter = adapted_module(models, "b")
    assert (path, adapter.model) == ("b", models["b"])
    with pytest.raises(ValueError, match="must hold one adapted model, got none:"):
        adapted_module(nn.Linear(2, 2))


def test_the_base_is_what_is_frozen_and_no_part_of_the_adapter(make_adapted):
    """Under every name that it has; what was trained stays, though it be frozen by now."""
    outer = nn.ModuleDict({"model": make_adapted(), "own": nn.Linear(2, 2)})
    path, adapter = adapted_module(outer)
    outer["model"].again = outer["model"].blocks
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    names = [name for name, _ in outer.named_parameters(remove_duplicate=False)]
    kept = ("own.", "model.factor_bank.", "model.head.")
    base = base_parameters(outer, path, adapter)
    assert set(base) == {name for name in names if not name.startswith(kept)}
    assert "model.again.0.mlp.fc1.weight" in base and "model.pos_embed" in base
    assert not any(parameter.requires_grad for parameter in base.values())
    outer["own"].weight.requires_grad_(False)
    assert set(base_parameters(outer, path, adapter)) == {*base, "own.weight"}
