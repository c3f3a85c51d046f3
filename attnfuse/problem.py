"""What every backend takes: a query attending to a list of sources, checked once and never again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNBOUNDED = -1


class AuxRequest(NamedTuple):
    """Which auxiliary outputs a call returns beside `out`, named as in torch's flex_attention."""

    lse: bool = False
    source_mass: bool = False


class AuxOutput(NamedTuple):
    """Auxiliary outputs; a field that was not requested is None.

    lse: (B, Hq, Nq) float32, the natural log of the softmax denominator; -inf where a row sees no key.
    source_mass: (B, Hq, Nq, S) float32, the share of attention each source got, before dropout.
    """

    lse: Tensor | None = None
    source_mass: Tensor | None = None


class Source:
    """One modality to attend to.

    key (B, Hkv, Ns, D), value (B, Hkv, Ns, Dv).
    mask: lengths (B,) int; or keys (B, Ns) bool, True = attend; or anything that broadcasts to
        (B, Hq, Nq, Ns), bool or additive float. A bool mask of shape (B, Ns) is always a key mask.
    present (B,) bool: False leaves the source out for that sample.
    bias: added to every logit of this source: a number, or a tensor (), (Hq,) or (B, Hq).
    is_causal: query row i sees columns j <= i, counted from the source's own first key.
    window: (left, right), row i sees columns i - left .. i + right; -1 or None leaves a side open.
    """

    __slots__ = ("bias", "is_causal", "key", "mask", "present", "value", "window")

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        present: Tensor | None = None,
        bias: Tensor | float | None = None,
        is_causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
    ) -> None:
        self.key = key
        self.value = value
        self.mask = mask
        self.present = present
        self.bias = bias
        self.is_causal = is_causal
        self.window = window

    def __repr__(self) -> str:
        given = [
            f"{name}={tuple(held.shape) if isinstance(held, Tensor) else held}"
            for name in ("key", "value", "mask", "present", "bias", "is_causal", "window")
            if (held := getattr(self, name)) is not None and held is not False
        ]
        return f"Source({', '.join(given)})"


class Stream(NamedTuple):
    """One stream of joint attention (MM-DiT): it asks with `query` and is seen through `key` and `value`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    present: Tensor | None = None
    bias: Tensor | float | None = None


class BoundSource:
    """A source checked against its query, its one `mask` argument sorted into what kernels tell apart.

    key (B, Hkv, Ns, D), value (B, Hkv, Ns, Dv); lengths (B,) int32; key_mask (B, Ns) bool;
    attn_mask 4-D, each size 1 or that of (B, Hq, Nq, Ns), bool or float; present (B,) bool; bias (B, Hq) float32.
    Row i stands at column i + offset for causal, window and ALiBi; offset is 0 except in lower-right alignment,
    and offsets (B,) int32 takes its place where it differs by sample.
    column: where the source begins in the running count of columns that keys the dropout.
    """

    __slots__ = (
        "attn_mask", "bias", "causal", "column", "key", "key_mask", "lengths", "offset", "offsets", "present",
        "value", "window_left", "window_right",
    )  # fmt: skip
    TENSORS = ("key", "value", "attn_mask", "bias", "lengths", "key_mask", "present", "offsets")

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        bias: Tensor | None = None,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        present: Tensor | None = None,
        offsets: Tensor | None = None,
        causal: bool = False,
        offset: int = 0,
        window_left: int = UNBOUNDED,
        window_right: int = UNBOUNDED,
        column: int = 0,
    ) -> None:
        self.key = key
        self.value = value
        self.attn_mask = attn_mask
        self.bias = bias
        self.lengths = lengths
        self.key_mask = key_mask
        self.present = present
        self.offsets = offsets
        self.causal = causal
        self.offset = offset
        self.window_left = window_left
        self.window_right = window_right
        self.column = column

    def is_banded(self) -> bool:
        """Whether which columns are seen depends on the row's position."""
        return self.causal or self.window_left != UNBOUNDED or self.window_right != UNBOUNDED


