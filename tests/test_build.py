"""Building csrc: finding the compilers, the architectures, what setup.py makes of ATTNFUSE_CUDA, and what is rebuilt.

Nothing here compiles the real kernels, which takes minutes: a csrc of a few lines takes their place, and a script that
hands over to g++ takes nvcc's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from attnfuse import build

ROOT = Path(__file__).parent.parent
COMPILERS = build.why_no_emulation()
needs_compilers = pytest.mark.skipif(COMPILERS is not None, reason=str(COMPILERS))

# A module without pybind11, so that it compiles at once: sum() is one() + two(), each from an instance of its own.
BINDINGS = """
#include <Python.h>
#include "attention.h"
#define NAME2(a, b) a##b
#define NAME(a, b) NAME2(a, b)
static PyObject* sum(PyObject*, PyObject*) { return PyLong_FromLong(one() + (kBoth ? two() : 0)); }
static PyMethodDef methods[] = {{"sum", sum, METH_NOARGS, ATTNFUSE_ARCHITECTURES}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "stub", nullptr, -1, methods};
extern "C" __attribute__((visibility("default"))) PyObject* NAME(PyInit_, ATTNFUSE_MODULE)() {
    return PyModule_Create(&definition);
}
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """A csrc of the real one's shape."""
    folder = tmp_path / "csrc"
    write(folder / "attention.h", "int one();\nint two();\nconstexpr bool kBoth = true;\n")
    write(folder / "bindings.cpp", BINDINGS)
    write(folder / "core" / "two.cuh", "constexpr int kTwo = 2;\n")
    write(folder / "emulation" / "selftest.cpp", "#error a program of its own, no part of the module\n")
    write(folder / "instances" / "one.cu", "int one() { return 1; }\n")
    write(folder / "instances" / "two.cu", '#include "two.cuh"\nint two() { return kTwo; }\n')
    return folder


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shape of a CUDA toolkit, found by no variable and on no path yet; its nvcc hands over to g++."""
    home = tmp_path / "toolkit"
    script = f"""#!{sys.executable}
import os, subprocess, sys
given = sys.argv[1:]
if "--dryrun" in given:
    sys.exit(print("#$ _HERE_={home}/bin\\n#$ TOP={home}/bin/.."))
if "BROKEN" in os.environ:
    sys.exit("the compiler has gone fishing")
known = [word for word in given if word.startswith(("-I", "-M"))]
value = {{word: given[given.index(word) + 1] for word in ("-o", "-MF", "-c")}}
print("ptxas info    : Used 168 registers")
command = ["g++", "-fPIC", *known, value["-MF"], "-x", "c++", "-c", value["-c"], "-o", value["-o"]]
sys.exit(subprocess.run(command).returncode)
"""
    write(home / "bin" / "nvcc", script)
    (home / "bin" / "nvcc").chmod(0o755)
    write(home / "include" / "cuda_runtime.h", "")
    write(home / "lib" / "libcudart_static.a", "!<arch>\n")
    for variable in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "BROKEN"):
        monkeypatch.delenv(variable, raising=False)
    without = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(without))
    monkeypatch.setattr(build, "USUAL_HOME", tmp_path / "nowhere")
    monkeypatch.setattr(build, "_site_packages", lambda: [tmp_path / "site"])
    return home


@pytest.mark.parametrize(
    "listed, expected",
    [
        ("", ("sm_80", "sm_90", "compute_90")),
        ("8.0", ("sm_80",)),
        ("8.0;9.0+PTX", ("sm_80", "sm_90", "compute_90")),
        ("8.6 9.0a", ("sm_86", "sm_90a")),
        ("8.0, 9.0a+PTX;", ("sm_80", "sm_90a", "compute_90a")),
        ("7.0 7.5 8.9 10.0 12.0f", ("sm_89", "sm_100", "sm_120f")),  # the kernels begin at 8.0
        ("8.0 8.0+PTX", ("sm_80", "compute_80")),
    ],
)
def test_architectures(listed: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert build.architectures() == expected


@pytest.mark.parametrize(
    "listed, words",
    [
        ("8.0;Hopper", "such as 8.0, 9.0a or 9.0+PTX, got 'Hopper' in '8.0;Hopper'"),
        ("sm_80", "got 'sm_80'"),
        ("8.0+ptx", "got '8.0+ptx'"),
        ("7.5", "at least 8.0, got '7.5'"),
    ],
)
def test_architectures_not_understood(listed: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(build.BuildError) as refused:
        build.architectures()
    assert words in str(refused.value) and str(refused.value).startswith("TORCH_CUDA_ARCH_LIST must list ")


def test_without_nvcc(toolkit: Path) -> None:
    assert build.cuda_home() is None
    assert str(build.why_not()).startswith("no nvcc was found: not by CUDA_HOME")


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_toolkit_that_is_named(variable: str, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, str(toolkit))
    assert build.cuda_home() == toolkit
    # A wrong name is not made good by an nvcc elsewhere: somebody meant something by it.
    monkeypatch.setenv("PATH", str(toolkit / "bin"), prepend=os.pathsep)
    monkeypatch.setenv(variable, str(tmp_path))
    assert build.cuda_home() is None
    assert build.why_not() == f"{variable} is {tmp_path}, which holds no bin/nvcc"


def test_nvcc_on_the_path(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(toolkit / "bin"), prepend=os.pathsep)
    assert build.cuda_home() == toolkit


@pytest.mark.parametrize("kind", ["link", "script"])
def test_an_nvcc_that_only_leads_to_the_toolkit(
    kind: str, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "elsewhere" / "bin" / "nvcc"
    write(there, f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    there.chmod(0o755)
    if kind == "link":
        there.unlink()
        there.symlink_to(toolkit / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(there.parent), prepend=os.pathsep)
    assert build.cuda_home() == toolkit


def test_the_compiler_of_the_package_index(toolkit: Path, tmp_path: Path) -> None:
    packaged = tmp_path / "site" / "nvidia" / "cu13"
    shutil.copytree(toolkit, packaged)
    assert build.cuda_home() == packaged


@pytest.mark.parametrize("file", ["include/cuda_runtime.h", "lib/libcudart_static.a"])
def test_a_toolkit_with_a_part_missing(file: str, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    (toolkit / file).unlink()
    assert str(build.why_not()).startswith(f"nvcc is in {toolkit}, but {Path(file).name} is not")


def test_without_a_host_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-c++")
    assert build.why_no_emulation() == "the C++ compiler no-such-c++ was not found (CXX may name another)"
    with pytest.raises(build.BuildError, match="emulation of the CUDA kernels cannot be built: the C\\+\\+ compiler"):
        build.build_emulation(tmp_path)


def called(module: Path) -> int:
    """sum() of a built module, in a process of its own."""
    program = f"""
