"""Settings and fixtures for every test: one thread, fixed seeds, small models, poisoned memory."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import hypothesis
import pytest
import torch
from torch import nn

from efft_kernels.testing.poison import poisoned_allocations

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "efft", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("efft")
# Processes that a test starts by "forkserver" need not import these once more, for 4 s each.
multiprocessing.get_context("forkserver").set_forkserver_preload(["efft_kernels.training.run"])


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that share a fixture of their module go to one process, which makes it once."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        fixtures = getattr(item, "_fixtureinfo", None)
        if fixtures is None or item.get_closest_marker("xdist_group"):
            continue
        own = item.nodeid.partition("::")[0]
        for name, found in fixtures.name2fixturedefs.items():
            if any(each.scope == "module" and each.baseid == own for each in found):
                item.add_marker(pytest.mark.xdist_group(f"{own}:{name}"))
                break


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: a garbage collection need not walk it, 0.7 s each time."""
    gc.collect()
    gc.freeze()
    _check_groups(session)


def _check_groups(session: pytest.Session) -> None:
    """pytest-xdist writes a test's group into its node id. With a pytest whose node ids it does not
    know it would ignore all groups without a word."""
    if not getattr(session.config.option, "loadgroup", False):
        return
    for item in session.items:
        group = item.get_closest_marker("xdist_group")
        if group is not None and not item.nodeid.endswith(f"@{group.args[0]}"):
            raise pytest.UsageError(
                f"pytest-xdist does not group tests under pytest {pytest.__version__}: install the"
                " versions in constraints.txt"
            )


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20231106)


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFT_KERNELS_BACKEND", raising=False)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled graph is there before the test, and none of its own after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every fresh floating allocation holds NaN."""
    with poisoned_allocations(warn_only=torch.cuda.is_available()):
        yield


@pytest.fixture
def make_vit() -> Callable[..., nn.Module]:
    """A timm ViT of a few thousand parameters, none of them at a special value."""

    def make(
        distilled: bool = False, dtype: torch.dtype = torch.float32, seed: int = 7, **options: Any
    ) -> nn.Module:
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(seed)
        kind = VisionTransformerDistilled if distilled else VisionTransformer
        sizes = {"img_size": 8, "patch_size": 4, "num_classes": 5}
        sizes |= {"embed_dim": 12, "depth": 2, "num_heads": 3}
        model = kind(**(sizes | options)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


@pytest.fixture
def randomize() -> Callable[[Any], None]:
    """Give every factor of an adapter or layer random values, so that ΔW is not zero."""

    def fill(module: Any, std: float = 0.3) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter) * std)

    return fill


@pytest.fixture
def unchanged() -> Callable[..., AbstractContextManager[None]]:
    """A context at whose end a model has the very modules, parameters and values it had; with
    `swapped=True` modules of the same types will do."""

    def identities(model: nn.Module, swapped: bool) -> Any:
        return (
            [(name, type(m) if swapped else id(m)) for name, m in model.named_modules()],
            [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        )

    @contextmanager
    def check(model: nn.Module, swapped: bool = False) -> Iterator[None]:
        before = identities(model, swapped)
        values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        yield
        assert identities(model, swapped) == before
        state = model.state_dict()
        assert state.keys() == values.keys()
        assert all(torch.equal(tensor, values[name]) for name, tensor in state.items())

    return check
