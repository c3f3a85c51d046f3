"""Context parallelism: one attention whose rows and columns are spread over the ranks of a process group.

    forward    each rank keeps its queries; keys and values go round the ring, and what each shard gives is merged:
               lse = logaddexp_s lse_s;   out = sum_s exp(lse_s - lse) out_s
    backward   with the merged out and lse, a backend's backward gives each shard's exact share: dq stays, and the sums
               of dk and dv travel with the keys they belong to until they are home

Ring Attention: Liu et al. 2023 (arXiv 2310.01889). A rank holds two shards of keys and values at any time, whatever the
number of ranks; sending one overlaps computing with the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import dispatch
from .functional import _autocast
from .problem import AuxOutput, AuxRequest, Problem, Source, bind

NEEDS = [True, False, False, False, True, True, False, False, False, False, False, False]  # query, key, value
NOTHING = float("-inf")


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    return_aux: AuxRequest | None = None,
    backend: str | None = None,
) -> Any:
    """`attention` over a sequence cut into shards, rank 0 of `group` holding the first; a collective call.

    Args:
        query: (B, Hq, Nq, D), this rank's rows. key, value: (B, Hkv, Ns, D) and (B, Hkv, Ns, Dv), its columns. Lengths
            may differ between ranks, 0 included; batch, heads, head dims and dtype may not.
        group: a torch.distributed process group; None takes the default one.
        key_mask: (B, Ns) bool, True = attend, for this rank's columns.
        is_causal: row i of the whole sequence sees columns j <= i of the whole sequence. Later ranks then have more to
            do; giving each rank an early and a late part is left to the caller.
        return_aux: AuxRequest(lse=True) also returns this rank's rows of the lse. source_mass is not served.
        others: as in `attention`.

    Returns:
        out (B, Hq, Nq, Dv), this rank's rows of what one process would compute; differentiable, once.

    Raises:
        ValueError, TypeError: a bad argument. RuntimeError: torch.distributed is not initialised, or no backend with
        a backward of its own serves the call.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("context_parallel_attention needs torch.distributed: call init_process_group first")
    if return_aux is not None and return_aux.source_mass:
        raise ValueError("return_aux: source_mass is not served by context_parallel_attention, only lse")
    query, (source,) = _autocast(query, [Source(key, value, key_mask)])
    problem = bind(
        query, [source], scale=scale, enable_gqa=enable_gqa, softcap=softcap, return_aux=return_aux, is_single=True
    )
    bound = problem.sources[0]
    if key_mask is not None and bound.key_mask is None:
        raise ValueError(f"key_mask must be bool of shape (B, Ns), got {tuple(key_mask.shape)} {key_mask.dtype}")
    ring = Ring(group, problem, is_causal, backend)
    out, lse = RingAttention.apply(ring, problem.query, bound.key, bound.value, bound.key_mask)
    return out if return_aux is None else (out, AuxOutput(lse if return_aux.lse else None, None))


