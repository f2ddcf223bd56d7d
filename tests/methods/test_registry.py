"""What holds of every registered method, the next one included: nothing here names one."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import efft_kernels
from efft_kernels import AdapterSet, attach, load
from efft_kernels.methods import METHODS, Method, method_from_config

IMAGES = torch.linspace(-1, 1, 4 * 3 * 8 * 8, dtype=torch.float64).view(4, 3, 8, 8)


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def kind(request):
    return request.param


@pytest.fixture
def model(make_vit):
    """Wide enough for every method's own defaults."""
    return make_vit(embed_dim=16, num_heads=2, dtype=torch.float64).eval()


def test_methods_import_nothing_but_torch():
    """And functions.py, which imports nothing but torch either."""
    methods = Path(efft_kernels.methods.__file__).parent
    for path in (*methods.glob("*.py"), methods.parent / "functions.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [alias.name for alias in node.names]
                allowed = node.level == 1 or (node.module is None and names == ["functions"])
                assert allowed, f"{path.name}: from {'.' * node.level}{node.module or ''} {names}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or alias.name for alias in node.names]
                roots = {name.partition(".")[0] for name in names}
                assert roots <= {"torch"} | sys.stdlib_module_names, f"{path.name}: {roots}"


def test_is_a_public_name(kind):
    assert getattr(efft_kernels, kind.__name__) is kind
    assert kind.__name__ in efft_kernels.__all__


def test_its_configuration_survives_json(kind):
    assert method_from_config(json.loads(json.dumps(kind().to_config()))) == kind()


def test_its_free_fields_are_fields(kind):
    """All but those that every method may have."""
    fields = {field.name for field in dataclasses.fields(kind)}
    assert kind.free_fields - Method.free_fields <= fields


def test_factor_matrices_are_matrices(kind, model):
    adapter = attach(model, kind())
    for site in adapter.sites:
        group = adapter.bank.group(site.name)
        assert all(group.get_parameter(name).ndim == 2 for name in group.factor_matrices)


def test_the_whole_life_of_an_adapter(kind, model, randomize, tmp_path):
    plain = copy.deepcopy(model)
    before = model(IMAGES)
    adapter = attach(model, kind())
    torch.testing.assert_close(model(IMAGES), before, rtol=1e-11, atol=1e-11)
    assert not any(delta.any() for delta in adapter.delta_weights().values())
    model(IMAGES).square().sum().backward()
    grads = [p.grad for p in adapter.parameters()]
    assert all(grad is not None for grad in grads) and any(grad.any() for grad in grads)

    randomize(adapter)
    after = model(IMAGES)
    assert (after - before).abs().max() > 1e-3
    adapter.merge()
    torch.testing.assert_close(model(IMAGES), after, rtol=1e-9, atol=1e-9)
    adapter.unmerge()
    adapter.save(tmp_path / "a.safetensors")
    loaded = load(plain, tmp_path / "a.safetensors")
    assert loaded.method == kind() and torch.equal(plain(IMAGES), after)

    tasks = AdapterSet(adapter)
    tasks.add("a", tmp_path / "a.safetensors")
    randomize(adapter)
    tasks.add("b")
    other = model(IMAGES)
    with tasks.tasks("abba"), torch.no_grad():
        mixed = model(IMAGES)
    expected = torch.stack([after[0], other[1], other[2], after[3]])
    torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-9)
    adapter.detach()
    assert torch.equal(model(IMAGES), before)
