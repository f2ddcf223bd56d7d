"""The Triton backend without a GPU: availability, and the choice of block shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton_package = pytest.importorskip("triton")

from efft_kernels.ops import dispatch  # noqa: E402
from efft_kernels.ops.backends import triton as backend  # noqa: E402
from efft_kernels.ops.backends.fallback import padded_rank  # noqa: E402
from efft_kernels.ops.backends.triton import configs, device, tuning  # noqa: E402
from efft_kernels.ops.backends.triton.forward import on_16_bytes, out_of_reach  # noqa: E402

H200 = device.Device("NVIDIA_H200", 90, 132, 227 * 1024)
A100 = device.Device("NVIDIA_A100_SXM4_80GB", 80, 108, 163 * 1024)
RTX3090 = device.Device("NVIDIA_GeForce_RTX_3090", 86, 82, 99 * 1024)
RTX5090 = device.Device("NVIDIA_GeForce_RTX_5090", 120, 170, 99 * 1024)


@pytest.fixture
def on(monkeypatch):
    """Pretend that a device is there, as far as the choice of block shapes goes."""

    def pretend(found):
        monkeypatch.setattr(device, "properties", lambda index: found)
        tuning.forget()

    yield pretend
    tuning.forget()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_all_that_a_backend_offers_is_listed():
    assert {"forward", "backward"} <= set(backend.__all__) <= set(vars(backend))


def test_unavailable_says_how_to_get_it():
    reason = backend.unavailable()
    assert "no CUDA device" in reason and "TRITON_INTERPRET=1" in reason
    with pytest.raises(RuntimeError, match="no CUDA device"):
        dispatch.require_backend("triton")


def test_rejects_names_what_came():
    assert "float64" in backend.rejects(torch.zeros(2, 3, dtype=torch.float64))
    assert "cpu" in backend.rejects(torch.zeros(2, 3))


def test_what_keeps_it_from_running(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(backend, "INTERPRETED", True)
        assert backend.unavailable() is None
        found = [backend.rejects(torch.zeros(2, dtype=dtype)) for dtype in backend.DTYPES]
        assert found[0] is found[2] is None and "bfloat16 incorrectly" in found[1]
        assert "float64" in backend.rejects(torch.zeros(2, dtype=torch.float64))
        patch.setattr(backend, "find_spec", lambda name: None)
        assert "triton is not installed" in backend.unavailable()
    on_gpu = SimpleNamespace(dtype=torch.float16, is_cuda=True)
    assert backend.rejects(on_gpu) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(backend, "too_old", lambda index: f"{index} is too old")
    assert backend.unavailable() == "3 is too old"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in backend.unavailable()


@pytest.mark.parametrize(
    ("arch", "kib"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99), (87, 99)]
)
def test_what_is_known_of_a_device(monkeypatch, arch, kib):
    """As torch says, or by the architecture where it does not know the shared memory."""
    found = SimpleNamespace(
        name="(NVIDIA) GeForce RTX-9 ", major=arch // 10, minor=arch % 10, multi_processor_count=7
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {1: None, 2: found}.__getitem__)
    for index in (None, 2):
        known = device.properties.__wrapped__(index)
        assert known == ("NVIDIA_GeForce_RTX_9", arch, 7, kib * 1024)
    assert device.SMEM_BYTES.get(arch) == (None if arch == 87 else kib * 1024)
    found.shared_memory_per_block_optin = 1234
    assert device.properties.__wrapped__(2).smem_bytes == 1234


def test_tensor_memory_is_256_kib():
    assert device.TMEM_COLUMNS * 128 * 4 == 256 * 1024


def test_persistent_programs(monkeypatch):
    for found, fuses in ((A100, True), (H200, True), (H200._replace(arch=100), False)):
        monkeypatch.setattr(device, "properties", lambda index, found=found: found)
        assert device.fuses_loops(0) is fuses
        assert device.multiprocessors(0) == found.multiprocessors
    monkeypatch.setattr(device, "properties", lambda index: H200)
    monkeypatch.setattr(device, "INTERPRETED", True)
    assert device.fuses_loops(0) is False and device.multiprocessors(0) == 3


def test_auto_never_takes_the_interpreter():
    code = """