class Ring:
    """What the ranks agree on, and how a shard passes from one to the next."""

    def __init__(self, group: Any, problem: Problem, is_causal: bool, backend: str | None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.is_causal = is_causal
        self.backend = backend
        self.scale, self.softcap = problem.scale, problem.softcap
        bound = problem.sources[0]
        batch, heads, rows, dim = problem.query.shape
        mine = [rows, bound.key.shape[2], int(bound.key_mask is not None)]
        same = [batch, heads, bound.key.shape[1], dim, bound.value.shape[3]]
        table = torch.empty(self.size * 8, dtype=torch.int64, device=problem.query.device)
        dist.all_gather_into_tensor(table, torch.tensor(mine + same, device=table.device), group=group)
        lengths = table.view(self.size, 8).tolist()
        for rank, row in enumerate(lengths):
            if row[3:] != same:
                raise ValueError(
                    f"batch, heads, key heads, head dim and value dim must be the same on every rank, "
                    f"got {same} on rank {self.rank} and {row[3:]} on rank {rank}"
                )
        self.columns = [row[1] for row in lengths]
        self.is_masked = any(row[2] for row in lengths)
        self.row_start = sum(row[0] for row in lengths[: self.rank])

    def shard(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, owner: int) -> Problem | None:
        """This rank's queries over the shard of `owner`; None where they see none of it."""
        rows, columns = query.shape[2], key.shape[2]
        if rows == 0 or columns == 0:
            return None
        source = Source(key, value, mask)
        problem = bind(query, [source], scale=self.scale, softcap=self.softcap or None, enable_gqa=True)
        if self.is_causal:
            offset = self.row_start - sum(self.columns[:owner])
            if offset + rows <= 0:
                return None
            if offset < columns - 1:
                problem.sources[0].causal, problem.sources[0].offset = True, offset
        return problem

    def module(self, problem: Problem) -> Any:
        name = dispatch.choose(problem, self.backend)
        if name == "reference":
            reasons = "; ".join(str(r) for n, r in dispatch.reasons(problem).items() if n != name)
            raise RuntimeError(f"context_parallel_attention needs a backend with a backward of its own: {reasons}")
        return dispatch.load(name)

    def pass_on(self, tensors: list[Tensor], owner: int) -> tuple[list[Tensor], list[Any]]:
        """Send shards to the next rank; the previous one sends those of `owner`, here once the works are done."""
        if self.size == 1:
            return tensors, []
        here = [x.contiguous() for x in tensors]
        come = [x.new_empty((*x.shape[:2], self.columns[owner], *x.shape[3:])) for x in here]
        target = dist.get_global_rank(self._group(), (self.rank + 1) % self.size)
        origin = dist.get_global_rank(self._group(), (self.rank - 1) % self.size)
        operations = [dist.P2POp(dist.isend, x, target, self.group) for x in here if x.numel()]
        operations += [dist.P2POp(dist.irecv, x, origin, self.group) for x in come if x.numel()]
        return come, dist.batch_isend_irecv(operations) if operations else []

    def _group(self) -> Any:
        return dist.group.WORLD if self.group is None else self.group


class RingAttention(torch.autograd.Function):
    """(ring, query, key, value, key_mask) -> out, lse."""

    @staticmethod
    def forward(
        ctx: Any, ring: Ring, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = query.new_zeros((*query.shape[:3], value.shape[3]), dtype=wide)
        lse = query.new_full(query.shape[:3], NOTHING, dtype=wide)
        travelling = _travelling(ring, key, value, key_mask)
        for step in range(ring.size):
            owner = (ring.rank - step) % ring.size
            is_last = step == ring.size - 1
            come, works = (travelling, []) if is_last else ring.pass_on(travelling, (owner - 1) % ring.size)
            problem = ring.shard(query, *_unpack(travelling), owner)
            if problem is not None:
                own_out, own_lse, _ = ring.module(problem).forward(problem)
                out, lse = _merge(out, lse, own_out.to(wide), own_lse)
            for work in works:
                work.wait()
            travelling = come
        ctx.ring = ring
        rounded = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, key_mask, rounded, lse)
        ctx.set_materialize_grads(False)
        return rounded, lse

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        ring: Ring = ctx.ring
        query, key, value, key_mask, out, lse = ctx.saved_tensors
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_query = torch.zeros_like(query, dtype=wide)
        travelling = _travelling(ring, key, value, key_mask)
        sums = [torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)]
        for step in range(ring.size):
            owner = (ring.rank - step) % ring.size
            following = (owner - 1) % ring.size
            is_last = step == ring.size - 1
            come, works = (travelling, []) if is_last else ring.pass_on(travelling, following)
            problem = ring.shard(query, *_unpack(travelling), owner)
            if problem is not None:
                # p = exp(z - lse) with the lse of all shards, and delta = dout . out - dlse of all of them too.
                gradients = ring.module(problem).backward(
                    problem, out, lse, lse.new_empty(0), grad_out, grad_lse, None, NEEDS
                )
                grad_query += gradients.query
                for total, grad in zip(sums, gradients.sources[0]):
                    total += grad
            for work in works:
                work.wait()
            travelling = come
            sums, works = ring.pass_on(sums, following)
            for work in works:
                work.wait()
        return None, grad_query.to(query.dtype), sums[0].to(key.dtype), sums[1].to(value.dtype), None


def _travelling(ring: Ring, key: Tensor, value: Tensor, key_mask: Tensor | None) -> list[Tensor]:
    """key, value and, if any rank has one, the mask as (B, 1, Ns) bytes."""
    if not ring.is_masked:
        return [key, value]
    if key_mask is None:
        key_mask = key.new_ones((key.shape[0], key.shape[2]), dtype=torch.bool)
    return [key, value, key_mask.to(torch.uint8)[:, None]]


def _unpack(travelling: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    return travelling[0], travelling[1], travelling[2][:, 0].bool() if len(travelling) > 2 else None


def _merge(out: Tensor, lse: Tensor, own_out: Tensor, own_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over different columns as one; a side that saw nothing weighs nothing."""
    merged = torch.logaddexp(lse, own_lse)
    base = merged.masked_fill(merged == NOTHING, 0.0)  # no -inf - -inf
    return out * torch.exp(lse - base)[..., None] + own_out * torch.exp(own_lse - base)[..., None], merged
