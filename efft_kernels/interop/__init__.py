"""Other projects' files: PEFT LoRA checkpoints, read and written, and the FacT release's, read;
the Hugging Face hub's repositories; and, in trainer.py, the checkpoints of transformers' Trainer.

All or nothing both ways: a file is checked whole before the model is touched, and a folder is
written under a temporary name and renamed. Tensors come from safetensors, or from `torch.load` with
weights_only=True where the format knows nothing else; nothing beyond that is unpickled.
"""

from .fact import import_fact
from .hub import from_pretrained, push_to_hub, save_pretrained
from .peft import export_peft_lora, import_peft_lora

__all__ = [
    "export_peft_lora",
    "from_pretrained",
    "import_fact",
    "import_peft_lora",
    "push_to_hub",
    "save_pretrained",
]
