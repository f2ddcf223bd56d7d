"""Damaged and hostile files: the documented error, in one line that names the file, and no more.

Every reader gets whole files with some bytes changed or cut off, headers of values that no writer
writes, and tensors that claim to be larger than they are.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import re
import resource
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from efft_kernels import EFFT2, FacTTK, FacTTT, KAdaptation, LoRA, attach, import_fact, load
from efft_kernels.analysis.subspace import load_alone
from efft_kernels.interop import files, import_peft_lora, name_patterns
from efft_kernels.interop.files import is_number, new_folder, read_json, read_torch_file
from efft_kernels.interop.name_patterns import (
    MOST_CHARACTERS,
    MOST_WAYS,
    NamePatterns,
    _compile,
)

HUGE = [10**9, 10**18, 10**400, 1e308, float("inf"), float("nan"), -1, 0]
ODD = [None, True, "", "x\ny", [], [[]], {}, {"tuple": 3}, {"a": {"b": []}}, [10**9] * 3]
DEEP = "[" * 100_000


def refused_or_read(read, path: Path) -> bool:
    """Whether the file is refused; then as documented."""
    try:
        read()
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return True
    return False


def damaged(whole: bytes, seed: int) -> bytes:
    """Cut off, or with a few bytes changed, mostly near the start, where headers are."""
    draw = random.Random(seed)
    if draw.random() < 0.3:
        return whole[: draw.randrange(len(whole))]
    content = bytearray(whole)
    for _ in range(draw.choice((1, 3, 30))):
        end = draw.choice((16, 400, len(content)))
        content[draw.randrange(min(end, len(content)))] = draw.randrange(256)
    return bytes(content)


@pytest.fixture(autouse=True)
def _few_gigabytes():
    """No tensor of a hostile size can be made, where the system can say so."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def adapter_file(make_vit, tmp_path):
    """(path, write): a small adapter's file, and a function that replaces entries of its header."""
    path = tmp_path / "adapter.safetensors"

    def write(config, **changes):
        attach(make_vit(), config).save(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        save_file(load_file(path), path, metadata={**header, **changes})

    return path, write


@pytest.fixture
def peft_folder(tmp_path):
    """(folder, write): a small PEFT checkpoint, and a function that replaces its config's text."""
    folder = tmp_path / "peft"
    folder.mkdir()
    name = "base_model.model.blocks.0.attn.qkv.lora_"
    tensors = {f"{name}A.weight": torch.ones(2, 12), f"{name}B.weight": torch.ones(36, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")

    def write(text=None, **changes):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **changes}
        text = json.dumps(config) if text is None else text
        (folder / "adapter_config.json").write_text(text)

    return folder, write


METHODS = [
    EFFT2(rank=3, ffn_rank=2),
    FacTTT(rank=3),
    FacTTK(rank=3, layer_rank=2),
    LoRA(rank=3),
    KAdaptation(products=2, rank=1),
]


class TestAdapterFile:
    def test_damaged_bytes(self, make_vit, adapter_file):
        path, write = adapter_file
        write(LoRA(rank=1))
        model, whole = make_vit(), path.read_bytes()
        refused = 0
        for seed in range(80):
            path.write_bytes(damaged(whole, seed))
            refused += refused_or_read(lambda: load(copy.deepcopy(model), path), path)
        assert refused > 40

    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
    def test_senseless_configurations_make_no_tensor(self, make_vit, adapter_file, method):
        path, write = adapter_file
        model = make_vit()
        refused = 0
        write(method)
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        for field in dataclasses.fields(method):
            for value in (*HUGE, *ODD):
                config = json.dumps({**method.to_config(), field.name: value})
                save_file(tensors, path, metadata={**header, "method": config})
                refused += refused_or_read(lambda: load(copy.deepcopy(model), path), path)
        assert refused > 20

    @pytest.mark.parametrize("key", ["method", "targets", "modules_to_train", "base_shapes"])
    def test_senseless_headers(self, make_vit, adapter_file, key):
        path, write = adapter_file
        model = make_vit(depth=1)
        shapes = ({"head.bias": value} for value in ([1e999], [[1]], "12", {"a": 1}, [10**30]))
        for value in (*HUGE, *ODD, ["*" * 200], ["head.bias"], *shapes):
            write(LoRA(rank=1), **{key: json.dumps(value)})
            refused_or_read(lambda: load(copy.deepcopy(model), path), path)
        for text in (DEEP, '{"a":' * 100_000, "", "{", "9" * 5000, "\x00"):
            write(LoRA(rank=1), **{key: text})
            assert refused_or_read(lambda: load(copy.deepcopy(model), path), path)

    def test_unknown_dtypes_and_lying_sizes(self, make_vit, adapter_file):
        path, write = adapter_file
        write(LoRA(rank=1))
        whole = path.read_bytes()
        (size,) = struct.unpack("<Q", whole[:8])
        for old, new in (
            ('"F32"', '"F64"'),
            ('"F32"', '"F4"'),
            ('"F32"', '"F8_E8M0"'),
            ('"F32"', '"X32"'),
            ('"shape":[5]', '"shape":[4611686018427387904,4]'),
            ('"shape":[5]', '"shape":[-5]'),
        ):
            header = whole[8 : 8 + size].decode().replace(old, new).encode()
            path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + size :])
            assert refused_or_read(lambda: load(make_vit(), path), path)