import torch
from efft_kernels.ops import cost_model, dispatch
from efft_kernels.ops.backends import triton as backend
x = torch.zeros(2, 3)
assert backend.unavailable() is None and backend.rejects(x) is None
assert "bfloat16" in backend.rejects(x.bfloat16())
problem = cost_model.Problem(2, 3, 5, 1, 2, False, 4, 4, "cpu")
assert dispatch._select_backend("auto", x, problem).NAME in ("cpp", "torch")
assert dispatch._select_backend("triton", x, problem).NAME == "triton"
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_what_runs_in_torch():
    assert not out_of_reach(1, 1, 1, 128)
    assert out_of_reach(1, 1, 1, 129)
    assert all(out_of_reach(*sizes, 1) for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)))


def test_off_16_bytes_p_is_a_pass_of_its_own():
    storage = torch.zeros(32, dtype=torch.float16)
    assert on_16_bytes("fused", storage, storage[8:]) == "fused"
    assert on_16_bytes("merged", storage[1:]) == "merged"
    for start in (1, 2, 4):
        for operands in ((storage[start:], storage), (storage, storage[start:])):
            assert on_16_bytes("fused", *operands) == "split"


@pytest.mark.parametrize(
    "rank,padded", [(1, 16), (16, 16), (17, 32), (33, 64), (65, 128), (128, 128)]
)
def test_padded_rank(rank, padded):
    assert padded_rank(rank) == padded


@pytest.mark.parametrize("device", [H200, A100, RTX3090, RTX5090], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_shape_has_a_config_that_fits(on, device, dtype):
    on(device)
    for rank in (16, 32, 64, 128):
        for compute_p in (True, False):
            for wide in (True, False) if dtype == torch.bfloat16 else (False,):
                for aligned in (True, False):
                    for m, c, i in ((1, 16, 16), (12608, 2304, 768), (12608, 768, 3072)):
                        shape = {
                            "wide": wide,
                            "aligned": aligned,
                            "compute_p": compute_p,
                            "slice_c": c,
                        }
                        config = tuning.gemm_config(m, c, i, rank, dtype, **shape, index=0)
                        wb = 4 if wide else dtype.itemsize
                        smem = configs.gemm_smem_bytes(config, rank, dtype.itemsize, wb, compute_p)
                        assert smem <= device.smem_bytes


@pytest.mark.parametrize(
    "arch,family",
    [(75, 80), (80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80)],
)
def test_each_architecture_takes_the_shapes_of_its_like(arch, family):
    assert device.family(arch) == family


def test_small_problems_get_small_tiles(on):
    on(H200)
    shape = {"wide": False, "aligned": True, "compute_p": True, "slice_c": 3072, "index": 0}
    many = tuning.gemm_config(100_000, 3072, 768, 16, torch.bfloat16, **shape)
    few = tuning.gemm_config(197, 768, 768, 16, torch.bfloat16, **shape)
    assert many.block_m * many.block_c > few.block_m * few.block_c


def test_tiles_of_several_slices_are_narrow(on, monkeypatch, tmp_path):
    """Slices that 256 columns do not divide, whatever was measured for that output."""
    key = configs.gemm_key(3072, 768, 16, "half", True)
    path = tmp_path / "mine.json"
    row = [128, 256, 64, 8, 8, 3, 1, 0]
    path.write_text(json.dumps({"device": H200.name, "rows": {key: {"17": row}}}))
    for file in (None, path):
        if file is not None:
            monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(file))
        on(H200)
        for slice_c, expected in ((1024, 256), (3072, 256), (384, 128), (96, 128)):
            shape = {
                "wide": False,
                "aligned": True,
                "compute_p": True,
                "slice_c": slice_c,
                "index": 0,
            }
            found = tuning.gemm_config(100_000, 3072, 768, 16, torch.bfloat16, **shape)
            assert found.block_c == expected
            assert (list(found) == row) == (file == path and expected == 256)
            assert tuning.crosses(found, 3072, slice_c) == (slice_c == 96)
    row = [64, 128, 64, 8, 4, 3, 1, 0]
    path.write_text(json.dumps({"device": H200.name, "rows": {key: {"17": row}}}))
    on(H200)
    found = tuning.gemm_config(100_000, 3072, 768, 16, torch.bfloat16, **(shape | {"slice_c": 96}))
    assert list(found) == row
    assert not tuning.crosses(found, 96, 96)


