"""The Triton kernels, compiled for GPUs that are not here.

A stand-in driver gives Triton a target; `JITFunction.warmup` compiles from stand-in tensors.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .model import Work
from .reading import Reading, hash_of, kept, read_function
from .sass import functions, printed

ARCHS = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_DIMS = (64, 96, 128, 256)
PASSES = ("fwd", "dq", "dkdv", "dkdv1")  # dkdv1: dkdv that adds up dq too
# plain: no mask at all; causal: a causal mask; everything: every feature of the contract, on two sources.
VARIANTS = ("plain", "causal", "everything")
SOURCE = Path(__file__).parent.parent / "triton_kernels"
FILES = ("attn_fwd.py", "attn_bwd.py", "tile.py", "tuning.py")


class Config(NamedTuple):
    """One tuned configuration."""

    arch: int
    dtype: str
    head_dim: int
    pass_: str
    variant: str

    @property
    def kernel(self) -> str:
        return f"{self.pass_} {self.dtype} d{self.head_dim} {self.variant}"


def configs(
    archs: Iterable[int] = ARCHS,
    dtypes: Iterable[str] = tuple(DTYPES),
    head_dims: Iterable[int] = HEAD_DIMS,
    passes: Iterable[str] = PASSES,
    variants: Iterable[str] = VARIANTS,
) -> list[Config]:
    return [Config(*c) for c in product(archs, dtypes, head_dims, passes, variants)]


def read_all(wanted: Sequence[Config], workers: int | None = None) -> Iterator[Reading]:
    """Every configuration as it is done, compiled in a pool of processes; a failure is told in its `error`."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing is compiled under the interpreter")
    # The longest first, so that none is left running alone.
    weight = {"everything": 0, "causal": 1, "plain": 2}
    with ProcessPoolExecutor(workers or os.cpu_count(), initializer=_quiet) as pool:
        waiting = [pool.submit(read, c) for c in sorted(wanted, key=lambda c: (weight[c.variant], -c.head_dim))]
        for done in as_completed(waiting):
            yield done.result()


def _quiet() -> None:
    # Triton tells every process of its own settings to come.
    warnings.filterwarnings("ignore", module="triton")


def read(config: Config) -> Reading:
    """Compile one configuration and read its machine code, or recall what was read of the same sources."""
    key = [str(config), toolchain(config.arch), hash_of(*(SOURCE / name for name in FILES))]
    return kept(key, lambda: _read(config))


@cache
def toolchain(arch: int) -> str:
    """Triton's version and that of the ptxas it calls for `arch`."""
    import triton
    from triton.backends.nvidia import compiler

    ptxas = compiler.get_ptxas(arch)
    version = getattr(ptxas, "version", None) or printed(str(ptxas.path), "--version").split(", V")[-1].split()[0]
    return f"triton {triton.__version__}, ptxas {version}"


def stand_in(arch: int) -> Any:
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


def _read(config: Config) -> Reading:
    import triton

    from ..triton_kernels.tuning import SHARED_LIMIT, padded, tile

    made_by = toolchain(config.arch)
    heavy = config.variant == "everything"
    t = tile(config.arch, DTYPES[config.dtype], config.head_dim, config.pass_, heavy)
    shape = f"{t.block_m}x{t.block_n} w{t.num_warps} s{t.num_stages}"
    triton.runtime.driver.set_active(stand_in(config.arch))
    try:
        kernel, arguments, constants = arguments_of(config)
        compiled = kernel.warmup(*arguments, grid=(1,), **constants)
        (function,) = functions(compiled.asm["cubin"])
        # fwd and dq walk keys and values, dkdv queries and gradients of the output.
        walked = t.block_m if config.pass_.startswith("dkdv") else t.block_n
        copied = 2 * walked * padded(config.head_dim) * DTYPES[config.dtype].itemsize
        depths = (config.head_dim,) * {"fwd": 2, "dq": 3, "dkdv": 4, "dkdv1": 5}[config.pass_]
        work = Work(t.block_m, t.block_n, t.num_warps, depths, copied, compiled.metadata.shared)
        reading = read_function(function, work, "triton", config.arch, config.kernel, made_by, shape)
        if reading.shared > SHARED_LIMIT[config.arch] * 1024:
            reading.error = f"{reading.shared} bytes of shared memory, a block has {SHARED_LIMIT[config.arch]} KB"
        return reading
    except Exception as failure:  # a table of every failure says more than the first one raised
        told = ""
        cause: BaseException | None = failure
        while cause is not None:  # Triton chains the error at the call to the error in the callee
            told += f"{type(cause).__name__}: {cause}"[-1000:] + "\n"
            cause = cause.__cause__
        return Reading("triton", config.arch, config.kernel, made_by, shape, error=told.strip())


def arguments_of(config: Config) -> tuple[Any, list[Any], dict[str, Any]]:
    """The kernel of a configuration, its positional arguments and its constexprs, for N = 4096 and 16 heads."""
    from triton.runtime.jit import MockTensor

    from ..triton_kernels.attn_bwd import attn_bwd_dkdv, attn_bwd_dq
    from ..triton_kernels.attn_fwd import attn_fwd
    from ..triton_kernels.tile import Shared, Source, Strided
    from ..triton_kernels.tuning import described, padded, tile

    dtype, dim = DTYPES[config.dtype], config.head_dim
    everything = config.variant == "everything"
    f32, u8, i32, i64 = (MockTensor(t) for t in (torch.float32, torch.uint8, torch.int32, torch.int64))

    def strided(of: torch.dtype = dtype) -> Any:
        return Strided(MockTensor(of), 16 * 4096 * dim, 4096 * dim, dim)

    shared = Shared(
        1 if config.dtype == "fp32" else None, 0.18, None, None, None, None, None, None, 429496729, 1.1, 16, 4096, 1, 1
    )
    if everything:
        shared = shared._replace(
            to_cap=0.01, from_cap=72.0, slopes=f32, slope_batch=16, slope_head=32, seed=i64, group=4
        )
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
    t = tile(config.arch, dtype, dim, config.pass_, everything)
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "D_PAD": padded(dim), "DV_PAD": padded(dim), "BLOCK_M": t.block_m, "BLOCK_N": t.block_n,
        "SOURCES": len(sources), "PRECISION": "ieee", "num_warps": t.num_warps, "num_stages": t.num_stages,
    }  # fmt: skip
    mass, sinks = (f32, f32) if everything else (None, None)
    if config.pass_ == "fwd":
        constants["DESCRIBED"] = described(config.arch, dtype, dim, dim, everything)
        return attn_fwd, [strided(), strided(), f32, mass, sinks, sources, shared, 32], constants
    if config.pass_ == "dq":
        return attn_bwd_dq, [
            strided(), strided(), f32, f32, mass, strided(), mass, mass, sources, shared, 0.125, 32,
        ], constants  # fmt: skip
    grad_pairs = Strided(f32, 0, 0, 4096, 16) if everything and config.pass_ == "dkdv" else None
    constants |= {"SUM_I": False, "SUM_J": False, "ATOMIC": grad_pairs is not None}
    dq_sum = strided(torch.float32) if config.pass_ == "dkdv1" else None
    return attn_bwd_dkdv, [
        strided(), strided(), f32, f32, mass, strided(), strided(), grad_pairs, dq_sum, source, shared, 0.125, 32, 0,
    ], constants  # fmt: skip
