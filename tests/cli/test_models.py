"""`efft-kernels models`, and advice on models in the words of the command line."""

from __future__ import annotations

import json
import warnings

import pytest
from typer.testing import CliRunner

from efft_kernels.cli import app
from efft_kernels.cli.errors import for_command_line, in_one_line
from efft_kernels.methods import METHODS


def invoke(*arguments):
    return CliRunner().invoke(app, ["models", *arguments])


def test_a_model_that_is_whole():
    report = json.loads(invoke("deit_tiny_distilled_patch16_224", "--json").stdout)
    assert report["kind"] == "VisionTransformerDistilled" and report["left"] == []
    assert report["classifier"] == ["head", "head_dist"] and report["parameters"] == 5_910_800
    adapted = {each["method"]: each for each in report["methods"]}
    assert adapted["efft2"]["linears"] == 48 and adapted["efft2"]["refused"] is None
    assert adapted["efft2"]["parameters"] == 7 * 192 * 16 + 6 * 12 * 16**2
    assert adapted["lora"]["linears"] == 12


def test_what_is_left_and_refused_in_words_of_the_command_line():
    result = invoke("efficientformer_l1")
    assert result.exit_code == 0
    assert "trained whole: head, head_dist" in result.stdout
    assert "left as they are, attention: 1 stages.*.blocks.*.token_mixer.qkv" in result.stdout
    assert "14 stages.*.blocks.*.mlp.fc1" in result.stdout
    flat = " ".join(result.stdout.replace("│", " ").split())
    assert "with --matrices all it adapts these" in flat and "matrices=None" not in flat


def test_a_refusal_of_all_methods_stands_once():
    result = invoke("resnet18")
    flat = " ".join(result.stdout.replace("│", " ").split())
    assert result.stdout.count("trained whole: fc\n") == 1
    assert flat.count("--method bitfit does") == 1
    assert all(f"│ {method} " in result.stdout for method in METHODS)


def test_patterns_and_wrong_names():
    assert "swin_tiny_patch4_window7_224" in invoke("swin_tiny*").stdout.splitlines()
    nothing = invoke("nope*")
    assert nothing.exit_code == 2 and "pattern of some, got 'nope*'" in nothing.stderr
    wrong = invoke("vit_tinyy")
    assert wrong.exit_code == 2
    assert "did you mean vit_tiny_patch16_224, " in wrong.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pass targets=['q', 'attn.v'] now", "pass --targets q,attn.v now"),
        ("takes targets='ffn'", "takes --targets ffn"),
        ("use LoRA, which", "use --method lora, which"),
        ("LoRA(rank=4) has matrices=None", "LoRA(rank=4) has --matrices all"),
        ("and LoRA(matrices=None), which", "and --method lora --matrices all, which"),
        ("the baseline BitFit does", "--method bitfit does"),
        ("targets=None finds nothing", "without --targets the method finds nothing"),
        ("targets must be ['a']", "targets must be ['a']"),
    ],
)
def test_advice_becomes_options(text, expected):
    assert for_command_line(text) == expected


def test_warnings_of_a_command_are_notes(capsys):
    def command():
        warnings.warn("pass targets=['a']", stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    in_one_line(command)()
    assert "note: pass --targets a\n" in (err := capsys.readouterr().err)
    assert "note: old" not in err
    assert "note" not in str(warnings.showwarning)