def test_a_measured_row_is_taken_at_the_nearest_size_only(on, monkeypatch, tmp_path):
    row = [64, 64, 64, 4, 4, 2, 1]
    read = [*row, False]  # a row from before there was a persistent grid
    key = configs.gemm_key(2304, 768, 16, "half", True)
    path = tmp_path / "mine.json"
    a_pass = [32, 64, 5, 8, 2]
    rows = {key: {"14": row}, configs.pass_key("thin", 768, 16, "half"): {"14": a_pass}}
    path.write_text(json.dumps({"device": H200.name, "rows": rows}))
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(path))
    on(H200)
    for m, taken in ((12608, True), (600, False)):
        found = tuning.pass_config("thin", m, 768, 16, torch.float16, aligned=True, index=0)
        assert (list(found) == a_pass) is taken and isinstance(found, configs.PassConfig)

    def config(m, c, aligned=True):
        shape = {"wide": False, "aligned": aligned, "compute_p": True, "slice_c": c, "index": 0}
        return list(tuning.gemm_config(m, c, 768, 16, torch.bfloat16, **shape))

    assert config(12608, 2304) == read
    assert config(600, 2304) != read
    assert config(12608, 768) != read
    assert config(12608, 2304, aligned=False) != read


def test_a_table_of_another_device_is_ignored_and_said_so(on, monkeypatch, tmp_path, caplog):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"device": "NVIDIA_B200", "rows": {}}))
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(path))
    on(H200)
    with caplog.at_level("INFO"):
        tuning.pass_config("thin", 197, 768, 16, torch.bfloat16, aligned=True, index=0)
        tuning._gemm_config(197, 768, 768, 16, "half", False, True, 768, 0)
    assert "was measured on NVIDIA_B200" in caplog.text
    assert "no measured thin config" in caplog.text and "no measured gemm config" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("not json", "Expecting value"),
        ("[]", "it names no device"),
        ('{"rows": {}}', "it names no device"),
        ('{"device": "NVIDIA_H200"}', "it has no rows"),
        ('{"device": "NVIDIA_H200", "rows": {"thin|half": [1]}}', "it has no rows"),
        (
            '{"device": "NVIDIA_H200", "rows": {"thin|half": {"14": [1, 2]}}}',
            "row 'thin|half' has '14': [1, 2]",
        ),
        (
            '{"device": "NVIDIA_H200", "rows": {"gemm|half": {"14": [1, 2, 3, 4, 5]}}}',
            "row 'gemm|half' has '14': [1, 2, 3, 4, 5]",
        ),
        (
            '{"device": "NVIDIA_H200", "rows": {"chain before|c768": {"many": [1]}}}',
            "row 'chain before|c768' has 'many': [1]",
        ),
        (
            '{"device": "NVIDIA_H200", "rows": {"chain before|c768": {"14": ["x"]}}}',
            "row 'chain before|c768' has '14': ['x']",
        ),
        *(
            (
                json.dumps(
                    {"device": "NVIDIA_H200", "rows": {"chain gelu|c768": {bucket: config}}}
                ),
                "row 'chain gelu|c768' has",
            )
            for bucket, config in (
                ("14", [2]),
                ("14", [-1]),
                ("14", [True]),
                ("14", [10**400]),
                ("14", [1, 0]),
                ("\u00b2", [1]),
                ("1" * 6000, [1]),
            )
        ),
        (
            '{"device": "NVIDIA_H200", "rows": {"thin|half": {"14": [0, 0, 0, 0, 0]}}}',
            "row 'thin|half' has '14': [0, 0, 0, 0, 0]",
        ),
        (
            '{"device": "NVIDIA_H200", "rows": {"gemm|half": {"14": [1, 2, 3, 4, 5, 6, 2]}}}',
            "row 'gemm|half' has '14': [1, 2, 3, 4, 5, 6, 2]",
        ),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_table_that_is_none_is_told(on, monkeypatch, tmp_path, text, said):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(path))
    on(H200)
    with pytest.raises(ValueError, match="EFFT_KERNELS_TUNED must be a table") as caught:
        tuning.pass_config("thin", 197, 768, 16, torch.bfloat16, aligned=True, index=0)
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_rows_of_every_form_are_taken(on, monkeypatch, tmp_path):
    """Of a GEMM also those from before TMA and persistent programs."""
    rows = {"thin|half": [1, 2, 3, 4, 5], "chain gelu|c768": [0]}
    rows |= {f"gemm|{more}": [1, 2, 3, 4, 5, 6, *[1] * more] for more in range(3)}
    table = {"device": H200.name, "rows": {key: {"14": row} for key, row in rows.items()}}
    (tmp_path / "mine.json").write_text(json.dumps(table))
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(tmp_path / "mine.json"))
    on(H200)
    assert configs.measured_table(H200.name) == table["rows"]


