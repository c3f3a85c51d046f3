"""The Triton kernels, compiled for GPUs that are not here.

A stand-in driver gives Triton a target; `JITFunction.warmup` compiles from stand-in tensors.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .model import Work
from .reading import Reading, hash_of, keep, read_function, recalled
from .sass import Function, of_cubins, printed

if TYPE_CHECKING:
    from ..triton_kernels.tuning import Tile

ARCHS = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_DIMS = (64, 96, 128, 256)
# "dkdv1" is dkdv that adds up dq too. Few queries: "split" and "few" at the most packed rows a tile has, "split16" and
# "few16" for one query; then what adds partials up. One query is compiled apart: Triton takes an argument of 1 for a
# constant.
PASSES = ("fwd", "dq", "dkdv", "dkdv1", "split", "split16", "combine", "few", "few16", "reduce")
# plain: no mask at all; causal: a causal mask; everything: every feature of the contract; several: the same on the
# second of two sources. A kernel has its loops once for each source, so one source shows what a tile costs, and a list
# is compiled at one dtype and head dim to show that it can be.
VARIANTS = ("plain", "causal", "everything", "several")
SEVERAL = ("bf16", 64)
SOURCE = Path(__file__).parent.parent / "triton_kernels"
FILES = (
    "attn_fwd.py", "attn_bwd.py", "attn_fwd_split.py", "attn_bwd_few.py", "packed.py", "tile.py", "tuning.py",
)  # fmt: skip
# The variants of a pass, where not all: partials are added up whatever was masked, keys are walked a source at a time,
# and where `tuning.one_pass` never takes one pass there is none.
LOOKS_AT = {
    "dkdv": ("plain", "causal", "everything"), "dkdv1": ("plain", "causal"), "combine": ("plain", "several"),
    "reduce": ("plain",),
}  # fmt: skip
# Depths are of the head dim: the products of a tile.
PRODUCTS = {"fwd": 2, "split": 2, "dq": 3, "dkdv": 4, "dkdv1": 5, "few": 5}


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

    @property
    def heavy(self) -> bool:
        return self.variant in ("everything", "several")

    @property
    def exists(self) -> bool:
        if self.variant == "several" and self.pass_ != "combine" and (self.dtype, self.head_dim) != SEVERAL:
            return False
        if self.pass_ == "dkdv1" and self.dtype == "fp32":
            return False
        return self.variant in LOOKS_AT.get(self.pass_, VARIANTS)


def configs(
    archs: Iterable[int] = ARCHS,
    dtypes: Iterable[str] = tuple(DTYPES),
    head_dims: Iterable[int] = HEAD_DIMS,
    passes: Iterable[str] = PASSES,
    variants: Iterable[str] = VARIANTS,
) -> list[Config]:
    """Every combination that there is."""
    found = (Config(*c) for c in product(archs, dtypes, head_dims, passes, variants))
    return [config for config in found if config.exists]


def tile_of(config: Config) -> Tile:
    """The tile a configuration is compiled with; for what adds partials up, block_m rows and block_n splits at once."""
    from ..triton_kernels.tuning import Tile, few_tile, merge_tile, tile

    dtype, heavy = DTYPES[config.dtype], config.heavy
    if config.pass_ in ("combine", "reduce"):
        merge = merge_tile(config.arch, config.head_dim)
        return Tile(merge.block_r, merge.chunk, merge.num_warps, 1)
    if config.pass_ in ("fwd", "dq", "dkdv", "dkdv1"):
        return tile(config.arch, dtype, config.head_dim, config.pass_, heavy)
    rows = 16 if config.pass_.endswith("16") else 128
    return few_tile(config.arch, dtype, config.head_dim, config.pass_.removesuffix("16"), rows, heavy)


def work_of(config: Config, shared: int) -> Work | None:
    """What the tile loops are about, `shared` being the block's bytes; None for what multiplies nothing."""
    from ..triton_kernels.tuning import padded

    depths = (config.head_dim,) * PRODUCTS.get(config.pass_.removesuffix("16"), 0)
    if not depths:
        return None
    t = tile_of(config)
    # dkdv walks queries and gradients of the output, the others keys and values.
    walked = t.block_m if config.pass_.startswith("dkdv") else t.block_n
    copied = 2 * walked * padded(config.head_dim) * DTYPES[config.dtype].itemsize
    return Work(t.block_m, t.block_n, t.num_warps, depths, copied, shared)


def read_known(config: Config) -> Reading | None:
    """What was read of a configuration with the same sources and compilers, or None."""
    return recalled(_key(config))


