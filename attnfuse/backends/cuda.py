"""The CUDA backend: csrc/, for NVIDIA cards of compute capability 8.0 and later.

Off a GPU, ATTNFUSE_EMULATE=1 runs the same kernels on CPU tensors, as a proof: csrc compiled for the host, with
csrc/emulation in the card's place. ATTNFUSE_EMULATE_ARCH (80 if not set, or 90) is the card's compute capability, which
decides the kernels; ATTNFUSE_EMULATE_SEED (0 if not set) shuffles the order in which threads take turns;
ATTNFUSE_EMULATE_MODULE names a module that is already built.

ATTNFUSE_CUDA_ARCH=80, read when this module is imported, keeps calls off the kernels for newer architectures: to
compare both on a Hopper card, or to do without the newer ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import build
from ..problem import UNBOUNDED, BoundSource, Gradients, Problem
from . import cuda_few
from .rows import constant_when_compiled, empty_results, empty_rows, exact_delta, on_device_of, sinks_gradient

# As csrc/attention.h has them.
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
MAX_SOURCES = 8
_NO_ROWS = (0, 0, 0, 0, 0)
NEWEST = os.environ.get("ATTNFUSE_CUDA_ARCH", "90")


@constant_when_compiled  # looks at files, which torch.compile cannot trace
def available() -> str | None:
    """Why the backend cannot run on this machine at all; None if it can."""
    if NEWEST not in ("80", "90"):
        return f"ATTNFUSE_CUDA_ARCH must be 80 or 90, got {NEWEST!r}"
    if not _emulating():
        return _no_gpu() or _no_extension()
    ready, seed = os.environ.get("ATTNFUSE_EMULATE_MODULE"), os.environ.get("ATTNFUSE_EMULATE_SEED", "0")
    if not seed.isdecimal():
        return f"ATTNFUSE_EMULATE_SEED must be a number of at least 0, got {seed!r}"
    arch = os.environ.get("ATTNFUSE_EMULATE_ARCH", "80")
    if arch not in ("80", "90"):
        return f"ATTNFUSE_EMULATE_ARCH must be 80 or 90, got {arch!r}"
    if ready:
        return None if Path(ready).is_file() else f"ATTNFUSE_EMULATE_MODULE must name a file, got {ready!r}"
    missing = build.why_no_emulation()
    return None if missing is None else f"the CUDA kernels cannot be emulated: {missing}"


def rejects(problem: Problem) -> str | None:
    """Why this problem is not served; None if it is."""
    query = problem.query
    if query.dtype not in DTYPES:
        return f"the CUDA kernels take bfloat16 and float16, got {query.dtype}"
    if len(problem.sources) > MAX_SOURCES:
        return f"the CUDA kernels take at most {MAX_SOURCES} sources, got {len(problem.sources)}"
    for s, source in enumerate(problem.sources):
        if source.attn_mask is not None:
            return f"sources[{s}] has an (i, j) mask, which the CUDA kernels do not take"
    if problem.alibi_slopes is not None:
        return "the CUDA kernels do not take alibi_slopes"
    if problem.dropout_p > 0:
        return f"the CUDA kernels have no dropout, got dropout_p={problem.dropout_p}"
    if query.device.type == "cpu":
        return None if _emulating() else "the tensors are on the CPU, and ATTNFUSE_EMULATE=1 is not set"
    missing = _no_extension()
    return f"the tensors are on {query.device}, and {missing}" if missing is not None else _too_old(query.device.index)


def describe(problem: Problem) -> str:
    """The tiles a call would use, for `explain`: rows x columns of each kernel, and the schedule of both passes."""
    module = _module(problem)
    dim = module.padded_dim(problem.query.shape[3], problem.value_dim)
    out, lse, mass = empty_results(problem)
    ahead, back = cuda_few.plan_forward(module, problem), cuda_few.plan_backward(module, problem)
    plain_ahead = module.attn_fwd_tile(module.ForwardParams(*_forward_given(problem, out, lse, mass, [])))
    told = []
    for name, plan, few, tiles in (
        ("forward", ahead, "attn_fwd_split", [plain_ahead]),
        ("backward", back, "attn_bwd_few", _backward_tiles(module, problem, out)),
    ):
        schedule = "mma.sync, keys split over blocks" if plan.splits else tiles[-1][-1]
        shapes = [
            f"{name} {rows}x{columns}, {threads // 32} warps, {shared / 1024:.0f} KB"
            for name, rows, columns, threads, shared, *_ in (
                [cuda_few.tile(module, problem, few)] if plan.splits else tiles
            )
        ]
        told.append(f"{name}: {schedule}; {plan.why}; tiles {'; '.join(shapes)}")
    emulated = ", emulated" if problem.query.device.type == "cpu" else ""
    return f"head dim {dim}{emulated}. {'. '.join(told)}"


def _backward_tiles(module: Any, problem: Problem, out: Tensor) -> list[tuple[Any, ...]]:
    """Tile and schedule of the plain kernels, the one over rows and the one over keys."""
    pairs = [(empty_rows(source.key), empty_rows(source.value)) for source in problem.sources]
    tensors = (_rows(problem.query), _rows(out), _rows(out), _rows(problem.query), 0, 0, 0, 0)
    sources = tuple(_source(source, [], *pair) for source, pair in zip(problem.sources, pairs))
    params = module.BackwardParams(_shape(problem), tensors, (0,) * 7, sources)
    tiles: list[tuple[Any, ...]] = module.attn_bwd_tiles(params)
    return tiles


def forward(problem: Problem, *, splits: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, Hq, Nq, Dv), lse (B, Hq, Nq) float32 and mass (B, Hq, Nq, S) float32, or (0,) if not wanted.

    splits: 0 takes the plain kernel, more splits the keys so many ways; None leaves it to `cuda_few.plan_forward`.
    """
    query = problem.query
    out, lse, mass = empty_results(problem)
    if lse.numel() == 0:
        return out, lse, mass
    module = _module(problem)
    kept: list[Tensor] = []
    splits = cuda_few.plan_forward(module, problem).splits if splits is None else splits
    with on_device_of(query):
        given = _forward_given(problem, out, lse, mass, kept)
        if splits:
            cuda_few.forward(module, problem, splits, given, lse, _stream(query))
        else:
            module.attn_fwd(module.ForwardParams(*given), _stream(query))
    return out, lse, mass


