"""Folders and repositories of the hub: an adapter comes back, with a card that says what it is."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from torch import nn

from efft_kernels import EFFT2, Adapter, attach, from_pretrained, push_to_hub, save_pretrained
from efft_kernels.interop import hub


def build() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=2).eval()


@pytest.fixture
def adapter() -> Adapter:
    adapter = attach(build(), EFFT2(rank=2))
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    return adapter


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.ones(1, 3, 32, 32))


def test_a_folder_gives_the_adapter_back(adapter: Adapter, tmp_path: Path) -> None:
    save_pretrained(adapter, tmp_path / "deep" / "folder")
    again = from_pretrained(build(), tmp_path / "deep" / "folder")
    assert torch.equal(logits(again.model), logits(adapter.model))
    assert not torch.equal(logits(again.model), logits(build()))
    other = build()
    other.reset_classifier(7)
    with pytest.raises(ValueError, match="pass keep_head=True"):
        from_pretrained(other, tmp_path / "deep" / "folder")
    from_pretrained(other, tmp_path / "deep" / "folder", keep_head=True)
    assert logits(other).shape == (1, 7)
    card = huggingface_hub.ModelCard.load(tmp_path / "deep" / "folder" / "README.md")
    assert card.data.library_name == "efft-kernels"
    assert card.data.base_model.startswith("timm/vit_tiny_patch16_224")
    assert "efft2" in card.data.tags
    assert f"# efft2 adapter of {card.data.base_model}\n" in card.text
    assert f"{adapter.num_parameters():,} parameters in 8 linears" in card.text


@pytest.mark.parametrize(
    ("noted", "of"),
    [
        ({}, "a VisionTransformer"),
        ({"pretrained_cfg": {"hf_hub_id": "timm/it"}}, "timm/it"),
        ({"pretrained_cfg": {"hf_hub_id": None}}, "a VisionTransformer"),
        ({"pretrained_cfg": {}, "config": types.SimpleNamespace(name_or_path="me/it")}, "me/it"),
        ({"config": types.SimpleNamespace(name_or_path="")}, "a VisionTransformer"),
    ],
)
def test_a_card_names_the_model_that_was_adapted(
    make_vit: Any, noted: dict[str, Any], of: str
) -> None:
    model = make_vit()
    for name, value in noted.items():
        setattr(model, name, value)
    text = hub.model_card(attach(model, EFFT2(rank=2)))
    assert f"# efft2 adapter of {of}\n" in text
    assert (f"base_model: {of}\n" in text) == ("/" in of)


def test_every_source_is_loaded_with_the_same_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(hub, "load", lambda model, path, **given: asked.append((path, given)))
    file = tmp_path / "adapter.safetensors"
    file.touch()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(file))
    chosen = {"keep_head": True, "fuse": "off", "strict": True}
    for given in ({}, chosen):
        expected = {"keep_head": False, "fuse": "auto", "strict": False} | given
        asked.clear()
        for source in (tmp_path, "me/mine"):
            from_pretrained(nn.Identity(), source, **given)
        assert asked == [(file, expected), (str(file), expected)]


def test_a_card_that_is_there_stays(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(adapter, tmp_path, base_model="me/other")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_holds_no_adapter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"source must be a folder with adapter\.safetensors"):
        from_pretrained(build(), tmp_path)
    for path in ("/nope", "./nope", "~/nope", "runs/pets/best"):
        with pytest.raises(ValueError, match=f"got {path}, where there is no folder"):
            from_pretrained(build(), path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file: `load` reads one"):
        from_pretrained(build(), tmp_path / "file")
    with pytest.raises(ValueError, match=r"folder must be a folder, got the file .*Adapter\.save"):
        save_pretrained(attach(build(), EFFT2(rank=2)), tmp_path / "file")

    def absent(*args: object, **kwargs: object) -> str:
        raise OSError("404 Client Error\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    with pytest.raises(ValueError, match=r"got me/nothing \(404 Client Error\)"):
        from_pretrained(build(), "me/nothing")


class Hub:
    """The part of HfApi that is used, with a folder in the place of the hub."""

    def __init__(self, root: Path, **login: Any) -> None:
        self.root, self.calls = root, [login]

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(options)
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id: str, name: str, revision: str | None) -> bool:
        return (self.root / repo_id / name).exists()

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
        self.calls.append(options)
        for path in Path(folder_path).iterdir():
            (self.root / repo_id / path.name).write_bytes(path.read_bytes())
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_a_repository_gives_it_back(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **login: api)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repo, name, **more: str(tmp_path / repo / name)
    )
    address = push_to_hub(adapter, "me/mine", base_model="timm/base", private=True, revision="x")
    assert address == "https://hub/me/mine/commit/1"
    assert api.calls[1:] == [
        {"private": True, "exist_ok": True},
        {"revision": "x", "commit_message": "Upload adapter"},
    ]
    card = tmp_path / "me" / "mine" / "README.md"
    assert "base_model: timm/base" in card.read_text()
    card.write_text("edited on the hub")
    push_to_hub(adapter, "me/mine")
    assert card.read_text() == "edited on the hub"
    again = from_pretrained(build(), "me/mine")
    assert torch.equal(logits(again.model), logits(adapter.model))