def test_the_committed_table_is_one():
    table = Path(__file__).parents[4] / "benchmarks" / "results" / "tuned_h200.json"
    assert configs._read_table(table, "it")["device"] == H200.name


def test_the_device_s_own_table_is_named_where_it_is_broken(on, monkeypatch, tmp_path):
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    (tmp_path / f"{H200.name}.json").write_text("{}")
    on(H200)
    with pytest.raises(ValueError, match=r"^the device's file must be .*: it names no device$"):
        configs.measured_table(H200.name)


def test_shipped_defaults_say_that_nothing_was_measured():
    assert configs.defaults()["source"] == "predicted"
    assert "NOT a measurement" in configs.defaults()["_about"]


def test_tf32_only_where_torch_allows_it(monkeypatch):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert device.dot_precision(torch.float32) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert device.dot_precision(torch.float32) == "tf32"
        assert device.dot_precision(torch.bfloat16) == "ieee"
        monkeypatch.setattr(device, "INTERPRETED", True)
        assert device.dot_precision(torch.float32) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_shared_memory_of_the_pipeline():
    config = configs.GemmConfig(128, 256, 64, 8, 8, 3)
    a, w, down = 128 * 64, 64 * 256, 64 * 16
    assert configs.gemm_smem_bytes(config, 16, 2, 4, True) == 3 * (2 * a + 4 * w + 2 * down)
    assert configs.gemm_smem_bytes(config, 16, 2, 2, False) == 3 * 2 * (a + w)
    persistent = config._replace(persistent=True)
    assert configs.gemm_smem_bytes(persistent, 16, 2, 2, False) == 3 * 2 * (a + w) + 32 * 1024
    for compute_p, rows in ((True, 256), (False, 256 + 128)):
        pipelined = configs.gemm_smem_bytes(config, 128, 2, 2, compute_p)
        found = configs.gemm_smem_bytes(persistent, 128, 2, 2, compute_p)
        assert found - pipelined == rows * 128 * 2


