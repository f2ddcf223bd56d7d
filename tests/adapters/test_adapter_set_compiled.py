"""A batch of several tasks as one compiled graph, which knows no task by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from efft_kernels import EFFT2, AdapterSet, LoRA, attach

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def tasks_of(make_vit, randomize):
    def make(method, seed=7):
        model = make_vit(seed=seed, depth=1)
        tasks = AdapterSet(attach(model.eval(), method))
        for name, classes in zip("abcd", (5, 3, 5, 4), strict=True):
            model.reset_classifier(classes)
            for part in (tasks.adapter, model.head):
                randomize(part)
            tasks.add(name)
        return tasks

    return make


def images(rows):
    return torch.linspace(-1, 1, rows * 192).view(rows, 3, 8, 8)


def same(tasks, run, ids):
    with torch.no_grad(), tasks.tasks(ids):
        expected = tasks.model(images(len(ids)))
    torch.testing.assert_close(run(ids, images(len(ids))), expected, rtol=1e-5, atol=1e-5)
    assert tasks.adapter.bank.traced is None


def test_one_graph_for_all_tasks_and_batches(tasks_of):
    tasks = tasks_of(EFFT2(rank=3, scale=0.7))
    counter = CompileCounterWithBackend("aot_eager")
    run = tasks.compiled(backend=counter)
    for ids in ("ab", "ba", "cc", "abcd", "dca", "bbbbb"):
        same(tasks, run, ids)
    assert counter.frame_count == 1
    tasks.add("e", tasks.adapter.state_dict())
    for ids in ("ed", "eab", "dddd", "abcdea"):
        same(tasks, run, ids)
    assert counter.frame_count == 1


def test_models_side_by_side(tasks_of):
    for seed, method in enumerate((LoRA(rank=2), EFFT2(rank=2))):
        tasks = tasks_of(method, seed=seed)
        run = tasks.compiled(backend="eager")
        same(tasks, run, "ab")
        plain = tasks.model(images(2))
        same(tasks, run, "cda")
        assert torch.equal(tasks.model(images(2)), plain)
        assert copy.deepcopy(tasks.model).factor_bank.traced is None


def test_it_raises_as_tasks_does(tasks_of):
    tasks = tasks_of(LoRA(rank=2))
    run = tasks.compiled(backend="eager")
    with pytest.raises(ValueError, match="got 2 for 3 rows"):
        run("ab", images(3))
    with pytest.raises(KeyError, match="no adapter 'x'"):
        run("ax", images(2))
    with tasks.tasks("ab"), pytest.raises(RuntimeError, match=r"leave tasks\(\) first"):
        run("ab", images(2))
    tasks.adapter.merge()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\)"):
        run("ab", images(2))


def test_a_compiled_model_names_the_way_out(tasks_of):
    tasks = tasks_of(LoRA(rank=2))
    compiled = torch.compile(tasks.model, backend="eager", fullgraph=True)
    with (
        torch.no_grad(),
        tasks.tasks("ab", batch_first=True),
        pytest.raises(Exception, match=r"AdapterSet\.compiled\(\)"),
    ):
        compiled(images(2))
