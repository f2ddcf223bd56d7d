"""What `describe` reports of what was grouped with what: as data and as text."""

from __future__ import annotations

import json
from math import prod

import pytest
import timm
import torch
from rich.table import Table
from torch import nn

from efft_kernels import EFFT1, EFFT2, FacTTK, FacTTT, KAdaptation, LoRA, attach
from efft_kernels.adapters.description import Description

METHODS = [
    EFFT1(rank=(3, 2)),
    EFFT2(rank=(3, 2), ffn_rank=4, learn_scale=True),
    FacTTT(rank=(3, 2)),
    FacTTK(rank=3, layer_rank=5),
    LoRA(rank=2),
    LoRA(rank=2, matrices=None),
    KAdaptation(products=2, rank=3),
]


def test_rows_of_a_vit(make_vit):
    description = attach(make_vit(), EFFT2(rank=(3, 2), ffn_rank=(4, 5))).describe()
    block = "blocks.1."
    assert description.rows[4:] == [
        {
            "name": block + name,
            "role": role,
            "block": 1,
            "stage": 0,
            "in_features": k,
            "out_features": n,
            "group": group,
            "rank": rank,
            "fused": "chain",
            "calls": None,
            "input": None,
        }
        for name, role, k, n, group, rank in (
            ("attn.qkv", "qkv", 12, 36, "mhsa", 3),
            ("attn.proj", "o", 12, 12, "mhsa", 3),
            ("mlp.fc1", "fc1", 12, 48, "ffn", 5),  # fc1's input side is V
            ("mlp.fc2", "fc2", 48, 12, "ffn", 4),
        )
    ]
    assert description.groups == {
        "mhsa": {"U": [12, 3], "V": [12, 2], "core": [8, 3, 2]},
        "ffn": {"U": [48, 4], "V": [12, 5], "core": [4, 4, 5]},
    }


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_data_adds_up(make_vit, method):
    adapter = attach(make_vit(), method)
    description = adapter.describe()
    counted = sum(prod(s) for shapes in description.groups.values() for s in shapes.values())
    assert counted == adapter.num_parameters()
    assert [row["name"] for row in description.rows] == [site.name for site in adapter.sites]
    assert {row["group"] for row in description.rows} == set(description.groups)
    for row in description.rows:
        layer = adapter.layers()[row["name"]]
        assert row["rank"] == layer.current_factors().down.shape[1]
        assert (row["out_features"], row["in_features"]) == tuple(layer.weight.shape)
    plain = {"method": description.method, "rows": description.rows, "groups": description.groups}
    assert json.loads(json.dumps(plain)) == plain
    assert description.method == str(method)


def test_ranks_of_each_method(make_vit):
    """The width of the fold: r, m·r for m matrices of a LoRA, m·n²·r for those of KAdaptation."""
    expected = {
        "qkv": [2, 3, 3, 3, 2 * 2, 2, 3 * 4 * 3],
        "fc2": [3, 4, 2, 3, None, 2, None],  # FacT's fc2 is folded to the four slices' shared V
    }
    for i, method in enumerate(METHODS):
        rows = {row["role"]: row["rank"] for row in attach(make_vit(), method).describe().rows}
        assert rows["qkv"] == expected["qkv"][i]
        assert rows.get("fc2") == expected["fc2"][i]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_text_names_every_group_and_count(make_vit, method):
    adapter = attach(make_vit(), method)
    description = adapter.describe()
    text = str(description)
    flat = " ".join(text.replace("│", " ").split())
    assert type(method).__name__ in text and isinstance(description.__rich__(), Table)
    table = description.__rich__()
    columns = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns] == [
        "group",
        "parameters",
        "shapes",
        "linears",
        "rank",
    ]
    assert columns[0] == list(description.groups)
    counts = [sum(prod(s) for s in shapes.values()) for shapes in description.groups.values()]
    assert columns[1] == [f"{count:,}" for count in counts]
    assert sum(int(cell.split(":")[0]) for cell in columns[3]) == len(adapter.sites)
    for count in counts:
        assert f"{count:,}" in flat
    assert max(map(len, text.splitlines())) <= 120


