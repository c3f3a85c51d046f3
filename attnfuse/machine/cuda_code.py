"""The CUDA kernels: csrc/instances compiled by nvcc for an architecture, and what each kernel's loop is about."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from .. import build
from .model import WARP, Work
from .reading import Reading, hash_of, keep, read_function, recalled
from .sass import Function, demangled, functions, printed

ROOT = build.CSRC.parent
# What ptxas says where products are made to wait for each other, or setmaxnreg is ignored.
_COMPLAINT = re.compile(r"\(C75\d\d\)[^\n]*")
# Warps of a Hopper block that copy for the others.
_COPYING = 4


class Shape(NamedTuple):
    """A pass's tile, as csrc tells it (`TileShape` of csrc/attention.h)."""

    name: str
    rows: int
    columns: int
    threads: int
    shared: int  # bytes


def why_not() -> str | None:
    """Why the CUDA kernels cannot be compiled and read here; None if they can."""
    return build.why_not()


def toolchain() -> str:
    home = build.cuda_home()
    assert home is not None
    return "nvcc " + printed(str(home / "bin" / "nvcc"), "--version").split(", V")[-1].split()[0]


def installed() -> Path:
    """build/cuda, with the objects and the extension that installing makes: for all of its architectures."""
    folder = ROOT / "build" / "cuda"
    return build.build_cuda(folder, folder / f"_cuda{build.SUFFIX}", quiet=True).parent


class Plan(NamedTuple):
    """Where csrc is compiled for an architecture, and what of it is not compiled yet."""

    arch: int
    folder: Path
    names: tuple[str, ...]  # of the architectures that are compiled in the folder
    missing: list[str]  # as `build.uncompiled` has them


def plan(arch: int) -> Plan:
    """For `arch` alone, unless installing has left its objects of today's sources in build/cuda."""
    names, installed = build.architectures(), ROOT / "build" / "cuda"
    ours = {f"sm_{arch}", f"sm_{arch}a"} & set(names)
    if ours and (installed / "build.ninja").exists() and not build.uncompiled(installed, names):
        return Plan(arch, installed, names, [])
    folder, alone = ROOT / "build" / f"cuda-sm_{arch}", (f"sm_{arch}",)
    return Plan(arch, folder, alone, build.uncompiled(folder, alone))


def compiled(where: Plan, jobs: int | None = None, told: Callable[[str], None] | None = None) -> Path:
    """The plan's folder, with the objects of csrc/instances and the extension; `jobs` and `told` as in `build_cuda`."""
    return build.build_cuda(
        where.folder, where.folder / f"_cuda{build.SUFFIX}", True, where.names, jobs, told
    ).parent  # fmt: skip


def shapes(folder: Path, dim: int) -> list[Shape]:
    """Tile and shared memory of every pass at a head dim, as the extension in `folder` tells them."""
    module = _extension(folder)
    return [Shape(*shape) for shape in (*module.tile_shapes(dim), *module.few_tile_shapes(dim))]


def _extension(folder: Path) -> ModuleType:
    # A name of its own: pybind11 gives a second extension of one name the first one's module.
    name = f"attnfuse.{folder.name.replace('-', '_')}._cuda"
    spec = importlib.util.spec_from_file_location(name, folder / f"_cuda{build.SUFFIX}")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_all(
    arch: int,
    head_dims: Sequence[int] = (64, 96, 128, 256),
    passes: Sequence[str] = ("fwd", "dq", "dkdv", "split", "combine", "few", "reduce", "rows"),
    workers: int | None = None,
) -> Iterator[Reading]:
    """Every kernel of csrc/instances for `arch`; objects that have not changed are neither compiled nor read again."""
    folder = compiled(plan(arch), workers)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        for found in pool.map(partial(read_object, folder, arch, head_dims, passes), instances(arch)):
            yield from found


def instances(arch: int) -> list[str]:
    """Names in csrc/instances of what is compiled for `arch`."""
    found = sorted(path.stem for path in (build.CSRC / "instances").glob("*.cu"))
    return [name for name in found if arch == 90 or not name.endswith(build.HOPPER_SUFFIX)]


def read_object(
    folder: Path, arch: int, head_dims: Sequence[int], passes: Sequence[str], instance: str
) -> list[Reading]:
    """The kernels at these head dims and of these passes in an object of csrc/instances, compiled in `folder`."""
    path, name = folder / "instances" / f"{instance}.o", f"sm_{arch}"
    made_by, digest = toolchain(), sha256(path.read_bytes()).hexdigest() + hash_of(Path(__file__))
    # An object is disassembled once, and only if something of it is not known yet.
    disassembled = cache(lambda: {(f.name, f.arch.rstrip("af")): f for f in functions(path)})
    said = complaints(folder, instance)

    def read(kernel: str) -> Reading:
        reading = _read(disassembled()[kernel, name], folder, arch, made_by)
        reading.complaints = said.get(kernel, [])
        keep([kernel, name, made_by, digest], reading)
        return reading

    found = []
    for kernel in _kernels_in(path):
        pass_, dim = _pass_of(kernel)
        if pass_ in passes and (dim is None or dim in head_dims):
            found.append(recalled([kernel, name, made_by, digest]) or read(kernel))
    return found


