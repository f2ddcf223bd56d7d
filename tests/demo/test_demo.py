"""The demo in its quick form: what it writes, what it promises, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from efft_kernels import load
from efft_kernels.demo.recipes import RECIPES, prepare
from efft_kernels.demo.report import COLUMNS
from efft_kernels.demo.run import run
from efft_kernels.training import digits


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(rows, folder) of a quick run that follows an earlier one into the same folder."""
    output = tmp_path_factory.mktemp("demo")
    (output / "adapters").mkdir()
    (output / "adapters" / "efft1-seed7.safetensors").touch()
    return run(output, quick=True), output


@pytest.fixture(scope="module")
def report(finished):
    return json.loads((finished[1] / "report.json").read_text())


def test_report_has_the_four_methods_and_their_numbers(finished, report):
    rows = report["rows"]
    assert [row["method"] for row in rows] == ["linear", "full", "efft1", "efft2"]
    for row, returned in zip(rows, finished[0], strict=True):
        assert row == vars(returned)
        assert set(row) == {"method", *COLUMNS}
        assert 0 <= row["top1_mean"] <= 100
        assert row["top1_std"] == 0
        assert row["step_ms_p50"] > 0
        assert row["saved_mib"] > 0
    d, layers, r1, r2 = 96, 6, 8, 16
    backbone = sum(p.numel() for p in digits.build_backbone(0).parameters())
    assert [row["trainable_params"] for row in rows] == [
        0,
        backbone,
        5 * d * r1 + 3 * layers * r1**2,
        7 * d * r2 + 6 * layers * r2**2,
    ]
    assert report["head_params"] == 5 * d + 5
    assert report["test_images"] == 796
    assert {"torch", "timm", "python", "efft-kernels"} <= set(report["versions"])


def test_every_file_is_there_and_nothing_else(finished):
    output = finished[1]
    assert sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()) == [
        "accuracy.png",
        "adapters/efft1-seed0.safetensors",
        "adapters/efft2-seed0.safetensors",
        "backbone.safetensors",
        "report.json",
    ]
    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_merged_plain_model_predicts_the_same(report):
    reload = report["reload"]
    assert reload["adapter"] == "efft2-seed0.safetensors"
    assert reload["plain_linears"]
    assert reload["equal_predictions"] == reload["images"] == report["test_images"]
    assert reload["max_abs_logit_diff"] < 1e-4
    assert reload["top1"] == pytest.approx(report["top1_per_seed"]["efft2"][0])


@pytest.mark.parametrize("name", ["efft1", "efft2"])
def test_saved_adapter_fits_the_saved_backbone(finished, name):
    model = digits.build_backbone(len(digits.SOURCE_CLASSES))
    model.load_state_dict(load_file(finished[1] / "backbone.safetensors"))
    adapter = load(model, finished[1] / "adapters" / f"{name}-seed0.safetensors")
    assert adapter.method == RECIPES[name].method
    assert all(delta.abs().max() > 0 for delta in adapter.delta_weights().values())


def test_same_seeds_give_the_same_accuracies(report, tmp_path):
    torch.rand(3)  # where the caller's random numbers stand does not matter
    run(tmp_path, quick=True)
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["top1_per_seed"] == report["top1_per_seed"]
    assert again["source_top1"] == report["source_top1"]


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_trains_what_it_says(name):
    backbone = digits.build_backbone(3)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    model, adapter = prepare(backbone, RECIPES[name], num_classes=5)
    trained = {key.split(".")[0] for key, p in model.named_parameters() if p.requires_grad}
    if adapter is not None:
        assert trained == {"head", "factor_bank"}
    else:
        everything = {"patch_embed", "pos_embed", "blocks", "fc_norm", "head"}
        assert trained == ({"head"} if name == "linear" else everything)
    assert model.head.out_features == 5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_backbone_that_learnt_nothing_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, "pretrain", lambda **_: (nn.Linear(1, 1), 80.0))
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match=r"must reach 95\.0% .* got 80\.0%"):
        run(tmp_path)
    assert not list(tmp_path.rglob("*.*"))
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_seeds_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        run(tmp_path, seeds=0)
