"""The public functions: each checks its arguments, describes them as one Problem and makes one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, ops, transforms
from .autograd import Attention
from .problem import AuxOutput, AuxRequest, Problem, Source, Stream, bind, has_passed, is_readable, sort_mask

Window = tuple[int | None, int | None]
# Held from the start: attnfuse.integrations.torch.patch_sdpa puts `attention` in its place.
_torch_attention = F.scaled_dot_product_attention
# Asked in every call: a name at hand costs less than three looked up.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_mask: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_aux: AuxRequest | None = None,
    backend: str | None = None,
) -> Any:
    """softmax(scale Q K^T + mask) V, with the signature and meaning of F.scaled_dot_product_attention.

    Args:
        query: (B, Hq, Nq, D), any float dtype, D up to 256; ranks other than 4 as torch takes them.
        key, value: (B, Hkv, Ns, D) and (B, Hkv, Ns, Dv), same dtype and device as query.
        attn_mask: broadcastable to (B, Hq, Nq, Ns); bool (True = attend), additive float, or torch's CausalBias.
        dropout_p: probability in [0, 1] that an attention weight is dropped (Philox, reproducible by torch's seed).
        is_causal: row i attends to columns j <= i, from the upper left; not together with attn_mask.
        scale: multiplies Q K^T; 1/sqrt(D) if None.
        enable_gqa: lets Hkv be a divisor of Hq.
        key_mask: lengths (B,) int or keys (B, Ns) bool, True = attend; NaN in masked keys is never seen.
        window: (left, right), row i sees columns i - left to i + right; -1 or None leaves a side open.
        softcap: z becomes softcap * tanh(z / softcap) before any mask or bias.
        alibi_slopes: (Hq,) or (B, Hq); adds -slope |j - i| (Press et al. 2022, arXiv 2108.12409).
        sinks: (Hq,) logits that join the softmax denominator (Xiao et al. 2023, arXiv 2309.17453).
        return_aux: AuxRequest(lse=..., source_mass=...): the call then returns (out, AuxOutput).
        backend: "cuda", "triton", "aten" or "reference"; None takes the documented order, see `explain`.

    Returns:
        out (B, Hq, Nq, Dv) in the query's dtype and memory layout; 0 in rows that see no key.

    Raises:
        torch's own error where F.scaled_dot_product_attention raises; else ValueError or TypeError for a bad argument,
        RuntimeError where the named backend cannot serve the call.
    """
    try:
        problem, shape = _attention_problem(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_mask, window, softcap,
            alibi_slopes, sinks, return_aux,
        )  # fmt: skip
    except (ValueError, TypeError) as ours:
        raise _torchs_own(ours, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) from None
    out, lse, mass = _run(problem, backend)
    if shape is not None:
        out, lse = out.reshape(*shape, out.shape[-1]), lse.reshape(shape)
        mass = mass.reshape(*shape, mass.shape[-1]) if problem.want_mass else mass
    if return_aux is None:
        return out
    return out, _aux(return_aux, lse, mass)


def multi_source_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    normalization: str = "joint",
    source_weights: Tensor | Sequence[float] | None = None,
    return_aux: AuxRequest | None = None,
    backend: str | None = None,
) -> Any:
    """Attention of one query over a list of sources at once, with nothing concatenated.

        joint:       p = softmax over all columns of all sources;  out_i = sum_s sum_j p_ij v_j
        per_source:  p = softmax over each source alone;           out_i = sum_s source_weights_s sum_j p_ij v_j

    per_source is decoupled cross-attention (IP-Adapter, Ye et al. 2023, arXiv 2308.06721).

    Args:
        query: (B, Hq, Nq, D). sources: a non-empty list of `Source`, each with its own length, mask, presence and bias.
        source_weights: (S,) tensor or numbers, for per_source only; ones if None.
        others: as in `attention`.

    Returns:
        out (B, Hq, Nq, Dv); with `return_aux` also AuxOutput: lse (B, Hq, Nq) over everything the row sees, and
        source_mass (B, Hq, Nq, S), how much attention each source got (per_source: 1 where a source is seen, less the
        sink's share). Both are differentiable. Rows that see nothing give 0, -inf and 0.

    Raises:
        ValueError, TypeError: a bad argument. RuntimeError: the named backend cannot serve the call.
    """
    if normalization not in ("joint", "per_source"):
        raise ValueError(f"normalization must be 'joint' or 'per_source', got {normalization!r}")
    if normalization == "joint" and source_weights is not None:
        raise ValueError("source_weights needs normalization='per_source', got 'joint'")
    query, sources = _autocast(query, sources)
    problem = bind(
        query, sources, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, softcap=softcap, sinks=sinks,
        return_aux=return_aux,
    )  # fmt: skip
    if normalization == "per_source":
        out, lse, mass = _run_per_source(problem, _source_weights(source_weights, problem), backend)
    else:
        out, lse, mass = _run(problem, backend)
    if return_aux is None:
        return out
    return out, _aux(return_aux, lse, mass)


def joint_attention(
    streams: Sequence[Stream],
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_aux: AuxRequest | None = None,
    backend: str | None = None,
) -> Any:
    """Every stream's query attends to every stream's keys (MM-DiT, Esser et al. 2024, arXiv 2403.03206).

    Args:
        streams: a non-empty list of `Stream(query, key, value, mask, present, bias)`; mask, present and bias speak of
            the stream's keys, as in `Source`. Query lengths may differ; batch, heads and head dim may not.
        others: as in `multi_source_attention`.

    Returns:
        a list of outs, one per stream; with `return_aux` (outs, list of AuxOutput).
    """
    if not isinstance(streams, (list, tuple)) or not streams:
        raise ValueError(f"streams must be a non-empty list of attnfuse.Stream, got {streams!r}")
    for n, stream in enumerate(streams):
        if not isinstance(stream, Stream):
            raise TypeError(f"streams[{n}] must be an attnfuse.Stream, got {type(stream).__name__}")
    sources = [Source(s.key, s.value, s.mask, s.present, s.bias) for s in streams]
    results = [
        multi_source_attention(
            stream.query, sources, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, softcap=softcap,
            sinks=sinks, return_aux=return_aux, backend=backend,
        )
        for stream in streams
    ]  # fmt: skip
    if return_aux is None:
        return results
    return [out for out, _ in results], [aux for _, aux in results]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = False,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Attention over packed sequences, with the signature of torch.nn.attention.varlen.varlen_attn.

    Sequence n holds query rows cu_seq_q[n] to cu_seq_q[n + 1] and the keys of cu_seq_k alike. Causal and windows are
    aligned to the lower right of each sequence, as in torch: the last query sees the last key.

    Args:
        query: (Tq, Hq, D). key, value: (Tk, Hkv, D) and (Tk, Hkv, Dv).
        cu_seq_q, cu_seq_k: (N + 1,) int, cumulative lengths from 0; cu_seq_k None takes cu_seq_q.
        max_q, max_k: the longest sequence; no sequence may be longer.
        window_size: (left, right), -1 unbounded; (-1, 0) is causal.
        seqused_k: (N,) int, only so many keys of each sequence count.
        others: as in `attention`.

    Returns:
        out (Tq, Hq, Dv); with `return_aux` also AuxOutput: lse (Tq, Hq), source_mass (Tq, Hq, 1).
    """
    problem, rows, _ = _varlen_problem(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, return_aux, scale, window_size, enable_gqa,
        seqused_k, dropout_p, softcap, alibi_slopes, sinks,
    )  # fmt: skip
    out, lse, mass = _run(problem, backend)
    packed_rows = _packed_index(cu_seq_q, rows, query.shape[0])
    out = out.transpose(1, 2)[packed_rows]
    if return_aux is None:
        return out
    mass = mass.transpose(1, 2)[packed_rows] if problem.want_mass else mass
    return out, _aux(return_aux, lse.transpose(1, 2)[packed_rows], mass)


def _varlen_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool,
    return_aux: AuxRequest | None,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor | None,
    dropout_p: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Problem, Tensor, Tensor]:
    """The padded problem of a `varlen_attention` call, and the lengths (N,) of its queries and of its keys."""
    cu_seq_k = cu_seq_q if cu_seq_k is None else cu_seq_k
    for name, packed in (("query", query), ("key", key), ("value", value)):
        if not isinstance(packed, Tensor) or packed.dim() != 3:
            given = tuple(packed.shape) if isinstance(packed, Tensor) else type(packed).__name__
            raise ValueError(f"{name} must be 3-D (total tokens, heads, head dim), got {given}")
    rows, row_index = _unpack("cu_seq_q", cu_seq_q, "max_q", max_q, query.shape[0])
    columns, column_index = _unpack("cu_seq_k", cu_seq_k, "max_k", max_k, key.shape[0])
    if cu_seq_q.shape != cu_seq_k.shape:
        raise ValueError(
            f"cu_seq_k must have cu_seq_q's shape {tuple(cu_seq_q.shape)}, got {tuple(cu_seq_k.shape)}"
        )
    lengths = columns
    if seqused_k is not None:
        if seqused_k.shape != columns.shape or seqused_k.dtype.is_floating_point:
            raise ValueError(f"seqused_k must be int of shape {tuple(columns.shape)}, got {tuple(seqused_k.shape)}")
        lengths = torch.minimum(seqused_k.to(columns.dtype), columns)
    query, sources = _autocast(query, [Source(key, value)])
    padded_query = _pad_rows(query, row_index)
    source = Source(
        _pad_rows(sources[0].key, column_index), _pad_rows(sources[0].value, column_index), lengths, window=window_size
    )
    problem = bind(
        padded_query, [source], dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, return_aux=return_aux, is_single=True,
    )  # fmt: skip
    bound = problem.sources[0]
    if bound.window_left == -1 and bound.window_right == 0:
        bound.window_right, is_causal = -1, True
    bound.causal = is_causal
    if bound.is_banded() or alibi_slopes is not None:
        offsets = (lengths - rows).to(torch.int32)
        # Equal lengths need no offsets, and without them more backends can serve the call; a GPU is not asked.
        if not is_readable(offsets) or bool(offsets.any()):
            bound.offsets = offsets
    return problem, rows, columns


class Explanation(NamedTuple):
    """Which backend would run a call, with which tile, and why each other would not or is not reached."""

    backend: str
    tile: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.tile}"]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.others.items()])


