"""The oracle: attention in plain einsum, written to be read.

Formula (rows i, columns j of source s, head h; DESIGN of the package in one place):

    z = scale q_i . k_j;  z = softcap tanh(z / softcap);  z += bias_s + attn_mask_ij - slope_h |i + offset - j|
    z = -inf where the key, the source or the pair (i, j) is masked
    p = softmax of z over all columns of all sources, a sink logit joining the denominator
    out_i = sum_s sum_j dropout(p) v_j;  lse_i = log sum exp z;  mass_is = sum_{j in s} p

Everything is torch operations, so autograd, double backward and forward-mode AD come from torch. Inputs in 16 bits
are multiplied as they are and summed in float32, and p is rounded to their dtype before it meets v: what a tensor core
does.
Softmax with a sink: Xiao et al. 2023 (arXiv 2309.17453); ALiBi: Press et al. 2022 (arXiv 2108.12409).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import UNBOUNDED, BoundSource, Problem

PHILOX_ROUNDS = 10
_LOW = 0xFFFFFFFF


def forward(problem: Problem, *, rounded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, Hq, Nq, Dv) in the query's dtype, lse (B, Hq, Nq) and mass (B, Hq, Nq, S), differentiable.

    rounded: also round z to the query's dtype, as plain 16-bit tensor code does: the yardstick of the error budget.
    """
    query = problem.query
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    seen = [visible(problem, source) for source in problem.sources]  # each (B, Hq, Nq, Ns) bool
    z = [logits(problem, s, m, rounded).to(wide) for s, m in zip(problem.sources, seen)]
    live = torch.stack([m.any(-1) for m in seen]).any(0)  # (B, Hq, Nq): the row sees a key at all

    columns = torch.cat(z, -1)
    if problem.sinks is not None:
        sink = problem.sinks.to(wide)[None, :, None, None].expand(*query.shape[:3], 1)
        columns = torch.cat([columns, sink], -1)
    # A row that sees nothing takes finite stand-ins, and is put to 0 (and -inf) at the end: no NaN on the way.
    columns = torch.where(live[..., None], columns, torch.zeros((), dtype=wide, device=query.device))
    if columns.shape[-1] == 0:
        lse = columns.sum(-1)
    else:
        lse = torch.logsumexp(columns, -1)
    p = [torch.where(m, torch.exp(s - lse[..., None]), 0.0) for s, m in zip(z, seen)]
    mass = torch.stack([x.sum(-1) for x in p], -1)

    out = torch.zeros((*query.shape[:3], problem.value_dim), dtype=wide, device=query.device)
    for source, weights, m in zip(problem.sources, p, seen):
        if problem.dropout_p > 0:
            kept = philox_keep(problem, source)
            # With p = 1 nothing is kept, and nothing is left to scale up.
            weights = torch.where(kept, weights / ((1.0 - problem.dropout_p) or 1.0), 0.0)
        value = blank(expand_heads(source.value, problem), m).to(wide)
        out = out + torch.einsum("bhij,bhjd->bhid", weights.to(query.dtype).to(wide), value)
    # The select keeps a gradient that arrives at a dead row, NaN or not, from the values.
    out = torch.where(live[..., None], out, 0.0)
    return out.to(query.dtype), torch.where(live, lse, float("-inf")), mass


def logits(problem: Problem, source: BoundSource, seen: Tensor, rounded: bool) -> Tensor:
    """z (B, Hq, Nq, Ns), -inf where not `seen`; what a masked key or a dead query row holds is never read."""
    query = problem.query
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    key = blank(expand_heads(source.key, problem), seen).to(wide)
    rows = torch.where(seen.any(-1)[..., None], query, torch.zeros((), dtype=query.dtype, device=query.device))
    z = problem.scale * torch.einsum("bhid,bhjd->bhij", rows.to(wide), key)
    if rounded:
        z = z.to(query.dtype).to(wide)
    if problem.softcap:
        z = problem.softcap * torch.tanh(z / problem.softcap)
    if source.bias is not None:
        z = z + source.bias[:, :, None, None]
    if source.attn_mask is not None and source.attn_mask.dtype != torch.bool:
        z = z + torch.where(seen, source.attn_mask.to(wide), 0.0)
    if problem.alibi_slopes is not None:
        distance = relative_position(problem, source).abs()
        z = z - problem.alibi_slopes[:, :, None, None] * distance.to(wide)
    return torch.where(seen, z, float("-inf"))


