"""The command line, as a user meets it: what it prints, its exit codes, what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from efft_kernels import EFFT2, cli
from efft_kernels.cli.commands import COMMANDS, app
from efft_kernels.training.loop import NonFiniteLossError

SMALL = [
    "--no-pretrained",
    "--img-size=32",
    "--rank=4",
    "--batch-size=8",
    "--workers=0",
    "--device=cpu",
    "--val-split=0.3",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, told apart by which colour is brighter under noise."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(1)
    for channel, name in enumerate(("red", "green")):
        (root / name).mkdir()
        for index in range(12):
            pixels = generator.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 55
            Image.fromarray(pixels).save(root / name / f"{index:02}.png")
    return root


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(data: Path, output: Path, *more: object) -> Result:
    return invoke("train", "--data", data, "--output", output, *SMALL, *more)


def error_of(result: Result, exit_code: int = 2) -> str:
    """The one line on stderr that is the error."""
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    return errors[0]


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("runs") / "deep" / "run"
    return output, train(images, output, "--epochs", 4)


def test_train_says_what_happened(trained: tuple[Path, Result]) -> None:
    output, result = trained
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.match(r"vit_tiny_patch16_224 on cpu, efft2 rank 4: 6,528 factor parameters", lines[0])
    assert [line.split("  ")[0] for line in lines[1:5]] == [f"epoch {n}/4" for n in (1, 2, 3, 4)]
    assert lines[-1] == f"adapter: {output / 'adapter.safetensors'}"
    found = re.search(r"val top-1: ([\d.]+) % after the last epoch; best ([\d.]+) %", lines[-2])
    assert found
    assert float(found[1]) > 75  # chance is 50
    assert result.stderr.startswith("note: the backbone's weights are random")


@pytest.mark.parametrize("merge", [(), ("--merge",)])
def test_eval_repeats_the_accuracy(
    images: Path, trained: tuple[Path, Result], merge: tuple[str, ...]
) -> None:
    output, result = trained
    adapter = output / "adapter.safetensors"
    again = invoke("eval", "--data", images, "--adapter", adapter, "--workers", 0, *merge)
    assert again.exit_code == 0, again.output
    expected = re.search(r"val top-1: ([\d.]+) %", result.stdout)
    assert expected
    assert again.stdout.startswith(f"top-1: {expected[1]} %")
    assert "8 images" in again.stdout
    assert ("merged model" in again.stdout) == bool(merge)


def test_eval_errors_are_one_line(images: Path, trained: tuple[Path, Result]) -> None:
    adapter = trained[0] / "adapter.safetensors"
    assert "nothing there" in error_of(invoke("eval", "--data", images, "--adapter", "absent"))
    missing = invoke("eval", "--data", images, "--adapter", adapter, "--checkpoint", "absent.pth")
    assert "checkpoint must be a file" in error_of(missing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rank 0", "rank must be"),
        ("--rank 9999", "rank must be"),
        ("--rank many", "rank must be a number R or two, R1,R2, or one of these per stage"),
        ("--layers 3-x", "layers must be numbers and ranges"),
        ("--layers 40", "layers must be within 0..11, got 40"),
        ("--layers 0-999999999", "layers must be numbers and ranges"),
        ("--layers 5-3", "layers must be numbers and ranges such as 0-3,11, got '5-3'"),
        ("--img-size 15", "img_size must be a number of pixels that vit_tiny_patch16_224 can cut"),
        ("--img-size 99999999", "img_size must be within 1..8192 pixels, got 99999999"),
        ("--img-size 20 --model test_vit", "(Input height (20) should be divisible by patch size"),
        (
            "--img-size 8 --model mvitv2_tiny",
            "img_size must be a number of pixels that mvitv2_tiny",
        ),
        ("--workers 99999", "workers must be within 0..1024, got 99999"),
        ("--weight-decay inf", "weight_decay must be at least 0 and finite, got inf"),
        ("--targets nothing", "targets pattern 'nothing' matches no nn.Linear"),
        ("--method magic", "method must be one of"),
        ("--init w", "init must be"),
        ("--model vit_tny_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("--checkpoint absent.pth", "checkpoint must be a file of weights, got absent.pth"),
        ("--backend magic", "must be 'auto' or one of"),
        ("--backend cuda", "cannot run here"),
        ("--device cuda:77", "device must be"),
        ("--lr -1", "lr must be above 0, got -1.0"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(
    images: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    if arguments == "--backend cuda" and torch.cuda.is_available():
        pytest.skip("the CUDA backend may run here")
    result = train(images, tmp_path / "run", "--epochs", 1, *arguments.split())
    assert message in error_of(result)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_backend_in_the_environment_is_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFT_KERNELS_BACKEND", "magic")
    assert "EFFT_KERNELS_BACKEND must be" in error_of(train(images, tmp_path / "run"))


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    assert "nothing there" in error_of(train(tmp_path / "absent", tmp_path / "run"))
    (tmp_path / "images" / "cat").mkdir(parents=True)
    assert "got none in" in error_of(train(tmp_path / "images", tmp_path / "run"))
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / "0.png")
    assert "at least 2 classes" in error_of(train(tmp_path / "images", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_named_and_skipped_only_when_asked(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(8):
            path = tmp_path / "images" / label / f"{index}.png"
            Image.new("RGB", (8, 8), (index, 0, 9)).save(path)
    bad = tmp_path / "images" / "dog" / "3.png"
    bad.write_bytes(b"\x89PNG no more")
    message = error_of(train(tmp_path / "images", tmp_path / "run", "--epochs", 1))
    assert f"got 1 unreadable: cannot read image {bad}" in message
    assert "--skip-bad-images" in message
    assert not (tmp_path / "run").exists()
    skipping = train(tmp_path / "images", tmp_path / "run", "--epochs", 1, "--skip-bad-images")
    assert skipping.exit_code == 0, skipping.output
    assert f"note: skipped 1 unreadable images: cannot read image {bad}" in skipping.stderr


def test_divergence_stops_with_advice(images: Path, tmp_path: Path) -> None:
    result = train(images, tmp_path / "run", "--epochs", 2, "--lr", 1e30, "--scale", 1e9)
    message = error_of(result, exit_code=1)
    assert re.search(r"loss is (nan|inf) in epoch 1, step \d: training stopped", message)
    assert "lower --lr or --scale" in message
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json"]


def test_an_existing_output_says_what_to_do(images: Path, trained: tuple[Path, Result]) -> None:
    assert "pass --resume" in error_of(train(images, trained[0], "--epochs", 4))
    other = error_of(train(images, trained[0], "--epochs", 5, "--resume"))
    assert "epochs must be 4 as when the run began, got 5" in other


def assert_same_adapter(first: Path, second: Path) -> None:
    tensors, others = (load_file(folder / "adapter.safetensors") for folder in (first, second))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_interrupted_it_resumes_to_the_same_result(
    images: Path, trained: tuple[Path, Result], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:

        def control_c(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("efft_kernels.training.run.evaluate", control_c)
        message = error_of(train(images, tmp_path, "--epochs", 4), exit_code=130)
    assert f"interrupted. the same command with --resume continues it in {tmp_path}" in message
    resumed = train(images, tmp_path, "--epochs", 4, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert_same_adapter(tmp_path, trained[0])


INNER = {
    "train": ("efft_kernels.training.run.prepare", ["--data", ".", "--output", "absent"]),
    "eval": (
        "efft_kernels.training.evaluation.evaluate_adapter",
        ["--data", ".", "--adapter", __file__],
    ),
    "demo": ("efft_kernels.demo.run.run", []),
    "doctor": ("efft_kernels.doctor.diagnose", []),
    "bench": ("efft_kernels.cli.bench._load", []),
    "analyse": ("efft_kernels.analysis.subspace.load_alone", ["x"]),
}


@pytest.mark.parametrize("command", INNER)
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "x.pt"), None, "No space left on device: 'x.pt'"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("[...] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (NonFiniteLossError("the model's logits are not finite"), 1, "logits are not finite"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_command_fails_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    error: BaseException,
    code: int | None,
    message: str,
) -> None:
    inner, arguments = INNER[command]

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(inner, fail)
    names = ["analyse", "subspace"] if command == "analyse" else [command]
    result = invoke(*names, *arguments)
    assert message in error_of(result, result.exit_code if code is None else code)
    assert result.exit_code in (1, 2, 130)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("impossible")

    monkeypatch.setattr("efft_kernels.doctor.diagnose", fail)
    assert isinstance(invoke("doctor").exception, RuntimeError)


def test_a_demo_that_learnt_nothing_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("efft_kernels.training.digits.pretrain", lambda **_: (None, 80.0))
    message = error_of(invoke("demo", "--output", tmp_path), exit_code=1)
    assert "must reach 95.0% on held-out digits 0 to 4, got 80.0%" in message


@pytest.mark.parametrize("ignored", [False, True])
def test_control_c_while_the_package_is_loaded_is_one_line(tmp_path: Path, ignored: bool) -> None:
    """With a torch that takes its time, as the real one does."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('loading', flush=True)\n"
        "try:\n    time.sleep(3)\n"
        "except BaseException:\n    raise ImportError('torch') from None\n"
        "import os; os._exit(7)\n"
    )
    code = "from efft_kernels.cli import main; main()"
    ended = interrupted(code, "loading", first_on_path=str(tmp_path), ignored=ignored)
    assert ended == ((7, "") if ignored else (130, "error: interrupted\n"))