def _forward_given(
    problem: Problem, out: Tensor, lse: Tensor, mass: Tensor, kept: list[Tensor]
) -> tuple[Any, ...]:
    """What attention.h's ForwardParams is made of; what `kept` holds must live until the kernel is enqueued."""
    tensors = (_rows(problem.query), _rows(out), lse.data_ptr(), _pointer(mass), _vector(problem.sinks, kept))
    return _shape(problem), tensors, tuple(_source(s, kept) for s in problem.sources)


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    needs: Sequence[bool],
    *,
    splits: int | None = None,
) -> Gradients:
    """The gradients that `needs` (aligned with Problem.tensors()) asks for.

    splits: 0 takes the plain kernels, more splits the keys so many ways wherever `cuda_few.refuses` has no objection;
    None leaves it to `cuda_few.plan_backward`.

    Of the plain kernels one walks the keys and values. dQ is added up in it by atomics, except where the same bits are
    wanted every time, or sums over whole rows are (sinks, bias): then a kernel of its own walks the rows before it.
    """
    need_query, _, need_sinks, _, *rest = needs
    width = len(BoundSource.TENSORS)
    need_sources = [rest[s * width : s * width + 4] for s in range(len(problem.sources))]
    need_pairs = any(need_key or need_value for need_key, need_value, *_ in need_sources)
    # Where dz is summed over a whole row, the rounding of a 16-bit `out` inside delta no longer averages out.
    exact = need_sinks or any(need_bias for *_, need_bias in need_sources)
    if lse.numel() == 0:
        splits = 0
    elif splits is None:
        splits = cuda_few.plan_backward(_module(problem), problem).splits
    elif splits and cuda_few.refuses(_module(problem), problem) is not None:
        splits = 0
    fused = (
        need_query and need_pairs and not exact and not splits and not torch.are_deterministic_algorithms_enabled()
    )

    grad_query = empty_rows(problem.query) if need_query else None
    pairs = [
        (empty_rows(source.key) if need_key else None, empty_rows(source.value) if need_value else None)
        for source, (need_key, need_value, *_) in zip(problem.sources, need_sources)
    ]
    lse = lse.contiguous()  # the kernels count its rows; whoever kept it may have laid it out anew
    shared, sums = lse, None
    if lse.numel() > 0:
        shared, sums = _launch(
            problem, out, lse, mass.contiguous(), grad_out if grad_out.stride(3) == 1 else grad_out.contiguous(),
            None if grad_lse is None else grad_lse.to(torch.float32).contiguous(),
            None if grad_mass is None else grad_mass.to(torch.float32).contiguous(),
            grad_query, pairs, exact, fused, splits,
        )  # fmt: skip
    else:  # not a row that looks at a key
        sums = lse.new_zeros((*lse.shape, len(problem.sources)))
        for grad in (grad for pair in pairs for grad in pair if grad is not None):
            grad.zero_()
    sources: list[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]] = []
    for s, (key, value) in enumerate(pairs):
        bias = None
        if need_sources[s][3]:
            assert sums is not None
            bias = sums[..., s].sum(-1)
        sources.append((key, value, None, bias))
    return Gradients(grad_query, None, sinks_gradient(problem, lse, shared) if need_sinks else None, sources)


