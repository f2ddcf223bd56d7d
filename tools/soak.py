"""Kill what writes files at random moments, and compare what comes of it bit for bit.

    python -m tools.soak [--kills 200] [--seed 7] [--only save train sweep]

save    an adapter is saved over the same file again and again. After each kill the file is one of
        those that were written, whole.
train   a run is killed and resumed until it ends. Its adapter and its metrics are those of a run
        that was left alone.
sweep   a small `efft-kernels sweep` is killed and started again until it ends. Its results and its
        table of all that was tried are those of one that was left alone.

The kills are shared among the three. Each victim is a fork of this process, so that a kill costs no
start of Python; SIGKILL leaves it no time to clean up.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from efft_kernels import EFFT2, attach, load
from efft_kernels.cli import app
from efft_kernels.training.run import fit, prepare
from efft_kernels.training.settings import TrainSettings

PROCESSES = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
KILLED, SAME = "killed", "the same"  # what happened
LATEST = 1.1  # a kill comes within this many times the duration of what was left alone


class Wrong(Exception):
    """What a kill left is not what it should be."""


def _into(log: Path, act: Callable[[], object]) -> None:
    sys.stdout = sys.stderr = written = log.open("w", buffering=1)
    for stream in (1, 2):
        os.dup2(written.fileno(), stream)
    act()


def ended(act: Callable[[], object], seconds: float | None = None) -> bool:
    """Run `act` in a fork and kill it after `seconds`.

    Returns:
        Whether it ended before.

    Raises:
        Wrong: it failed.
    """
    assert PROCESSES is not None
    with tempfile.NamedTemporaryFile() as log:
        process = PROCESSES.Process(target=_into, args=(Path(log.name), act))
        process.start()
        process.join(seconds)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
            return False
        if code:
            said = Path(log.name).read_text(errors="replace")[-2000:]
            raise Wrong(f"it ended by itself with exit code {code}:\n{said}")
        return True


def soak_save(folder: Path, draw: random.Random) -> Iterator[str]:
    """What happened, step by step; see the module."""
    path = folder / "a.safetensors"

    def model() -> VisionTransformer:
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=8, patch_size=4, embed_dim=96, depth=4, num_heads=2, num_classes=5
        )

    def save(numbers: Iterable[int]) -> None:
        """One adapter after the other, each of a single number."""
        adapter = attach(model(), EFFT2(rank=16))
        for number in numbers:
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.fill_(number)
            adapter.save(path, {"number": str(number)})

    def save_on() -> None:
        save(itertools.count())

    while not path.exists():
        ended(save_on, 1.0)
    while True:
        ended(save_on, draw.uniform(0.05, 0.4))
        values = {p.flatten()[0].item() for p in load(model(), path).parameters()}
        if len(values) != 1:
            raise Wrong(f"{path} holds parts of several adapters: {values}")
        save([-1])  # what the next kill finds where it comes before the first save
        if others := [other for other in folder.iterdir() if other != path]:
            raise Wrong(f"a save after a kill leaves {others}")
        yield KILLED
        yield SAME


def _write_images(root: Path) -> Path:
    generator = np.random.default_rng(1)
    for channel, name in enumerate(("red", "green")):
        (root / name).mkdir(parents=True)
        for index in range(8):
            pixels = generator.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 55
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def _resumed(
    folder: Path,
    draw: random.Random,
    run: Callable[[Path], object],
    read: Callable[[Path], dict[str, Any]],
) -> Iterator[str]:
    """Kill `run` and start it again until it ends, and compare.

    Args:
        folder: for the outputs.
        draw: the random moments.
        run: what writes into the folder it is given, or goes on there.
        read: what has to be the same, by name.
    """
    start = time.monotonic()
    ended(lambda: run(folder / "alone"))
    duration = time.monotonic() - start
    expected = read(folder / "alone")
    if not expected:
        raise Wrong("what was left alone wrote nothing")
    for number in itertools.count():
        output = folder / str(number)
        while not ended(partial(run, output), draw.uniform(0, LATEST * duration)):
            yield KILLED
        found = read(output)
        if found != expected:
            names = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
            raise Wrong(f"{output} differs from {folder / 'alone'} in {sorted(names)}")
        yield SAME


def _numbers(path: Path) -> dict[str, bytes]:
    """Name → the bytes of a tensor."""
    tensors = load_file(path).items()
    return {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors}


def soak_train(folder: Path, draw: random.Random) -> Iterator[str]:
    """What happened, step by step; see the module."""
    settings = TrainSettings(
        data=_write_images(folder / "images"),
        model="test_vit",
        rank=4,
        epochs=4,
        batch_size=4,
        img_size=32,
        pretrained=False,
        device="cpu",
        val_split=0.3,
    )

    def run(output: Path) -> None:
        fit(prepare(settings, output, resume=(output / "config.json").exists()))

    def read(output: Path) -> dict[str, Any]:
        with (output / "metrics.csv").open(newline="") as file:
            rows = [{k: v for k, v in r.items() if k != "seconds"} for r in csv.DictReader(file)]
        return {"metrics.csv": rows, **_numbers(output / "adapter.safetensors")}

    return _resumed(folder, draw, run, read)


def soak_sweep(folder: Path, draw: random.Random) -> Iterator[str]:
    """What happened, step by step; see the module."""
    task = _write_images(folder / "data" / "dtd" / "images").parent
    paths = sorted(task.rglob("*.png"))
    lines = [f"{path.relative_to(task)} {path.parent.name == 'red':d}" for path in paths]
    parts = {"train800": lines[0::3], "val200": lines[1::3], "test": lines[2::3]}
    parts["train800val200"] = parts["train800"] + parts["val200"]
    for name, part in parts.items():
        (task / f"{name}.txt").write_text("\n".join(part) + "\n")

    def run(output: Path) -> None:
        command = ["sweep", "--data", str(folder / "data"), "--output", str(output)]
        command += ["--tasks", "dtd", "--methods", "efft2,fact_tt", "--epochs", "2"]
        command += ["--model", "test_vit", "--img-size", "32", "--batch-size", "4"]
        command += ["--ranks", "1,2"]
        command += ["--no-pretrained", "--device", "cpu", "--workers", "0", "--test-every", "1"]
        app(command, standalone_mode=False)

    def read(output: Path) -> dict[str, Any]:
        found: dict[str, Any] = {"tried.csv": (output / "tried.csv").read_text()}
        for path in sorted(output.rglob("result.json")):
            content = json.loads(path.read_text())
            found[path.parent.name] = _without_times(content["result"])
        return found

    return _resumed(folder, draw, run, read)


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if "seconds" not in k}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


SOAKS = {"save": soak_save, "train": soak_train, "sweep": soak_sweep}


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill at random moments, and compare.")
    parser.add_argument("--kills", type=int, default=200, help="of all together")
    parser.add_argument("--seed", type=int, help="of the moments; default: of the clock")
    parser.add_argument("--only", nargs="+", choices=SOAKS, default=list(SOAKS))
    options = parser.parse_args()
    if PROCESSES is None:
        sys.exit("error: this system cannot fork a process")
    torch.set_num_threads(1)
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"--seed {seed}", flush=True)
    wrong = False
    for name in options.only:
        kills, compared, share = 0, 0, -(-options.kills // len(options.only))
        with tempfile.TemporaryDirectory(prefix="efft-soak-") as folder:
            try:
                for event in SOAKS[name](Path(folder), random.Random(seed)):
                    kills, compared = kills + (event == KILLED), compared + (event == SAME)
                    if event == SAME and kills >= share:
                        break
            except Wrong as error:
                wrong = True
                print(f"{name}: after {kills} kills {error}", flush=True)
            else:
                print(f"{name}: {kills} kills, {compared} times the same bits", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
