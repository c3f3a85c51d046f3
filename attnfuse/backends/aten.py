"""The CPU backend: torch's own flash kernel once per source, merged by log-sum-exp.

    lse = logaddexp over s of (lse_s + bias_s);   out = sum_s exp(lse_s + bias_s - lse) out_s

The backward needs no second formula. torch's flash backward computes p = exp(z - lse) and dz = p (dout . v - delta)
with delta = dout . out, so with the merged out and lse it gives each source its own exact share. Where lse or mass
carry a gradient, delta_s differs from dout . out by a constant per row, which one more feature brings in: dout gains a
1, out that constant, v a 0.

Nothing is concatenated and no (Nq, Ns) matrix arises. Samples are grouped by how much of a source they see, so absent
and padded keys are never read: a source present in 2 of 8 samples costs 2.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import UNBOUNDED, BoundSource, Gradients, Problem, empty_output

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

All = slice(None)

# What one more kernel call costs, forward and backward, in multiply-adds the kernel does in that time (bench/notes.md).
CALL_COST = 4e6


def available() -> str | None:
    return None


def rejects(problem: Problem) -> str | None:
    """Why this problem cannot be served, or None."""
    if problem.query.device.type != "cpu":
        return f"aten runs on CPU tensors, the query is on {problem.query.device}"
    if problem.softcap:
        return "aten: torch's CPU flash kernel has no softcap"
    if problem.alibi_slopes is not None:
        return "aten: torch's CPU flash kernel has no ALiBi slopes"
    if problem.dropout_p > 0:
        return "aten: torch's CPU flash kernel has no dropout"
    for s, source in enumerate(problem.sources):
        if source.window_left != UNBOUNDED or source.window_right != UNBOUNDED:
            return f"aten: torch's CPU flash kernel has no window (sources[{s}])"
        if source.causal and (source.offset or source.offsets is not None):
            return f"aten: torch's CPU flash kernel is causal from the upper left only (sources[{s}])"
        mask = source.attn_mask
        if mask is not None and mask.requires_grad and torch.is_grad_enabled():
            return f"aten: torch's CPU flash kernel gives no gradient for a float mask (sources[{s}])"
    return None


def describe(problem: Problem) -> str:
    return f"torch's CPU flash kernel, {len(problem.sources)} source(s) merged by log-sum-exp"


class Piece:
    """A run of samples that see the same columns of a source, so that one kernel call serves them.

    samples: a slice of the batch, so that queries and leading keys are views (copying keys to gather scattered samples
    costs more than calling the kernel once a run); columns: how many leading keys, or an index (m,) of keys;
    mask: additive, broadcastable to (n, Hq, Nq, m), or None; dead: bool, broadcastable to (n, Hq, Nq), rows that see
    none of these columns; unseen: (n, Hkv or 1, m) bool, columns no row sees.
    """

    __slots__ = ("columns", "dead", "mask", "samples", "unseen")

    def __init__(
        self,
        samples: slice,
        columns: int | Tensor,
        mask: Tensor | None = None,
        dead: Tensor | None = None,
        unseen: Tensor | None = None,
    ) -> None:
        self.samples = samples
        self.columns = columns
        self.mask = mask
        self.dead = dead
        self.unseen = unseen

    def rows(self, x: Tensor) -> Tensor:
        """The piece's samples of x (B, ...), a view."""
        return x if self.samples == All else x[self.samples]

    def queries(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """The piece's rows of x (B, Hq, Nq, ...), `fill` where a row is dead."""
        x = self.rows(x)
        if self.dead is None:
            return x
        return x.masked_fill(self.dead if x.dim() == 3 else self.dead[..., None], fill)

    def keys(self, x: Tensor) -> Tensor:
        """The piece's columns of x (B, Hkv, Ns, D), 0 in columns no row sees."""
        x = self.rows(x)
        x = x.narrow(2, 0, self.columns) if isinstance(self.columns, int) else x.index_select(2, self.columns)
        return x if self.unseen is None else x.masked_fill(self.unseen[..., None], 0.0)

    def is_whole(self, x: Tensor) -> bool:
        """Whether the piece is every sample and every column of x (B, Hkv, Ns, D)."""
        return self.samples == All and isinstance(self.columns, int) and self.columns == x.shape[2]

    def add_keys(self, total: Tensor, grad: Tensor) -> None:
        """Put the gradient of `keys(x)` where it belongs in total, the zeroed gradient of x."""
        if isinstance(self.columns, int):
            part = total.narrow(2, 0, self.columns)
            part[self.samples] = grad
        else:
            # A piece of chosen columns is always one sample.
            total[self.samples].index_copy_(2, self.columns, grad)


def pieces_of(problem: Problem, source: BoundSource) -> list[Piece]:
    """The kernel calls that serve `source`; empty where no sample sees it."""
    batch, columns = problem.query.shape[0], source.key.shape[2]
    if problem.query.numel() == 0 or columns == 0:
        return []
    lengths = [columns] * batch if source.lengths is None else [min(x, columns) for x in source.lengths.tolist()]
    if source.causal:
        # What no row reaches is not read: 0 * NaN would be NaN.
        lengths = [min(n, problem.query.shape[2]) for n in lengths]
    if source.present is not None:
        lengths = [n if here else 0 for n, here in zip(lengths, source.present.tolist())]
    holes = _hole_samples(source, lengths)
    if source.attn_mask is None and _padding_is_cheaper(problem, source, lengths, holes):
        longest = max(lengths)
        seen = torch.arange(columns) < torch.tensor(lengths)[:, None]
        for sample, kept in holes.items():
            seen[sample] = False
            seen[sample, kept] = True
        _mask_piece(piece := Piece(All, longest), problem, source, seen[:, None, None, :longest])
        return [piece]
    pieces, start = [], 0
    for sample in range(1, batch + 1):
        if sample < batch and lengths[sample] == lengths[start] and not holes.keys() & {start, sample}:
            continue
        if lengths[start] > 0 and start not in holes:
            run = All if sample - start == batch else slice(start, sample)
            pieces.append(Piece(run, lengths[start]))
        start = sample
    for sample, kept in holes.items():
        here = slice(sample, sample + 1)
        if source.causal or source.attn_mask is not None:
            chosen = torch.zeros(columns, dtype=torch.bool)
            chosen[kept] = True
            _mask_piece(piece := Piece(here, columns), problem, source, chosen[None, None, None])
            pieces.append(piece)
        else:
            pieces.append(Piece(here, kept))
    if source.attn_mask is not None:
        for piece in pieces:
            if piece.mask is None:
                _mask_piece(piece, problem, source, None)
    return pieces


def _padding_is_cheaper(
    problem: Problem, source: BoundSource, lengths: list[int], holes: dict[int, Tensor]
) -> bool:
    """Whether one masked call over the whole batch beats a call for each run of samples of one length."""
    longest = max(lengths)
    runs = sum(a != b for a, b in pairwise(lengths)) + 1 + 2 * len(holes)
    if longest == 0 or runs == 1:
        return False
    _, heads, rows, dim = problem.query.shape
    needless = sum(longest - n for n in lengths) * heads * rows * (dim + source.value.shape[3])
    return needless < (runs - 1) * CALL_COST


def _hole_samples(source: BoundSource, lengths: list[int]) -> dict[int, Tensor]:
    """Samples whose key mask is no prefix, with the columns they keep; `lengths` takes the prefixes found."""
    holes: dict[int, Tensor] = {}
    if source.key_mask is None:
        return holes
    for sample, length in enumerate(lengths):
        if length == 0:
            continue
        kept = source.key_mask[sample, :length].nonzero()[:, 0]
        count = kept.numel()
        if count == 0 or int(kept[-1]) == count - 1:
            lengths[sample] = count
        else:
            holes[sample] = kept
    return holes


def _mask_piece(piece: Piece, problem: Problem, source: BoundSource, seen: Tensor | None) -> None:
    """Give `piece` its additive mask, from the source's attn_mask and `seen`, broadcastable to (n, Hq, Nq, m)."""
    count = piece.columns if isinstance(piece.columns, int) else piece.columns.numel()
    wide = torch.float64 if problem.query.dtype == torch.float64 else torch.float32
    additive = torch.zeros((), dtype=wide)
    if source.attn_mask is not None:
        pairs = source.attn_mask if source.attn_mask.shape[0] == 1 else piece.rows(source.attn_mask)
        pairs = pairs[..., :count] if pairs.shape[3] > 1 else pairs.expand(-1, -1, -1, count)
        if pairs.dtype == torch.bool:
            visible = pairs
        else:
            visible, additive = pairs != float("-inf"), pairs.to(wide)
        seen = visible if seen is None else visible & seen
    assert seen is not None
    piece.mask = additive.where(seen, torch.full((), float("-inf"), dtype=wide))
    if source.causal:
        # Row i sees a key if one is visible in columns 0 .. i; one row of `seen` stands for all where it broadcasts.
        rows = problem.query.shape[2]
        if seen.shape[2] == 1:
            last = torch.arange(rows).clamp(max=count - 1)
            alive = seen.cummax(-1).values[..., 0, :][..., last]
            reach = seen & (torch.arange(count) < rows)
        else:
            seen = seen.tril()
            alive, reach = seen.any(-1), seen
    else:
        alive, reach = seen.any(-1), seen
    piece.dead = None if bool(alive.all()) else ~alive
    columns = reach.any(2)  # (n or 1, Hq or 1, m): a column counts as seen if any query head of its group sees it
    if columns.shape[1] > 1:
        columns = columns.unflatten(1, (-1, problem.group)).any(2)
    piece.unseen = None if bool(columns.all()) else ~columns


def _is_plain(problem: Problem) -> bool:
    """One source that every sample sees whole: torch's kernel is the whole answer."""
    if len(problem.sources) != 1 or problem.sinks is not None:
        return False
    source = problem.sources[0]
    return (
        source.lengths is None
        and source.key_mask is None
        and source.present is None
        and source.attn_mask is None
        and source.bias is None
        and source.key.shape[2] > 0
        and (not source.causal or source.key.shape[2] <= problem.query.shape[2])
        and problem.query.numel() > 0
        and source.value.shape[3] == problem.query.shape[3]
    )


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """out in the query's dtype, lse float32 and mass (B, Hq, Nq, S), empty unless wanted."""
    query = problem.query
    if _is_plain(problem):
        source = problem.sources[0]
        out, lse = _flash(query, source.key, source.value, 0.0, source.causal, scale=problem.scale)
        return out, lse, torch.ones_like(lse)[..., None] if problem.want_mass else lse.new_empty(0)

    dtype = query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parts: list[list[tuple[Piece, Tensor]]] = []
    # (S, B, Hq, Nq), -inf where a row sees nothing of the source
    shares = torch.full((len(problem.sources), *query.shape[:3]), float("-inf"), dtype=wide)
    for s, source in enumerate(problem.sources):
        parts.append([])
        for piece in pieces_of(problem, source):
            out, lse = _attend(problem, source, piece)
            if source.bias is not None:
                lse = lse + piece.rows(source.bias)[..., None]
            if piece.dead is not None:
                lse = lse.masked_fill(piece.dead, float("-inf"))
            shares[s, piece.samples] = lse
            parts[s].append((piece, out))
    lse = shares[0] if len(problem.sources) == 1 else torch.logsumexp(shares, 0)
    dead = lse == float("-inf")
    if problem.sinks is not None:
        lse = torch.logaddexp(lse, problem.sinks.to(wide)[:, None]).masked_fill(dead, float("-inf"))
    # exp(share - lse) with the dead rows' -inf - -inf kept out
    weights = torch.exp(shares - lse.masked_fill(dead, 0.0))
    merged = _merge(problem, parts, weights, wide)
    mass = weights.permute(1, 2, 3, 0).contiguous() if problem.want_mass else lse.new_empty(0)
    return merged, lse, mass


def _attend(problem: Problem, source: BoundSource, piece: Piece) -> tuple[Tensor, Tensor]:
    """out (n, Hq, Nq, Dv) and lse (n, Hq, Nq) of one piece alone."""
    query, key, value = piece.queries(problem.query), piece.keys(source.key), piece.keys(source.value)
    dim, value_dim = query.shape[3], value.shape[3]
    if dim != value_dim:
        query, key, value = _pad(max(dim, value_dim), query, key, value)
    out, lse = _flash(query, key, value, 0.0, source.causal, attn_mask=piece.mask, scale=problem.scale)
    return out[..., :value_dim], lse


def _pad(dim: int, *tensors: Tensor) -> list[Tensor]:
    return [x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1])) for x in tensors]


