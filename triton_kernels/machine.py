"""Compile every tuned configuration for GPUs that are not here, and read the machine code.

    python -m attnfuse.triton_kernels.machine --arch 80 90 100 120

A stand-in driver gives Triton a target; `JITFunction.warmup` compiles from stand-in tensors. Read off per kernel:
registers, shared memory, local (spill) bytes, and how many local-memory loads and stores lie inside a loop.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..machine import cuobjdump, loops
from .tuning import SHARED_LIMIT, Tile, few_tile, merge_tile, padded, tile

ARCHS = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Few queries: "split" and "few" at the most packed rows a tile has, "split16" and "few16" for one query; then what adds
# partials up. One query is compiled apart: Triton takes an argument of 1 for a constant.
PASSES = ("fwd", "dq", "dkdv", "split", "split16", "combine", "few", "few16", "reduce")
VARIANTS = ("plain", "causal", "everything")


class Config(NamedTuple):
    arch: int
    dtype: str
    head_dim: int
    pass_: str
    variant: str

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.dtype} d{self.head_dim} {self.pass_} {self.variant}"


class Reading(NamedTuple):
    config: Config
    tile: tuple[int, ...]
    registers: int
    shared: int  # bytes of one block
    local: int  # bytes of local memory of one thread
    loop_local: int  # local-memory instructions inside loops
    loop: int  # instructions of the longest innermost loop
    error: str = ""

    def over_shared(self) -> bool:
        return self.shared > SHARED_LIMIT[self.config.arch] * 1024


def configs(
    archs: Iterable[int] = ARCHS,
    dtypes: Iterable[str] = ("bf16", "fp32"),
    head_dims: Iterable[int] = (64, 96, 128, 256),
    passes: Iterable[str] = PASSES,
    variants: Iterable[str] = VARIANTS,
) -> list[Config]:
    archs, dtypes, head_dims, passes = list(archs), list(dtypes), list(head_dims), list(passes)
    variants = list(variants)
    return [Config(*c) for c in _product(archs, dtypes, head_dims, passes, variants)]


def _product(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [()]
    for axis in axes:
        rows = [(*row, x) for row in rows for x in axis]
    return rows


def tile_of(config: Config) -> Tile:
    """The tile a configuration is compiled with; for partials block_m rows and block_n splits at once."""
    dtype, heavy = DTYPES[config.dtype], config.variant == "everything"
    if config.pass_ in ("combine", "reduce"):
        merge = merge_tile(config.arch, config.head_dim)
        return Tile(merge.block_r, merge.chunk, merge.num_warps, 1)
    if config.pass_ in ("fwd", "dq", "dkdv"):
        return tile(config.arch, dtype, config.head_dim, config.pass_, heavy)
    rows = 16 if config.pass_.endswith("16") else 128
    return few_tile(config.arch, dtype, config.head_dim, config.pass_.removesuffix("16"), rows, heavy)


def _stand_in(arch: int) -> Any:
    """What `triton.runtime.driver.active` must answer while a kernel is only compiled."""
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_device(self) -> int:
            return arch  # a kernel keeps its target by device number: one number for each

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_device_interface(self) -> Any:
            return torch.cuda

    return Driver()


def _arguments(config: Config) -> tuple[Any, list[Any], dict[str, Any]]:
    """The kernel of a configuration, its positional arguments and its constexprs, for N = 4096 and 16 heads."""
    from triton.runtime.jit import MockTensor

    from .attn_bwd import attn_bwd_dkdv, attn_bwd_dq
    from .attn_bwd_few import attn_bwd_few, attn_bwd_few_reduce
    from .attn_fwd import attn_fwd
    from .attn_fwd_split import attn_fwd_combine, attn_fwd_split
    from .tile import Shared, Source, Strided

    dtype, dim = DTYPES[config.dtype], config.head_dim
    everything, one_query = config.variant == "everything", config.pass_.endswith("16")
    f32, u8, i32, i64 = (MockTensor(t) for t in (torch.float32, torch.uint8, torch.int32, torch.int64))

    def strided(of: torch.dtype = dtype) -> Any:
        return Strided(MockTensor(of), 16 * 4096 * dim, 4096 * dim, dim)

    shared = Shared(
        1 if config.dtype == "fp32" else None, 0.18, *((0.01, 72.0) if everything else (None, None)),
        *((f32, 16, 32) if everything else (None, None, None)),
        i64 if everything else None, 429496729, 1.1, 16, 1 if one_query else 4096, 4 if everything else 1,
    )  # fmt: skip
    plain = Source(
        strided(), strided(), 4096, None, None, None, None, None, None, None, None, None, 0, None, None,
        0 if config.variant != "plain" else None, 0,
    )  # fmt: skip
    source = plain
    if everything:
        pairs = Strided(MockTensor(torch.float32), 0, 0, 4096, 16)
        source = plain._replace(
            lengths=i32, present=u8, key_mask=u8, key_mask_batch=4096, key_mask_column=16, pairs=pairs, bias=f32,
            bias_batch=16, bias_head=32, offset=16, left=512, right=256, column=4096,
        )  # fmt: skip
    sources = (plain, source) if everything else (plain,)
    t = tile_of(config)
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "D_PAD": padded(dim), "DV_PAD": padded(dim), "BLOCK_M": t.block_m, "BLOCK_N": t.block_n,
        "SOURCES": len(sources), "PRECISION": "ieee", "num_warps": t.num_warps, "num_stages": t.num_stages,
    }  # fmt: skip
    mass, sinks = (f32, f32) if everything else (None, None)
    if config.pass_ == "fwd":
        return attn_fwd, [strided(), strided(), f32, mass, sinks, sources, shared, 32], constants
    if config.pass_ == "dq":
        return attn_bwd_dq, [
            strided(), strided(), f32, f32, mass, strided(), mass, mass, sources, shared, 0.125, 32,
        ], constants  # fmt: skip
    if config.pass_.startswith("split"):
        constants["MASS"] = everything
        tiles = 1 if one_query else 2
        return attn_fwd_split, [strided(), f32, f32, f32, sources, shared, 32, tiles, 4096], constants
    if config.pass_.startswith("few"):
        grads = tuple(strided() for _ in range(2 * len(sources)))
        to = (strided(), None) if one_query else (None, f32)  # with one split dq is stored as it is
        return attn_bwd_few, [
            strided(), strided(), f32, f32, mass, *to, grads, mass, mass, sources, shared, 0.125,
            1 if one_query else 32, 4096,
        ], constants  # fmt: skip
    if config.pass_ in ("combine", "reduce"):
        small = {"BLOCK_R": t.block_m, "CHUNK": t.block_n, "num_warps": t.num_warps}
        if config.pass_ == "reduce":
            return attn_bwd_few_reduce, [f32, strided(), 16, 4096, 0.125, 32, 4096], small | {
                "D": dim, "D_PAD": padded(dim),
            }  # fmt: skip
        return attn_fwd_combine, [f32, f32, f32, sinks, strided(), f32, mass, shared, 32, 4096], small | {
            "DV": dim, "DV_PAD": padded(dim), "SPLITS_PAD": 256, "SOURCES": len(sources),
        }  # fmt: skip
    grad_pairs = Strided(f32, 0, 0, 4096, 16) if everything else None
    constants |= {"SUM_I": False, "SUM_J": False, "ATOMIC": everything}
    return attn_bwd_dkdv, [
        strided(), strided(), f32, f32, mass, strided(), strided(), grad_pairs, source, shared, 0.125, 32, 0,
    ], constants  # fmt: skip


def read(config: Config) -> Reading:
    """Compile one configuration and read its machine code; a failure is told in `error`."""
    import triton

    shape = tuple(tile_of(config))
    triton.runtime.driver.set_active(_stand_in(config.arch))
    try:
        kernel, arguments, constants = _arguments(config)
        compiled = kernel.warmup(*arguments, grid=(1,), **constants)
        registers, local = _resources(compiled.asm["cubin"])
        found = loops(_disassembled(compiled.asm["cubin"]))
        inner = [x for x in found if not any(x.encloses(y) for y in found)]
        loop_local = max((x.local for x in found), default=0)
        loop = max((x.instructions for x in inner), default=0)
    except Exception as failure:  # a table of every failure says more than the first one raised
        told = ""
        cause: BaseException | None = failure
        while cause is not None:  # Triton chains the error at the call to the error in the callee
            told += f"{type(cause).__name__}: {cause}"[-1000:] + "\n"
            cause = cause.__cause__
        return Reading(config, shape, 0, 0, 0, 0, 0, told.strip())
    return Reading(config, shape, registers, compiled.metadata.shared, local, loop_local, loop)


def _run_on(cubin: bytes, *command: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, local bytes) of a thread."""
    text = _run_on(cubin, cuobjdump(), "-res-usage")
    found = [re.findall(rf"{what}:(\d+)", text) for what in ("REG", "STACK", "LOCAL")]
    return max(map(int, found[0])), max(map(int, found[1] + found[2]))