def complaints(folder: Path, instance: str) -> dict[str, list[str]]:
    """Of each kernel of csrc/instances/`instance`.cu, what ptxas complained of when it was compiled in `folder`."""
    found: dict[str, list[str]] = {}
    for sentence in _COMPLAINT.findall((folder / f"{instance}.ptxas.txt").read_text()):
        for name in re.findall(r"_Z\w+", sentence):
            found.setdefault(demangled(name), []).append(sentence)
    return found


def _kernels_in(path: Path) -> list[str]:
    """Names of the kernels in an object, from its sources' instantiations: disassembling takes longer."""
    text = path.read_bytes()
    found = sorted(set(re.findall(rb"\.text\.(_Z\w+)", text)))
    return [demangled(name.decode()) for name in found if b"_kernel" in name]


def _pass_of(kernel: str) -> tuple[str, int | None]:
    name = kernel.split("<")[0]
    dim = re.search(r"<\w+, (\d+)", kernel)
    for pass_ in ("split", "combine", "reduce", "few", "fwd", "dq", "dkdv"):  # the longer names first
        if f"_{pass_}_" in name:
            return pass_, int(dim[1]) if dim else None
    return "rows", None


def _read(function: Function, folder: Path, arch: int, made_by: str) -> Reading:
    base = function.name.split("<")[0].removesuffix("_kernel")
    arguments = [a.strip() for a in function.name.partition("<")[2].rstrip(">").split(",")]
    if base not in WORK:
        return read_function(function, None, "cuda", arch, function.name, made_by, "-")
    dim = int(arguments[1])
    candidates = [shape for shape in shapes(folder, dim) if shape.name == base]
    shape, depths = WORK[base](arguments, candidates)
    work = Work(shape.rows, shape.columns, shape.threads // WARP, (dim,) * depths, shared=shape.shared)
    if base.startswith("sm90::"):
        # Copies are tensor copies, of K and V or of Q and dO, by warps that do nothing else.
        copied = 2 * (shape.rows if "_dkdv" in base else shape.columns) * dim * 2
        # What bulk reductions, where the kernel has them, add to dQ.
        reduced = shape.rows * dim * 4 if "_dkdv" in base else 0
        work = replace(work, warps=work.warps - _COPYING, block_warps=work.warps, copied=copied, reduced=reduced)
    elif base in ("attn_fwd_split", "attn_bwd_few"):
        # Several warps may compute the same scores: tiles are counted by what is copied, K and V.
        work = replace(work, copied=2 * shape.columns * dim * 2)
    tile = f"{shape.rows}x{shape.columns} w{shape.threads // WARP}"
    return read_function(function, work, "cuda", arch, function.name, made_by, tile)


def _dkdv(arguments: Sequence[str], candidates: Sequence[Shape]) -> tuple[Shape, int]:
    # <dtype, dim, for cards with 99 KB, which gradients>: the first shape is the usual card's, or dV's launch.
    _, _, small, wanted = arguments
    products = {"both": 5, "value": 2, "key": 4}[wanted]  # S, dP, dV, dK, dQ, as far as needed
    return candidates[int(small == "true" or wanted == "key")], products


def _hopper_dkdv(arguments: Sequence[str], candidates: Sequence[Shape]) -> tuple[Shape, int]:
    # <dtype, dim, which gradients>: at 256 dV's launch is the first, dK's the second.
    wanted = arguments[2]
    return candidates[-1 if wanted != "value" else 0], {"both": 5, "value": 2, "key": 4}[wanted]


def _by_rows(products: int, arguments: Sequence[str], candidates: Sequence[Shape]) -> tuple[Shape, int]:
    # <dtype, dim, rows>: a shape for each number of rows.
    (shape,) = [shape for shape in candidates if shape.rows == int(arguments[2])]
    return shape, products


# Of a kernel that walks tiles: its shape of those csrc names for the head dim, and how many products a tile takes.
# A new kernel gets a line here.
WORK: dict[str, Callable[[Sequence[str], Sequence[Shape]], tuple[Shape, int]]] = {
    "attn_fwd": lambda arguments, candidates: (candidates[0], 2),
    "sm90::attn_fwd": lambda arguments, candidates: (candidates[0], 2),
    "attn_bwd_dq": lambda arguments, candidates: (candidates[0], 3),
    "attn_bwd_dkdv": _dkdv,
    "sm90::attn_bwd_dq": lambda arguments, candidates: (candidates[0], 3),
    "sm90::attn_bwd_dkdv": _hopper_dkdv,
    "attn_fwd_split": partial(_by_rows, 2),
    "attn_bwd_few": partial(_by_rows, 5),
}
