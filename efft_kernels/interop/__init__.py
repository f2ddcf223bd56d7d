"""Other projects' files: PEFT LoRA checkpoints, read and written, and the FacT release's, read.

All or nothing both ways: a file is checked whole before the model is touched, and a folder is
written under a temporary name and renamed. Tensors come from safetensors, or from `torch.load` with
weights_only=True where the format knows nothing else; nothing beyond that is unpickled.
"""

from .fact import import_fact
from .peft import export_peft_lora, import_peft_lora

__all__ = ["export_peft_lora", "import_fact", "import_peft_lora"]
