"""The compilation tool: what it lists, and that what it looks for in machine code is found."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import replace
from functools import cache

import pytest
import torch

triton = pytest.importorskip("triton")

from efft_kernels.ops.backends import triton as backend  # noqa: E402
from efft_kernels.ops.backends.fallback import padded_rank  # noqa: E402
from efft_kernels.ops.backends.triton import configs, device  # noqa: E402
from efft_kernels.ops.backends.triton.configs import GemmConfig  # noqa: E402
from efft_kernels.testing.fake_gpu import fake_gpu  # noqa: E402
from tools import compilations, compile_triton  # noqa: E402
from tools.compilations import Layer, Row, layers, rows, sample  # noqa: E402
from tools.compile_triton import compile_row  # noqa: E402

if device.INTERPRETED:
    pytest.skip("the kernels are interpreted", allow_module_level=True)

PLAIN = Layer("bf16", False, 16, "even", "", False, False, False)


# `make aot` compiles every row; here, those that a ViT in bf16 at rank 16 launches with EFFT's
# factors. float16 has code of its own where a core is read in a pass over rows.
REPRESENTATIVE = [
    row
    for row in rows(
        of=(
            Layer(dtype, False, 16, "even", slices, wide, float32, False)
            for dtype, slices, wide, float32 in itertools.product(
                ("bf16", "fp16"), ("", "core"), (False, True), (False, True)
            )
        )
    )
    if (row.dtype == "bf16" or row.kernel.startswith("thin"))
    and (row.kernel != "gemm" or "128x" in row.label)
    and (row.kernel == "merge" or "wide" not in row.label)
    # Taken only where it was measured: one form of each shape.
    and not (row.tma and ("core" in row.label or "float32" in row.label))
    # float32 factors are rounded as they are loaded, everywhere alike.
    and (row.arch == 90 or "float32" not in row.label)
]


@pytest.mark.parametrize("row", REPRESENTATIVE, ids=str)
def test_machine_code_has_no_problem(row):
    report = compile_row(row)
    assert not report.problems, report
    assert report.registers > 0 and report.smem_bytes >= 0


@cache
def listed(rank: int) -> frozenset[str]:
    """What is compiled for sm_90 in bf16 at ranks padded to this one."""
    of = (at for at in layers() if at.dtype == "bf16" and padded_rank(at.rank) == rank)
    return frozenset(row.specialisation for row in rows((90,), of))


@pytest.mark.parametrize(
    "size,width", [(768, 16), (768, 8), (720, 16), (720, 8), (769, 16), (768, 64), (720, 40)]
)
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("folded", [True, False])
def test_a_step_launches_only_what_is_listed(size, width, factors, transposed, folded):
    """A qkv at 64 images, whose sizes and numbers of slices are not those of the list's layers."""

    def empty(*sizes, dtype=factors):
        return torch.empty(sizes, dtype=dtype, device="meta")

    x, dy = (empty(64 * 197, n, dtype=torch.bfloat16) for n in (size, 3 * size))
    bias = empty(3 * size, dtype=x.dtype)
    down, core = empty(size, width), None if folded else empty(3, width, width)
    up = empty(1, 3 * size if folded else size, width)
    if transposed and folded:  # as methods/lora.py gives it
        down = empty(width, size).mT
    elif transposed:  # as methods/tensor_train.py does
        core = core.mT
    needs = (True, False, False, True, True, True)
    launched = set()

    def hook(*, compile, **_):
        launched.add(compile["specialization_data"])
        return True

    with fake_gpu(90), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        for strategy in ("fused", "split", "merged"):
            stored = torch.float32 if strategy == "merged" else x.dtype
            weight = empty(3 * size, size, dtype=stored)
            _, p = backend.forward(x, weight, bias, down, core, up, save_p=True, strategy=strategy)
            backend.backward(dy, x, weight, p, down, core, up, needs=needs, strategy=strategy)
    assert len(launched) >= 5
    assert launched <= listed(padded_rank(width))


def test_every_shipped_config_is_compiled(monkeypatch):
    asked = set()
    read = configs._default

    def note(kernel, arch, form, rank):
        found = read(kernel, arch, form, rank)
        asked.add((kernel, f"sm_{device.family(arch)}", form, json.dumps(found)))
        return found

    monkeypatch.setattr(configs, "_default", note)
    of = [
        layer
        for layer in layers()
        if layer.dtype != "fp16"
        and layer.slices == "core"
        and not (layer.float32 or layer.transposed)
    ]
    found = rows(of=of)
    shipped = {
        (kernel, arch, form, json.dumps(entry))
        for kernel, by_arch in configs.defaults().items()
        if isinstance(by_arch, dict)
        for arch, forms in by_arch.items()
        for form, entries in forms.items()
        for _, entry in entries
    }
    assert asked == shipped
    labels = {(f"sm_{row.arch}", word) for row in found for word in row.label.split()}
    for kernel, arch, _, entry in shipped:
        if kernel == "gemm":
            for block_m, block_c, block_i, *_ in json.loads(entry):
                assert (arch, f"{block_m}x{block_c}x{block_i}") in labels