def _merge(
    problem: Problem, parts: list[list[tuple[Piece, Tensor]]], weights: Tensor, wide: torch.dtype
) -> Tensor:
    """sum_s weights_s out_s, summed in `wide`, in the query's memory layout."""
    query = problem.query
    merged = None
    for s, part in enumerate(parts):
        for piece, out in part:
            term = out.to(wide) if out.dtype != wide else out
            share = piece.rows(weights[s])[..., None]
            if merged is None and piece.samples == All:
                merged = term.mul_(share) if problem.value_dim == query.shape[3] else term * share
                continue
            if merged is None:
                merged = empty_output(problem, wide).zero_()
            piece.rows(merged).addcmul_(term, share)
    if merged is None:
        return empty_output(problem).zero_()
    return merged.to(query.dtype)


def _wants_float32(dtype: torch.dtype) -> bool:
    """Whether the 16-bit backward is slower than a float32 one on this machine.

    Measured (bench/notes.md): without AVX512-BF16 or AMX torch's bfloat16 flash backward took 5 times its float32 one.
    """
    if dtype == torch.bfloat16:
        return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if dtype == torch.float16:
        return not torch.cpu._is_amx_fp16_supported()
    return False


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    needs: list[bool],
) -> Gradients:
    """Gradients of every differentiable tensor of the problem; `needs` is aligned with `problem.tensors()`."""
    query = problem.query
    if _is_plain(problem) and grad_lse is None and not _wants_float32(query.dtype):
        # mass is 1 whatever the inputs: its gradient moves nothing.
        source = problem.sources[0]
        grads = _flash_backward(
            grad_out, query, source.key, source.value, out, lse, 0.0, source.causal, scale=problem.scale
        )
        return Gradients(grads[0], None, None, [(grads[1], grads[2], None, None)])

    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    dead = lse == float("-inf")
    bias_needed = any(s.bias is not None and needs[7 + 8 * n] for n, s in enumerate(problem.sources))
    work = wide if bias_needed or _wants_float32(query.dtype) else query.dtype
    if bool(dead.any()):
        # What a row that sees nothing holds must not reach the keys: neither its query nor its gradient.
        grad_out = grad_out.masked_fill(dead[..., None], 0.0)
        query = query.masked_fill(dead[..., None], 0.0)
    # p = exp(z - inf) = 0 keeps such a row silent
    silent = lse.masked_fill(dead, float("inf"))
    constants = _row_constants(problem, mass, grad_lse, grad_mass, dead)  # delta_s - dout . out, or None
    needs_delta = bias_needed or (problem.sinks is not None and needs[2])
    if needs_delta and query.dtype != wide:
        # Summed over whole rows, the rounding of a 16-bit `out` inside delta no longer averages out.
        out, _, _ = forward(_widened(problem))
    dot = (grad_out.to(wide) * out.to(wide)).sum(-1) if needs_delta else None  # (B, Hq, Nq)

    grad_query: Tensor | None = None
    per_source: list[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]] = []
    for s, source in enumerate(problem.sources):
        constant = None if constants is None else constants[s]
        grad_key: Tensor | None = None
        grad_value: Tensor | None = None
        grad_bias = None if source.bias is None or not bias_needed else torch.zeros(query.shape[:2], dtype=wide)
        for piece in pieces_of(problem, source):
            dq, dk, dv = _piece_backward(
                problem, source, piece, query, out, silent, grad_out, constant, work, grad_bias, dot
            )
            if piece.is_whole(source.key):
                grad_key, grad_value = dk.to(query.dtype), dv.to(query.dtype)
            else:
                if grad_key is None or grad_value is None:
                    grad_key, grad_value = torch.zeros_like(source.key), torch.zeros_like(source.value)
                piece.add_keys(grad_key, dk.to(query.dtype))
                piece.add_keys(grad_value, dv.to(query.dtype))
            if grad_query is None and piece.samples == All:
                grad_query = dq.to(wide)
            else:
                if grad_query is None:
                    grad_query = torch.zeros_like(query, dtype=wide)
                piece.rows(grad_query).add_(dq)
        if grad_key is None:
            grad_key, grad_value = torch.zeros_like(source.key), torch.zeros_like(source.value)
        per_source.append((grad_key, grad_value, None, grad_bias))
    if grad_query is None:
        grad_query = torch.zeros_like(query)

    grad_sinks = None
    if problem.sinks is not None and needs[2]:
        assert dot is not None
        delta = dot if constants is None else dot + _common_constant(problem, mass, grad_lse, grad_mass, dead)
        p_sink = torch.exp(problem.sinks.to(wide)[:, None] - silent)
        grad_sinks = -(p_sink * delta).sum((0, 2))
    return Gradients(grad_query.to(query.dtype), None, grad_sinks, per_source)