def _disassembled(cubin: bytes) -> str:
    return _run_on(cubin, cuobjdump(), "-sass")


def read_all(wanted: Sequence[Config], workers: int | None = None) -> list[Reading]:
    """Every configuration, in a pool of processes."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing is compiled under the interpreter")
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(read, wanted))


def _print(readings: Sequence[Reading]) -> None:
    head = ("configuration", "tile", "registers", "shared", "local", "in loops", "loop", "")
    rows = []
    for r in readings:
        note = r.error.splitlines()[-1] if r.error else "over the shared limit" if r.over_shared() else ""
        shape = "{}x{} w{} s{}".format(*r.tile)
        rows.append((str(r.config), shape, *map(str, (r.registers, r.shared, r.local, r.loop_local, r.loop)), note))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for row in (head, *rows):
            print("{:36} {:16} {:>9} {:>7} {:>6} {:>8} {:>5} {}".format(*row))
        return
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS))
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 96, 128, 256])
    parser.add_argument("--pass", dest="passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--workers", type=int)
    given = parser.parse_args(argv)
    wanted = configs(given.arch, given.dtype, given.head_dim, given.passes, given.variant)
    readings = read_all(wanted, given.workers)
    _print(readings)
    return int(any(r.error or r.over_shared() for r in readings))


if __name__ == "__main__":
    raise SystemExit(main())
