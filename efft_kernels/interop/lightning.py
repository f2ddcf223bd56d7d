"""Checkpoints of Lightning's Trainer that hold what was trained, and no copy of the backbone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from .left_out import adapted_module, base_parameters

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

_SHAPES = "efft_kernels.left_out"  # in a checkpoint: name → shape of each parameter left out
_OWN_WRITERS = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}


class AdapterCheckpoints(Callback):  # type: ignore[misc]
    """Makes every checkpoint one of the adapter: `Trainer(..., callbacks=[AdapterCheckpoints()])`.

    A checkpoint X.ckpt holds all but the frozen base, which the module that resumes from it has by
    itself: optimizers, schedulers and loops as ever. Beside it lies X.safetensors, for `load` or
    `from_pretrained`; it goes when Lightning removes X.ckpt. `Trainer` of `lightning` and of
    `pytorch_lightning` take it alike. `LightningModule.load_from_checkpoint` reads files by itself,
    and needs `strict=False`.

    Args:
        model: name of the adapted model in the LightningModule, such as "model"; None for the only
            one.
    """

    def __init__(self, model: str | None = None) -> None:
        self.model = model

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Called by Trainer before anything is saved or loaded.

        Raises:
            ValueError: the strategy writes checkpoints of its own kind.
        """
        strategy = trainer.strategy
        if _OWN_WRITERS & {kind.__name__ for kind in type(strategy).__mro__}:
            raise ValueError(
                "strategy must be one that writes whole checkpoints, as 'ddp' does, for"
                f" AdapterCheckpoints, got {type(strategy).__name__}: leave the callback out and"
                " call Adapter.save on every process"
            )
        inner = strategy.checkpoint_io
        if isinstance(inner, _AdapterIO):
            inner = inner.inner
        strategy.checkpoint_io = _AdapterIO(inner, pl_module, self.model)


class _AdapterIO:
    """A CheckpointIO of Lightning around another; a strategy writes on one process alone.

    Args:
        inner: what writes and reads.
        module: the LightningModule. Its adapter may still be missing: it is looked for when it is
            needed.
        model: as in AdapterCheckpoints.
    """

    def __init__(self, inner: Any, module: nn.Module, model: str | None) -> None:
        self.inner = inner
        self.module = module
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kw: Any) -> None:
        if "state_dict" not in checkpoint:  # weights on their way out of a spawned process
            self.inner.save_checkpoint(checkpoint, path, *args, **kw)
            return
        where, adapter = adapted_module(self.module, self.model)
        base = base_parameters(self.module, where, adapter)
        state = {name: t for name, t in checkpoint["state_dict"].items() if name not in base}
        shapes = {name: list(tensor.shape) for name, tensor in base.items()}
        self.inner.save_checkpoint(
            {**checkpoint, "state_dict": state, _SHAPES: shapes}, path, *args, **kw
        )
        if (file := _beside(path)) is None:
            warnings.warn(
                f"{path} is on no local disk: no adapter.safetensors is written beside it",
                stacklevel=2,
            )
        else:
            adapter.save(file)

    def load_checkpoint(self, path: Any, *args: Any, **kw: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = self.inner.load_checkpoint(path, *args, **kw)
        shapes = checkpoint.get(_SHAPES)
        if shapes is not None:
            own = dict(self.module.named_parameters(remove_duplicate=False))
            for name, shape in shapes.items():
                found = list(own[name].shape) if name in own else "none"
                if found != shape:
                    raise ValueError(
                        f"{type(self.module).__name__} must have {name} of {shape}, which"
                        f" {path} was written without, got {found}"
                    )
            base = {name: own[name].detach() for name in shapes}
            checkpoint["state_dict"] = base | checkpoint["state_dict"]
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)
        if (file := _beside(path)) is not None:
            file.unlink(missing_ok=True)


def _beside(path: Any) -> Path | None:
    """The adapter's file of a checkpoint; None for an address."""
    text = str(path)
    return None if "://" in text else Path(text.removesuffix(".ckpt") + ".safetensors")
