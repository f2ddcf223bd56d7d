"""Checkpoints of transformers' Trainer that hold what was trained, and no copy of the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..atomic_files import replacing
from .hub import ADAPTER
from .left_out import adapted_module, base_parameters

WEIGHTS = "model.safetensors"


class AdapterCheckpoints(TrainerCallback):
    """Makes every checkpoint one of the adapter: `Trainer(..., callbacks=[AdapterCheckpoints()])`.

    A checkpoint gets an adapter.safetensors, for `load` or `from_pretrained`, and its
    model.safetensors is left with what Trainer needs to resume: all but the frozen base.
    Trainer says that keys are missing when it resumes; these are the frozen ones, which the model
    has.
    """

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by Trainer after it has written a checkpoint."""
        if not state.is_world_process_zero:
            return
        model: nn.Module = given["model"]
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        path, adapter = adapted_module(model)
        adapter.save(folder / ADAPTER)
        weights = folder / WEIGHTS
        if weights.is_file():  # and not in parts, as those of a very large model are
            base = base_parameters(model, path, adapter)
            kept = {name: t for name, t in load_file(weights).items() if name not in base}
            with replacing(weights) as temporary:
                save_file(kept, temporary, {"format": "pt"})