def test_a_persistent_program_has_two_stages_at_least(monkeypatch):
    two, one = (configs.GemmConfig(rows, 256, 64, 8, 8, 3) for rows in (256, 512))
    monkeypatch.setattr(configs, "gemm_candidates", lambda *_: (two, one))
    (found,) = configs.persistent_candidates(90, "half", 16, True)
    assert found == two._replace(num_stages=2, tma=True, persistent=True)
    least = configs.gemm_smem_bytes(found, 16, 2, 2, True)
    for smem_bytes, kept in ((least, (found,)), (least - 1, ())):
        monkeypatch.setitem(configs.SMEM_BYTES, 90, smem_bytes)
        assert configs.persistent_candidates(90, "half", 16, True) == kept


@pytest.mark.parametrize("compute_p", [True, False])
@pytest.mark.parametrize("rank", [16, 17, 32])
def test_persistent_programs_keep_the_stages_that_fit(rank, compute_p):
    for arch in (80, 100):
        assert configs.persistent_candidates(arch, "half", rank, compute_p) == ()
    found = configs.persistent_candidates(90, "half", rank, compute_p)
    shipped = configs.gemm_candidates(90, "half", rank)
    for config in found:
        assert config.tma and config.persistent and config.num_warps >= 8
        assert config.num_stages >= 2 and (rank <= 16 or config.block_c <= 128)
        plain = config._replace(tma=False, persistent=False)
        (given,) = (s for s in shipped if s[:5] == plain[:5])
        more = config._replace(num_stages=config.num_stages + 1)
        fits = configs.gemm_smem_bytes(more, rank, 2, 2, compute_p) <= device.SMEM_BYTES[90]
        assert config.num_stages == given.num_stages or not fits
    wide = [s for s in shipped if s.num_warps >= 8 and (rank <= 16 or s.block_c <= 128)]
    assert len(found) == len(wide) > 0


def test_a_measured_row_serves_sizes_one_bit_apart(monkeypatch):
    rows = {"a": {"10": [1], "14": [2]}, "empty": {}}
    monkeypatch.setattr(configs, "measured_table", lambda name: rows)
    found = {m: configs.measured("any", "a", m) for m in (255, 256, 1023, 2047, 2048, 4096, 65535)}
    assert found == {255: None, 256: [1], 1023: [1], 2047: [1], 2048: None, 4096: [2], 65535: None}
    assert configs.measured("any", "a", 32767) == [2]
    assert configs.measured("any", "empty", 16) is configs.measured("any", "other", 16) is None


def test_time_of_a_grid_is_its_waves():
    config = configs.GemmConfig(128, 128, 64, 8, 8, 3)
    tile = 128 * 128 / 0.88

    def cost(tiles, config=config, compute_p=False, on=H200):
        return tuning._gemm_cost(config, 128 * tiles, 128, 16, compute_p, on)

    waves = {1: 1, 132: 1, 133: 2, 264: 2, 265: 3, 264 * 3: 6}
    assert {tiles: cost(tiles) / tile for tiles in waves} == pytest.approx(waves)
    assert cost(1, compute_p=True) == pytest.approx(128 * (128 + 16) / 0.88)
    assert cost(1, config._replace(block_i=48)) == cost(1)
    odd = config._replace(block_m=32, block_c=32)
    assert cost(1, odd) == 32 * 32 / 0.5
    for sizes, rate in (((128, 256), 1.0), ((64, 128), 0.8), ((64, 64), 0.62)):
        one = config._replace(block_m=sizes[0], block_c=sizes[1])
        found = tuning._gemm_cost(one, *sizes, 16, False, H200)
        assert found == pytest.approx(sizes[0] * sizes[1] / rate)


