"""Checkpoints of transformers' Trainer that hold what was trained, and no copy of the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..atomic_files import replacing
from .hub import ADAPTER
from .left_out import adapted_module, base_parameters

WEIGHTS = "model.safetensors"
IN_PARTS = ("model-?????-of-?????.safetensors", "model.safetensors.index.json")


class AdapterCheckpoints(TrainerCallback):
    """Makes every checkpoint one of the adapter: `Trainer(..., callbacks=[AdapterCheckpoints()])`.

    A checkpoint gets an adapter.safetensors, for `load` or `from_pretrained`, and its
    model.safetensors is written anew with what Trainer needs to resume: all but the frozen base,
    under the names that the model has in memory. Trainer resumes by these, while
    `PreTrainedModel.save_pretrained`, by which it saves, renames the blocks of many models.
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
        parts = [path for pattern in IN_PARTS for path in folder.glob(pattern)]
        if not parts and not (folder / WEIGHTS).is_file():
            return  # FSDP and DeepSpeed write and read files of their own
        base = base_parameters(model, path, adapter)
        kept = {
            name: tensor.detach().clone()  # safetensors refuses tensors that share memory
            for name, tensor in model.state_dict().items()
            if name not in base
        }
        with replacing(folder / WEIGHTS) as temporary:
            save_file(kept, temporary, {"format": "pt"})
        for part in parts:
            part.unlink()