def read(wanted: Sequence[Config]) -> list[Reading]:
    """Compile configurations, disassemble them in one go, and read them. A failure is told in its reading's `error`."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing is compiled under the interpreter")
    # Triton tells every process of its own settings to come.
    warnings.filterwarnings("ignore", module="triton")
    found = []
    for arch in sorted({config.arch for config in wanted}):
        compiled = {config: _compiled(config) for config in wanted if config.arch == arch}
        good = {config: done for config, done in compiled.items() if not isinstance(done, str)}
        code = dict(zip(good, of_cubins([done.cubin for done in good.values()], arch)))
        for config, done in compiled.items():
            if isinstance(done, str):
                found.append(_blank(config, error=done))
            else:
                found.append(_read(config, code[config], done.shared))
                if not found[-1].error:
                    keep(_key(config), found[-1])
    return found


def _key(config: Config) -> list[str]:
    return [str(config), toolchain(config.arch), hash_of(Path(__file__), *(SOURCE / name for name in FILES))]


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


class _Compiled(NamedTuple):
    cubin: bytes
    shared: int  # bytes of a block


def _compiled(config: Config) -> _Compiled | str:
    """What Triton makes of it, or why it does not."""
    import triton

    triton.runtime.driver.set_active(stand_in(config.arch))
    try:
        kernel, arguments, constants = arguments_of(config)
        compiled = kernel.warmup(*arguments, grid=(1,), **constants)
        return _Compiled(compiled.asm["cubin"], compiled.metadata.shared)
    except Exception as failure:  # a table of every failure says more than the first one raised
        told = ""
        cause: BaseException | None = failure
        while cause is not None:  # Triton chains the error at the call to the error in the callee
            told += f"{type(cause).__name__}: {cause}"[-1000:] + "\n"
            cause = cause.__cause__
        return told.strip()


def _read(config: Config, function: Function, shared: int) -> Reading:
    from ..triton_kernels.tuning import SHARED_LIMIT

    blank = _blank(config)
    work = work_of(config, shared)
    reading = read_function(function, work, "triton", config.arch, config.kernel, blank.toolchain, blank.tile)
    if reading.shared > SHARED_LIMIT[config.arch] * 1024:
        reading.error = f"{reading.shared} bytes of shared memory, a block has {SHARED_LIMIT[config.arch]} KB"
    return reading


def _blank(config: Config, error: str = "") -> Reading:
    t = tile_of(config)
    tile = f"{t.block_m}x{t.block_n} w{t.num_warps} s{t.num_stages}"
    return Reading("triton", config.arch, config.kernel, toolchain(config.arch), tile, error=error)


def arguments_of(config: Config) -> tuple[Any, list[Any], dict[str, Any]]:
    """The kernel of a configuration, its positional arguments and its constexprs, for N = 4096 and 16 heads."""
    from triton.runtime.jit import MockTensor

    from ..backends.few import MAX_SPLITS
    from ..triton_kernels.attn_bwd import attn_bwd_dkdv, attn_bwd_dq
    from ..triton_kernels.attn_bwd_few import attn_bwd_few, attn_bwd_few_reduce
    from ..triton_kernels.attn_fwd import attn_fwd
    from ..triton_kernels.attn_fwd_split import attn_fwd_combine, attn_fwd_split
    from ..triton_kernels.tile import Shared, Source, Strided
    from ..triton_kernels.tuning import described, padded

    dtype, dim = DTYPES[config.dtype], config.head_dim
    everything, one_query = config.heavy, config.pass_.endswith("16")
    f32, u8, i32, i64 = (MockTensor(t) for t in (torch.float32, torch.uint8, torch.int32, torch.int64))

    def strided(of: torch.dtype = dtype) -> Any:
        return Strided(MockTensor(of), 16 * 4096 * dim, 4096 * dim, dim)

    shared = Shared(
        1 if config.dtype == "fp32" else None, 0.18, None, None, None, None, None, None, 429496729, 1.1, 16,
        1 if one_query else 4096, 1, 1,
    )  # fmt: skip
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
            bias_batch=16, bias_head=32, offset=16, left=512, right=256,
            column=4096 if config.variant == "several" else 0,
        )  # fmt: skip
    sources = (plain, source) if config.variant == "several" else (source,)
    t = tile_of(config)
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
            sizes = {"D": dim, "D_PAD": padded(dim)}
            return attn_bwd_few_reduce, [f32, strided(), 16, 4096, 0.125, 32, 4096], small | sizes
        sizes = {"DV": dim, "DV_PAD": padded(dim), "SPLITS_PAD": MAX_SPLITS, "SOURCES": len(sources)}
        return attn_fwd_combine, [f32, f32, f32, sinks, strided(), f32, mass, shared, 32, 4096], small | sizes
    grad_pairs = Strided(f32, 0, 0, 4096, 16) if everything and config.pass_ == "dkdv" else None
    constants |= {"SUM_I": False, "SUM_J": False, "ATOMIC": grad_pairs is not None}
    dq_sum = strided(torch.float32) if config.pass_ == "dkdv1" else None
    return attn_bwd_dkdv, [
        strided(), strided(), f32, f32, mass, strided(), strided(), grad_pairs, dq_sum, source, shared, 0.125, 32, 0,
    ], constants  # fmt: skip