@pytest.mark.parametrize(
    ("dtype", "wide", "a_bytes", "w_bytes"),
    [
        (torch.bfloat16, False, 2, 2),
        (torch.bfloat16, True, 2, 4),
        (torch.float32, False, 4, 4),
        (torch.float32, True, 4, 4),
    ],
)
def test_a_config_that_fits_to_the_byte_is_taken(on, monkeypatch, dtype, wide, a_bytes, w_bytes):
    large, small, least = (configs.GemmConfig(128, n, 64, 8, 8, 3) for n in (128, 64, 32))
    monkeypatch.setattr(tuning, "gemm_candidates", lambda *_: (large, small, least))
    shape = {"wide": wide, "aligned": True, "compute_p": True, "slice_c": 128, "index": 0}

    def taken(smem_bytes):
        on(H200._replace(smem_bytes=smem_bytes))
        return tuning.gemm_config(12608, 128, 768, 16, dtype, **shape)

    for config, next_one in ((large, small), (small, least), (least, None)):
        smem_bytes = configs.gemm_smem_bytes(config, 16, a_bytes, w_bytes, True)
        assert taken(smem_bytes) == config
        assert taken(smem_bytes - 1) == (next_one or least._replace(num_stages=2))


def test_ranks_at_a_time(monkeypatch):
    half, single = torch.float16, torch.float32
    assert tuning.rank_block(half, "ieee", 128, True) == 16
    assert tuning.rank_block(half, "ieee", 128, False) == 128
    assert tuning.rank_block(single, "tf32", 64, False) == 64
    assert [tuning.rank_block(single, "ieee", rank, False) for rank in (16, 32, 64)] == [16, 32, 32]
    for precision, most in (("ieee", 32), ("tf32", 128)):
        monkeypatch.setattr(tuning, "dot_precision", lambda dtype, found=precision: found)
        assert [rank for rank in (32, 33, 128) if tuning.can_compute_p(single, rank)][-1] == most
        assert tuning.can_compute_p(half, 128)


def test_shapes_in_the_interpreter_are_small_and_all_different(monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    shape = {"wide": False, "aligned": True, "compute_p": True, "slice_c": 96, "index": 0}
    gemm = tuning.gemm_config(37, 96, 41, 16, torch.float32, **shape)
    assert sorted(gemm[:3]) == [16, 32, 64]
    one = tuning.pass_config("thin", 37, 41, 16, torch.float32, aligned=True, index=0)
    assert sorted(one[:2]) == [16, 32]
    others = tuning.FOLD_CONFIG, tuning.merge_config(16, 5)
    for config in (gemm[:6], one, *others, tuning.merge_config(16, 17)):
        assert all(number.bit_count() == 1 for number in config)


def test_what_counts_as_aligned():
    assert tuning.is_aligned(768 | 2304, 16) and tuning.is_aligned(16, 5)
    assert tuning.is_aligned(32, 32) and tuning.is_aligned(32, 48) and tuning.is_aligned(32, 31)
    assert not tuning.is_aligned(768 | 8, 16) and not tuning.is_aligned(32, 33)
    forms = {
        (torch.bfloat16, False, True): "half",
        (torch.float16, True, True): "half-wide",
        (torch.float16, True, False): "half-unaligned",
        (torch.float32, False, True): device.dot_precision(torch.float32),
    }
    assert {how: tuning.operand_form(*how) for how in forms} == forms
    narrow = tuning.merge_config(16, 17)
    assert tuning.merge_config(16, 5) == tuning.merge_config(32, 48) == tuning.MERGE_CONFIG
    assert narrow == tuning.merge_config(24, 16) != tuning.MERGE_CONFIG


def test_rows_of_a_pass_are_split_between_programs():
    config = configs.PassConfig(64, 128, 0, 4, 2)
    programs = {"thin": 198, "thin_grad": 198, "tall_grad": 44}
    for kernel, expected in programs.items():
        assert tuning.pass_programs(kernel, 12608 + 8, 768, config, 132) == expected
    assert tuning.pass_programs("thin_grad", 12608 * 2, 768, config, 132) == 264
    assert tuning.pass_programs("tall_grad", 257, 768, config, 132) == 2
    assert tuning.pass_programs("tall_grad", 1, 10**6, config, 132) == 1
