"""A run's files, damaged: the error that is documented, in one line that names the file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from efft_kernels import LoRA, attach
from efft_kernels.training import run_folder
from efft_kernels.training.settings import BEFORE_THERE_WAS, TrainSettings

Read = Callable[[str], Any]


@pytest.fixture
def config() -> run_folder.Config:
    return {
        "settings": TrainSettings(Path("images"), rank=(4, 2), layers=(0, 3)).to_json(),
        "identity": {"classes": ["a"], "data": "1", "skipped_images": ["a/1.png"], "backbone": "2"},
        "versions": {"torch": "3"},
    }


@pytest.fixture(params=["config.json", "adapter"])
def read(request: pytest.FixtureRequest, make_vit: Any, tmp_path: Path) -> tuple[Read, Path]:
    """(read, path): what reads a configuration's text from a run's folder or from an adapter."""
    if request.param == "config.json":
        path = tmp_path / "config.json"

        def from_folder(text: str) -> Any:
            path.write_text(text)
            return run_folder.read_config(tmp_path)

        return from_folder, path
    adapter, path = attach(make_vit(), LoRA(rank=1)), tmp_path / "adapter.safetensors"

    def from_adapter(text: str) -> Any:
        adapter.save(path, metadata={run_folder.HEADER_KEY: text})
        return run_folder.read_adapter_header(path)

    return from_adapter, path


def refused(read: Read, path: Path, text: str) -> bool:
    try:
        read(text)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return True
    return False


def test_a_whole_configuration_is_read(read: tuple[Read, Path], config: run_folder.Config) -> None:
    assert read[0](json.dumps(config)) == config
    assert run_folder.left_out(config) == ["a/1.png"]
    config["identity"]["skipped_images"] = 2  # of the first format
    config["settings"]["of_a_later_release"] = 1
    assert run_folder.left_out(read[0](json.dumps(config))) == []


def test_a_configuration_of_an_older_release_has_what_it_did(
    read: tuple[Read, Path], config: run_folder.Config
) -> None:
    for name in BEFORE_THERE_WAS:
        del config["settings"][name]
    settings = read[0](json.dumps(config))["settings"]
    assert settings == TrainSettings(Path("images"), rank=(4, 2), layers=(0, 3)).to_json()
    del config["settings"]["lr"]
    assert refused(*read, json.dumps(config))


def test_ranks_per_stage_and_a_methods_options_are_recorded(
    read: tuple[Read, Path], config: run_folder.Config
) -> None:
    options = {"matrices": ("q", "k"), "ffn_rank": [2, (3, 1)]}
    settings = TrainSettings(Path("images"), rank=[2, (4, 3)], options=options)
    config["settings"] = json.loads(json.dumps(settings.to_json()))
    assert read[0](json.dumps(config)) == config
    for name in ("rank", "options"):
        for value in ({} if name == "rank" else [], {"stages": {"x": 1}}, [[]]):
            changed = config["settings"] | {name: value}
            refused(*read, json.dumps(config | {"settings": changed}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("options", {"rank": 3}),
        ("options", {"matrices": {"list": [1]}}),
        ("normalize", "clip"),
        ("schedule", 3),
        ("drop_last", None),
        ("img_size", 10**9),
        ("img_size", "32"),
        ("model", 3),
        ("method", ["lora"]),
        ("method", "magic"),
        ("rank", "many"),
        ("layers", ["x"]),
        ("layers", [[]]),
        ("seed", None),
        ("seed", -1),
        ("val_split", 2),
        ("data", None),
        ("checkpoint", 3),
        ("amp", "float8"),
        ("lr", "nan"),
        ("drop_path", float("nan")),
    ],
)
def test_settings_of_another_type_or_range_are_named(
    read: tuple[Read, Path], config: run_folder.Config, name: str, value: object
) -> None:
    config["settings"][name] = value
    assert refused(*read, json.dumps(config))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"settings":' * 100_000, "", "3", "{}", '{"settings": 3}', "9" * 5000],
)
def test_other_texts_are_refused(read: tuple[Read, Path], text: str) -> None:
    assert refused(*read, text)


@pytest.mark.parametrize("part", ["settings", "identity", "versions"])
def test_odd_parts_are_refused_or_read(
    read: tuple[Read, Path], config: run_folder.Config, part: str
) -> None:
    odd = [None, 3, "x", [], [1], {}, {"a": [[]]}, True]
    for name in [*config[part], None]:
        for value in odd:
            changed = {**config[part], name: value} if name else value
            refused(*read, json.dumps({**config, part: changed}))


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    state = {"trained": {"x": torch.ones(3)}, "history": [], "scaler": None}
    run_folder.save_state(tmp_path, state)
    path = tmp_path / "state.pt"
    whole, cpu, damaged = path.read_bytes(), torch.device("cpu"), 0
    for seed in range(100):
        draw = random.Random(seed)
        content = bytearray(whole[: draw.choice((len(whole), draw.randrange(len(whole))))])
        for _ in range(draw.choice((1, 20))):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(bytes(content))
        try:
            assert isinstance(run_folder.read_state(tmp_path, cpu), dict)
        except ValueError as error:
            assert str(error).startswith(f"{path} must be the state of this run (")
            assert "\n" not in str(error)
            damaged += 1
    assert damaged > 40


def test_a_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert run_folder.read_state(tmp_path, cpu) is None
    for content, reason in (([1], "holds a list"), ({"x": tmp_path}, "Weights only load failed")):
        torch.save(content, tmp_path / "state.pt")
        with pytest.raises(ValueError, match=f"must be the state of this run .*{reason}"):
            run_folder.read_state(tmp_path, cpu)
    for error, reason in ((KeyError(), "KeyError"), (ValueError("one\ntwo"), "one")):
        assert f"state of this run ({reason}):" in str(run_folder.damaged_state(tmp_path, error))


def test_where_a_run_may_begin_or_be_resumed(tmp_path: Path) -> None:
    def check(*names: str) -> list[str | None]:
        """What is said of a folder that holds these, to a new run and to a resumed one."""
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        said: list[str | None] = []
        for resume in (False, True):
            try:
                run_folder.check_output(folder, resume=resume)
                said.append(None)
            except ValueError as error:
                said.append(str(error).replace(str(folder), "IT").partition(":")[0])
        return said

    begins = "output must be a new or empty folder, got IT, which holds "
    assert check(".state.pt.12") == [None, None]
    assert check("config.json") == [begins + "a run", None]
    assert check("config.json", "notes") == [begins + "a run", None]
    lost = "output must be a run to resume, got IT without config.json"
    assert check("thesis.tex", "notes") == [begins + "notes", lost]
    run_folder.check_output(tmp_path / "absent", resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        run_folder.check_output(tmp_path / "file", resume=False)


def test_what_a_kill_while_saving_left_is_removed(tmp_path: Path) -> None:
    files = ("config.json", "state.pt", "metrics.csv", "adapter.safetensors", "curves.png")
    kept = {*files, ".hidden", ".state.pt", "x.state.pt.1"}
    for name in (*kept, *(f".{name}.x1" for name in files)):
        (tmp_path / name).touch()
    for name in files:
        (tmp_path / f".{name}.x2").mkdir()
        (tmp_path / f".{name}.x2" / name).touch()
    run_folder.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_the_configuration_is_written_for_people(config: run_folder.Config, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "one"
    assert run_folder.read_config(output) is None
    for _ in range(2):
        run_folder.write_config(output, config)
    assert (output / "config.json").read_text() == json.dumps(config, indent=2) + "\n"
    assert run_folder.read_config(output) == config
    assert set(run_folder.library_versions()) == {"efft_kernels", "torch", "timm"}


def test_an_adapter_that_no_training_wrote_is_refused(make_vit: Any, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(ValueError, match="nothing there"):
        run_folder.read_adapter_header(path)
    attach(make_vit(), LoRA(rank=1)).save(path)
    with pytest.raises(ValueError, match=r"must be one that `efft-kernels train` wrote"):
        run_folder.read_adapter_header(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"workers": 3}, None),
        ({"layers": (3, 0)}, None),
        ({"layers": (0, 2)}, r"layers must be \[0, 3\] as when the run began, got \[0, 2\]"),
        ({"layers": None}, r"layers must be \[0, 3\] as when the run began, got unset"),
        ({"lr": 0.01}, "lr must be 0.001 as when the run began, got 0.01"),
        ({"seed": 1}, "seed must be 42 as when the run began, got 1"),
        ({"scale": 2.0}, "scale must be unset as when the run began, got 2.0"),
        ({"options": {}}, "ffn_rank must be 3 as when the run began, got unset"),
        ({"options": {"ffn_rank": 3, "ffn_init": "u"}}, "ffn_init must be unset .*, got u"),
    ],
)
def test_what_may_not_change_in_a_resumed_run(change: dict[str, Any], message: str | None) -> None:
    began = {"rank": (4, 2), "layers": (0, 3), "options": {"ffn_rank": 3}}
    one, other = (TrainSettings(Path("images"), **(began | c)).to_json() for c in ({}, change))
    if message is None:
        run_folder.compare_settings(one, other)
    else:
        with pytest.raises(ValueError, match=message):
            run_folder.compare_settings(one, other)


@pytest.mark.parametrize(
    ("name", "setting"), [("classes", "data"), ("data", "data"), ("backbone", "checkpoint")]
)
def test_images_and_backbone_may_not_change(name: str, setting: str) -> None:
    began: dict[str, Any] = {"classes": ["a"], "data": "1", "backbone": "2", "skipped_images": []}
    run_folder.compare_identity(began, began | {"skipped_images": ["x"]})
    with pytest.raises(ValueError, match=f"{setting} must be as when the run began, but .* chang"):
        run_folder.compare_identity(began, began | {name: "other"})