class TestPeft:
    def test_damaged_bytes(self, make_vit, peft_folder):
        folder, write = peft_folder
        write()
        model = make_vit()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            whole = (folder / name).read_bytes()
            for seed in range(60):
                (folder / name).write_bytes(damaged(whole, seed))
                refused_or_read(lambda: import_peft_lora(copy.deepcopy(model), folder), folder)
            (folder / name).write_bytes(whole)
        import_peft_lora(model, folder)

    def test_senseless_configurations(self, make_vit, peft_folder):
        folder, write = peft_folder
        model = make_vit()
        patterns = [{"qkv": value} for value in (*HUGE, *ODD)]
        for field, values in {
            "r": (*HUGE, *ODD),
            "lora_alpha": (*HUGE, *ODD),
            "peft_type": ODD,
            "modules_to_save": (*ODD, [""], ["x"], 10**9),
            "rank_pattern": (*patterns, *ODD),
            "alpha_pattern": (*patterns, *ODD),
            "init_lora_weights": ODD,
            "bias": ODD,
            "x\ny": ODD,
        }.items():
            for value in values:
                write(**{field: value})
                refused_or_read(lambda: import_peft_lora(copy.deepcopy(model), folder), folder)
        for text in (DEEP, '{"a":' * 100_000, "[]", "3", "", '{"r": ' + "9" * 5000 + "}"):
            write(text)
            assert refused_or_read(lambda: import_peft_lora(model, folder), folder)

    @pytest.mark.parametrize("flag", [True, False])
    def test_the_merge_weights_flag_of_old_releases_means_nothing(
        self, make_vit, peft_folder, flag
    ):
        folder, write = peft_folder
        write(merge_weights=flag, enable_lora=None)
        adapter = import_peft_lora(make_vit(), folder)
        (delta,) = adapter.delta_weights().values()
        assert torch.equal(delta, torch.full((36, 12), 4.0))


def test_a_config_of_many_bytes_is_not_read(make_vit, peft_folder):
    folder, write = peft_folder
    path, start = folder / "adapter_config.json", '{"peft_type": "LORA", "x": "'
    write(start + "x" * (2**24 - len(start) - 2) + '"}')
    assert len(read_json(path)["x"]) == 2**24 - 30
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"JSON of at most 16,777,216 bytes, got 16,777,217"):
        import_peft_lora(make_vit(), folder)


def test_a_failure_at_the_last_moment_takes_the_adapter_off_again(
    make_vit, unchanged, monkeypatch, peft_folder, tmp_path
):
    folder, write = peft_folder
    write(modules_to_save=["head"])
    integers = {"head.weight": torch.ones(5, 12).long(), "head.bias": torch.ones(5)}
    weights = folder / "adapter_model.safetensors"
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in integers.items()}
    save_file(load_file(weights) | prefixed, weights)
    torch.save(TestFact.tensors() | integers, tmp_path / "fact.pt")
    model = make_vit()
    for read in (
        lambda: import_peft_lora(model, folder),
        lambda: import_fact(model, tmp_path / "fact.pt", method="fact_tt", scale=1.0),
    ):
        with unchanged(model, swapped=True), pytest.raises(ValueError, match=r"head\.weight"):
            read()


