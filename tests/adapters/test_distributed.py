"""The whole life of an adapter on two processes: FSDP2's sharded factors, and DDP."""

from __future__ import annotations

import json
import os
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from efft_kernels import (
    EFFT2,
    AdapterSet,
    LoRA,
    attach,
    export_peft_lora,
    import_peft_lora,
    load,
)

METHODS = {
    "efft": EFFT2(rank=(3, 2), dropout=0.0, learn_scale=True),
    "lora": LoRA(rank=2, matrices=None),
}
WORLD = 2


class Block(nn.Module):
    """Named as timm's, which takes each process seconds to import."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(12, 48), nn.Linear(48, 12)

    def forward(self, x):
        q, k, v = self.attn.qkv(x).chunk(3, -1)
        x = x + self.attn.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(x)))


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.blocks(x))


def vit():
    torch.manual_seed(0)
    return Model(Block(), Block()).eval()


def torchs_encoder():
    torch.manual_seed(0)
    return Model(nn.TransformerEncoderLayer(12, 2, 48, 0.0, batch_first=True)).eval()


def adapted(method, make=vit, seed=3):
    model = make()
    adapter = attach(model, METHODS[method], strict=True)
    fill(adapter, seed)
    return model, adapter


def fill(adapter, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)


def sharded(method, whole_only=False, make=vit, seed=3):
    model, adapter = adapted(method, make, seed)
    for block in () if whole_only else model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model, adapter


def inputs():
    return torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(4))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def is_the_model_of_the_file(folder, model, path, make=vit):
    plain = make()
    load(plain, path)
    close(model(inputs()), plain.eval()(inputs()))


def trains_and_saves(folder, method, whole_only):
    """A step, then the file, on a plain model: the same as a plain model's step."""
    plain, plain_adapter = adapted(method)
    model, adapter = sharded(method, whole_only)
    for one in (plain, model):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.1)
        one(inputs()).square().sum().backward()
        optimizer.step()
    adapter.save(folder / "a")
    for name, delta in plain_adapter.delta_weights().items():
        close(adapter.delta_weights()[name], delta)
    is_the_model_of_the_file(folder, plain, folder / "a")
    is_the_model_of_the_file(folder, model, folder / "a")


def merges(folder, method, whole_only):
    plain, _ = adapted(method)
    with torch.no_grad():
        expected = plain(inputs())
        model, adapter = sharded(method, whole_only)
        base = [p.full_tensor().clone() for p in model.state_dict().values()]
        model(inputs())  # the root stays gathered
        adapter.merge()
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        close(model(inputs()), expected)
        adapter.unmerge()
        after = [p.full_tensor() for p in model.state_dict().values()]
        assert all(map(torch.equal, base, after))
        close(model(inputs()), expected)


def loads_and_describes(folder, method, whole_only):
    plain, plain_adapter = adapted(method, seed=5)
    model, adapter = sharded(method, whole_only)
    with torch.no_grad():
        model(inputs())
        adapter.load_state_dict(plain_adapter.state_dict())
        close(model(inputs()), plain(inputs()))
    assert adapter.describe().rows == plain_adapter.describe().rows
    assert adapter.describe().groups == plain_adapter.describe().groups


def exports(folder, method, whole_only):
    model, adapter = sharded(method, whole_only)
    export_peft_lora(adapter, folder / "peft")
    plain = vit()
    import_peft_lora(plain, folder / "peft")
    with torch.no_grad():
        close(model(inputs()), plain(inputs()))


def holds_many_tasks(folder, method, whole_only):
    expected = []
    model, adapter = sharded(method, whole_only)
    tasks = AdapterSet(adapter)
    with torch.no_grad():
        for i, name in enumerate("ab"):
            plain, plain_adapter = adapted(method, seed=7 + i)
            adapter.load_state_dict(plain_adapter.state_dict())
            tasks.add(name)
            expected.append(plain(inputs()))
        tasks.use("a")
        close(model(inputs()), expected[0])
        with tasks.tasks(["a", "b"]):
            close(model(inputs()), torch.stack([expected[0][0], expected[1][1]]))
        tasks.update("b")
        tasks.use("b")
        close(model(inputs()), expected[0])


def refuses(folder, method, whole_only):
    model, adapter = sharded(method, whole_only)
    other = fully_shard(vit())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"fully_shard has divided .*save it"):
            adapter.detach()
        with pytest.raises(RuntimeError, match=r"cannot be adapted: call attach or load first"):
            attach(other, METHODS[method])
        model(inputs()), other(inputs())  # the roots stay gathered
    close(model(inputs()), adapted(method)[0](inputs()))


def adapts_torchs_attention(folder):
    plain, _ = adapted("efft", torchs_encoder)
    model, adapter = sharded("efft", make=torchs_encoder)
    close(model.train()(inputs()), plain.train()(inputs()))
    model(inputs()).sum().backward()
    adapter.save(folder / "a")
    is_the_model_of_the_file(folder, plain.eval(), folder / "a", torchs_encoder)
    adapter.merge()
    with torch.no_grad():
        close(model.eval()(inputs()), plain(inputs()))


def runs_in_ddp(folder, method):
    rank = dist.get_rank()
    plain, plain_adapter = adapted(method)
    plain(inputs()).square().mean().backward()
    model, adapter = adapted(method)
    wrapped = DistributedDataParallel(model)
    wrapped(inputs()[rank : rank + 1]).square().mean().backward()
    for (name, p), q in zip(adapter.named_parameters(), plain_adapter.parameters(), strict=True):
        assert q.grad.norm() > 0, name
        close(p.grad, q.grad)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)
    adapter.save(folder / "a")
    is_the_model_of_the_file(folder, wrapped, folder / "a")
    before = wrapped(inputs()).detach()
    adapter.merge()
    close(wrapped(inputs()).detach(), before)


FSDP2 = (trains_and_saves, merges, loads_and_describes, exports, holds_many_tasks, refuses)
CASES = {
    f"{check.__name__}, {method}{', root alone' * whole_only}": (check, method, whole_only)
    for check in FSDP2
    for method in METHODS
    for whole_only in ((False, True) if check in (trains_and_saves, merges, refuses) else (False,))
}
CASES |= {f"runs_in_ddp, {method}": (runs_in_ddp, method) for method in METHODS}
CASES["adapts_torchs_attention"] = (adapts_torchs_attention,)


def worker(rank, folder):
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    found = {}
    for i, (name, (check, *options)) in enumerate(CASES.items()):
        own = folder / f"{rank}.{i}"
        own.mkdir()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "adapted linears")
                check(own, *options)
        except Exception:
            found[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"found.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in CASES if "ddp" not in name])
def test_on_one_process(name, tmp_path):
    """Sharded tensors as well, each of one part."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check, *options = CASES[name]
        check(tmp_path, *options)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What failed in each process, by the check's name: two processes run all of them once."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.start_processes(worker, (folder,), nprocs=WORLD, start_method="forkserver")
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(failures, name):
    assert not any(name in found for found in failures), "\n".join(
        found.get(name, "") for found in failures
    )