def visible(problem: Problem, source: BoundSource) -> Tensor:
    """(B, Hq, Nq, Ns) bool: which columns each row may see."""
    query, device = problem.query, problem.query.device
    columns = torch.arange(source.key.shape[2], device=device)
    seen = torch.ones((*query.shape[:3], source.key.shape[2]), dtype=torch.bool, device=device)
    if source.lengths is not None:
        seen = seen & (columns < source.lengths[:, None])[:, None, None]
    if source.key_mask is not None:
        seen = seen & source.key_mask[:, None, None]
    if source.present is not None:
        seen = seen & source.present[:, None, None, None]
    if source.attn_mask is not None:
        pairs = source.attn_mask
        seen = seen & (pairs if pairs.dtype == torch.bool else pairs != float("-inf"))
    ahead = relative_position(problem, source)
    if source.causal:
        seen = seen & (ahead <= 0)
    if source.window_left != UNBOUNDED:
        seen = seen & (ahead >= -source.window_left)
    if source.window_right != UNBOUNDED:
        seen = seen & (ahead <= source.window_right)
    return seen


def relative_position(problem: Problem, source: BoundSource) -> Tensor:
    """j - (i + offset), (B or 1, 1, Nq, Ns) int64."""
    device = problem.query.device
    rows = torch.arange(problem.query.shape[2], device=device)[:, None]
    columns = torch.arange(source.key.shape[2], device=device)
    if source.offsets is not None:
        rows = rows + source.offsets.to(torch.int64)[:, None, None, None]
    else:
        rows = (rows + source.offset)[None, None]
    return columns - rows


def expand_heads(x: Tensor, problem: Problem) -> Tensor:
    """(B, Hkv, N, D) -> (B, Hq, N, D): each key head serves `group` query heads."""
    return x if problem.group == 1 else x.repeat_interleave(problem.group, 1)


def blank(x: Tensor, seen: Tensor) -> Tensor:
    """x (B, H, Ns, D) with 0 in every row no query sees, so that 0 * NaN cannot arise from padding."""
    return torch.where(seen.any(-2)[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def philox_keep(problem: Problem, source: BoundSource) -> Tensor:
    """(B, Hq, Nq, Ns) bool: the dropout mask, True = kept.

    Philox-4x32-10 (Salmon et al., SC 2011) keyed by the seed, counter (column, i, h, b), first output word, where the
    column runs on over the sources; an entry is kept when the word is at least floor(p 2^32).
    """
    assert problem.seed is not None
    batch, heads, rows, _ = problem.query.shape
    device = problem.query.device
    shape = (batch, heads, rows, source.key.shape[2])
    columns = torch.arange(source.key.shape[2], device=device) + source.column
    counter = [
        columns.expand(shape),
        torch.arange(rows, device=device)[:, None].expand(shape),
        torch.arange(heads, device=device)[:, None, None].expand(shape),
        torch.arange(batch, device=device)[:, None, None, None].expand(shape),
    ]
    word = philox(problem.seed & _LOW, (problem.seed >> 32) & _LOW, counter)[0]
    return word >= int(problem.dropout_p * 2.0**32)


def philox(key0: Tensor, key1: Tensor, counter: list[Tensor]) -> list[Tensor]:
    """Philox-4x32-10 on int64 tensors that hold unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 = (key0 + 0x9E3779B9) & _LOW
        key1 = (key1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and low words of a * b; b in halves, so that no int64 product overflows."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    carried = upper + (lower >> 16)
    return carried >> 16, ((carried << 16) | (lower & 0xFFFF)) & _LOW