class TestNamePatterns:
    NAME = "blocks.11.attn.qkv"

    @pytest.mark.parametrize(
        ("key", "fits"),
        [
            ("qkv", True),
            ("kv", False),
            ("attn.qkv", True),
            (r"blocks\.\d+\.attn\.qkv", True),
            (r"blocks\.([02468]|10)\..*", False),
            (r".*\.1[0-3]\..*\.(q|qkv)", True),
            ("^attn.qkv", False),
            ("(a|b)ttn.(?:q|k|v)+", True),
            ("x)|(.*qkv", True),
            (r"(.)(t)\3n.qkv", False),
            (r"a(.)\3n.qkv", True),
            ("(?=a).*", True),
            (".{6}.*?.{0,3}qkv", True),
            ("[[q]kv", True),  # which Python warns of
        ],
    )
    @pytest.mark.filterwarnings("error")
    def test_keys_are_read_as_peft_reads_them(self, key, fits):
        assert NamePatterns({"no": 2, key: 3}).value_of(self.NAME, 1) == (3 if fits else 1)

    @pytest.mark.parametrize(
        "key",
        [
            "((.*)*)*Z",
            "(x+x+)+y",
            "(a|aa)+",
            "(.*)" * 12 + "Z",
            "(a|a?)" * 30 + "Z",
            "(a?){40}",
            "(.*?)" * 12 + "Z",
            "(?=(.*)*)Z",
            "(?:(?:a|ab){0,9}){0,9}Z",
            "x|(.*)*|y",
        ],
    )
    def test_a_key_that_could_take_for_ever_is_named(self, key):
        with pytest.raises(ValueError, match="simple regular expressions as keys, got"):
            NamePatterns({key: 2}).value_of(self.NAME * 2, 1)

    @pytest.mark.parametrize(
        ("key", "choices", "repeats"),
        [
            ("qkv", 1, 0),
            ("ab|cd|ef", 3, 0),
            ("(a*|b|c*d*)", 3, 2),
            (".*", 1, 1),
            ("a{3}", 1, 0),
            ("a{2,3}", 1, 1),
            (".*x.+", 1, 2),
            ("(a*)?b", 2, 1),
            ("(a*b){3}", 1, 3),
            ("(ab|cd){3}", 2**3, 0),
            ("(a*|b){4}", 2**4, 4),
            ("(a*b){8}", 1, 8),
            ("(a*b){9}", MOST_WAYS + 1, 0),
            ("(a*b){1,3}", MOST_WAYS + 1, 0),
            ("(ab|cd){26}", 2**26, 0),
            ("(ab|cd){27}", MOST_WAYS + 1, 0),
            ("(ab|cd){80}", MOST_WAYS + 1, 0),
            ("(aa|bb|cc|dd|ee|ff|gg|hh|ii|jj){8}", MOST_WAYS, 0),
            ("(ab|cd){1}(a*b)?", 2 * 2, 1),
            ("((ab|cd){26}|c)(ef|gh){2}", MOST_WAYS + 1, 0),
            ("(?=a*)(?:ab|cd)c*", 2, 2),
        ],
    )
    def test_the_ways_of_a_key(self, key, choices, repeats):
        assert _compile(key)[1:] == (choices, repeats)

    def test_many_names_share_the_bound(self):
        patterns = NamePatterns({".*.*.*.*x": 2})
        assert patterns.value_of(self.NAME, 1) == 1
        with pytest.raises(ValueError, match=f"more than {MOST_WAYS:,} tries"):
            for _ in range(MOST_WAYS):
                patterns.value_of(self.NAME * 3, 1)

    def test_the_ways_of_a_name_are_those_of_its_ends(self, monkeypatch):
        """2 ends of "a.b", 3 choices, and C(3 + 1, 1) places where the repeat can end."""
        monkeypatch.setattr(name_patterns, "MOST_WAYS", 5 * 2 * 3 * 4)
        patterns = NamePatterns({"(x|y|.*z)": 2})
        assert [patterns.value_of("a.b", 1) for _ in range(5)] == [1] * 5
        with pytest.raises(ValueError, match="more than 120 tries"):
            patterns.value_of("a.b", 1)

    def test_a_long_key_is_shown_in_part(self):
        for count, shown in ((60, "(" * 60 + "':"), (61, "(" * 60 + "'...:")):
            with pytest.raises(ValueError, match=re.escape(f"got '{shown}")):
                NamePatterns({"(" * count: 2})

    @pytest.mark.parametrize("key", ["(", "a{99999999999}", "(" * 10**5, "(?z)", "[z-a]", r"\9"])
    def test_what_is_no_expression_is_named(self, key):
        with pytest.raises(ValueError, match="must have regular expressions as keys, got"):
            NamePatterns({key: 2})

    def test_a_thousand_plain_names_are_quick(self):
        names = [f"blocks.{index}.attn.qkv" for index in range(1000)]
        patterns = NamePatterns({name: index for index, name in enumerate(names)})
        assert [patterns.value_of(name, -1) for name in names[::100]] == list(range(0, 1000, 100))

    @pytest.mark.parametrize(
        "keys", [["a" * (MOST_CHARACTERS + 1)], ["(a)" * 20_000, "(a)" * 20_000 + "b"]]
    )
    def test_what_takes_long_to_compile_is_refused(self, keys, monkeypatch):
        """A file of 16 MB may hold a million keys, which take minutes to compile."""
        monkeypatch.setattr(name_patterns, "_compile", None)
        with pytest.raises(
            ValueError, match=r"at most 100,000 characters together, got 1[02]0,001"
        ):
            NamePatterns(dict.fromkeys(keys, 1))


