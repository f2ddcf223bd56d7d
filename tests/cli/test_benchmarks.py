"""`efft-kernels vtab` and `fewshot`, as a user meets them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from efft_kernels.cli import app

SMALL = [
    "--model=test_vit",
    "--no-pretrained",
    "--img-size=32",
    "--epochs=2",
    "--batch-size=8",
    "--workers=0",
    "--device=cpu",
    "--rank=2",
    "--test-every=1",
    "--methods=efft2",
]


def invoke(*arguments: object) -> Result:
    runner = CliRunner(env={"COLUMNS": "150"})
    return runner.invoke(app, [str(argument) for argument in arguments])


def write_images(folder: Path, prefix: str, count: int) -> list[str]:
    """Images of two classes, told apart by which colour is brighter; the lines of their list."""
    generator = np.random.default_rng(len(prefix))
    (folder / prefix).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        pixels = generator.integers(0, 200, (16, 16, 3), dtype=np.uint8)
        pixels[..., index % 2] += 55
        name = f"{prefix}/no {index:02}.png"
        Image.fromarray(pixels).save(folder / name)
        lines.append(f"{name} {index % 2}")
    return lines


def write_vtab_task(folder: Path) -> None:
    sizes = {"a": 12, "b": 4, "c": 8}
    train, val, test = (write_images(folder, f"images/{s}", n) for s, n in sizes.items())
    lists = {"train800": train, "val200": val, "train800val200": train + val, "test": test}
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for task in ("cifar100", "SVHN", "kitti-dist"):
        write_vtab_task(root / task)
    return root


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("runs") / "vtab"
    return output, invoke("vtab", "--data", data, "--output", output, "--seeds=1,2", *SMALL)


def test_vtab_says_what_is_missing_and_goes_on(done: tuple[Path, Result], data: Path) -> None:
    _, result = done
    assert result.exit_code == 0, result.output
    (missing,) = (line for line in result.stderr.splitlines() if "no folder" in line)
    assert missing.startswith(f"note: no folder in {data}, so left out: caltech101, dtd,")
    assert len(missing.split(", ")) == 17  # 16 tasks, one comma in the sentence
    assert "6 cells, 0 finished before" in result.stdout
    assert result.stderr.count("weights are random") == 1
    lines = [line for line in result.stdout.splitlines() if line.startswith("kitti-efft2-seed2: ")]
    assert len(lines) == 1
    assert [part.split()[0] for part in lines[0].split(": ")[1].split(", ")] == [
        "last",
        "val_chosen",
        "best_on_test",
    ]


def test_vtab_writes_tables_beside_the_published_numbers(done: tuple[Path, Result]) -> None:
    output, _ = done
    text = (output / "table.md").read_text(encoding="utf-8")
    assert "### Natural: top-1 %, after the last epoch" in text
    assert "| EFFT2 ≤32 (published) | 245,000 | 72.1 | 89.6 | 80.8 |" in text
    assert "| EFFT2 ≤32 (published) | 245,000 | 82.7 | 82.7 |" in text
    (published,) = (
        line
        for line in text.splitlines()
        if line.startswith("| EFFT2 ≤32 (published)") and line.count("|") == 9
    )
    # Of the tasks that ran: groups ((72.1 + 89.6)/2 + 82.7)/2, tasks (72.1 + 89.6 + 82.7)/3.
    assert published.endswith("| - | - | - | - | 81.8 | 81.5 |")
    for note in (
        "over the tasks that ran: 3 of VTAB-1K's 19.",
        "best_on_test: best tested epoch, chosen on the test",
        "± is the 95 % interval over seeds",
        "- caltech101: no folder",
    ):
        assert note in text
    with (output / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["task"] for row in rows} == {"cifar", "svhn", "kitti"}
    content = json.loads((output / "results.json").read_text())
    assert content["cells"][0]["results"]["val_chosen"]["protocol"].startswith("after the epoch")
    assert len(content["missing"]) == 16
    for name in ("radar", "groups", "parameters"):
        assert (output / f"{name}.png").stat().st_size > 10_000
        assert "EFFT2 ≤32 (published)" in (output / f"{name}.svg").read_text(encoding="utf-8")


def test_a_second_call_trains_nothing(done: tuple[Path, Result], data: Path) -> None:
    output, first = done
    cells = {path: path.read_bytes() for path in output.glob("cells/*/result.json")}
    assert len(cells) == 6
    again = invoke("vtab", "--data", data, "--output", output, "--seeds=1,2", *SMALL)
    assert again.exit_code == 0, again.output
    assert "6 cells, 6 finished before" in again.stdout
    assert again.stdout.split("finished before")[1] == first.stdout.split("finished before")[1]
    assert {path: path.read_bytes() for path in output.glob("cells/*/result.json")} == cells
    more = invoke(
        "vtab",
        "--data",
        data,
        "--output",
        output,
        "--seeds=1,2,3",
        "--tasks=kitti",
        "--report=best_on_test",
        *SMALL,
    )
    assert "3 cells, 2 finished before" in more.stdout
    assert "optimistic" in more.stdout.split("Structured: ")[1].splitlines()[0]


def test_a_result_that_no_cell_has(data: Path, tmp_path: Path) -> None:
    write_vtab_task(tmp_path / "kitti")
    (tmp_path / "kitti/val200.txt").unlink()
    arguments = ("--output", tmp_path / "run", "--report=val_chosen", *SMALL)
    result = invoke("vtab", "--data", tmp_path, "--tasks=kitti", *arguments)
    assert result.exit_code == 0, result.output
    assert "note: kitti: val200.txt not there" in result.stderr
    assert "kitti-efft2-seed42: last " in result.stdout
    assert not list((tmp_path / "run").glob("*.png"))
    result = invoke("fewshot", "--data", tmp_path, *arguments)
    assert "report must be last or best_on_test for few-shot sets" in result.stderr
    assert result.exit_code == 2


def test_bad_lists_are_named_and_the_rest_runs(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for task in ("kitti", "svhn", "dtd", "cifar"):
        write_vtab_task(root / task)
    (root / "svhn/test.txt").write_text("images/c/no 00.png 10\n")
    (root / "dtd/train800val200.txt").write_text("")
    (root / "cifar-100").mkdir()
    output = tmp_path / "run"
    result = invoke(
        "vtab",
        "--data",
        root,
        "--output",
        output,
        "--methods=lora",
        "--tasks=kitti,svhn,dtd,cifar",
        *SMALL[:-1],
    )
    assert result.exit_code == 2
    notes = result.stderr
    assert "labels must be within 0..9, got 10" in notes
    assert "train800val200.txt must list images, got an empty list" in notes
    assert "must hold cifar once, got cifar and cifar-100" in notes
    assert notes.splitlines()[-1] == "error: lists that cannot be used: svhn, dtd, cifar"
    assert len(list(output.glob("cells/kitti-lora-*/result.json"))) == 1
    text = (output / "table.md").read_text()
    assert "- dtd: " in text and "empty list" in text


def test_a_failed_cell_is_named_and_the_rest_runs(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for task in ("kitti", "svhn"):
        write_vtab_task(root / task)
    (root / "kitti/images/c/no 03.png").write_bytes(b"broken")
    arguments = [
        "vtab",
        "--data",
        root,
        "--output",
        tmp_path / "run",
        "--methods=lora",
        "--tasks=kitti,svhn",
        *SMALL[:-1],
    ]
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "failed kitti-lora-seed42: data must hold readable images, got 1" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: 1 of 2 cells failed"
    assert [p.name for p in (tmp_path / "run/cells").glob("kitti*/*")] == ["failure.json"]
    result = invoke(*arguments, "--skip-bad-images")
    assert result.exit_code == 0, result.output
    assert "2 cells, 1 finished before" in result.stdout
    assert [p.name for p in (tmp_path / "run/cells").glob("kitti*/*")] == ["result.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data=absent", "data must be a folder of tasks' folders, got absent (nothing there)"),
        ("--tasks=dtd", "data must hold a task that can run, got none in"),
        ("--tasks=cifar,cifar100", "tasks must name each task once, got cifar and cifar100"),
        ("--methods=magic", "methods must be of efft1"),
        ("--methods=lora,lora", "methods must be each named once"),
        ("--model=test_vt", "did you mean"),
        ("--checkpoint=absent.npz", "checkpoint must be a file of weights, got absent.npz"),
        ("--report=best", "report must be one of last, val_chosen, best_on_test, got best"),
        ("--seeds=a", "seeds must be whole numbers"),
        ("--seeds=-1", "seed must be within"),
        ("--epochs=0", "epochs must be at least 1"),
        ("--test-every=0", "test_every must be at least 1"),
        ("--img-size=15", "img_size must be a number of pixels"),
        ("--device=cuda:77", "device must be"),
        ("--backend=magic", "must be 'auto' or one of"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(
    data: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    output = tmp_path / "run"
    result = invoke("vtab", "--data", data, "--output", output, *SMALL, arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert message in result.stderr.splitlines()[-1]
    assert not output.exists()


def test_fewshot(tmp_path: Path) -> None:
    root = tmp_path / "few-shot"
    for name, images in (("oxford-pets", "images"), ("standford-cars", ".")):
        folder = root / name
        (folder / "annotations").mkdir(parents=True)
        train = write_images(folder / images, "train", 4)
        for shots in (1, 2):
            for seed in (0, 1):
                path = folder / f"annotations/train_meta.list.num_shot_{shots}.seed_{seed}"
                path.write_text("\n".join(train[: 2 * shots]))
        test = write_images(folder / images, "test", 6)
        (folder / "annotations/test_meta.list").write_text("\r\n".join(test))
    (root / "standford-cars/annotations/train_meta.list.num_shot_2.seed_1").unlink()
    output = tmp_path / "run"
    arguments = [
        "fewshot",
        "--data",
        root,
        "--output",
        output,
        "--shots=1,2",
        "--seeds=0,1",
        *SMALL,
    ]
    result = invoke(*arguments)
    assert result.exit_code == 2  # one list is missing; the rest ran
    assert "left out: fgvc_aircraft, food101, flowers102" in result.stderr
    assert "left out stanford_cars, 2 shots, seed 1: " in result.stderr
    assert "7 cells, 0 finished before" in result.stdout
    text = (output / "table.md").read_text(encoding="utf-8")
    for title in ("### pets: top-1 % by images a class, after the last epoch", "### mean of sets"):
        assert title in text
    means = text.split("### mean of sets")[1]
    (row,) = (line for line in means.splitlines() if line.startswith("| efft2 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert "±" in cells[1] and "±" not in cells[2]  # of 2 shots one seed alone has both sets
    assert (output / "shots.png").is_file() and (output / "shots.svg").is_file()
    content = json.loads((output / "results.json").read_text())
    assert all("val_chosen" not in cell["results"] for cell in content["cells"])
    assert "7 cells, 7 finished before" in invoke(*arguments).stdout
