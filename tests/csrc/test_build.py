"""The native build: what it reads, what it finds, what it reports. Nothing here needs a GPU."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from efft_kernels.ops.backends import native_library

ROOT = Path(__file__).parents[2]


def build_module(name: str) -> ModuleType:
    """A module of csrc/build/, which is no package."""
    sys.path.insert(0, str(ROOT / "csrc" / "build"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


native_build = build_module("native_build")
toolchain = build_module("toolchain")
Settings, ToolError, Missing = toolchain.Settings, toolchain.ToolError, toolchain.Missing


# What the environment asks for


def test_the_defaults_are_both_architectures_where_there_is_an_nvcc() -> None:
    assert Settings.from_environment({}) == Settings("auto", ("8.0", "9.0a"))
    assert Settings.from_environment({}) == Settings()


@pytest.mark.parametrize("value", ["auto", "0", "1", " 1 ", "AUTO", ""])
def test_build_cuda_takes_auto_0_and_1(value: str) -> None:
    assert Settings.from_environment({"EFFT_KERNELS_BUILD_CUDA": value}).cuda == (
        value.strip().lower() or "auto"
    )


def test_build_cuda_refuses_anything_else() -> None:
    with pytest.raises(ToolError, match="EFFT_KERNELS_BUILD_CUDA must be auto, 0 or 1, got 'yes'"):
        Settings.from_environment({"EFFT_KERNELS_BUILD_CUDA": "yes"})


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("8.0;9.0a", ("8.0", "9.0a")),
        ("9.0a, 8.0,", ("8.0", "9.0a")),
        ("8.0 8.9\t8.0", ("8.0", "8.9")),
        ("10.0f;8.6;12.0", ("8.6", "10.0f", "12.0")),
    ],
)
def test_archs_are_separated_by_anything_usual(text: str, archs: tuple[str, ...]) -> None:
    assert Settings.from_environment({"EFFT_KERNELS_CUDA_ARCHS": text}).archs == archs


@pytest.mark.parametrize("text", ["sm_90", "90", "9.0b", "8.0+PTX", "8.0;nine"])
def test_an_arch_that_is_none_is_named(text: str) -> None:
    wrong = text.split(";")[-1]
    with pytest.raises(ToolError, match=f"EFFT_KERNELS_CUDA_ARCHS.*got {re.escape(repr(wrong))}"):
        toolchain.parse_archs(text)


def test_an_arch_that_is_too_old_or_no_arch_at_all_is_refused() -> None:
    with pytest.raises(ToolError, match=r"need 8\.0 or newer, got '7\.5'"):
        toolchain.parse_archs("7.5;8.0")
    with pytest.raises(ToolError, match="names no architecture"):
        toolchain.parse_archs(" ; ")


def test_the_newest_portable_arch_also_gets_ptx() -> None:
    assert toolchain.gencode_flags(["8.0", "9.0a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert toolchain.gencode_flags(["9.0a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]


# A small project with a source for each library


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Sources that compile in a moment: they include nothing of torch."""
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda").mkdir()
    (tmp_path / "csrc" / "two.h").write_text("int two();\n")
    (tmp_path / "csrc" / "schemas.cpp").write_text(
        '#include "two.h"\nint four() { return 2 * two(); }'
    )
    (tmp_path / "csrc" / "cpu" / "two.cpp").write_text('#include "two.h"\nint two() { return 2; }')
    (tmp_path / "csrc" / "cuda" / "any.cu").write_text("__global__ void any_kernel() {}\n")
    (tmp_path / "csrc" / "cuda" / "mma_sm80.cu").write_text("__global__ void mma_kernel() {}\n")
    (tmp_path / "csrc" / "cuda" / "wgmma_sm90.cu").write_text("__global__ void wgmma_kernel() {}\n")
    (tmp_path / "csrc" / "cuda" / "ops.cpp").write_text("int cuda_ops() { return 1; }\n")
    (tmp_path / "csrc" / "build").mkdir()
    shutil.copy(ROOT / "csrc" / "build" / "build_info.cpp", tmp_path / "csrc" / "build")
    return tmp_path


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has no program at all; tests add what they need."""
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "MAX_JOBS": "1"}


def needs_compiler() -> None:
    try:
        toolchain.find_cxx(os.environ)
        toolchain.find_ninja(os.environ)
    except Missing as reason:
        pytest.skip(str(reason))


def needs_cuda(archs: tuple[str, ...] = ("8.0", "9.0a")) -> None:
    needs_compiler()
    try:
        cxx = toolchain.find_cxx(os.environ)
        toolchain.find_nvcc(os.environ, toolchain.find_torch(), cxx, archs)
        toolchain.find_cutlass()
    except Missing as reason:
        pytest.skip(str(reason))


def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*arguments: object) -> None:
        raise Missing("no nvcc was found in CUDA_HOME, PATH or the nvidia-cuda-nvcc wheel")

    monkeypatch.setattr(toolchain, "find_nvcc", nowhere)


def commands(graph: object, name: str) -> dict[str, tuple[str, ...]]:
    """Source file name -> its compile command."""
    (library,) = [library for library in graph.libraries if library.name == name]  # type: ignore[attr-defined]
    return {item.source.name: item.command for item in library.objects}


def test_without_a_compiler_the_package_is_plain_python_and_says_so(
    project: Path, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    package = project / "package"
    package.mkdir()
    stale = package / native_build.filename("_native")
    stale.write_text("of an earlier build")
    graph = native_build.build(Settings(), project / "build", environ=environ, root=project)
    native_build.install(graph, project / "build", package)
    assert graph.libraries == []
    assert not stale.exists()
    assert [path.name for path in package.iterdir()] == ["_build_report.json"]
    report = json.loads((package / "_build_report.json").read_text())
    for library in report["libraries"].values():
        assert "no C++ compiler was found" in library["missing"]
        assert "install g++" in library["missing"]
    assert "left out: _native, _native_cuda" in capsys.readouterr().out


def test_a_compiler_that_does_not_work_is_as_good_as_none(
    project: Path, environ: dict[str, str]
) -> None:
    broken = project / "bin" / "c++"
    broken.write_text("#!/bin/sh\necho unknown option -std=c++20; exit 1\n")
    broken.chmod(0o755)
    graph = native_build.build_graph(Settings(), project / "build", environ=environ, root=project)
    assert "unknown option -std=c++20" in graph.missing["_native"]
    named = {**environ, "CXX": str(broken)}
    with pytest.raises(ToolError, match=r"CXX=.* cannot compile .*unknown option -std"):
        native_build.build_graph(Settings(), project / "build", environ=named, root=project)


def test_a_named_compiler_is_the_only_one_looked_for(environ: dict[str, str]) -> None:
    """And the build ends without it: pip would show nothing of one that succeeds."""
    with pytest.raises(ToolError, match=r"CXX=no-such-compiler -O1: .*looked for no-such-compiler"):
        toolchain.find_cxx({**os.environ, "CXX": "no-such-compiler -O1"})


def test_without_nvcc_the_rest_is_built(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    without_nvcc(monkeypatch)
    graph = native_build.build_graph(Settings(), project / "build", root=project)
    assert [library.name for library in graph.libraries] == ["_native", "_build_info"]
    assert "no nvcc was found" in graph.report()["libraries"]["_native_cuda"]["missing"]
    assert graph.report()["libraries"]["_native"]["missing"] is None
    assert graph.missing["_autograd"] == "there are no sources csrc/entry/*.cpp"
    assert graph.facts["cuda_version"] is None
    assert graph.facts["cuda_archs"] == []


def test_cuda_that_was_demanded_is_an_error_when_it_is_missing(
    project: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demanded = Settings("1", ("8.0",))
    with pytest.raises(ToolError, match=r"BUILD_CUDA=1, but .*: no C\+\+ compiler was found"):
        native_build.build_graph(demanded, project / "build", environ=environ, root=project)
    needs_compiler()
    without_nvcc(monkeypatch)
    with pytest.raises(ToolError, match=r"BUILD_CUDA=1, but .*: no nvcc was found"):
        native_build.build_graph(demanded, project / "build", root=project)


def test_cuda_that_was_declined_is_not_looked_for(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_compiler()
    monkeypatch.setattr(toolchain, "find_nvcc", lambda *_: pytest.fail("it was looked for"))
    graph = native_build.build_graph(Settings("0"), project / "build", root=project)
    assert graph.missing["_native_cuda"] == "it was left out: EFFT_KERNELS_BUILD_CUDA=0"


def test_a_cuda_home_without_nvcc_is_named() -> None:
    needs_compiler()
    cuda_torch = toolchain.Torch(Path("site/torch"), "2.11.0+cu130", "13.0")
    cxx = toolchain.find_cxx(os.environ)
    with pytest.raises(Missing, match="CUDA_HOME=/nowhere has no bin/nvcc"):
        toolchain.find_nvcc({**os.environ, "CUDA_HOME": "/nowhere"}, cuda_torch, cxx, ["8.0"])


def test_a_torch_without_cuda_is_named() -> None:
    cpu_torch = toolchain.Torch(Path("site/torch"), "2.11.0+cpu", None)
    compiler = toolchain.Compiler(("c++",), "any")
    with pytest.raises(Missing, match=r"torch 2\.11\.0\+cpu is built without CUDA"):
        toolchain.find_nvcc(os.environ, cpu_torch, compiler, ["8.0"])


def test_an_nvcc_of_another_cuda_is_not_taken(tmp_path: Path) -> None:
    needs_compiler()
    other = tmp_path / "bin" / "nvcc"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    other.chmod(0o755)
    future_torch = toolchain.Torch(Path("site/torch"), "9.9.0", "99.0")
    environ = {**os.environ, "PATH": f"{other.parent}:{os.environ['PATH']}"}
    environ.pop("CUDA_HOME", None)
    with pytest.raises(Missing, match=f"no nvcc of torch's CUDA 99 .*{other} is 11.8.89"):
        toolchain.find_nvcc(environ, future_torch, toolchain.find_cxx(os.environ), ["8.0"])


def test_each_file_is_compiled_for_its_own_architectures(project: Path) -> None:
    needs_cuda()
    every = toolchain.gencode_flags(["8.0", "9.0a"])

    def gencodes(command: tuple[str, ...]) -> list[str]:
        return [part for part in command if part.startswith("-gencode")]

    graph = native_build.build_graph(Settings(), project / "build", root=project)
    lines = commands(graph, "_native_cuda")
    assert gencodes(lines["any.cu"]) == gencodes(lines["mma_sm80.cu"]) == every
    assert gencodes(lines["wgmma_sm90.cu"]) == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert gencodes(lines["ops.cpp"]) == []
    assert all("-DEFFT_KERNELS_SM90" in line for line in lines.values())


def test_without_hopper_its_files_are_left_out(project: Path) -> None:
    needs_cuda(("8.0",))
    graph = native_build.build_graph(Settings("1", ("8.0",)), project / "build", root=project)
    lines = commands(graph, "_native_cuda")
    assert sorted(lines) == ["any.cu", "mma_sm80.cu", "ops.cpp"]
    assert not any("-DEFFT_KERNELS_SM90" in line for line in lines.values())


def test_a_new_architecture_is_one_row(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archs = ("8.0", "10.0a")
    needs_cuda(archs)
    (project / "csrc" / "cuda" / "mma_sm100.cu").write_text("__global__ void mma_kernel() {}\n")
    monkeypatch.setitem(native_build.CUDA_FILES, "*sm100*.cu", (("10.0a", "10.3a"), "SM100"))
    graph = native_build.build_graph(Settings("1", archs), project / "build", root=project)
    lines = commands(graph, "_native_cuda")
    assert sorted(lines) == ["any.cu", "mma_sm100.cu", "mma_sm80.cu", "ops.cpp"]
    assert "-gencode=arch=compute_100a,code=sm_100a" in lines["mma_sm100.cu"]
    assert "-gencode=arch=compute_80,code=sm_80" not in lines["mma_sm100.cu"]
    assert all("-DSM100" in line and "-DEFFT_KERNELS_SM90" not in line for line in lines.values())


def test_the_stable_libraries_see_the_stable_interface_only(project: Path) -> None:
    needs_compiler()
    (project / "csrc" / "entry").mkdir()
    (project / "csrc" / "entry" / "autograd.cpp").write_text("int autograd() { return 1; }\n")
    graph = native_build.build_graph(Settings("0"), project / "build", root=project)
    assert native_build.TARGET_VERSION_MACRO in commands(graph, "_native")["two.cpp"]
    assert native_build.TARGET_VERSION_MACRO not in commands(graph, "_autograd")["autograd.cpp"]
    major, minor = (int(part) for part in native_build.TARGET_VERSION.split("."))
    assert native_build.TARGET_VERSION_MACRO.endswith(f"=0x{major:02x}{minor:02x}{0:012x}")


def outputs(build_dir: Path) -> dict[str, int]:
    """Every object and library -> when it was written, in ns."""
    made = [path for path in build_dir.rglob("*") if path.suffix in (".o", ".so")]
    return {str(path.relative_to(build_dir)): path.stat().st_mtime_ns for path in made}


@pytest.mark.slow
def test_a_second_build_makes_nothing_and_a_changed_header_what_includes_it(project: Path) -> None:
    needs_compiler()
    build_dir, package = project / "build", project / "package"

    def build() -> None:
        graph = native_build.build(Settings("0"), build_dir, root=project)
        native_build.install(graph, build_dir, package)

    build()
    first, installed = outputs(build_dir), outputs(package)
    assert set(installed) == {native_build.filename(name) for name in ("_native", "_build_info")}
    assert "objects/_native/csrc/cpu/two.cpp.o" in first
    build()
    assert outputs(build_dir) == first
    assert outputs(package) == installed

    (project / "csrc" / "two.h").write_text("int two();\nint three();\n")
    build()
    changed = {name for name, time in outputs(build_dir).items() if time != first[name]}
    assert changed == {
        "_native.so",
        "objects/_native/csrc/schemas.cpp.o",
        "objects/_native/csrc/cpu/two.cpp.o",
    }


def test_a_source_that_does_not_compile_fails_the_build(project: Path) -> None:
    needs_compiler()
    (project / "csrc" / "schemas.cpp").write_text("int four( { return 4; }\n")
    with pytest.raises(ToolError, match="did not compile"):
        native_build.build(Settings("0"), project / "build", root=project, names=["_native"])


def test_an_undefined_symbol_is_found_by_the_build(project: Path) -> None:
    needs_compiler()
    (project / "csrc" / "cpu" / "two.cpp").unlink()
    with pytest.raises(ToolError):
        native_build.build(Settings("0"), project / "build", root=project, names=["_native"])


def test_the_sanitized_library_is_another_one(project: Path) -> None:
    needs_compiler()
    graph = native_build.build_graph(
        Settings(), project / "build", root=project, names=["_native"], sanitize=True
    )
    (library,) = graph.libraries
    assert "-fsanitize=address,undefined" in library.link
    assert "-fno-sanitize-recover=all" in commands(graph, "_native")["schemas.cpp"]


# What is installed here


def test_the_report_and_the_libraries_agree() -> None:
    path = ROOT / "efft_kernels" / "_build_report.json"
    if not path.exists():
        pytest.skip("no build has been made here")
    libraries = json.loads(path.read_text())["libraries"]
    assert set(libraries) == set(native_library.LIBRARIES)
    for name, library in libraries.items():
        assert native_library.library_path(name).name == library["file"] or name == "_native"
        built = (path.parent / library["file"]).exists()
        assert built == (library["missing"] is None), name


def test_build_info_says_what_is_on_disk() -> None:
    info = native_library.build_info()
    if info is None:
        pytest.skip(f"no build has been made here: {native_library.not_built('_build_info')}")
    assert set(info) == {
        "compiler",
        "cxx_flags",
        "torch_version",
        "target_version",
        "cuda_version",
        "cuda_archs",
        "cutlass_version",
        "nvcc_flags",
    }
    assert info["torch_version"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert "-O3" in info["cxx_flags"]
    cuda_is_there = native_library.library_path("_native_cuda").exists()
    assert bool(info["cuda_archs"]) == cuda_is_there
    assert (info["cutlass_version"] is not None) == cuda_is_there
    assert (info["cuda_version"] is not None) == cuda_is_there


def test_what_is_built_also_loads() -> None:
    """The CUDA library too: it needs no GPU and no driver for that."""
    for name, load in (
        ("_native", native_library.load_cpu),
        ("_native_cuda", native_library.load_cuda),
    ):
        if native_library.not_built(name) is None:
            assert load() is None


def test_no_library_is_linked_with_the_driver() -> None:
    readelf = shutil.which("readelf")
    path = native_library.library_path("_native_cuda")
    if readelf is None or not path.exists():
        pytest.skip("no readelf, or no CUDA library")
    answer = subprocess.run([readelf, "-d", path], capture_output=True, text=True, check=True)
    assert "libcudart.so" in answer.stdout
    assert "libcuda.so" not in answer.stdout


@pytest.mark.parametrize("name", ["_native", "_native_cuda"])
def test_the_stable_libraries_take_only_c_functions_from_torch(name: str) -> None:
    """A C++ symbol of torch would bind the library to one version of it."""
    nm = shutil.which("nm")
    path = native_library.library_path(name)
    if nm is None or not path.exists():
        pytest.skip(f"no nm, or {native_library.not_built(name)}")
    command = [nm, "-D", "--undefined-only", "--format=posix", path]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    symbols = [line.split()[0] for line in answer.stdout.splitlines()]
    assert "aoti_torch_abi_version" in symbols
    assert not [name for name in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]


# What efft_kernels.ops.native answers where something is missing


@pytest.fixture
def empty_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder without libraries, and native's memory of the real one put aside."""
    monkeypatch.setattr(native_library, "_PACKAGE", tmp_path)
    monkeypatch.delenv(native_library.NATIVE_LIBRARY_VARIABLE, raising=False)
    for name in ("load_cpu", "load_cuda", "cuda_unavailable", "_autograd"):
        monkeypatch.setattr(native_library, name, getattr(native_library, name).__wrapped__)
    return tmp_path