def test_text_of_swin_tells_the_stages():
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224")
    adapter = attach(model, EFFT2(rank=[4, 8, 16, 32]))
    description = adapter.describe()
    assert list(description.groups) == [f"stage{i}_{p}" for i in range(4) for p in ("mhsa", "ffn")]
    text = str(description)
    assert all(name in text for name in description.groups)
    table = description.__rich__()
    linears = list(table.columns[3].cells)
    assert linears[4] == "12: layers.*.blocks.*.attn.qkv, layers.*.blocks.*.attn.proj"
    assert list(table.columns[4].cells) == ["4", "4", "8", "8", "16", "16", "32", "32"]
    assert next(iter(table.columns[1].cells)) == f"{2 * 96 * 4 + 8 * 16:,}"


def test_of_an_unknown_model():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    description = attach(model, LoRA(rank=2), targets="*", modules_to_train=()).describe()
    assert [(r["name"], r["role"], r["group"], r["rank"]) for r in description.rows] == [
        ("0", "linear", "0", 2),
        ("2", "linear", "2", 2),
    ]
    assert description.groups["2"] == {"A": [1, 2, 7], "B": [1, 3, 2]}
    assert "1: *" in str(description)


def test_describing_changes_nothing(make_vit):
    model = make_vit()
    adapter = attach(model, EFFT2(rank=3, dropout=0.5))
    model.train()
    state = torch.get_rng_state()
    adapter.describe()
    str(adapter.describe())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_while_merged(make_vit, randomize):
    adapter = attach(make_vit(), EFFT2(rank=3))
    randomize(adapter)
    before = adapter.describe()
    adapter.merge()
    assert adapter.describe() == before


def test_calls_of_the_last_forward(make_vit):
    model = make_vit()
    adapter = attach(model, LoRA(rank=2))
    images = torch.randn(2, 3, 8, 8)
    model(images)
    assert [row["calls"] for row in adapter.describe().rows] == [1, 1]
    model.blocks = nn.Sequential(model.blocks[1], model.blocks[1])
    with torch.no_grad():
        model(images)
    assert [row["calls"] for row in adapter.describe().rows] == [0, 2]
    flat = " ".join(str(adapter.describe()).split())
    assert "did not run in the last forward: 1: blocks.*.attn.qkv" in flat


def test_what_the_inputs_come_out_of(make_vit):
    description = attach(make_vit(), LoRA(rank=2, matrices=None)).describe()
    for row, kind in zip(
        description.rows, ("LayerNorm", "kept", "LayerNorm", None) * 2, strict=True
    ):
        row["input"] = kind
    flat = " ".join(str(description).split())
    assert "x made again, out of LayerNorm: 4: blocks.*.attn.qkv, blocks.*.mlp.fc1" in flat
    assert "x kept: 2: blocks.*.attn.proj" in flat


def test_text_is_plain_whatever_the_environment_says_of_colours(make_vit, monkeypatch):
    """A notebook's kernel sets FORCE_COLOR."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = str(attach(make_vit(), EFFT2(rank=2)).describe())
    assert "mhsa" in text and "\x1b" not in text


def test_the_caption_names_those_that_it_is_about():
    rows = [
        {"name": f"blocks.{i}.{name}", "group": "a", "rank": 2, "fused": fused, "calls": calls}
        for i, (name, fused, calls) in enumerate(
            [("q", "chain", 1), ("k", "alone", 0), ("v", "alone", None)]
        )
    ]
    table = Description("m", rows, {"a": {"U": [1234, 2]}}, "why", {}, ("head",)).__rich__()
    lines = str(table.caption).splitlines()
    assert lines[0] == "in a chain, on a GPU under autocast: 1: blocks.*.q"
    assert lines[1:] == ["did not run in the last forward: 1: blocks.*.k", "trained whole: head"]
    sides = [column.justify for column in table.columns]
    assert sides == ["left", "right", "left", "left", "right"]
    assert list(table.columns[1].cells) == ["2,468"]
    none = Description("m", rows[1:2], {"a": {}}, "why").__rich__()
    assert str(none.caption).startswith("no chain: why\n")