def gemm_row(monkeypatch, config: GemmConfig) -> Row:
    """The forward's row with this config for sm_90."""
    monkeypatch.setattr(configs, "gemm_candidates", lambda *_: (config,))
    return next(row for row in rows((90,), [PLAIN]) if row.kernel == "gemm" and not row.tma)


def test_spills_are_found(monkeypatch):
    """256 accumulators for each of 128 threads are more than the 255 registers that there are."""
    report = compile_row(gemm_row(monkeypatch, GemmConfig(128, 256, 64, 8, 4, 3)))
    assert any("spills" in problem for problem in report.problems)
    assert report.stack_bytes and f"{report.stack_bytes} bytes of stack" in report.problems


def test_too_much_shared_memory_is_found(monkeypatch):
    report = compile_row(gemm_row(monkeypatch, GemmConfig(128, 256, 64, 8, 8, 6)))
    limit = 227 * 1024
    assert report.smem_bytes > limit
    assert f"{report.smem_bytes} bytes of shared memory, limit {limit}" in report.problems


def test_missing_instructions_and_overlap_are_found():
    layer = PLAIN._replace(dtype="fp32", ieee=True)
    row = next(row for row in rows((90,), [layer]) if row.kernel == "gemm")
    assert row.instruction is None and not (row.overlaps or row.tma or row.one_loop)
    report = compile_row(replace(row, instruction="HGMMA", overlaps=True, tma=True))
    assert report.problems == [
        "no HGMMA in the machine code",
        "no UTMALDG (TMA load) in the machine code",
        "every wgmma waits for the one before it",
    ]


def test_a_loop_within_a_loop_is_found():
    nested = "  scf.for a {\n    x\n    scf.for b {\n    }\n  }\n"
    after = "  scf.for a {\n    x\n  }\n  scf.for b {\n  }\n"
    assert compile_triton._has_nested_loops(nested)
    assert not compile_triton._has_nested_loops(after)


def test_a_sample_is_the_same_each_time_and_has_something_of_everything():
    every = rows((80, 90), [PLAIN, PLAIN._replace(dtype="fp32"), PLAIN._replace(wide=True)])
    some = sample(every, 20)
    assert some == sample(every[::-1], 20)[::-1] and len(some) == 20
    assert {(r.kernel, r.arch) for r in some} == {(r.kernel, r.arch) for r in every}
    assert {row.dtype for row in some} == {"bf16", "fp32"}
    assert sample(every, 10_000) == every


def test_rows_have_names_of_their_own():
    every = rows((90,), [PLAIN, PLAIN._replace(rank=8), PLAIN._replace(rank=61)])
    assert len(set(map(str, every))) == len(set(every)) == len(every)


def test_the_command_writes_its_rows_and_fails_with_one_of_them(monkeypatch, tmp_path, capsys):
    row = next(row for row in rows((80,), [PLAIN]) if row.kernel == "reduce")
    monkeypatch.setattr(
        compile_triton, "rows", lambda archs: [row, replace(row, instruction="HMMA")]
    )
    path = tmp_path / "rows.csv"
    command = ["compile_triton", "--only", "reduce", "--jobs", "1", "--csv", str(path)]
    monkeypatch.setattr("sys.argv", command)
    assert compile_triton.main() == 1
    assert "1 of 2 compiled configurations pass" in capsys.readouterr().out
    good, bad = csv.DictReader(path.open())
    assert good["kernel"] == "reduce" and good["arch"] == "80" and good["problems"] == ""
    assert int(good["registers"]) > 0 and good["stack_bytes"] == "0"
    assert bad["problems"] == "no HMMA in the machine code"


def test_the_kernels_of_a_chain_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilations, "layers", lambda: iter(()))
    found = rows((90,))
    assert {row.kernel for row in found} == {
        *("norm_fwd", "norm_bwd", "norm_down_grad", "merge_stack", "remake"),
        *("gather", "pair_grad", "reduce", "thin", "thin_grad", "tall_grad", "act_fwd", "act_bwd"),
    }
    norm = [row for row in found if row.kernel == "norm_fwd"]
    assert {row.rank for row in norm} == set(compilations.RANKS)
    # With the branch before it and without, for both widths and for float16.
    assert len(norm) == 2 * (2 * len(compilations.RANKS) + 1)