def test_a_library_that_was_never_built_names_the_command(empty_package: Path) -> None:
    assert native_library.load_cpu() == (
        "_native.so was not built. To build it: pip install --no-build-isolation --no-deps"
        " --no-cache-dir --force-reinstall SOURCES, where SOURCES is a clone of efft-kernels or its"
        " .tar.gz"
    )
    assert "it: EFFT_KERNELS_BUILD_CUDA=1 pip install" in str(native_library.cuda_unavailable())
    assert native_library.autograd_module() is None
    assert "was not built" in str(native_library.autograd_unavailable())


def test_in_a_clone_the_command_names_it(
    empty_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_package / "csrc").mkdir()
    monkeypatch.setattr(native_library, "_PACKAGE", empty_package / "efft_kernels")
    assert str(native_library.load_cpu()).endswith(
        f"To build it, in {empty_package}: pip install --no-build-isolation -e ."
    )


def test_the_first_import_says_that_the_build_had_no_compiler(
    empty_package: Path, recwarn: pytest.WarningsRecorder
) -> None:
    native_library.warn_of_a_build_without_compiler()
    assert not recwarn.list  # no build has been made: a tree as it was cloned
    missing = native_build.BuildGraph(missing={"_native": "no C++ compiler was found"})
    native_build.write_if_changed(empty_package / native_build.REPORT, json.dumps(missing.report()))
    with pytest.warns(RuntimeWarning, match="plain torch: _native.so was not built: no C"):
        native_library.warn_of_a_build_without_compiler()


