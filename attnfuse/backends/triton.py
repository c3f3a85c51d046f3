"""The Triton backend: every feature of the contract, on any GPU Triton supports.

Off a GPU, TRITON_INTERPRET=1 (set before triton is imported) runs the same kernels on CPU tensors, as a proof.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from contextvars import copy_context
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..problem import UNBOUNDED, BoundSource, Gradients, Problem
from .few import Plan, long_for, split_count, visible_keys
from .rows import constant_when_compiled, empty_results, empty_rows, exact_delta, on_device_of, sinks_gradient

# Wider than any sequence, and far from where int32 sums of positions would wrap.
_WIDEST = 2**29


@constant_when_compiled
def available() -> str | None:
    """Why the backend cannot run on this machine at all; None if it can."""
    if not _is_installed():
        return "triton is not installed"
    if not _has_gpu() and not _interpreted():
        return "there is no GPU here, and TRITON_INTERPRET=1 is not set"
    return None


@lru_cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@lru_cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@lru_cache
def _structs() -> Any:
    """triton_kernels.tile, which imports triton: not before it is needed, and once."""
    from ..triton_kernels import tile

    return tile


def rejects(problem: Problem) -> str | None:
    """Why this problem is not served; None if it is."""
    if problem.query.dtype == torch.float64:
        return "the Triton kernels compute in float32: float64 is not served"
    if problem.dropout_p == 1.0:
        return "the Triton kernels keep some weights: dropout_p must be less than 1, got 1.0"
    if problem.query.device.type == "cpu" and not _interpreted():
        return "the tensors are on the CPU, and TRITON_INTERPRET=1 is not set"
    return None


def describe(problem: Problem) -> str:
    """The path and the tiles a call would use, for `explain`; the backward as if every gradient were asked for."""
    ahead, back = plan_forward(problem), plan_backward(problem, _trains_a_mask(problem))
    walks: tuple[str, ...] = ("dq", "dkdv")
    if not back.splits:
        together, why = plan_passes(problem, _every_need(problem))
        walks = ("dkdv1",) if together else walks
        back = back._replace(why=f"{back.why}, {why}")
    told = []
    for name, plan, few, passes in (("forward", ahead, "split", ("fwd",)), ("backward", back, "few", walks)):
        tiles = [(few, _few_tile(problem, few))] if plan.splits else [(p, _tile(problem, p)) for p in passes]
        shapes = [f"{p} {t.block_m}x{t.block_n}, {t.num_warps} warps, {t.num_stages} stages" for p, t in tiles]
        told.append(f"{name}: {plan.why}; tiles {'; '.join(shapes)}")
    return ". ".join(told)


def plan_forward(problem: Problem) -> Plan:
    """The keys are split where the plain grid, a program for each row tile and head, leaves half the chip idle.

    Above that, what is left to gain is about what a second launch and the partials cost (bench/few_queries.py).
    Partials take 4 splits B Hq Nq (Dv + 1 + S) bytes (S = 1 where mass is not wanted). Splits are so many that at most
    2 programs for each multiprocessor run, of at most 128 rows each: whatever the lengths, that is no more than
    1024 (Dv + 1 + S) bytes for each multiprocessor, 18 MB on an H100 at Dv 128 with one source.
    """
    batch, heads, rows, _ = problem.query.shape
    plain = batch * heads * -(-rows // _tile(problem, "fwd").block_m)
    multiprocessors = _multiprocessors(problem)
    if 2 * plain > multiprocessors:
        return Plan(0, f"plain, its {plain} programs occupy more than half of {multiprocessors} multiprocessors")
    packed = problem.group * rows
    tiles = -(-packed // _few_tile(problem, "split").block_m)
    programs = batch * problem.sources[0].key.shape[1] * tiles
    keys = visible_keys(problem)
    found = split_count(programs, keys, packed, multiprocessors)
    if found == 1:
        return Plan(0, f"plain, {keys} visible keys are too few to be split")
    return Plan(
        found,
        f"keys split {found} ways, {programs * found} programs, where the plain kernel's {plain} would leave "
        f"{multiprocessors - plain} of {multiprocessors} multiprocessors idle",
    )


def plan_backward(problem: Problem, need_pairs: bool) -> Plan:
    """Query-stationary where the packed rows fit one tile, keys are long, and no float mask wants its gradient.

    Partials take 4 splits B Hq Nq (D + 2 S + 2) bytes at most, and nothing but row sums with one split; the splits
    are bounded as in `plan_forward`. Also where the plain grid fills the chip: K and V are read once instead of twice.
    need_pairs: the gradient of some source's (i, j) mask is asked for.
    """
    reason = few_refuses(problem, need_pairs)
    if reason is not None:
        return Plan(0, f"plain, {reason}")
    packed, keys = problem.group * problem.query.shape[2], visible_keys(problem)
    if keys < long_for(packed):
        return Plan(0, f"plain, {keys} visible keys are not long for {packed} rows")
    programs = problem.query.shape[0] * problem.sources[0].key.shape[1]
    found = split_count(programs, keys, packed, _multiprocessors(problem))
    told = f"query-stationary, {packed} rows in a tile, keys split {found} ways, {programs * found} programs"
    return Plan(found, told)


def few_refuses(problem: Problem, need_pairs: bool) -> str | None:
    """Why the query-stationary backward cannot serve the problem at all; None if it can."""
    packed, most = problem.group * problem.query.shape[2], _few_tile(problem, "few").block_m
    if packed > most:
        return f"{packed} rows (queries times query heads per key head) are more than a tile's {most}"
    if need_pairs:
        return "the gradient of a float mask needs delta before the keys are read"
    return None


def plan_passes(problem: Problem, needs: Sequence[bool], wanted: bool | None = None) -> tuple[bool, str]:
    """Whether the plain backward adds dq up beside dk and dv in one pass, and why.

    Two passes give the same bits every time and stay wherever `tuning.ONE_PASS` does not name the architecture and head
    dim. One pass takes 5 products a tile instead of 7 and 4 B Hq Nq D bytes for the sum.
    needs: as in `backward`. wanted: in the place of what `tuning` says.
    """
    from ..triton_kernels.tuning import one_pass

    if wanted is None:
        query = problem.query
        dim = max(query.shape[3], problem.value_dim)
        wanted = one_pass(_kind(problem), query.dtype, dim, _heavy(problem))
    if not wanted:
        return False, "two passes, on this GPU one has not been seen to be faster"
    reason = one_pass_refuses(problem, needs)
    return (True, "one pass, dq is added up by atomics") if reason is None else (False, f"two passes, {reason}")


def one_pass_refuses(problem: Problem, needs: Sequence[bool]) -> str | None:
    """Why dq cannot be added up beside dk and dv, or should not; None if it can."""
    need_query, need_slopes, need_sinks, need_sources = _told_apart(problem, needs)
    if torch.are_deterministic_algorithms_enabled():
        return "torch asks for deterministic algorithms"
    if need_slopes or need_sinks or any(need[2] or need[3] for need in need_sources):
        return "the gradients of slopes, sinks, biases and float masks need sums over whole rows"
    if not need_query or not all(need[0] or need[1] for need in need_sources):
        return "not both the query's and every source's gradients are asked for"
    return None


def _told_apart(problem: Problem, needs: Sequence[bool]) -> tuple[bool, bool, bool, list[Sequence[bool]]]:
    """query, slopes, sinks, and (key, value, mask, bias) of each source, of a list aligned with Problem.tensors()."""
    need_query, need_slopes, need_sinks, _, *rest = needs
    width = len(BoundSource.TENSORS)
    return need_query, need_slopes, need_sinks, [
        rest[s * width : s * width + 4] for s in range(len(problem.sources))
    ]  # fmt: skip


def _every_need(problem: Problem) -> list[bool]:
    """`needs` where every gradient is asked for, but of masks only that of those that are trained."""
    masks = [source.attn_mask for source in problem.sources]
    return [
        x is not None and x.is_floating_point() and (x.requires_grad or all(x is not mask for mask in masks))
        for x in problem.tensors()
    ]


def _trains_a_mask(problem: Problem) -> bool:
    return any(source.attn_mask is not None and source.attn_mask.requires_grad for source in problem.sources)


def forward(problem: Problem, *, splits: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, Hq, Nq, Dv), lse (B, Hq, Nq) float32 and mass (B, Hq, Nq, S) float32, or (0,) if not wanted.

    splits: 0 takes the plain kernel, more splits the keys so many ways; None leaves it to `plan_forward`.
    """
    import triton

    from ..triton_kernels.attn_fwd import attn_fwd

    query = problem.query
    batch, heads, rows, _ = query.shape
    out, lse, mass = empty_results(problem)
    if lse.numel() == 0:
        return out, lse, mass
    splits = plan_forward(problem).splits if splits is None else splits
    if splits:
        _forward_split(problem, splits, out, lse, mass)
        return out, lse, mass
    t = _tile(problem, "fwd")
    tiles = -(-rows // t.block_m)
    sinks = problem.sinks
    described = _described(problem)

    def launch() -> None:
        if described and not _interpreted():
            # Each program writes its descriptors to memory that Triton asks its caller for.
            triton.set_allocator(_scratch)
        attn_fwd[(tiles * batch * heads,)](
            _strided(query), _strided(out), lse, mass if problem.want_mass else None,
            None if sinks is None else sinks.contiguous(), tuple(_source(s) for s in problem.sources),
            _shared(problem), tiles, **_dims(problem), BLOCK_M=t.block_m, BLOCK_N=t.block_n,
            SOURCES=len(problem.sources), PRECISION=_precision(query), DESCRIBED=described, num_warps=t.num_warps,
            num_stages=t.num_stages,
        )  # fmt: skip

    with on_device_of(query):
        if described:
            copy_context().run(launch)  # whoever else uses Triton keeps the allocator they have set
        else:
            launch()
    return out, lse, mass


def _forward_split(problem: Problem, splits: int, out: Tensor, lse: Tensor, mass: Tensor) -> None:
    """Fill out, lse and mass by the kernels of attn_fwd_split.py."""
    from ..triton_kernels.attn_fwd_split import attn_fwd_combine, attn_fwd_split

    query, sinks, dims = problem.query, problem.sinks, _dims(problem)
    batch, key_heads = query.shape[0], problem.sources[0].key.shape[1]
    sources = len(problem.sources)
    t, merge = _few_tile(problem, "split"), _merge_tile(problem, problem.value_dim)
    tiles = -(-problem.group * query.shape[2] // t.block_m)
    all_rows = lse.numel()
    partial = lse.new_empty((splits, *out.shape))
    maxima = lse.new_empty((splits, *lse.shape))
    sums = lse.new_empty((splits, *lse.shape, sources if problem.want_mass else 1))
    shared = _shared(problem)
    with on_device_of(query):
        attn_fwd_split[(tiles * splits * batch * key_heads,)](
            _strided(query), partial, maxima, sums, tuple(_source(s) for s in problem.sources), shared, splits, tiles,
            all_rows, **dims, BLOCK_M=t.block_m, BLOCK_N=t.block_n, SOURCES=sources, MASS=problem.want_mass,
            PRECISION=_precision(query), num_warps=t.num_warps, num_stages=t.num_stages,
        )  # fmt: skip
        attn_fwd_combine[(-(-all_rows // merge.block_r),)](
            partial, maxima, sums, None if sinks is None else sinks.contiguous(), _strided(out), lse,
            mass if problem.want_mass else None, shared, splits, all_rows, DV=dims["DV"], DV_PAD=dims["DV_PAD"],
            SPLITS_PAD=1 << (splits - 1).bit_length(), BLOCK_R=merge.block_r, CHUNK=merge.chunk, SOURCES=sources,
            num_warps=merge.num_warps,
        )  # fmt: skip


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
    one_pass: bool | None = None,
) -> Gradients:
    """The gradients that `needs` (aligned with Problem.tensors()) asks for.

    splits: 0 takes the plain kernels, more splits the keys so many ways wherever `few_refuses` has no objection; None
    leaves it to `plan_backward`.
    one_pass: what the plain kernels do wherever `one_pass_refuses` has no objection; None leaves it to `plan_passes`.
    """
    need_query, need_slopes, need_sinks, need_sources = _told_apart(problem, needs)
    grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
    lse = lse.contiguous()  # the kernels count its rows; whoever kept it may have laid it out anew
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    grad_mass = None if grad_mass is None else grad_mass.to(torch.float32).contiguous()
    delta = _delta(problem, out, lse, mass.contiguous(), grad_out, grad_lse, grad_mass)

    # Where dz is summed over a whole row, the rounding of a 16-bit `out` inside delta no longer averages out.
    exact = need_slopes or need_sinks or any(need[2] or need[3] for need in need_sources)
    query, sums, far_sums, slopes, dq_sum = None, None, None, None, None
    columns: list[tuple[Tensor | None, Tensor | None]] | None = None
    need_any_pairs = any(need[2] for need in need_sources)
    if splits is None:
        splits = plan_backward(problem, need_any_pairs).splits
    elif splits and few_refuses(problem, need_any_pairs) is not None:
        splits = 0
    if splits:
        need_columns = [(need[0], need[1]) for need in need_sources]
        query, columns, sums, far_sums = _few(
            problem, splits, lse, delta, grad_out, grad_mass, need_query, need_columns, exact, need_slopes
        )
    elif plan_passes(problem, needs, one_pass)[0]:
        batch, heads, rows, dim = problem.query.shape
        block_m = _tile(problem, "dkdv1").block_m  # rows past the last are added too, as zeros
        dq_sum = lse.new_zeros(batch, heads, -(-rows // block_m) * block_m, dim)
    elif need_query or exact:
        query, sums, far_sums = _dq(problem, lse, delta, grad_out, grad_mass, exact, need_slopes)
    if sums is not None:
        delta, error = exact_delta(lse, delta, grad_lse, sums)
        sums = sums[..., 0] - error[..., None] * sums[..., 1]
        if far_sums is not None:
            slopes = (error * far_sums[..., 1] - far_sums[..., 0]).sum(-1)
    sources: list[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]] = []
    for s, (need_key, need_value, need_pairs, need_this_bias) in enumerate(need_sources):
        key, value, pairs = None, None, None
        if columns is not None:
            key, value = columns[s]
        elif need_key or need_value or need_pairs:
            key, value, pairs = _dkdv(problem, s, lse, delta, grad_out, grad_mass, need_pairs, dq_sum)
        bias = None
        if need_this_bias:
            assert sums is not None
            bias = sums[..., s].sum(-1)
        sources.append((key if need_key else None, value if need_value else None, pairs, bias))
    if dq_sum is not None:
        query = empty_rows(problem.query)
        torch.mul(dq_sum[:, :, : query.shape[2]], problem.scale, out=query)
    return Gradients(
        query if need_query else None,
        slopes,
        sinks_gradient(problem, lse, delta) if need_sinks else None,
        sources,
    )


def _delta(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
) -> Tensor:
    """(B, Hq, Nq) float32: the part of delta that all sources share."""
    from ..triton_kernels.attn_bwd import attn_bwd_delta

    delta = torch.empty_like(lse)
    if delta.numel() == 0:
        return delta
    batch, heads, rows = lse.shape
    dims = _dims(problem)
    block = 32 if _interpreted() else 64
    tiles = -(-rows // block)
    with on_device_of(lse):
        attn_bwd_delta[(tiles * batch * heads,)](
            _strided(out), _strided(grad_out), lse, grad_lse, None if grad_mass is None else mass, grad_mass, delta,
            heads, rows, tiles, DV=dims["DV"], DV_PAD=dims["DV_PAD"], BLOCK_M=block, SOURCES=len(problem.sources),
        )  # fmt: skip
    return delta


def _dq(
    problem: Problem,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    grad_mass: Tensor | None,
    need_sums: bool,
    need_far_sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad_query, and (dz, p) summed over columns: (B, Hq, Nq, S, 2), and by distance (B, Hq, Nq, 2)."""
    from ..triton_kernels.attn_bwd import attn_bwd_dq

    query = problem.query
    batch, heads, rows, _ = query.shape
    grad_query = empty_rows(query)
    sums = lse.new_empty((*lse.shape, len(problem.sources), 2)) if need_sums else None
    far_sums = lse.new_empty((*lse.shape, 2)) if need_far_sums else None
    if lse.numel() == 0:
        return grad_query, sums, far_sums
    t = _tile(problem, "dq")
    tiles = -(-rows // t.block_m)
    with on_device_of(query):
        attn_bwd_dq[(tiles * batch * heads,)](
            _strided(query), _strided(grad_out), lse, delta, grad_mass, _strided(grad_query), sums, far_sums,
            tuple(_source(s) for s in problem.sources), _shared(problem), problem.scale, tiles, **_dims(problem),
            BLOCK_M=t.block_m, BLOCK_N=t.block_n, SOURCES=len(problem.sources), PRECISION=_precision(query),
            num_warps=t.num_warps, num_stages=t.num_stages,
        )  # fmt: skip
    return grad_query, sums, far_sums


def _dkdv(
    problem: Problem,
    s: int,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    grad_mass: Tensor | None,
    need_pairs: bool,
    dq_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of source s: key, value and, if asked for, its (i, j) mask.

    dq_sum (B, Hq, Nq up to a multiple of the tile's rows, D) float32: unless None, the source's part of the query's
    gradient is added to it, not scaled.
    """
    from ..triton_kernels.attn_bwd import attn_bwd_dkdv

    source, query = problem.sources[s], problem.query
    key, value, mask = source.key, source.value, source.attn_mask
    grad_key, grad_value = empty_rows(key), empty_rows(value)
    grad_pairs, sum_i, sum_j, atomic = None, False, False, False
    if need_pairs:
        assert mask is not None
        full = (*query.shape[:3], key.shape[2])
        if torch.are_deterministic_algorithms_enabled():
            grad_pairs = torch.zeros(full, dtype=torch.float32, device=query.device)
        else:
            grad_pairs = torch.zeros(mask.shape, dtype=torch.float32, device=query.device)
            lost = [m != f for m, f in zip(mask.shape, full)]
            sum_i, sum_j, atomic = lost[2], lost[3], any(lost)
    batch, key_heads, columns, _ = key.shape
    if batch * key_heads * columns > 0:
        t = _tile(problem, "dkdv" if dq_sum is None else "dkdv1")
        tiles = -(-columns // t.block_n)
        with on_device_of(query):
            attn_bwd_dkdv[(tiles * batch * key_heads,)](
                _strided(query), _strided(grad_out), lse, delta, grad_mass, _strided(grad_key), _strided(grad_value),
                None if grad_pairs is None else _pairs(grad_pairs), None if dq_sum is None else _strided(dq_sum),
                _source(source), _shared(problem), problem.scale, tiles, s, **_dims(problem), BLOCK_M=t.block_m,
                BLOCK_N=t.block_n, SOURCES=len(problem.sources), SUM_I=sum_i, SUM_J=sum_j, ATOMIC=atomic,
                PRECISION=_precision(query), num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    if grad_pairs is None or mask is None:
        return grad_key, grad_value, None
    return grad_key, grad_value, grad_pairs.sum_to_size(mask.shape).to(mask.dtype)


def _few(
    problem: Problem,
    splits: int,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    grad_mass: Tensor | None,
    need_query: bool,
    need_columns: Sequence[tuple[bool, bool]],
    need_sums: bool,
    need_far_sums: bool,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]], Tensor | None, Tensor | None]:
    """grad_query, (grad_key, grad_value) of each source, and row sums as `_dq` gives them; None where not needed."""
    from ..triton_kernels.attn_bwd_few import attn_bwd_few, attn_bwd_few_reduce

    query, dims = problem.query, _dims(problem)
    batch, heads, rows, dim = query.shape
    key_heads = problem.sources[0].key.shape[1]
    grad_query = empty_rows(query) if need_query else None
    columns = [
        (empty_rows(source.key) if need_key else None, empty_rows(source.value) if need_value else None)
        for source, (need_key, need_value) in zip(problem.sources, need_columns)
    ]
    if lse.numel() == 0:  # nothing is launched
        for x in (x for pair in columns for x in pair if x is not None):
            x.zero_()
    sums = lse.new_empty((splits, *lse.shape, len(problem.sources), 2)) if need_sums else None
    far_sums = lse.new_empty((splits, *lse.shape, 2)) if need_far_sums else None
    partial = lse.new_empty((splits, *query.shape)) if need_query and splits > 1 else None
    all_rows = lse.numel()
    if all_rows > 0:
        t, merge = _few_tile(problem, "few"), _merge_tile(problem, dim)
        flat = [x if x is None else _strided(x) for pair in columns for x in pair]
        with on_device_of(query):
            attn_bwd_few[(splits * batch * key_heads,)](
                _strided(query), _strided(grad_out), lse, delta, grad_mass,
                None if grad_query is None or partial is not None else _strided(grad_query), partial, tuple(flat),
                sums, far_sums, tuple(_source(s) for s in problem.sources), _shared(problem), problem.scale, splits,
                all_rows, **dims, BLOCK_M=t.block_m, BLOCK_N=t.block_n, SOURCES=len(problem.sources),
                PRECISION=_precision(query), num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
            if grad_query is not None and partial is not None:
                attn_bwd_few_reduce[(-(-all_rows // merge.block_r),)](
                    partial, _strided(grad_query), heads, rows, problem.scale, splits, all_rows, D=dims["D"],
                    D_PAD=dims["D_PAD"], BLOCK_R=merge.block_r, CHUNK=merge.chunk, num_warps=merge.num_warps,
                )  # fmt: skip
    return (
        grad_query,
        columns,
        None if sums is None else sums.sum(0),
        None if far_sums is None else far_sums.sum(0),
    )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def _device_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _multiprocessors(problem: Problem) -> int:
    from ..triton_kernels.tuning import INTERPRETER, INTERPRETER_MULTIPROCESSORS

    if _kind(problem) == INTERPRETER:
        return INTERPRETER_MULTIPROCESSORS
    return _device_multiprocessors(problem.query.device)


def _kind(problem: Problem) -> int:
    """The architecture as `tuning` names it."""
    from ..triton_kernels.tuning import INTERPRETER

    device = problem.query.device
    return _arch(device) if device.type == "cuda" and not _interpreted() else INTERPRETER


def _heavy(problem: Problem) -> bool:
    masks = any(source.attn_mask is not None for source in problem.sources)
    return masks or problem.dropout_p > 0 or problem.softcap > 0


def _tile(problem: Problem, pass_: str) -> Any:
    from ..triton_kernels.tuning import tile

    dim = max(problem.query.shape[3], problem.value_dim)
    return tile(_kind(problem), problem.query.dtype, dim, pass_, _heavy(problem))


def _few_tile(problem: Problem, pass_: str) -> Any:
    from ..triton_kernels.tuning import few_tile

    query = problem.query
    dim, rows = max(query.shape[3], problem.value_dim), problem.group * query.shape[2]
    return few_tile(_kind(problem), query.dtype, dim, pass_, rows, _heavy(problem))


def _merge_tile(problem: Problem, dim: int) -> Any:
    from ..triton_kernels.tuning import merge_tile

    return merge_tile(_kind(problem), dim)


def _described(problem: Problem) -> bool:
    """Whether the forward may read full tiles by descriptor: `tuning` says so, and every row begins at 16 bytes."""
    from ..triton_kernels.tuning import described

    if not described(_kind(problem), problem.query.dtype, problem.query.shape[3], problem.value_dim, _heavy(problem)):
        return False
    unit = 16 // problem.query.element_size()
    rows = [x for source in problem.sources for x in (source.key, source.value)]
    return all(x.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in x.stride()[:3]) for x in rows)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _dims(problem: Problem) -> dict[str, int]:
    from ..triton_kernels.tuning import padded

    dim, value_dim = problem.query.shape[3], problem.value_dim
    return {"D": dim, "DV": value_dim, "D_PAD": padded(dim), "DV_PAD": padded(value_dim)}


def _precision(query: Tensor) -> str:
    """How `tile.dot` multiplies; 16-bit inputs ask only in the interpreter."""
    if query.dtype == torch.bfloat16 and _interpreted():
        return "widened"
    if query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def _strided(x: Tensor) -> Any:
    return _structs().Strided(x, x.stride(0), x.stride(1), x.stride(2))


def _pairs(mask: Tensor) -> Any:
    """A 4-D mask that broadcasts: stride 0 along every size of 1."""
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride())]
    return _structs().Strided(mask.view(torch.uint8) if mask.dtype == torch.bool else mask, *strides)


def _shared(problem: Problem) -> Any:
    query, slopes, softcap, p = problem.query, problem.alibi_slopes, problem.softcap, problem.dropout_p
    natural = query.dtype == torch.float32
    units = 1.0 if natural else math.log2(math.e)
    return _structs().Shared(
        1 if natural else None,
        problem.scale * units,
        problem.scale / softcap if softcap else None,
        softcap * units if softcap else None,
        slopes,
        None if slopes is None else slopes.stride(0),
        None if slopes is None else slopes.stride(1),
        problem.seed if p > 0 else None,
        int(p * 2.0**32),
        1.0 / (1.0 - p),
        query.shape[1],
        query.shape[2],
        problem.group,
        1 if problem.scale > 0 else None,
    )


def _source(source: BoundSource) -> Any:
    left = None if source.window_left == UNBOUNDED else min(source.window_left, _WIDEST)
    right = None if source.window_right == UNBOUNDED else min(source.window_right, _WIDEST)
    bias, keys, present = source.bias, source.key_mask, source.present
    return _structs().Source(
        _strided(source.key),
        _strided(source.value),
        source.key.shape[2],
        None if source.lengths is None else source.lengths.to(torch.int32).contiguous(),
        None if present is None else present.contiguous().view(torch.uint8),
        None if keys is None else keys.view(torch.uint8),
        None if keys is None else keys.stride(0),
        None if keys is None else keys.stride(1),
        None if source.attn_mask is None else _pairs(source.attn_mask),
        bias,
        None if bias is None else bias.stride(0),
        None if bias is None else bias.stride(1),
        source.offset,
        None if source.offsets is None else source.offsets.to(torch.int32).contiguous(),
        left,
        0 if source.causal else right,
        source.column,
    )