def explain(*args: Any, **kwargs: Any) -> Explanation | list[Explanation]:
    """Which backend a call would take and why, without running it.

    Takes the arguments of `attention`, of `multi_source_attention` (a list of sources second) or of `joint_attention`
    (a list of streams first; the answer is then a list, one per stream).
    """
    backend = kwargs.pop("backend", None)
    first = args[0] if args else kwargs.get("streams", kwargs.get("query"))
    if isinstance(first, (list, tuple)):
        streams = kwargs.pop("streams", None) or args[0]
        sources = [Source(s.key, s.value, s.mask, s.present, s.bias) for s in streams]
        return [_explain(_multi_problem(s.query, sources, **kwargs), backend) for s in streams]
    second = args[1] if len(args) > 1 else kwargs.get("sources")
    if isinstance(second, (list, tuple)):
        return _explain(_multi_problem(*args, **kwargs), backend)
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = dict(zip(("query", "key", "value", *names), args)) | kwargs
    defaults = {
        "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False, "key_mask": None,
        "window": None, "softcap": None, "alibi_slopes": None, "sinks": None, "return_aux": None,
    }  # fmt: skip
    return _explain(_attention_problem(**(defaults | given))[0], backend)


def _explain(problem: Problem, backend: str | None) -> Explanation:
    chosen = dispatch.choose(problem, backend)
    others = {
        name: reason or ("not asked for" if backend else f"{chosen} comes first")
        for name, reason in dispatch.reasons(problem).items()
        if name != chosen
    }
    return Explanation(chosen, dispatch.load(chosen).describe(problem), others)


