"""Every example runs as it is called from a shell, with few images."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--epochs", "1", "--images", "64"]
CALLS = {
    "hf_trainer": ("transformers", SMALL, r"the same logits to within 0\.0e"),
    "accelerate_loop": ("accelerate", SMALL, "is in runs"),
    "lightning_module": ("lightning", SMALL, r"\.safetensors: top-1 0\."),
    "timm_script": ("timm", SMALL, r"epoch 0: loss .*top-1"),
    "peft_migration": ("peft", ["--steps", "2"], "given back, 6 linears"),
    "serving": ("onnxruntime", ["--backend", "eager"], r"torch\.compile \(eager\): logits differ"),
}


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_each_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CALLS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_example(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package, arguments, expected = CALLS[name]
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        run(name, ["--help"], monkeypatch)
    assert "usage:" in capsys.readouterr().out
    run(name, arguments, monkeypatch)
    printed = capsys.readouterr().out
    assert re.search(expected, printed), printed
    assert all(float(d) < 1e-4 for d in re.findall(r"differ by (\S+)", printed)), printed