import importlib.util, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
spec = importlib.util.spec_from_file_location({module.name.split(".")[0]!r}, {str(module)!r})
print(importlib.util.module_from_spec(spec).sum())
"""
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def rebuilt(folder: Path, again: Any) -> set[str]:
    """The files of `folder` that calling `again` writes anew, less ninja's own."""

    def times() -> dict[str, int]:
        files = (path for path in folder.rglob("*") if path.suffix in (".o", ".so"))
        return {str(path.relative_to(folder)).split(".")[0]: path.stat().st_mtime_ns for path in files}

    before = times()
    again()
    after = times()
    return {name for name in after if after[name] != before.get(name)}


@needs_compilers
def test_only_what_changed_is_built_again(csrc: Path, tmp_path: Path) -> None:
    folder = tmp_path / "build"

    def again() -> Path:
        return build.build_emulation(folder, sources_dir=csrc, quiet=True)

    everything = {"bindings", "instances/one", "instances/two", "_emulated"}
    assert rebuilt(folder, again) == everything
    assert called(again()) == 3
    assert rebuilt(folder, again) == set()
    write(csrc / "instances" / "one.cu", "int one() { return 5; }\n")
    assert rebuilt(folder, again) == {"instances/one", "_emulated"}
    write(csrc / "core" / "two.cuh", "constexpr int kTwo = 20;\n")
    assert rebuilt(folder, again) == {"instances/two", "_emulated"}
    assert called(again()) == 25


@needs_compilers
def test_a_module_of_some_instances(csrc: Path, tmp_path: Path) -> None:
    write(csrc / "attention.h", "int one();\nint two();\nextern bool kBoth;\n")
    write(csrc / "launchers.cpp", "bool kBoth = false;\n")
    folder = tmp_path / "build"
    module = build.build_emulation(folder, only=["on?"], sources_dir=csrc, quiet=True)
    assert not (folder / "instances" / "two.o").exists()
    assert called(module) == 1


@needs_compilers
@pytest.mark.parametrize("options", [{"sanitize": "undefined"}, {"coverage": True}], ids=str)
def test_instrumented_modules(options: dict[str, Any], csrc: Path, tmp_path: Path) -> None:
    assert called(build.build_emulation(tmp_path / "build", sources_dir=csrc, quiet=True, **options)) == 3
    assert bool(list(tmp_path.rglob("*.gcda"))) == ("coverage" in options)


@needs_compilers
def test_a_compilers_complaint_is_passed_on(csrc: Path, tmp_path: Path) -> None:
    write(csrc / "instances" / "two.cu", "int two() { return nonsense; }\n")
    with pytest.raises(build.BuildError, match=r"(?s)_emulated.* could not be built in .*nonsense.* was not declared"):
        build.build_emulation(tmp_path / "build", sources_dir=csrc, quiet=True)


