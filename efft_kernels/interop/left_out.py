"""What a checkpoint of an adapted model need not hold: the frozen base, which the model has."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.attachment import BANK_NAME, AttachedBank, is_inside


def adapted_module(module: nn.Module, name: str | None = None) -> tuple[str, Adapter]:
    """(name, adapter) of the one adapted model in a module, or of the one called `name`.

    Raises:
        ValueError: there is none, or several and no name.
    """
    found = {
        path: inner
        for path, inner in module.named_modules()
        if isinstance(inner._modules.get(BANK_NAME), AttachedBank)
    }
    if (name is None and len(found) == 1) or name in found:
        path = next(iter(found)) if name is None else name
        return path, Adapter(found[path])
    expected = "hold one adapted model" if name is None else f"hold an adapted model {name!r}"
    raise ValueError(
        f"{type(module).__name__} must {expected}, got {', '.join(map(repr, found)) or 'none'}:"
        " call attach or load on it first, or name one of several"
    )


def base_parameters(module: nn.Module, path: str, adapter: Adapter) -> dict[str, Tensor]:
    """The frozen parameters in `module` that belong neither to the adapter nor to what is trained
    along with it; those stay in a checkpoint though they be frozen by now.

    Args:
        module: the module that is checkpointed.
        path: name of the adapted model in it, "" where it is that itself.
        adapter: that model's.
    """
    kept = [".".join(filter(None, (path, own))) for own in (BANK_NAME, *adapter.modules_to_train)]
    return {
        name: parameter.detach()
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and not is_inside(name, kept)
    }