def test_the_reason_of_the_build_is_repeated(empty_package: Path) -> None:
    missing = native_build.BuildGraph(missing={"_native": "no C++ compiler was found"})
    native_build.write_if_changed(empty_package / native_build.REPORT, json.dumps(missing.report()))
    assert "_native.so was not built: no C++ compiler was found. To" in str(
        native_library.load_cpu()
    )
    assert str(native_library.load_cuda()).startswith("_native_cuda.so was not built. To")


def test_a_library_that_does_not_load_gives_the_loaders_message(
    empty_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = empty_package / "other.so"
    monkeypatch.setenv(native_library.NATIVE_LIBRARY_VARIABLE, str(broken))
    assert (
        native_library.load_cpu() == f"EFFT_KERNELS_NATIVE_LIBRARY={broken}: there is no such file"
    )
    broken.write_text("not a library")
    assert f"{broken} was built, but loading it failed: " in str(native_library.load_cpu())


def test_a_cuda_library_without_a_gpu_says_so(
    empty_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_library.library_path("_native_cuda").write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native_library.cuda_unavailable() == "no CUDA device is visible to torch"


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        ((7, 5), ["8.0", "9.0a"], "capability 7.5, and the CUDA operators need 8.0 or newer"),
        (
            (8, 0),
            ["9.0a"],
            "EFFT_KERNELS_CUDA_ARCHS=8.0 EFFT_KERNELS_BUILD_CUDA=1 pip install",
        ),
        ((8, 6), ["9.0a", "8.0"], None),
        ((9, 0), ["9.0a"], None),
        ((12, 0), ["8.0", "9.0a"], None),
        ((10, 0), ["9.0a"], "were built for 9.0a"),
        ((10, 3), ["10.0f"], None),
    ],
)
def test_a_gpu_is_compared_with_what_was_built(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    archs: list[str],
    expected: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(native_library, "build_info", lambda: {"cuda_archs": archs})
    reason = native_library.device_rejected.__wrapped__(0)
    assert reason is None if expected is None else expected in str(reason)


def test_an_autograd_module_for_another_torch_is_refused(
    empty_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_library.library_path("_autograd").write_text("")
    monkeypatch.setattr(native_library, "build_info", lambda: {"torch_version": "2.1.0"})
    assert native_library.autograd_module() is None
    assert "was built for torch 2.1.0, this is torch" in str(native_library.autograd_unavailable())


# What is published


def test_make_installs_what_the_build_requires() -> None:
    """The Makefile repeats [build-system].requires, since pip has no way to install just that."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    assert requires is not None
    names = set(re.findall(r'"([a-z0-9-]+)', requires.group(1)))
    line = re.search(r"^BUILD_REQUIRES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line is not None
    assert names <= set(line.group(1).split())
    nvcc = re.search(r'"cuda-toolkit\[.*?\]', line.group(1))
    assert nvcc is not None
    assert nvcc.group() in text
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(f"\n{name}==" in pinned for name in names)