def _widened(problem: Problem) -> Problem:
    """The same problem in float32."""
    tensors = [x.float() if x is not None and x.is_floating_point() else x for x in problem.tensors()]
    return Problem.rebuilt(tensors, problem.layout(), problem.scale, problem.softcap, problem.dropout_p, False)


def _common_constant(
    problem: Problem, mass: Tensor, grad_lse: Tensor | None, grad_mass: Tensor | None, dead: Tensor
) -> Tensor:
    """-dlse + sum_t mass_t g_t, (B, Hq, Nq)."""
    constant = torch.zeros(dead.shape, dtype=torch.float64 if problem.query.dtype == torch.float64 else torch.float32)
    if grad_lse is not None:
        constant = constant - grad_lse
    if grad_mass is not None:
        constant = constant + (mass * grad_mass).sum(-1)
    return constant.masked_fill(dead, 0.0)


def _row_constants(
    problem: Problem, mass: Tensor, grad_lse: Tensor | None, grad_mass: Tensor | None, dead: Tensor
) -> list[Tensor] | None:
    """delta_s - dout . out = -dlse - g_s + sum_t mass_t g_t of each source, (B, Hq, Nq) each."""
    if grad_lse is None and grad_mass is None:
        return None
    common = _common_constant(problem, mass, grad_lse, grad_mass, dead)
    if grad_mass is None:
        return [common] * len(problem.sources)
    return [(common - grad_mass[..., s]).masked_fill(dead, 0.0) for s in range(len(problem.sources))]