def interrupted(
    code: str, says: str, first_on_path: str = "", ignored: bool = False
) -> tuple[int, str]:
    """The exit code and stderr of `doctor`, which gets Ctrl-C when it has said this."""
    # Said either way: what a background job starts inherits that it is ignored.
    handler = "signal.SIG_IGN" if ignored else "signal.default_int_handler"
    setting = f"import signal; signal.signal(signal.SIGINT, {handler})\n"
    path = os.pathsep.join(filter(None, (first_on_path, str(Path(__file__).parents[2]))))
    starting = subprocess.Popen(
        [sys.executable, "-c", setting + code, "doctor"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with starting:
        assert starting.stdout is not None
        assert starting.stdout.readline() == f"{says}\n"
        starting.send_signal(signal.SIGINT)
        _, errors = starting.communicate()
    return starting.returncode, errors


PARSES = """
import time
from efft_kernels.cli import commands, main

def parse_args(self, context, arguments):
    print("parsing", flush=True)
    time.sleep(3)

commands._Group.parse_args = parse_args
main()
"""


def test_interrupted_while_arguments_are_parsed() -> None:
    """Typer would end without a word; it takes as long as a tenth of a second."""
    assert interrupted(PARSES, "parsing") == (130, "error: interrupted\n")


@pytest.mark.parametrize("command", INNER)
def test_a_command_that_runs_can_clean_up(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str
) -> None:
    """Within it Ctrl-C is an exception."""
    inner, arguments = INNER[command]
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's
    seen = []

    def stopped(*args: object, **kwargs: object) -> None:
        seen.append(signal.getsignal(signal.SIGINT))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(inner, stopped)
    names = ["analyse", "subspace"] if command == "analyse" else [command]
    monkeypatch.setattr(sys, "argv", ["efft-kernels", *names, *arguments])
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert (ended.value.code, seen) == (130, [signal.default_int_handler])
    assert "error: interrupted" in capsys.readouterr().err
    assert after is signal.default_int_handler


def test_the_console_script_runs_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["efft-kernels", "--version"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("efft-kernels ")
    assert signal.getsignal(signal.SIGINT) is before


KILLED_IN_THE_SECOND_EPOCH = """
import os, signal
from efft_kernels import cli
from efft_kernels.training import run

evaluate = run.evaluate

def evaluate_once(*args, **kwargs):
    global evaluate
    if evaluate is None:
        os.kill(os.getpid(), signal.SIGKILL)
    top1_percent, evaluate = evaluate(*args, **kwargs), None
    return top1_percent

run.evaluate = evaluate_once
cli.app()
"""


@pytest.mark.slow
def test_killed_it_resumes_to_the_same_result(
    images: Path, trained: tuple[Path, Result], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = ["train", "--data", str(images), "--output", str(output), *SMALL, "--epochs", "4"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_SECOND_EPOCH, *command],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
    )
    assert killed.returncode == -signal.SIGKILL

    resumed = invoke(*command, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "resuming after epoch 1 of 4" in resumed.stderr
    assert resumed.stdout.splitlines()[-2] == trained[1].stdout.splitlines()[-2]
    assert_same_adapter(output, trained[0])


def test_train_follows_a_recipe_and_eval_repeats_it(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = ("--model", "vit_tiny_patch16_224", "--epochs", 2, "--lr", 0.002, "--no-drop-last")
    command = ("--recipe", "vtab", "--task", "svhn", *given, "--ffn-init", "u")
    result = train(images, output, *command)
    assert result.exit_code == 0, result.output
    config = json.loads((output / "config.json").read_text())
    settings, method = config["settings"], config["method"]
    assert (settings["recipe"], settings["task"]) == ("vtab", "svhn")
    assert "efft2 rank 4, recipe vtab for svhn: " in result.stdout
    by_hand = {"epochs": 2, "lr": 0.002, "batch_size": 8, "img_size": 32, "drop_last": False}
    recipes = {"normalize": "imagenet", "schedule": "epoch", "weight_decay": 1e-4}
    assert {name: settings[name] for name in by_hand | recipes} == by_hand | recipes
    assert (
        method
        == EFFT2(rank=4, scale=80, cores="shared", ffn_init="u", factor_init="release").to_config()
    )

    again = invoke("eval", "--data", images, "--adapter", output / "adapter.safetensors")
    accuracy = [
        float(re.findall(r"top-1: ([\d.]+)", text)[0]) for text in (result.stdout, again.stdout)
    ]
    assert accuracy[0] == accuracy[1]

    other = train(images, output, *command[:-1], "v", "--resume")
    message = "ffn_init must be u as when the run began, got v: resume with the same --ffn-init"
    assert message in error_of(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "vtab2"], "recipe must be one of vtab, got 'vtab2'"),
        (["--recipe", "vtab", "--task", "cats"], "task must be one of VTAB-1K's 19, got 'cats'"),
        (["--task", "cifar"], "task must be left out without --recipe, got cifar"),
        (
            ["--method", "lora", "--ffn-rank", "4"],
            "ffn_rank must be left out for method lora, got 4",
        ),
        (["--factor-init", "paper"], "factor_init must be one of ('xavier', 'release')"),
        (["--ffn-rank", "4:x"], "ffn_rank must be a number R or two, R1,R2, or one of these"),
        (["--rank", "4:8"], "rank must have one entry per stage (1), got 2"),
        (["--normalize", "clip"], "normalize must be one of model, imagenet, got clip"),
        (["--schedule", "step"], "schedule must be one of update, epoch, constant, got step"),
    ],
)
def test_wrong_recipes_and_method_options_are_named(
    images: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = train(images, tmp_path / "run", *options)
    assert message in error_of(result)
    assert not (tmp_path / "run").exists()


def test_doctor_prints_tables_or_json() -> None:
    tables = invoke("doctor")
    assert tables.exit_code == 0
    assert "torch" in tables.stdout
    assert "usable" in tables.stdout
    answer = invoke("doctor", "--json")
    assert answer.exit_code == 0
    report = json.loads(answer.stdout)
    assert report["healthy"]
    assert report["backends"]["torch"] == {"usable": True, "reason": None}
    assert report["versions"]["timm"]


def test_help_and_version() -> None:
    assert "demo" in invoke("--help").stdout
    assert "--skip-bad-images" in invoke("train", "--help").stdout
    assert re.match(r"efft-kernels \d+\.\d+", invoke("--version").stdout)


QUICK = """
import resource, sys
from efft_kernels.cli import main
try:
    main()
except SystemExit as ended:
    assert "torch" not in sys.modules
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(ended.code, used.ru_utime + used.ru_stime)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["train", "--data", "absent"], 2),
        (["eval", "--data=.", "--adapter=absent"], 2),
    ],
)
def test_what_needs_no_model_answers_at_once(arguments: list[str], code: int) -> None:
    """The time is the processor's, best of three: the machine may be busy with others."""
    command = [sys.executable, "-c", QUICK, *arguments]
    seconds = []
    for _ in range(3):
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        ended, took = result.stdout.splitlines()[-1].split()
        assert int(ended) == code
        assert ("(nothing there)" in result.stderr) == (code == 2)
        seconds.append(float(took))
    assert min(seconds) < 0.5


def test_the_list_of_commands_says_what_their_docstrings_say() -> None:
    for name, command in COMMANDS.items():
        assert command.load(name).help.splitlines()[0] == command.help


def test_a_public_name_loads_the_package() -> None:
    code = (
        "import sys, efft_kernels; assert 'torch' not in sys.modules; from efft_kernels import *;"
        "assert set(efft_kernels.__all__) <= set(globals());"
        "import torch; torch.ops.efft_kernels.low_rank_linear_fwd.default; efft_kernels.interop;"
        "assert not hasattr(efft_kernels, 'absent')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demo_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr("efft_kernels.demo.run.run", lambda **arguments: calls.append(arguments))
    assert invoke("demo", "--output", tmp_path, "--seeds", 2).exit_code == 0
    assert calls == [{"output": tmp_path, "seeds": 2}]
