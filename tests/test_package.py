"""The package as it is installed: what the wheel and the sdist hold, and that they work outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import attnfuse

ROOT = Path(__file__).parent.parent
KERNELS = sorted(path.name for path in (ROOT / "triton_kernels").glob("*.py"))
CSRC = sorted(
    str(path.relative_to(ROOT / "csrc"))
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in (".h", ".cuh", ".cu", ".cpp")
)


def python(*args: str, cwd: Path) -> str:
    # Compiling the CUDA kernels takes minutes and has tests of its own.
    environment = os.environ | {"ATTNFUSE_CUDA": "0"}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what goes into a package: setuptools leaves its build files beside what it builds."""
    copy = tmp_path_factory.mktemp("sources")
    names = ("attnfuse", "csrc", "triton_kernels", "bench", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    held = [name for name in names if (ROOT / name).exists()]
    # cp -R keeps the links as links, which is what is being tested
    subprocess.run(["cp", "-RP", *(str(ROOT / name) for name in held), str(copy)], check=True)
    return copy


@pytest.fixture(scope="module")
def sdist(sources: Path) -> Path:
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    name = python("-c", build, cwd=sources).splitlines()[-1]
    return sources / "dist" / name


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip_wheel(sources, out)
    return next(out.glob("attnfuse-*.whl"))


def pip_wheel(source: Path, out: Path) -> None:
    python(
        "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out),
        str(source), cwd=out,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["bench", "csrc", "triton_kernels"])
def test_the_links_name_real_directories(name: str) -> None:
    link = ROOT / "attnfuse" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


def test_wheel_holds_the_kernels_as_files_and_nothing_at_the_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as held:
        names = held.namelist()
        tops = {name.split("/")[0] for name in names}
        assert tops == {"attnfuse", f"attnfuse-{attnfuse.__version__}.dist-info"}
        packed = sorted(name.removeprefix("attnfuse/triton_kernels/") for name in names if "/triton_kernels/" in name)
        assert packed == KERNELS
        for name in KERNELS:
            assert held.read(f"attnfuse/triton_kernels/{name}") == (ROOT / "triton_kernels" / name).read_bytes()
        assert "attnfuse/py.typed" in names
        assert {"attnfuse/cli/main.py", "attnfuse/nn/__init__.py", "attnfuse/fusion/__init__.py"} <= set(names)


def test_wheel_holds_what_attnfuse_bench_runs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as held:
        names = held.namelist()
        packed = sorted(name.removeprefix("attnfuse/bench/") for name in names if name.startswith("attnfuse/bench/"))
        assert packed == sorted(path.name for path in (ROOT / "bench").glob("*.py"))
        for name in packed:
            assert held.read(f"attnfuse/bench/{name}") == (ROOT / "bench" / name).read_bytes()


def test_wheel_holds_what_the_extension_is_built_from(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")  # pure Python with ATTNFUSE_CUDA=0
    with zipfile.ZipFile(wheel) as held:
        packed = sorted(name.removeprefix("attnfuse/csrc/") for name in held.namelist() if "/csrc/" in name)
        assert packed == CSRC
        for name in CSRC:
            assert held.read(f"attnfuse/csrc/{name}") == (ROOT / "csrc" / name).read_bytes()


def test_wheel_built_from_the_sdist_holds_the_same(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as held:
        held.extractall(tmp_path)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    out = tmp_path / "out"
    out.mkdir()
    pip_wheel(unpacked, out)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as again, zipfile.ZipFile(wheel) as first:
        assert sorted(again.namelist()) == sorted(first.namelist())


def test_installed_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    python("-m", "pip", *install, cwd=tmp_path)
    # First on the path, so that an editable install of this repository does not answer instead.
    program = f"""
import os, sys
sys.path.insert(0, {str(target)!r})
os.environ.setdefault("TRITON_INTERPRET", "1")
import torch, attnfuse, attnfuse.triton_kernels, attnfuse.triton_kernels.attn_fwd
assert "triton_kernels" not in sys.modules
for module in (attnfuse, attnfuse.triton_kernels):
    assert os.path.realpath(module.__file__).startswith({str(target.resolve())!r}), module.__file__
assert not os.path.islink(os.path.dirname(attnfuse.triton_kernels.__file__))
q, k, v = (x[None] for x in torch.randn(3, 2, 8, 16))
device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = (x.to(device) for x in (q, k, v))
out = attnfuse.attention(q, k, v, backend="triton")
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
import attnfuse.cli.main
shape = ["--shape", "b=1,h=2,q=8,k=8+8,d=16", "--pass", "forward", "--against", "torch", "--seconds", "0.01"]
assert attnfuse.cli.main.main(["bench", *shape, "--out", "results"]) == 0
print(attnfuse.__version__)
"""
    assert python("-c", program, cwd=tmp_path).splitlines()[-1] == attnfuse.__version__
    assert (tmp_path / "results" / "attnfuse_bench_ratios.png").exists()
    assert (target / "bin" / "attnfuse").exists()


def test_importing_the_package_leaves_triton_alone(tmp_path: Path) -> None:
    # `attnfuse check` sets TRITON_INTERPRET after attnfuse and torch are imported; that only works if triton is not.
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import attnfuse; print('triton' in sys.modules)"
    assert python("-c", program, cwd=tmp_path).strip() == "False"