def _piece_backward(
    problem: Problem,
    source: BoundSource,
    piece: Piece,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    constant: Tensor | None,
    work: torch.dtype,
    grad_bias: Tensor | None,
    dot: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one piece in dtype `work`; its share of the bias gradient is added to `grad_bias`."""
    dim, value_dim = query.shape[3], problem.value_dim
    q = piece.queries(query).to(work)
    k, v = piece.keys(source.key).to(work), piece.keys(source.value).to(work)
    o, g = piece.queries(out).to(work), piece.queries(grad_out).to(work)
    rows_lse = piece.queries(lse, float("inf"))
    heads = k.shape[1]
    if grad_bias is not None and problem.group > 1:
        # The bias gradient is wanted head by head, and dv of a shared head no longer tells whose it is.
        k, v = (x.repeat_interleave(problem.group, 1) for x in (k, v))
    z_lse = rows_lse if source.bias is None else rows_lse - piece.rows(source.bias)[..., None]
    shift = None if constant is None else piece.queries(constant)
    width = max(dim, value_dim)
    if shift is not None:
        # Two features, the rounded constant and what rounding it left, keep a 16-bit delta as exact as a float32 one.
        extra = [shift.to(work), (shift - shift.to(work)).to(work)]
        g = torch.cat([g, torch.ones_like(g[..., :1]).expand(*g.shape[:3], 2)], -1)
        o = torch.cat([o, torch.stack(extra, -1)], -1)
        width = max(dim, value_dim + 2)
    if not dim == value_dim == width:
        q, k, v, o, g = _pad(width, q, k, v, o, g)
    dq, dk, dv = _flash_backward(
        g, q, k, v, o, z_lse.to(lse.dtype), 0.0, source.causal, attn_mask=piece.mask, scale=problem.scale
    )
    if grad_bias is not None:
        # sum_ij p_ij dout_i . v_j = sum_j dv_j . v_j, so dbias = that - sum_i mass_i delta_i, with no (Nq, Ns) matrix.
        assert dot is not None and source.bias is not None
        delta = piece.queries(dot) if shift is None else piece.queries(dot) + shift
        _, own = _attend(problem, source, piece)
        own = own.masked_fill(piece.dead, float("-inf")) if piece.dead is not None else own
        share = torch.exp(own - z_lse)
        grad_bias[piece.samples] += (dv * v)[..., :value_dim].sum((2, 3)) - (share * delta).sum(2)
    dk, dv = dk[..., :dim], dv[..., :value_dim]
    if k.shape[1] != heads:
        dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
    return dq[..., :dim], dk, dv
