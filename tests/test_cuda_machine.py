"""Every CUDA kernel as nvcc compiles it: registers, no local memory in loops, the wide products, a small extension."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnfuse import build
from attnfuse.machine import cuda_code, sass, table
from attnfuse.machine.reading import Reading

WIDE_PRODUCT = "HMMA.16816"
REASON = cuda_code.why_not()
if REASON is None:
    try:
        sass.cuobjdump()
    except FileNotFoundError as error:
        REASON = str(error)

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def extension() -> Path:
    """The extension, from the objects that installing has left in build/cuda where it has."""
    return cuda_code.installed() / f"_cuda{build.SUFFIX}"


@pytest.fixture(scope="module")
def readings(extension: Path) -> list[Reading]:
    return [reading for arch in (80, 90) for reading in cuda_code.read_all(arch)]


def test_every_instance_is_there(readings: list[Reading]) -> None:
    found = {(r.kernel, r.arch) for r in readings}
    assert len(found) == len(readings)
    for arch in (80, 90):
        for dtype in ("bf16", "fp16"):
            for dim in (64, 96, 128, 256):
                assert (f"attn_fwd_kernel<{dtype}, {dim}>", arch) in found
                assert (f"attn_bwd_dq_kernel<{dtype}, {dim}>", arch) in found
                assert any(name.startswith(f"attn_bwd_dkdv_kernel<{dtype}, {dim}, ") for name, _ in found)
            for dim, rows in [(d, r) for d in (64, 128, 256) for r in (16, 64, 128)]:
                if rows < 128:
                    assert (f"attn_fwd_split_kernel<{dtype}, {dim}, {rows}>", arch) in found
                if rows * dim < 128 * 256:
                    assert (f"attn_bwd_few_kernel<{dtype}, {dim}, {rows}>", arch) in found
            assert (f"attn_fwd_combine_kernel<{dtype}>", arch) in found
            assert (f"attn_bwd_few_reduce_kernel<{dtype}>", arch) in found
            assert (f"attn_bwd_dkdv_kernel<{dtype}, 128, true, both>", arch) in found
            assert (f"attn_bwd_delta_kernel<{dtype}>", arch) in found
            assert (f"attn_bwd_convert_kernel<{dtype}>", arch) in found


def test_no_loop_touches_local_memory(readings: list[Reading]) -> None:
    """Hopper's own kernels have a step of their own for full tiles: tests/test_hopper_machine.py."""
    assert [(r.name, r.loop_local) for r in readings if r.loop_local and not r.kernel.startswith("sm90::")] == []


def test_one_loop_walks_the_tiles_with_the_wide_products(readings: list[Reading]) -> None:
    """One tile an iteration, as csrc gives its shape: the products of the loop come out at its FLOP exactly."""
    for r in readings:
        if re.match("attn_(fwd|fwd_split|bwd_dq|bwd_dkdv|bwd_few)_kernel", r.kernel):
            (loop,) = r.loops
            assert loop.name == "full" and loop.tiles == 1, r.name
            assert all(name.startswith(WIDE_PRODUCT) for name in loop.products), r.name
            # 16 rows are shared out among four warps
            assert sum(loop.products.values()) >= (40 if r.kernel.endswith(", 16>") else 64), r.name
            assert 128 <= r.registers <= 255


def test_the_table_in_the_repository_is_this_one(readings: list[Reading]) -> None:
    fresh = table.lines(readings)
    kept = {line.key: line for line in table.kept() if line.language == "cuda"}
    assert {line.key for line in fresh} == set(kept)
    if {line.toolchain for line in fresh} == {line.toolchain for line in kept.values()}:
        for line in fresh:
            assert line == kept[line.key], "the table is not of these sources: attnfuse inspect --write"


def test_what_installing_has_left_is_read(extension: Path) -> None:
    names = build.architectures()
    for arch in (80, 90):
        assert cuda_code.plan(arch) == cuda_code.Plan(arch, extension.parent, names, [])


def test_else_one_architecture_is_compiled_alone(
    extension: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where build/cuda is of other sources or flags, as of other architectures here, or has not this one."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    host = [f"g++ {path.name}" for path in sorted(build.CSRC.glob("*.cpp"))]
    for arch in (80, 90, 120):
        plan = cuda_code.plan(arch)
        assert plan.folder == extension.parent.parent / f"cuda-sm_{arch}" and plan.names == (f"sm_{arch}",)
        sources = {f"nvcc instances/{name}.cu" for name in cuda_code.instances(arch)}
        assert set(plan.missing) <= sources | set(host)
        assert any(name.endswith(build.HOPPER_SUFFIX) for name in cuda_code.instances(arch)) == (arch == 90)
    assert build.uncompiled(tmp_path, ("sm_120",)) == [
        *(f"nvcc instances/{name}.cu" for name in cuda_code.instances(120)), *host
    ]  # fmt: skip


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
params = module.ForwardParams((0, 0, 1, 1, 1, 4, 64, 64, 1.0, 0.0, 90), (rows, rows, 0, 0, 0), ())
try:
    module.attn_fwd(params, 0)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "driver" in done.stdout.lower(), done.stdout
