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
from .rows import empty_results, empty_rows, exact_delta, on_device_of, sinks_gradient

# Wider than any sequence, and far from where int32 sums of positions would wrap.
_WIDEST = 2**29


def available() -> str | None:
    """Why the backend cannot run on this machine at all; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "there is no GPU here, and TRITON_INTERPRET=1 is not set"
    return None


def rejects(problem: Problem) -> str | None:
    """Why this problem is not served; None if it is."""
    missing = available()
    if missing is not None:
        return missing
    if problem.query.dtype == torch.float64:
        return "the Triton kernels compute in float32: float64 is not served"
    if problem.query.device.type == "cpu" and not _interpreted():
        return "the tensors are on the CPU, and TRITON_INTERPRET=1 is not set"
    return None


def describe(problem: Problem) -> str:
    """The tiles a call would use, for `explain`."""
    parts = []
    for pass_ in ("fwd", "dq", "dkdv"):
        t = _tile(problem, pass_)
        parts.append(f"{pass_} {t.block_m}x{t.block_n}, {t.num_warps} warps, {t.num_stages} stages")
    return "tiles " + "; ".join(parts)


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, Hq, Nq, Dv), lse (B, Hq, Nq) float32 and mass (B, Hq, Nq, S) float32, or (0,) if not wanted."""
    import triton

    from ..triton_kernels.attn_fwd import attn_fwd

    query = problem.query
    batch, heads, rows, _ = query.shape
    out, lse, mass = empty_results(problem)
    if lse.numel() == 0:
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


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients that `needs` (aligned with Problem.tensors()) asks for."""
    need_query, need_slopes, need_sinks, _, *rest = needs
    width = len(BoundSource.TENSORS)
    need_sources = [rest[s * width : s * width + 4] for s in range(len(problem.sources))]
    grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    grad_mass = None if grad_mass is None else grad_mass.to(torch.float32).contiguous()
    delta = _delta(problem, out, lse, mass.contiguous(), grad_out, grad_lse, grad_mass)

    # Where dz is summed over a whole row, the rounding of a 16-bit `out` inside delta no longer averages out.
    exact = need_slopes or need_sinks or any(need[2] or need[3] for need in need_sources)
    query, sums, slopes = None, None, None
    if need_query or exact:
        query, sums, far_sums = _dq(problem, lse, delta, grad_out, grad_mass, exact, need_slopes)
        if sums is not None:
            delta, error = exact_delta(lse, delta, grad_lse, sums)
            sums = sums[..., 0] - error[..., None] * sums[..., 1]
            if far_sums is not None:
                slopes = (error * far_sums[..., 1] - far_sums[..., 0]).sum(-1)
    sources: list[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]] = []
    for s, (need_key, need_value, need_pairs, need_this_bias) in enumerate(need_sources):
        key, value, pairs = None, None, None
        if need_key or need_value or need_pairs:
            key, value, pairs = _dkdv(problem, s, lse, delta, grad_out, grad_mass, need_pairs)
        bias = None
        if need_this_bias:
            assert sums is not None
            bias = sums[..., s].sum(-1)
        sources.append((key if need_key else None, value if need_value else None, pairs, bias))
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of source s: key, value and, if asked for, its (i, j) mask."""
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
        t = _tile(problem, "dkdv")
        tiles = -(-columns // t.block_n)
        with on_device_of(query):
            attn_bwd_dkdv[(tiles * batch * key_heads,)](
                _strided(query), _strided(grad_out), lse, delta, grad_mass, _strided(grad_key), _strided(grad_value),
                None if grad_pairs is None else _pairs(grad_pairs), _source(source), _shared(problem), problem.scale,
                tiles, s, **_dims(problem), BLOCK_M=t.block_m, BLOCK_N=t.block_n, SOURCES=len(problem.sources),
                SUM_I=sum_i, SUM_J=sum_j, ATOMIC=atomic, PRECISION=_precision(query),
                num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    if grad_pairs is None or mask is None:
        return grad_key, grad_value, None
    return grad_key, grad_value, grad_pairs.sum_to_size(mask.shape).to(mask.dtype)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _tile(problem: Problem, pass_: str) -> Any:
    from ..triton_kernels.tuning import tile

    query = problem.query
    return tile(_kind(problem), query.dtype, max(query.shape[3], problem.value_dim), pass_, _heavy(problem))


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


def _kind(problem: Problem) -> int:
    """The architecture as `tuning` names it."""
    from ..triton_kernels.tuning import INTERPRETER

    device = problem.query.device
    return _arch(device) if device.type == "cuda" and not _interpreted() else INTERPRETER


def _heavy(problem: Problem) -> bool:
    masks = any(source.attn_mask is not None for source in problem.sources)
    return masks or problem.dropout_p > 0 or problem.softcap > 0


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
    from ..triton_kernels.tile import Strided

    return Strided(x, x.stride(0), x.stride(1), x.stride(2))


def _pairs(mask: Tensor) -> Any:
    """A 4-D mask that broadcasts: stride 0 along every size of 1."""
    from ..triton_kernels.tile import Strided

    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride())]
    return Strided(mask.view(torch.uint8) if mask.dtype == torch.bool else mask, *strides)


def _shared(problem: Problem) -> Any:
    from ..triton_kernels.tile import Shared

    query, slopes, softcap, p = problem.query, problem.alibi_slopes, problem.softcap, problem.dropout_p
    natural = query.dtype == torch.float32
    units = 1.0 if natural else math.log2(math.e)
    return Shared(
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
    from ..triton_kernels.tile import Source

    left = None if source.window_left == UNBOUNDED else min(source.window_left, _WIDEST)
    right = None if source.window_right == UNBOUNDED else min(source.window_right, _WIDEST)
    bias, keys, present = source.bias, source.key_mask, source.present
    return Source(
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
