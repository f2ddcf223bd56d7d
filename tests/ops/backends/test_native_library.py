"""Which compiled library runs where, and why not; what a build says is in tests/csrc."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from efft_kernels.ops.backends import native_library


@pytest.mark.parametrize(
    ("arch", "runs_on", "not_on"),
    [
        ("8.0", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5), (7, 9)]),
        ("8.6", [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
        ("9.0a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("10.3f", [(10, 3), (10, 4)], [(9, 3), (10, 0), (11, 3), (12, 5)]),
    ],
)
def test_which_gpus_run_code(arch, runs_on, not_on):
    assert all(native_library._runs_on(arch, capability) for capability in runs_on)
    assert not any(native_library._runs_on(arch, capability) for capability in not_on)


def test_where_libraries_are(monkeypatch):
    package = Path(native_library.__file__).parents[2]
    monkeypatch.setenv(native_library.NATIVE_LIBRARY_VARIABLE, "/other.so")
    expected = {
        "_native": Path("/other.so"),
        "_native_cuda": package / "_native_cuda.so",
        "_autograd": package / f"_autograd{sysconfig.get_config_var('EXT_SUFFIX')}",
    }
    assert {name: native_library.library_path(name) for name in expected} == expected
    monkeypatch.delenv(native_library.NATIVE_LIBRARY_VARIABLE)
    assert native_library.library_path("_native") == package / "_native.so"


@pytest.fixture
def built(monkeypatch):
    """What `not_built` and the loading of libraries say, by library; one that is not named is there
    and loads."""
    missing, broken = {}, {}
    monkeypatch.setattr(native_library, "not_built", missing.get)
    monkeypatch.setattr(native_library, "_load", broken.get)
    for name in ("load_cpu", "load_cuda", "cuda_unavailable", "_autograd", "build_info"):
        monkeypatch.setattr(native_library, name, getattr(native_library, name).__wrapped__)
    return missing, broken


def test_the_cuda_library_is_loaded_after_the_one_that_defines_the_operators(built):
    missing, broken = built
    assert native_library.load_cuda() is native_library.load_cpu() is None
    broken["_native_cuda"] = "CUDA's is broken"
    assert native_library.load_cuda() == "CUDA's is broken"
    broken["_native"] = "the CPU's is broken"
    assert native_library.load_cuda() == native_library.load_cpu() == "the CPU's is broken"
    missing["_native_cuda"] = "not built"
    assert native_library.load_cuda() == "not built"


def test_one_gpu_that_runs_it_is_enough(built, monkeypatch):
    _, broken = built
    refused = {0: "too old", 1: "older"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(native_library, "device_rejected", refused.get)
    assert native_library.cuda_unavailable() == "too old; older"
    del refused[1]
    assert native_library.cuda_unavailable() is None
    broken["_native_cuda"] = "broken"
    assert native_library.cuda_unavailable() == "broken"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native_library.cuda_unavailable() == "no CUDA device is visible to torch"


def test_a_build_that_names_no_gpus_refuses_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    for info in (None, {}, {"cuda_archs": []}):
        monkeypatch.setattr(native_library, "build_info", lambda found=info: found)
        assert native_library.device_rejected.__wrapped__(0) is None


def test_a_module_that_cannot_be_imported_says_so(built, monkeypatch):
    missing, _ = built

    def import_module(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert native_library.build_info() is None
    module, reason = native_library._autograd()
    assert module is None
    assert reason.endswith("was built, but importing it failed: no efft_kernels._autograd")
    missing["_autograd"] = "not built"
    assert native_library._autograd() == (None, "not built")


def test_what_a_build_says_of_itself_is_the_callers(built, monkeypatch):
    module = SimpleNamespace(FACTS={"compiler": "c++"})
    monkeypatch.setattr(importlib, "import_module", {"efft_kernels._build_info": module}.get)
    info = native_library.build_info()
    assert info == module.FACTS and info is not module.FACTS


def test_the_import_warns_of_a_build_without_a_compiler(monkeypatch):
    report = '{"libraries": {"_native": {"missing": "no compiler"}}}'
    monkeypatch.setattr(Path, "read_text", lambda path: report)
    monkeypatch.setattr(native_library.sys, "platform", "linux")
    monkeypatch.setenv(native_library.NATIVE_LIBRARY_VARIABLE, "/absent.so")
    spec = importlib.util.find_spec(native_library.__name__)
    with pytest.warns(RuntimeWarning, match=r"CPU calls run in plain torch: .*/absent\.so"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_module_serves_the_patches_of_its_torch(built, monkeypatch):
    major, minor, *_ = torch.__version__.split(".")
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    for version, serves in (
        (f"{major}.{minor}.99", True),
        (f"{major}.{int(minor) + 1}.0", False),
        (f"{int(major) + 1}.{minor}.0", False),
    ):
        info = {"torch_version": version}
        monkeypatch.setattr(native_library, "build_info", lambda found=info: found)
        module, reason = native_library._autograd()
        assert (module is not None) == (reason is None) == serves


def test_a_build_without_a_compiler_warns_on_linux_alone(built, monkeypatch, recwarn):
    missing, _ = built
    left_out = {}
    monkeypatch.setattr(native_library, "_reasons_of_the_build", lambda: left_out)

    def warned(platform="linux"):
        recwarn.clear()
        monkeypatch.setattr(native_library.sys, "platform", platform)
        native_library.warn_of_a_build_without_compiler()
        return [str(found.message) for found in recwarn]

    assert warned() == []
    missing["_native"] = "it is not there"
    assert warned() == []  # a clone that was never built
    left_out["_native"] = "no compiler"
    assert warned() == ["CPU calls run in plain torch: it is not there"]
    recwarn.clear()
    native_library.warn_of_a_build_without_compiler()
    assert recwarn.pop(RuntimeWarning).filename == __file__  # the import's
    assert warned("darwin") == []
    del missing["_native"]
    assert warned() == []
