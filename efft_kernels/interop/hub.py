"""An adapter as a repository of the Hugging Face hub, or as a folder: its file and its card."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.attach import load
from ..atomic_files import write_text

ADAPTER, CARD = "adapter.safetensors", "README.md"


def save_pretrained(
    adapter: Adapter, folder: str | os.PathLike[str], *, base_model: str | None = None
) -> None:
    """Write an adapter and a model card into a folder, which `from_pretrained` reads.

    A card that is there already is left as it is.

    Args:
        adapter: not merged.
        folder: made where it is missing.
        base_model: the hub's name of the model that was adapted; None for what the model says.

    Raises:
        ValueError: `folder` is a file.
        OSError: the folder cannot be made or written.
    """
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"folder must be a folder, got the file {path}; Adapter.save writes files")
    path.mkdir(parents=True, exist_ok=True)
    adapter.save(path / ADAPTER)
    if not (path / CARD).exists():
        write_text(path / CARD, model_card(adapter, base_model))


def from_pretrained(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    keep_head: bool = False,
    fuse: str = "auto",
    strict: bool = False,
) -> Adapter:
    """Attach to `model` the adapter of a folder or of a repository on the hub.

    Args:
        model: the base model, as for `load`.
        source: a folder that `save_pretrained` wrote, else the name of a repository.
        revision, token, cache_dir: as in `huggingface_hub.hf_hub_download`.
        keep_head: as in `load`: take the factors alone, beside the model's own head.
        fuse, strict: as in `attach`.

    Raises:
        ValueError: the source holds no adapter, or as for `load`.
        TypeError: as for `load`.
    """
    path = Path(source) / ADAPTER
    if Path(source).is_dir():
        if not path.is_file():
            raise ValueError(f"source must be a folder with {ADAPTER}, got {source} without it")
        return load(model, path, keep_head=keep_head, fuse=fuse, strict=strict)
    if _is_path(str(source)):
        what = "a file: `load` reads one" if Path(source).is_file() else "where there is no folder"
        raise ValueError(
            f"source must be a folder with {ADAPTER}, or a repository, got {source}, {what}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = hf_hub_download(
            str(source), ADAPTER, revision=revision, token=token, cache_dir=cache_dir
        )
    except (HFValidationError, OSError) as error:  # the hub's errors are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"source must be a folder or a repository with {ADAPTER}, got {source} ({reason})"
        ) from error
    return load(model, found, keep_head=keep_head, fuse=fuse, strict=strict)


def _is_path(source: str) -> bool:
    """Whether what is no folder was meant as one: a repository is NAME or OWNER/NAME."""
    path = Path(source)
    return (
        path.exists()
        or path.is_absolute()
        or source.startswith(("~", "."))
        or source.count("/") > 1
    )


def push_to_hub(
    adapter: Adapter,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> str:
    """Upload an adapter and its card to the hub; the repository is made where it is missing.

    A card that is there already is left as it is.

    Args:
        adapter: not merged.
        repo_id: the repository, "user/name".
        base_model: as for `save_pretrained`.
        private, token, revision, commit_message: as in huggingface_hub's `HfApi`.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(adapter, folder, base_model=base_model)
        if api.file_exists(repo_id, CARD, revision=revision):
            (Path(folder) / CARD).unlink()
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return str(commit.commit_url)


def model_card(adapter: Adapter, base_model: str | None = None) -> str:
    """The card's text: what was adapted, how, and how to load it."""
    from huggingface_hub import ModelCardData

    base = base_model or _base_of(adapter.model)
    data = ModelCardData(
        library_name="efft-kernels",
        base_model=base,
        tags=["efft-kernels", "parameter-efficient-fine-tuning", adapter.method.name],
    )
    what = base or f"a {type(adapter.model).__name__}"
    return f"""---
{data.to_yaml()}
---

# {adapter.method.name} adapter of {what}

{adapter.num_parameters():,} parameters in {len(adapter.sites)} linears: `{adapter.method}`.
Trained whole beside it: {", ".join(adapter.modules_to_train) or "nothing"}.

```python
from efft_kernels.interop import from_pretrained

model = ...  # {what}, with a head of this adapter's size
adapter = from_pretrained(model, "this repository, or a folder of it")
```
"""


def _base_of(model: Any) -> str | None:
    """The hub's name of a model, where timm or transformers have noted it."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("hf_hub_id"):
        return str(config["hf_hub_id"])
    return getattr(getattr(model, "config", None), "name_or_path", None) or None