def _launch(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    grad_query: Tensor | None,
    pairs: list[tuple[Tensor | None, Tensor | None]],
    exact: bool,
    fused: bool,
    splits: int,
) -> tuple[Tensor, Tensor | None]:
    """Fill grad_query and `pairs`, the gradients of each source's key and value.

    With `exact`, also the part of delta that all sources share (B, Hq, Nq), and dz summed over columns
    (B, Hq, Nq, S); else lse and None in their places.
    """
    module = _module(problem)
    query, count = problem.query, len(problem.sources)
    batch, heads, rows, dim = query.shape
    padded = module.rows_padded(rows)
    # (1 or S, B, Hq, rows_padded): delta differs between the sources by the gradients of their masses
    delta = lse.new_empty((1 if grad_mass is None else count, batch, heads, padded))
    lse2 = lse.new_empty((batch, heads, padded))
    live = lse.new_empty((batch, heads, padded // 64), dtype=torch.int64)
    dq_sum = lse.new_empty((batch, heads, padded, module.padded_dim(dim, problem.value_dim))) if fused else None
    sums = None
    if exact:
        sums = cuda_few.empty_sums(module, problem, splits, lse) if splits else lse.new_empty((*lse.shape, count, 2))
    kept: list[Tensor] = []
    tensors = (
        _rows(query), _rows(out), _rows(grad_out), _rows(grad_query), lse.data_ptr(), _pointer(grad_lse),
        _pointer(mass), _pointer(grad_mass),
    )  # fmt: skip
    scratch = (
        lse2.data_ptr(), delta.data_ptr(), live.data_ptr(), _pointer(dq_sum), _pointer(sums),
        0 if grad_mass is None else delta.stride(0), padded,
    )  # fmt: skip
    sources = tuple(_source(source, kept, *pair) for source, pair in zip(problem.sources, pairs))
    made = _shape(problem), tensors, scratch, sources
    params = module.BackwardParams(*made)
    shared, summed = lse, None
    with on_device_of(query):
        stream = _stream(query)
        module.attn_bwd_delta(params, stream)
        if splits:
            cuda_few.backward(module, problem, splits, made, lse, grad_query is not None, stream)
            sums = None if sums is None else sums.sum(0)
        elif exact or (grad_query is not None and not fused):
            module.attn_bwd_dq(params, stream)
        if sums is not None:
            given = delta[0, :, :, :rows] if grad_mass is None else delta[0, :, :, :rows] + grad_mass[..., 0]
            given = torch.where(lse == float("-inf"), 0.0, given)
            shared, error = exact_delta(lse, given, grad_lse, sums)
            delta[..., :rows] += error
            summed = sums[..., 0] - error[..., None] * sums[..., 1]
        if not splits and any(grad is not None for pair in pairs for grad in pair):
            module.attn_bwd_dkdv(params, stream)
        if fused:
            module.attn_bwd_convert(params, stream)
    return shared, summed


@lru_cache
def missing_extension() -> str | None:
    """What became of attnfuse._cuda where it cannot be imported; None if it can."""
    if importlib.util.find_spec("attnfuse._cuda") is None:
        return f"not built: {build.why_not() or 'what that takes is here, so install attnfuse again'}"
    try:
        extension()
    except ImportError as error:
        return f"built, but cannot be loaded: {error}"
    return None


@lru_cache
def extension() -> Any:
    """The compiled kernels."""
    return importlib.import_module("attnfuse._cuda")


@lru_cache
def emulation() -> Any:
    """The kernels compiled for the host, which happens here the first time and after a change."""
    ready = os.environ.get("ATTNFUSE_EMULATE_MODULE")
    path = Path(ready) if ready else build.build_emulation(build.emulation_dir(), quiet=True)
    spec = importlib.util.spec_from_file_location("attnfuse._emulated", path)
    assert spec is not None and spec.loader is not None
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # a module built with only some of the instances lacks the others' symbols
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(flags)
    module.set_seed(int(os.environ.get("ATTNFUSE_EMULATE_SEED", "0")))
    module.set_architecture(int(os.environ.get("ATTNFUSE_EMULATE_ARCH", "80")))
    return module


def _module(problem: Problem) -> Any:
    return emulation() if problem.query.device.type == "cpu" else extension()


def _emulating() -> bool:
    return os.environ.get("ATTNFUSE_EMULATE") == "1"


@lru_cache
def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "there is no GPU here, and ATTNFUSE_EMULATE=1 is not set"


@constant_when_compiled
def _no_extension() -> str | None:
    missing = missing_extension()
    return None if missing is None else f"the CUDA extension is {missing}"


@lru_cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@constant_when_compiled
def _too_old(device: int) -> str | None:
    major, minor = _capability(device)
    return None if major >= 8 else f"the CUDA kernels need compute capability 8.0, device {device} has {major}.{minor}"


def _stream(x: Tensor) -> int:
    """The current stream of x's device, as a cudaStream_t."""
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.device.type == "cuda" else 0


def _shape(problem: Problem) -> tuple[int | float, ...]:
    """attention.h's Shape, without source_count."""
    query = problem.query
    batch, heads, rows, dim = query.shape
    key_heads = problem.sources[0].key.shape[1]
    return (
        DTYPES[query.dtype], query.device.index or 0, batch, heads, key_heads, rows, dim, problem.value_dim,
        problem.scale, problem.softcap, int(NEWEST),
    )  # fmt: skip


def _source(
    source: BoundSource, kept: list[Tensor], grad_key: Tensor | None = None, grad_value: Tensor | None = None
) -> tuple[Any, ...]:
    """attention.h's SourceParams."""
    keys, bias = source.key_mask, source.bias
    widest = 2**29
    left = widest if source.window_left == UNBOUNDED else min(source.window_left, widest)
    right = widest if source.window_right == UNBOUNDED else min(source.window_right, widest)
    return (
        _rows(source.key),
        _rows(source.value),
        _rows(grad_key),
        _rows(grad_value),
        _vector(source.lengths, kept),
        _vector(source.present, kept),
        *((0, 0, 0) if keys is None else (keys.data_ptr(), *keys.stride())),
        *((0, 0, 0) if bias is None else (bias.data_ptr(), *bias.stride())),
        _vector(source.offsets, kept),
        source.offset,
        source.key.shape[2],
        left,
        0 if source.causal else right,
    )


def _rows(x: Tensor | None) -> tuple[int, int, int, int, int]:
    """attention.h's Rows: address, strides, and whether 16-byte copies can read it."""
    if x is None:
        return _NO_ROWS
    address = x.data_ptr()
    batch, head, row, _ = strides = x.stride()
    aligned = address % 16 == 0 and x.shape[3] % 8 == 0
    if aligned and (batch | head | row) % 8:  # where there is one of a kind, no stride is taken
        aligned = not any(stride % 8 for stride, size in zip(strides[:3], x.shape) if size > 1)
    return address, batch, head, row, int(aligned)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _vector(x: Tensor | None, kept: list[Tensor]) -> int:
    """The address of x without gaps; a copy goes into `kept`, to live until the kernel is enqueued.

    From there on it is its memory's stream that keeps it whole.
    """
    if x is None:
        return 0
    if not x.is_contiguous():
        x = x.contiguous()
        kept.append(x)
    return x.data_ptr()