def _multi_problem(
    query: Tensor,
    sources: Sequence[Source],
    *,
    normalization: str = "joint",
    source_weights: Any = None,
    **options: Any,
) -> Problem:
    query, sources = _autocast(query, sources)
    return bind(query, sources, **options)


def _attention_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_mask: Tensor | None,
    window: Window | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    return_aux: AuxRequest | None,
) -> tuple[Problem, tuple[int, ...] | None]:
    """The problem of an `attention` call, and (*leading, Nq) to give the result back in where the rank is not 4."""
    shape = None
    known = has_passed(query, key, value, enable_gqa)
    if not known:
        for name, given in (("query", query), ("key", key), ("value", value)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None when is_causal=True, got both")
    if not known and not _are_four(query, key, value, enable_gqa):
        query, key, value, attn_mask, shape = _as_four(query, key, value, attn_mask, enable_gqa)
    source = Source(key, value, key_mask, None, None, is_causal, window)
    query, sources = _autocast(query, [source])
    problem = bind(
        query, sources, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, return_aux=return_aux, is_single=True, known=known,
    )  # fmt: skip
    if attn_mask is not None:
        _add_attn_mask(problem, attn_mask)
    return problem, shape


def _add_attn_mask(problem: Problem, attn_mask: Tensor) -> None:
    """`attention`'s attn_mask: torch's broadcasting alone decides, so no shape is taken for lengths or a key mask."""
    bound = problem.sources[0]
    if type(attn_mask).__name__ != "CausalBias":
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
        if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
            raise TypeError(f"attn_mask must be bool or float, got {attn_mask.dtype}")
        if attn_mask.dim() < 2:
            raise ValueError(f"attn_mask must have 2 to 4 dimensions, got shape {tuple(attn_mask.shape)}")
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    key_mask = bound.key_mask
    sort_mask("attn_mask", attn_mask, bound, (*problem.query.shape[:3], bound.key.shape[2]))
    if key_mask is not None and bound.key_mask is not key_mask and bound.key_mask is not None:
        bound.key_mask = bound.key_mask & key_mask


def _are_four(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether nothing has to be broadcast to four dimensions."""
    if not (query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]):
        return False
    return enable_gqa or query.shape[1] == key.shape[1] == value.shape[1]


def _as_four(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Any rank from 2, and sizes of 1 that torch would broadcast, as four dimensions."""
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError(
            f"query, key and value must have at least 2 dimensions, got shapes {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    heads = 1 if enable_gqa else 0  # with GQA the head dimension is not broadcast
    tensors = [x.reshape((1,) * (4 - x.dim()) + tuple(x.shape)) for x in (query, key, value)]
    try:
        leading = torch.broadcast_shapes(*(x.shape[: x.dim() - 2 - heads] for x in tensors))
    except RuntimeError:
        raise ValueError(
            f"key and value must have the query's batch and heads, got query {tuple(query.shape)}, "
            f"key {tuple(key.shape)} and value {tuple(value.shape)}"
        ) from None
    tensors = [x.expand(*leading, *x.shape[x.dim() - 2 - heads :]) for x in tensors]
    wide = tensors[0].shape[:-1]
    if attn_mask is not None and (
        attn_mask.dim() > 4 or (len(wide) > 3 and attn_mask.dim() == 4 and attn_mask.shape[0] > 1)
    ):
        attn_mask = attn_mask.expand(*wide, attn_mask.shape[-1]).flatten(0, -4)
    flat = [x.flatten(0, -4) for x in tensors]
    rank = max(query.dim(), key.dim(), value.dim())
    return flat[0], flat[1], flat[2], attn_mask, tuple(wide[len(wide) - (rank - 1) :])


def _torchs_own(
    ours: Exception,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Exception:
    """Where torch refuses the call too, its type and its words beside ours; else ours."""
    given: list[Any] = [query, key, value, attn_mask]
    tries: list[list[Any]] = []
    if type(attn_mask).__name__ != "CausalBias":
        # The meta device checks what some of torch's kernels take unchecked, and computes nothing.
        tries.append([x.detach().to("meta") if isinstance(x, Tensor) else x for x in given])
    if all(x.numel() for x in given[:3] if isinstance(x, Tensor)):
        # torch's CPU kernel divides by an empty length.
        tries.insert(0 if len({x.device for x in given if isinstance(x, Tensor)}) > 1 else 1, given)
    for attempt in tries:
        try:
            with torch.no_grad():
                q, k, v, mask = attempt
                _torch_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        except (RuntimeError, TypeError, ValueError, IndexError) as theirs:
            return type(theirs)(f"{ours} (torch: {str(theirs).strip()})")
    return ours


def _autocast(query: Tensor, sources: Sequence[Source]) -> tuple[Tensor, Sequence[Source]]:
    """Under torch.autocast: query, keys and values in its dtype, as F.scaled_dot_product_attention has it."""
    if not isinstance(query, Tensor) or not torch.is_autocast_enabled(query.device.type):
        return query, sources
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(x: Tensor) -> Tensor:
        fits = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if fits else x

    recast = [
        Source(cast(s.key), cast(s.value), s.mask, s.present, s.bias, s.is_causal, s.window)
        if isinstance(s, Source)
        else s
        for s in sources
    ]
    return cast(query), recast


def _run(problem: Problem, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    name = dispatch.choose(problem, backend)
    module = dispatch.load(name)
    if name == "reference":
        with torch.autocast(problem.query.device.type, enabled=False):
            return module.forward(problem)  # type: ignore[no-any-return]
    if torch.compiler.is_compiling() or _dispatch_modes():
        return ops.call_forward(problem, name)
    if _transforms_active() or forward_ad._current_level >= 0:
        return _run_transformed(problem, name)
    if torch.is_grad_enabled():
        tensors = problem.tensors()
        if any(x is not None and x.requires_grad for x in tensors):
            return Attention.apply(name, problem, *tensors)  # type: ignore[no-any-return]
    return module.forward(problem)  # type: ignore[no-any-return]


def _run_transformed(problem: Problem, name: str) -> tuple[Tensor, Tensor, Tensor]:
    rest = (problem.layout(), problem.scale, problem.softcap, problem.dropout_p, problem.want_mass)
    return transforms.Attention.apply(name, rest, *problem.tensors())  # type: ignore[no-any-return]


def _run_per_source(problem: Problem, weights: list[Any], backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each source softmaxed alone: as many problems of one source, their outs added with `weights`."""
    outs, lses, masses = [], [], []
    for source in problem.sources:
        alone = Problem(
            problem.query, [source], problem.scale, problem.softcap, problem.dropout_p, problem.alibi_slopes,
            problem.sinks, problem.seed, problem.want_mass,
        )  # fmt: skip
        out, lse, mass = _run(alone, backend)
        outs.append(out)
        lses.append(lse)
        masses.append(mass)
    wide = torch.float64 if problem.query.dtype == torch.float64 else torch.float32
    total = sum((out.to(wide) * weight for out, weight in zip(outs, weights)), outs[0].new_zeros((), dtype=wide))
    live = torch.stack([lse > float("-inf") for lse in lses]).any(0)
    stacked = torch.stack([torch.where(live, lse, 0.0) for lse in lses])
    lse = torch.where(live, torch.logsumexp(stacked, 0), float("-inf"))
    return total.to(problem.query.dtype), lse, torch.cat(masses, -1) if problem.want_mass else masses[0]


def _source_weights(given: Tensor | Sequence[float] | None, problem: Problem) -> list[Any]:
    count = len(problem.sources)
    if given is None:
        return [1.0] * count
    if isinstance(given, Tensor):
        if tuple(given.shape) != (count,) or not given.dtype.is_floating_point:
            raise ValueError(f"source_weights must be float of shape ({count},), got {tuple(given.shape)}")
        return list(given.unbind())
    if not isinstance(given, (list, tuple)) or len(given) != count:
        raise ValueError(f"source_weights must hold {count} numbers, one per source, got {given!r}")
    return list(given)


def _aux(request: AuxRequest, lse: Tensor, mass: Tensor) -> AuxOutput:
    return AuxOutput(lse if request.lse else None, mass if request.source_mass else None)


def _unpack(name: str, cu_seq: Tensor, limit_name: str, limit: int, total: int) -> tuple[Tensor, Tensor]:
    """Lengths (N,) int32 of packed sequences, and the index (N, limit) of each one's tokens (clamped past its end)."""
    if not isinstance(cu_seq, Tensor) or cu_seq.dim() != 1 or cu_seq.dtype.is_floating_point or cu_seq.numel() < 2:
        raise ValueError(f"{name} must be a 1-D int tensor of cumulative lengths (N + 1,), got {cu_seq!r}")
    lengths = cu_seq.diff().to(torch.int32)
    if is_readable(cu_seq):
        first, last, longest, shortest = int(cu_seq[0]), int(cu_seq[-1]), int(lengths.max()), int(lengths.min())
        if first != 0 or last != total or shortest < 0:
            raise ValueError(f"{name} must rise from 0 to the {total} tokens given, got {cu_seq.tolist()}")
        if longest > limit:
            raise ValueError(f"{limit_name} must be at least the longest sequence, {longest}, got {limit}")
    steps = torch.arange(limit, device=cu_seq.device)
    index = (cu_seq[:-1, None] + steps).clamp(max=max(total - 1, 0))
    return lengths, index


def _pad_rows(packed: Tensor, index: Tensor) -> Tensor:
    """(T, H, D) as (N, H, longest, D); rows past a sequence's end repeat some token and are masked."""
    if packed.shape[0] == 0:
        return packed.new_zeros((index.shape[0], packed.shape[1], index.shape[1], packed.shape[2]))
    return packed[index].transpose(1, 2)


def _packed_index(cu_seq: Tensor, lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(sequence, row) of every packed token, (T,) each."""
    sequence = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=lengths.device), lengths.long(), output_size=total
    )
    return sequence, torch.arange(total, device=lengths.device) - cu_seq[:-1].long()[sequence]
