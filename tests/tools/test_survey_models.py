"""The survey of model families: a sample of it, the faults that it sees, its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

from tools import survey_models as survey

TABLE = Path(__file__).parents[2] / "docs" / "supported_models.md"
LINEARS = {"DINOv3": 10, "SigLIP": 13, "ConViT": 9, "XCiT": 20, "Swin V2": 12, "TNT": 20}


@pytest.mark.parametrize(("family", "linears"), LINEARS.items())
def test_families_of_timm(family, linears):
    row = survey.survey_timm(family)
    assert [outcome.linears for outcome in row.outcomes] == [linears, linears]
    assert all(outcome.sound for outcome in row.outcomes) and not row.left


@pytest.mark.parametrize("family", ["ViT, no head", "DETR", "PVT v2"])
def test_families_of_transformers(family):
    pytest.importorskip("transformers")
    row = survey.survey_hugging_face(family)
    assert all(outcome.sound and outcome.linears for outcome in row.outcomes), row
    assert not row.left


class Model(nn.Module):
    """Of its two linears the second does not run, or runs without effect."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        parts = {"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict(parts)})])
        self.scale = scale

    def forward(self, x):
        mlp = self.blocks[0]["mlp"]
        hidden = mlp["fc1"](x)
        return hidden if self.scale is None else (hidden, self.scale * mlp["fc2"](hidden))


@pytest.mark.parametrize(("scale", "idle"), [(None, ("blocks.0.mlp.fc2",)), (0.0, ()), (1.0, None)])
def test_what_does_not_learn_is_seen(scale, idle):
    torch.manual_seed(0)
    row = survey.survey("a", "b", Model(scale), lambda model: model(torch.ones(2, 4)))
    lora = row.outcomes[1]
    assert lora.sound == (idle is None) and lora.linears == 2
    if idle is not None:
        assert lora.idle == idle and len(lora.without_gradient) == 2
        assert "without gradient" in survey.as_markdown([row], [])


def test_the_table_has_every_family_and_no_fault():
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    expected = [*survey.TIMM, *survey.HUGGING_FACE]
    assert [name for name in names if name not in ("family", "---")] == expected
    assert not any(
        fault in "\n".join(lines) for fault in ("not run", "without gradient", "merge error")
    )