class Problem:
    """One attention: query (B, Hq, Nq, D) over `sources`, as every backend takes it.

    alibi_slopes (B, Hq) float32, sinks (Hq,) float32, seed () int64 (only with dropout_p > 0), softcap 0 = none.
    want_mass: whether the caller reads source_mass (lse is always computed: the backward needs it).
    """

    __slots__ = (
        "alibi_slopes", "dropout_p", "query", "scale", "seed", "sinks", "softcap", "sources", "want_mass",
    )  # fmt: skip
    TENSORS = ("alibi_slopes", "sinks", "seed")

    def __init__(
        self,
        query: Tensor,
        sources: Sequence[BoundSource],
        scale: float,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        seed: Tensor | None = None,
        want_mass: bool = False,
    ) -> None:
        self.query = query
        self.sources = sources
        self.scale = scale
        self.softcap = softcap
        self.dropout_p = dropout_p
        self.alibi_slopes = alibi_slopes
        self.sinks = sinks
        self.seed = seed
        self.want_mass = want_mass

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[1] // max(self.sources[0].key.shape[1], 1)

    @property
    def value_dim(self) -> int:
        return self.sources[0].value.shape[3]

    def tensors(self) -> list[Tensor | None]:
        """Every tensor of the problem in one flat order: query, the shared ones, then source by source."""
        flat: list[Tensor | None] = [self.query, self.alibi_slopes, self.sinks, self.seed]
        for source in self.sources:
            flat += [
                source.key, source.value, source.attn_mask, source.bias,
                source.lengths, source.key_mask, source.present, source.offsets,
            ]  # fmt: skip
        return flat

    def layout(self) -> list[int]:
        """The integers that go with `tensors()`: causal, offset, window_left, window_right of each source."""
        flat: list[int] = []
        for source in self.sources:
            flat += [int(source.causal), source.offset, source.window_left, source.window_right]
        return flat

    @staticmethod
    def rebuilt(
        tensors: Sequence[Tensor | None],
        layout: Sequence[int],
        scale: float,
        softcap: float,
        dropout_p: float,
        want_mass: bool,
    ) -> Problem:
        """The problem whose `tensors()` and `layout()` these are."""
        query, alibi_slopes, sinks, seed, *rest = tensors
        width = len(BoundSource.TENSORS)
        sources, column = [], 0
        for s in range(len(rest) // width):
            key, value, attn_mask, bias, lengths, key_mask, present, offsets = rest[s * width : (s + 1) * width]
            causal, offset, left, right = layout[4 * s : 4 * s + 4]
            assert key is not None and value is not None
            sources.append(
                BoundSource(
                    key, value, attn_mask, bias, lengths, key_mask, present, offsets,
                    bool(causal), offset, left, right, column,
                )
            )  # fmt: skip
            column += key.shape[2]
        assert query is not None
        return Problem(query, sources, scale, softcap, dropout_p, alibi_slopes, sinks, seed, want_mass)


class Gradients(NamedTuple):
    """What a backward returns: None where nothing was asked for. Each has its tensor's own shape."""

    query: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    sources: list[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]  # key, value, attn_mask, bias

    def flat(self) -> list[Tensor | None]:
        """In the order of `Problem.tensors()`."""
        flat = [self.query, self.alibi_slopes, self.sinks, None]
        for grads in self.sources:
            flat += [*grads, None, None, None, None]
        return flat


def empty_output(problem: Problem, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, Hq, Nq, Dv) output whose dimensions lie in memory in the query's own order."""
    query = problem.query
    shape = (*query.shape[:3], problem.value_dim)
    if query.is_contiguous():
        return torch.empty(shape, dtype=dtype or query.dtype, device=query.device)
    strides = query.stride()
    order = sorted(range(3), key=lambda d: -strides[d]) + [3]
    return torch.empty_permuted(shape, order, dtype=dtype or query.dtype, device=query.device)


def _describe(given: object) -> str:
    if isinstance(given, Tensor):
        return f"shape {tuple(given.shape)} {given.dtype}"
    return repr(given)


def _require_tensor(name: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")


# Query, key and value signatures that passed `check_query` and `_check_key_value`, which look at nothing else: a call
# like one before is not checked again.
_PASSED: set[tuple[Any, ...]] = set()
_MOST_PASSED = 4096


def has_passed(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether tensors of these shapes, dtypes and devices were found good before (never while compiling)."""
    if torch.compiler.is_compiling():
        return False
    try:
        return _signature(query, key, value, enable_gqa) in _PASSED
    except (AttributeError, RuntimeError, TypeError):  # not tensors, or of shapes that cannot be hashed
        return False


def _remember(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if torch.compiler.is_compiling():
        return
    if len(_PASSED) >= _MOST_PASSED:
        _PASSED.clear()
    with suppress(RuntimeError, TypeError):
        _PASSED.add(_signature(query, key, value, enable_gqa))


def _signature(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Any, ...]:
    return (
        query.__class__, query.shape, query.dtype, query.device, key.__class__, key.shape, key.dtype, key.device,
        value.__class__, value.shape, value.dtype, value.device, enable_gqa,
    )  # fmt: skip


def check_query(query: Tensor) -> None:
    _require_tensor("query", query)
    if query.dim() != 4:
        raise ValueError(f"query must be 4-D (B, Hq, Nq, D), got shape {tuple(query.shape)}")
    if query.dtype not in FLOAT_DTYPES:
        raise TypeError(f"query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    if not 1 <= query.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"query's head dim must be 1 to {MAX_HEAD_DIM}, got {query.shape[3]}")
    if query.shape[1] < 1:
        raise ValueError(f"query must have at least one head, got shape {tuple(query.shape)}")


def check_scalars(dropout_p: float, scale: float | None, softcap: float | None) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be a positive number or None, got {softcap!r}")


def _check_key_value(name: str, query: Tensor, source: Source, first: Source, enable_gqa: bool) -> None:
    key, value = source.key, source.value
    batch, heads, _, dim = query.shape
    for part, held in (("key", key), ("value", value)):
        _require_tensor(f"{name}{part}", held)
        if held.dim() != 4:
            raise ValueError(f"{name}{part} must be 4-D (B, Hkv, Ns, D), got shape {tuple(held.shape)}")
        if held.dtype != query.dtype:
            raise TypeError(f"{name}{part} must have the query's dtype {query.dtype}, got {held.dtype}")
        if held.device != query.device:
            raise ValueError(f"{name}{part} must be on the query's device {query.device}, got {held.device}")
        if held.shape[0] != batch:
            raise ValueError(f"{name}{part} must have the query's batch size {batch}, got {held.shape[0]}")
    if key.shape[3] != dim:
        raise ValueError(f"{name}key must have the query's head dim {dim}, got {key.shape[3]}")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"{name}value must have its key's heads and length {tuple(key.shape[1:3])}, got {tuple(value.shape[1:3])}"
        )
    if not 1 <= value.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}value's head dim must be 1 to {MAX_HEAD_DIM}, got {value.shape[3]}")
    if value.shape[3] != first.value.shape[3]:
        raise ValueError(
            f"{name}value must have the head dim of the first source's value, {first.value.shape[3]}, "
            f"got {value.shape[3]}"
        )
    if key.shape[1] != first.key.shape[1]:
        raise ValueError(f"{name}key must have the first source's {first.key.shape[1]} heads, got {key.shape[1]}")
    if key.shape[1] != heads:
        if not enable_gqa:
            raise ValueError(
                f"{name}key has {key.shape[1]} heads and query has {heads}: pass enable_gqa=True to share key heads"
            )
        if key.shape[1] < 1 or heads % key.shape[1]:
            raise ValueError(f"query's heads ({heads}) must be a multiple of {name}key's heads, got {key.shape[1]}")


def is_readable(x: Tensor) -> bool:
    """Whether Python may look at x's numbers: no GPU is waited for, and nothing fake, mapped or traced is read."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _check_lengths(name: str, lengths: Tensor, limit: int) -> None:
    # On a GPU reading the values would stop the stream, so kernels clamp them to [0, Ns] instead.
    if not is_readable(lengths) or lengths.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(lengths))
    if low < 0:
        raise ValueError(f"{name}: lengths must not be negative, got {low}")
    if high > limit:
        raise ValueError(f"{name}: lengths must not go beyond the source's {limit} keys, got {high}")


def sort_mask(name: str, mask: object, bound: BoundSource, full: tuple[int, int, int, int]) -> None:
    """Put one `mask` argument where it belongs in `bound`: lengths, key_mask or attn_mask."""
    if type(mask).__name__ == "CausalBias":
        _sort_causal_bias(name, mask, bound, full)
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.device != bound.key.device:
        raise ValueError(f"{name} must be on the query's device {bound.key.device}, got {mask.device}")
    batch, columns = full[0], full[3]
    dtype = mask.dtype
    if dtype != torch.bool and not dtype.is_floating_point:
        if dtype.is_complex or mask.dim() != 1:
            raise TypeError(
                f"{name} must be lengths (B,) int, keys (B, Ns) bool, or bool or float broadcastable to "
                f"(B, Hq, Nq, Ns), got {_describe(mask)}"
            )
        if mask.shape[0] != batch:
            raise ValueError(f"{name}: lengths must have shape ({batch},), got {tuple(mask.shape)}")
        _check_lengths(name, mask, columns)
        bound.lengths = mask.to(torch.int32)
        return
    if dtype == torch.bool and tuple(mask.shape) == (batch, columns):
        bound.key_mask = mask
        return
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(m not in (1, f) for m, f in zip(shape, full)):
        raise ValueError(
            f"{name} must be lengths ({batch},), keys ({batch}, {columns}) or broadcast to {full}, "
            f"got shape {tuple(mask.shape)}"
        )
    mask = mask.reshape(shape)
    if dtype == torch.bool and shape[1] == 1 and shape[2] == 1:
        bound.key_mask = mask[:, 0, 0].expand(batch, columns)
    else:
        bound.attn_mask = mask


def _sort_causal_bias(name: str, mask: object, bound: BoundSource, full: tuple[int, int, int, int]) -> None:
    rows, columns = mask.seq_len_q, mask.seq_len_kv  # type: ignore[attr-defined]
    if (rows, columns) != full[2:]:
        raise ValueError(f"{name}: the CausalBias is for {rows} x {columns}, the call has {full[2]} x {full[3]}")
    bound.causal = True
    bound.offset = columns - rows if mask.variant.name == "LOWER_RIGHT" else 0  # type: ignore[attr-defined]


def _window(name: str, window: object) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"{name} must be (left, right), got {window!r}")
    sides = [UNBOUNDED if side is None else side for side in window]
    if not all(isinstance(side, int) and side >= -1 for side in sides):
        raise ValueError(f"{name} must hold integers of at least 0, or -1 or None for unbounded, got {window!r}")
    return sides[0], sides[1]


def per_head(name: str, given: Tensor | float, query: Tensor, shapes: str) -> Tensor:
    """A number or tensor of shape (), (Hq,) or (B, Hq) as a (B, Hq) float32 view (float64 with a float64 query)."""
    batch, heads = query.shape[:2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not isinstance(given, Tensor):
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            raise TypeError(f"{name} must be a number or a float tensor of shape {shapes}, got {given!r}")
        return torch.full((), given, dtype=dtype, device=query.device).expand(batch, heads)
    if not given.dtype.is_floating_point:
        raise TypeError(f"{name} must be a float tensor of shape {shapes}, got {given.dtype}")
    if given.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {given.device}")
    if tuple(given.shape) not in ((), (heads,), (batch, heads)):
        raise ValueError(
            f"{name} must have shape {shapes} with B={batch}, Hq={heads}, got shape {tuple(given.shape)}"
        )
    return given.to(dtype).expand(batch, heads)


def _fits(source: Source, first: Source) -> bool:
    """Whether a source that passed on its own has the first one's heads and value dim."""
    return source.key.shape[1] == first.key.shape[1] and source.value.shape[3] == first.value.shape[3]


def bind_source(
    name: str, query: Tensor, source: Source, first: Source, enable_gqa: bool, column: int, mask_name: str = "",
    known: bool = False,
) -> BoundSource:  # fmt: skip
    """Check `source` against `query` and sort what it carries; errors call its fields `name` + field.

    known: `has_passed` said so of query, key and value.
    """
    if not known:
        if not isinstance(source, Source):
            raise TypeError(f"{name.rstrip('.')} must be an attnfuse.Source, got {type(source).__name__}")
        known = has_passed(query, source.key, source.value, enable_gqa)
    if not known or (source is not first and not _fits(source, first)):
        _check_key_value(name, query, source, first, enable_gqa)
        _remember(query, source.key, source.value, enable_gqa)
    key, value = source.key, source.value
    batch, heads, rows, _ = query.shape
    # Kernels read rows of D contiguous numbers; any other stride is theirs to follow.
    bound = BoundSource(
        key if key.stride(3) == 1 else key.contiguous(), value if value.stride(3) == 1 else value.contiguous()
    )
    bound.causal = bool(source.is_causal)
    bound.column = column
    if source.mask is not None:
        sort_mask(mask_name or f"{name}mask", source.mask, bound, (batch, heads, rows, key.shape[2]))
    if source.present is not None:
        present = source.present
        _require_tensor(f"{name}present", present)
        if present.dtype != torch.bool or tuple(present.shape) != (batch,):
            raise ValueError(f"{name}present must be bool of shape ({batch},), got {_describe(present)}")
        if present.device != query.device:
            raise ValueError(f"{name}present must be on the query's device {query.device}, got {present.device}")
        bound.present = present
    if source.bias is not None:
        bound.bias = per_head(f"{name}bias", source.bias, query, "(), (Hq,) or (B, Hq)")
    if source.window is not None:
        bound.window_left, bound.window_right = _window(f"{name}window", source.window)
    return bound


def bind(
    query: Tensor,
    sources: Sequence[Source],
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_aux: AuxRequest | None = None,
    is_single: bool = False,
    known: bool = False,
) -> Problem:
    """Check every argument and return the problem; raises ValueError or TypeError with one sentence.

    is_single: the caller is `attention`, whose users know the source's fields as key, value and key_mask.
    known: `has_passed` said so of the single source.
    """
    if not known:
        check_query(query)
    check_scalars(dropout_p, scale, softcap)
    if not isinstance(sources, (list, tuple)) or not sources:
        raise ValueError(f"sources must be a non-empty list of attnfuse.Source, got {sources!r}")
    bound, column = [], 0
    for s, source in enumerate(sources):
        name, mask_name = ("", "key_mask") if is_single else (f"sources[{s}].", "")
        bound.append(bind_source(name, query, source, sources[0], enable_gqa, column, mask_name, known))
        column += source.key.shape[2]
    if sinks is not None:
        _require_tensor("sinks", sinks)
        if tuple(sinks.shape) != (query.shape[1],) or not sinks.dtype.is_floating_point:
            raise ValueError(f"sinks must be a float tensor of shape ({query.shape[1]},), got {_describe(sinks)}")
        if sinks.device != query.device:
            raise ValueError(f"sinks must be on the query's device {query.device}, got {sinks.device}")
        sinks = sinks.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    if alibi_slopes is not None:
        _require_tensor("alibi_slopes", alibi_slopes)
        if alibi_slopes.dim() == 0:
            raise ValueError("alibi_slopes must have shape (Hq,) or (B, Hq), got shape ()")
        alibi_slopes = per_head("alibi_slopes", alibi_slopes, query, "(Hq,) or (B, Hq)")
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(f"return_aux must be an attnfuse.AuxRequest or None, got {type(return_aux).__name__}")
    return Problem(
        query if query.stride(3) == 1 else query.contiguous(),
        bound,
        1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale),
        softcap or 0.0,
        float(dropout_p),
        alibi_slopes,
        sinks,
        draw_seed(query) if dropout_p > 0 else None,
        return_aux is not None and return_aux.source_mass,
    )


def draw_seed(query: Tensor) -> Tensor:
    """A fresh () int64 dropout seed from torch's generator of the query's device: no device is waited for."""
    return torch.randint(0, 2**31 - 1, (), dtype=torch.int64, device=query.device)