@pytest.fixture
def project(csrc: Path, toolkit: Path, tmp_path: Path) -> Path:
    """This repository as far as a build needs it, with the small csrc."""
    folder = tmp_path / "project"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "attnfuse/__init__.py", "attnfuse/build.py"):
        write(folder / name, (ROOT / name).read_text())
    shutil.move(csrc, folder / "csrc")
    (folder / "attnfuse" / "csrc").symlink_to("../csrc")
    return folder


def make(project: Path, call: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A hook of setuptools' build backend, called as pip would."""
    program = f"from setuptools import build_meta; print(build_meta.{call})"
    environment = os.environ | variables
    return subprocess.run([sys.executable, "-c", program], cwd=project, env=environment, capture_output=True, text=True)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_attnfuse_cuda_knows_three_values(project: Path) -> None:
    done = make(project, "build_wheel('dist')", ATTNFUSE_CUDA="yes")
    assert one_line(done) == "ATTNFUSE_CUDA must be auto, 0 or 1, got 'yes'"


def test_attnfuse_cuda_1_needs_nvcc(project: Path, toolkit: Path) -> None:
    shutil.rmtree(toolkit)
    line = one_line(make(project, "build_wheel('dist')", ATTNFUSE_CUDA="1", CUDA_HOME=str(toolkit)))
    assert line == (
        f"attnfuse: the CUDA extension cannot be built: CUDA_HOME is {toolkit}, which holds no bin/nvcc; "
        "ATTNFUSE_CUDA=0 installs it without its CUDA kernels"
    )


@pytest.mark.parametrize("value", ["auto", "0"])
def test_pure_python(value: str, project: Path, toolkit: Path) -> None:
    if value == "auto":
        shutil.rmtree(toolkit)  # with 0 it is there, and left alone
    done = make(project, "build_wheel('dist')", ATTNFUSE_CUDA=value, CUDA_HOME=str(toolkit))
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as held:
        assert not [name for name in held.namelist() if name.endswith(".so")]
        assert "attnfuse/csrc/instances/one.cu" in held.namelist()


@needs_compilers
@pytest.mark.parametrize("value", ["auto", "1"])
def test_a_wheel_with_the_extension(value: str, project: Path, toolkit: Path, tmp_path: Path) -> None:
    done = make(project, "build_wheel('dist')", ATTNFUSE_CUDA=value, CUDA_HOME=str(toolkit))
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as held:
        assert f"attnfuse/_cuda{build.SUFFIX}" in held.namelist()
        module = Path(held.extract(f"attnfuse/_cuda{build.SUFFIX}", tmp_path / "out"))
    assert called(module) == 3
    assert "168 registers" in (project / "build" / "cuda" / "one.ptxas.txt").read_text()


@needs_compilers
def test_an_editable_install_builds_in_place(project: Path, toolkit: Path) -> None:
    def again() -> None:
        done = make(project, "build_editable('dist')", ATTNFUSE_CUDA="1", CUDA_HOME=str(toolkit))
        assert done.returncode == 0, done.stderr

    folder = project / "build" / "cuda"
    assert rebuilt(folder, again) == {"bindings", "instances/one", "instances/two"}
    assert called(project / "attnfuse" / f"_cuda{build.SUFFIX}") == 3
    write(project / "csrc" / "instances" / "one.cu", "int one() { return 5; }\n")
    assert rebuilt(folder, again) == {"instances/one"}
    assert called(project / "attnfuse" / f"_cuda{build.SUFFIX}") == 7


@needs_compilers
def test_a_failed_compilation_is_no_reason_to_go_without(project: Path, toolkit: Path) -> None:
    done = make(project, "build_wheel('dist')", ATTNFUSE_CUDA="auto", CUDA_HOME=str(toolkit), BROKEN="1")
    assert one_line(done).startswith(f"attnfuse: _cuda{build.SUFFIX} could not be built in ")
    assert "the compiler has gone fishing" in done.stdout


def test_the_builder_is_loaded_without_torch_or_attnfuse() -> None:
    program = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("attnfuse_build", {str(ROOT / "attnfuse" / "build.py")!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print([name for name in ("torch", "attnfuse", "ninja", "pybind11") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_emulation_is_built_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache" / "attnfuse"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.emulation_dir() == ROOT / "build" / "emulation"
    with monkeypatch.context() as read_only:
        read_only.setattr(os, "access", lambda path, mode: False)
        unwritable = build.emulation_dir()
    monkeypatch.setattr(build, "CSRC", tmp_path / "site-packages" / "attnfuse" / "csrc")
    installed = build.emulation_dir()
    assert unwritable.parent == installed.parent == cache
    assert unwritable != installed  # two installations do not build over each other
    assert build.emulation_dir() == installed
