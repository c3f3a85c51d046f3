"""Every CUDA kernel as nvcc compiles it: registers, no local memory in loops, the wide products, a small extension."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnfuse import build, machine

ROOT = Path(__file__).parent.parent
REASON = build.why_not()
if REASON is None:
    try:
        machine.cuobjdump()
    except FileNotFoundError as error:
        REASON = str(error)

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension, from the objects that installing has left in build/cuda where it has."""
    output = tmp_path_factory.mktemp("cuda") / f"_cuda{build.SUFFIX}"
    return build.build_cuda(ROOT / "build" / "cuda", output, quiet=True)


@pytest.fixture(scope="module")
def kernels(extension: Path) -> list[machine.Kernel]:
    return machine.read_build()


def test_every_instance_is_there(kernels: list[machine.Kernel]) -> None:
    found = {(k.name, k.arch) for k in kernels}
    assert len(found) == len(kernels)
    for arch in ("sm_80", "sm_90"):
        for dtype in ("bf16", "fp16"):
            for dim in (64, 96, 128, 256):
                assert (f"attn_fwd_kernel<{dtype}, {dim}>", arch) in found
                assert (f"attn_bwd_dq_kernel<{dtype}, {dim}>", arch) in found
                assert any(name.startswith(f"attn_bwd_dkdv_kernel<{dtype}, {dim}, ") for name, _ in found)
            assert (f"attn_bwd_dkdv_kernel<{dtype}, 128, true, both>", arch) in found


def test_no_loop_touches_local_memory(kernels: list[machine.Kernel]) -> None:
    assert [(k.name, k.arch, k.loop_local) for k in kernels if k.loop_local] == []


def test_products_are_the_wide_ones(kernels: list[machine.Kernel]) -> None:
    for kernel in kernels:
        if kernel.name.startswith(("attn_fwd", "attn_bwd_dq", "attn_bwd_dkdv")):
            loop = kernel.main_loop
            assert loop is not None, kernel.name
            assert loop.count("HMMA") == loop.count(machine.WIDE_PRODUCT) >= 64, (kernel.name, kernel.arch)
            assert 128 <= kernel.registers <= 255


def test_the_table_in_the_repository_is_this_one(kernels: list[machine.Kernel]) -> None:
    kept = machine.DOCUMENT.read_text()
    release = re.search(r"nvcc ([\d.]+)", kept)
    told = subprocess.run([str(build.cuda_home() / "bin" / "nvcc"), "--version"], capture_output=True, text=True).stdout
    if release is None or f"release {release[1]}," not in told or build.architectures() != build.DEFAULT_ARCHITECTURES:
        pytest.skip(f"the table was made by nvcc {release and release[1]} for {build.DEFAULT_ARCHITECTURES}")
    for kernel in kernels:
        line = "| " + " | ".join(machine.row(kernel)) + " |"
        assert line in kept, f"not in docs/cuda_machine_code.md (python -m attnfuse.machine --write): {line}"


def test_the_extension_is_small(extension: Path) -> None:
    assert extension.stat().st_size < 30e6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_without_a_driver_it_loads_and_a_launch_is_one_sentence(extension: Path) -> None:
    program = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("attnfuse._cuda", {str(extension)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
rows = (0, 0, 0, 0, 0)
params = module.ForwardParams((0, 0, 1, 1, 1, 4, 64, 64, 1.0, 0.0), (rows, rows, 0, 0, 0), ())
try:
    module.attn_fwd(params, 0)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "driver" in done.stdout.lower(), done.stdout