class TestFact:
    @staticmethod
    def tensors(r=3, blocks=2, expand=False):
        shapes = {"FacTu.weight": (r, 12), "FacTv.weight": (12, r)}
        for i in range(blocks):
            for name in ("q", "k", "v", "proj"):
                shapes[f"blocks.{i}.attn.{name}_FacTs.weight"] = (r, r)
            shapes[f"blocks.{i}.mlp.fc1_FacTs.weight"] = (4 * r, r)
            shapes[f"blocks.{i}.mlp.fc2_FacTs.weight"] = (r, 4 * r)
        one = torch.ones(())
        return {k: one.expand(s) if expand else torch.ones(s) for k, s in shapes.items()}

    def test_the_lowest_rank_and_the_releases_dropout(self, make_vit, tmp_path):
        torch.save(self.tensors(r=1), tmp_path / "fact.pt")
        adapter = import_fact(make_vit(), tmp_path / "fact.pt", method="fact_tt", scale=1.0)
        assert (adapter.method.rank, adapter.method.dropout) == (1, 0.1)
        for dropout in (-0.1, 1.0):
            with pytest.raises(ValueError, match=r"dropout must be at least 0\.0 and below 1\.0"):
                import_fact(
                    make_vit(),
                    tmp_path / "fact.pt",
                    method="fact_tt",
                    scale=1.0,
                    dropout=dropout,
                )

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("legacy", [False, True])
    def test_damaged_bytes(self, make_vit, tmp_path, legacy):
        path, model = tmp_path / "fact.pt", make_vit()
        torch.save(self.tensors(r=1), path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        refused = 0
        for seed in range(80):
            path.write_bytes(damaged(whole, seed))
            refused += refused_or_read(
                lambda: import_fact(copy.deepcopy(model), path, method="fact_tt", scale=1.0), path
            )
        assert refused > 40

    @pytest.mark.parametrize("rank", [10**9, 13])
    def test_a_rank_that_no_linear_has_is_refused_before_it_is_computed_with(
        self, make_vit, tmp_path, rank
    ):
        path = tmp_path / "fact.pt"
        torch.save(self.tensors(r=rank, expand=True), path)
        with pytest.raises(ValueError, match=r"stored whole in .*fact\.pt, got"):
            import_fact(make_vit(), path, method="fact_tt", scale=1.0)
        if rank < 100:
            torch.save(self.tensors(r=rank), path)
            with pytest.raises(ValueError, match=r"must be within 1..12, got 13 .*fact\.pt"):
                import_fact(make_vit(), path, method="fact_tt", scale=1.0)

    def test_a_file_that_grows_when_unpacked_is_refused(self, make_vit, tmp_path):
        path, packed = tmp_path / "fact.pt", tmp_path / "packed.pt"
        torch.save(self.tensors() | {"zeros": torch.zeros(10**6)}, path)
        with (
            zipfile.ZipFile(path) as source,
            zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
        ):
            for item in source.infolist():
                target.writestr(item.filename, source.read(item))
        with pytest.raises(ValueError, match=r"packed\.pt: compressed, 4,\d+,\d+ bytes"):
            import_fact(make_vit(), packed, method="fact_tt", scale=1.0)

    def test_other_devices_and_deep_objects_are_refused(self, make_vit, tmp_path):
        path = tmp_path / "fact.pt"
        nested: list = []
        for _ in range(5000):
            nested = [nested]
        for content in ({"x": torch.ones(2, device="meta")}, nested, {"x": nested}, {1: 2}):
            try:
                torch.save(content, path)
            except RecursionError:
                continue
            with pytest.raises(ValueError, match=r"fact\.pt"):
                import_fact(make_vit(), path, method="fact_tt", scale=1.0)


class TestFiles:
    """What the formats share."""

    def test_a_file_of_tensors_holds_dense_ones_alone(self, tmp_path):
        path, whole = tmp_path / "it.pt", {"a": torch.ones(2, 3), "b": torch.tensor(1.0)}
        torch.save(whole, path)
        assert all(torch.equal(t, whole[name]) for name, t in read_torch_file(path).items())
        for content, text in (
            ({"a": path}, "must be a whole file of tensors"),
            ({"a": torch.eye(2).to_sparse()}, "a must be a dense tensor"),
            ({"a": torch.ones(2, device="meta")}, "a must be a dense tensor"),
            ({"a": 3}, "a must be a dense tensor"),
            ({"a": torch.ones(1).expand(2)}, "a must be stored whole"),
            ({1: torch.ones(2)}, "a dictionary of named tensors"),
            ([torch.ones(2)], "a dictionary of named tensors"),
        ):
            torch.save(content, path)
            with pytest.raises(ValueError, match=text):
                read_torch_file(path)
        with pytest.raises(FileNotFoundError, match="found none"):
            read_torch_file(tmp_path / "absent")

    def test_numbers_are_those_that_a_float_can_hold(self):
        largest = sys.float_info.max
        assert all(is_number(value) is True for value in (0, -1.5, largest, -largest))
        assert not any(is_number(v) for v in (True, "1", None, 10**400, math.nan, math.inf))

    def test_a_reason_is_one_line(self):
        found = [files._reason(error) for error in (ValueError("one\ntwo"), KeyError())]
        assert found == ["one", "KeyError"]

    def test_a_folder_is_written_whole_or_not_at_all(self, tmp_path):
        for name in ("new", "empty"):
            (tmp_path / "empty").mkdir(exist_ok=True)
            with new_folder(tmp_path / name) as folder:
                (folder / "a").touch()
            assert [path.name for path in (tmp_path / name).iterdir()] == ["a"]
        for name in ("new", "new/a"):
            with (
                pytest.raises(FileExistsError, match="an empty folder"),
                new_folder(tmp_path / name),
            ):
                pass
        with (
            pytest.raises(FileNotFoundError, match="an existing folder"),
            new_folder(tmp_path / "absent" / "it"),
        ):
            pass
        for removed in (False, True):
            with pytest.raises(ValueError, match="mine"), new_folder(tmp_path / "it") as folder:
                if removed:
                    folder.rmdir()
                raise ValueError("mine")
        assert {path.name for path in tmp_path.iterdir()} == {"new", "empty"}


@pytest.mark.parametrize("shape", [[10**9, 10**9], [10**30], [-1, 12]])
def test_a_model_of_hostile_sizes_is_not_stood_in_for(adapter_file, shape):
    path, write = adapter_file
    write(LoRA(rank=1))
    assert load_alone(path).num_parameters() > 0
    with safe_open(path, framework="pt") as file:
        shapes = json.loads(file.metadata()["base_shapes"])
    write(LoRA(rank=1), base_shapes=json.dumps({**shapes, "head.weight": shape}))
    assert refused_or_read(lambda: load_alone(path), path)
