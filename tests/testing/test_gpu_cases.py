"""The table of calls that take every kernel, against what was built and what chooses; no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from efft_kernels.ops.backends import native_library
from efft_kernels.ops.backends.cuda_cost import _sm90_columns
from efft_kernels.testing.cuda_kernels import built_kernels, kernel_of, recorded_launches
from efft_kernels.testing.gpu_cases import (
    CUDA_CASES,
    MULTIPROCESSORS,
    TRITON_CASES,
    cases_by_kernel,
    plans_are_known,
)

CASES = [*CUDA_CASES, *TRITON_CASES]
NOT_BUILT = native_library.not_built("_native_cuda")


@pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT))
def test_every_built_kernel_is_taken_by_a_case():
    """A kernel that is missing here runs in no test: give it a case in testing/gpu_cases.py."""
    assert built_kernels() - set(cases_by_kernel()) == set()


@pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT))
def test_no_case_names_a_kernel_that_is_not_built():
    built = built_kernels()
    hopper = any(kernel.startswith("sm90") for kernel in built)
    wanted = {k for k in cases_by_kernel() if hopper or not k.startswith("sm90")}
    assert wanted - built == set()


def test_a_kernel_of_an_unknown_name_counts_as_built(tmp_path, monkeypatch):
    names = b"\0_ZN12efft_kernels4cuda10new_kernelEi\0_ZN12efft_kernels4cuda12merge_kernelEi\0"
    library = tmp_path / "library.so"
    library.write_bytes(names + b"_ZN12efft_kernels4cuda13launch_kernelIJEEEv\0")
    monkeypatch.setattr(native_library, "library_path", lambda _: library)
    assert built_kernels() == {"_ZN12efft_kernels4cuda10new_kernelEi", "merge"}


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", [c for c in CUDA_CASES if c.strategy != "merged"], ids=str)
def test_the_gemms_are_those_that_select_h_takes(case):
    """The rule for the sm_90a GEMM is the cost model's copy; that for the general one is here."""
    shape = case.shape
    found = []
    for out, inner in ((shape.N, shape.K), (shape.K, shape.N)):
        columns = _sm90_columns(shape.M, out, MULTIPROCESSORS)
        tiles_of_128 = -(-shape.M // 128) * -(-out // 128)
        aligned = out % 8 == 0 and (inner % 8 == 0 or "tail" in case.view)
        general = 128 if tiles_of_128 >= MULTIPROCESSORS else 64
        found.append(f"sm90-{columns}" if aligned and columns else f"sm80-{general}")
    assert tuple(found) == case.gemms


@pytest.mark.parametrize("view", ["K tail", "N tail", "bias"])
def test_views_have_nan_beside_them_and_keep_rows_aligned(view):
    case = next(c for c in CUDA_CASES if c.view == view)
    x, weight, bias, _, _, _, dy = replace(case, shape=replace(case.shape, M=3)).operands("cpu")
    viewed = {"K tail": (x, weight), "N tail": (dy,), "bias": (bias,)}[view]
    for t in viewed:
        base = t._base
        assert not t.isnan().any() and base.isnan().any()
        assert t.dim() == 1 or t.stride(0) % 8 == 0
    if view == "bias":
        assert bias.storage_offset() == 1


def test_whole_numbers_are_drawn_in_the_dtypes_asked_for():
    case = next(c for c in CUDA_CASES if c.wide)
    x, *rest, dy = replace(case, shape=replace(case.shape, M=3)).operands("cpu")
    assert x.dtype == dy.dtype == case.dtype
    assert {t.dtype for t in rest} == {torch.float32}
    assert set(x.unique().tolist()) == {-1.0, 0.0, 1.0}


SM90 = "low_rank_gemm_sm90_kernel"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            f"void efft_kernels::cuda::{SM90}<__half, efft_kernels::cuda::Sm90Config<192, 16,"
            " (efft_kernels::cuda::WLayout)1> >(efft_kernels::cuda::GemmMaps)",
            "sm90-f16-192-16-C",
        ),
        (
            f"_ZN12efft_kernels4cuda25{SM90}I13__nv_bfloat16NS0_10Sm90ConfigILi128ELi0ELNS0_7"
            "WLayoutE0EEEEEvNS0_8GemmMapsENS0_14Sm90ParametersE",
            "sm90-bf16-128-0-I",
        ),
        (
            "void efft_kernels::cuda::(anonymous namespace)::thin_kernel<__nv_bfloat16,"
            " efft_kernels::cuda::PassConfig<32>, true>(efft_kernels::cuda::ThinParameters)",
            "thin-bf16-32",
        ),
        (
            "_ZN12efft_kernels4cuda41_GLOBAL__N__ab_12_thin_grad_cu_cd16thin_grad_kernelI6__halfLb0EEEv"
            "NS1_18ThinGradParametersE",
            "thin_grad-f16-odd",
        ),
        ("void efft_kernels::cuda::(anonymous namespace)::fold_kernel<float>(int)", "fold-f32"),
        ("efft_kernels::cuda::(anonymous namespace)::reduce_kernel(int, int)", "reduce"),
        ("_fold_kernel", None),
        ("void at::native::vectorized_elementwise_kernel<4>(int)", None),
    ],
)
def test_short_names(name, short):
    assert kernel_of(name) == short


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_nothing_is_recorded_and_no_plan_is_known():
    with recorded_launches() as launches:
        torch.ones(3).add_(1)
    assert launches == []
    assert not plans_are_known()
