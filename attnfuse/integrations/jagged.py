"""Nested tensors of the jagged layout: attention within each of their sequences, through varlen_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnfuse.functional import varlen_attention


def jagged_attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, **options: Any) -> Tensor:
    """attention for (B, H, j, D) nested tensors, as F.scaled_dot_product_attention takes them; no padding is stored.

    Args:
        query: (B, Hq, j1, D). key, value: (B, Hkv, j2, D) and (B, Hkv, j2, Dv), ragged alike. All of them jagged, the
            transpose(1, 2) of (B, j, H, D) as nested tensors of layout torch.jagged come from a projection.
        is_causal: aligned to the upper left, so it needs query and key ragged alike.
        options: dropout_p, scale, enable_gqa, softcap, sinks and backend, as in `varlen_attention`.

    Returns:
        (B, Hq, j1, Dv), ragged as the query; differentiable.
    """
    packed = [_packed(name, x) for name, x in (("query", query), ("key", key), ("value", value))]
    (q, offsets_q, longest_q), (k, offsets_k, longest_k), (v, offsets_v, _) = packed
    if offsets_k is not offsets_v and not torch.equal(offsets_k, offsets_v):
        raise ValueError("value must be ragged as key is: their offsets differ")
    if is_causal and offsets_q is not offsets_k and not torch.equal(offsets_q, offsets_k):
        raise ValueError("is_causal with nested tensors needs query and key ragged alike: their offsets differ")
    out = varlen_attention(q, k, v, offsets_q, offsets_k, longest_q, longest_k, is_causal=is_causal, **options)
    return torch.nested.nested_tensor_from_jagged(
        out, offsets_q, min_seqlen=int(query._get_min_seqlen()), max_seqlen=longest_q  # type: ignore[attr-defined]
    ).transpose(1, 2)


def _packed(name: str, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """(T, H, D), offsets (N + 1,) and the longest sequence of (B, H, j, D)."""
    if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged:
        given = f"a nested tensor of layout {x.layout}" if isinstance(x, Tensor) and x.is_nested else type(x).__name__
        raise TypeError(f"{name} must be a nested tensor of layout torch.jagged, got {given}")
    if x.dim() != 4 or x._ragged_idx != 2:  # type: ignore[attr-defined]
        raise ValueError(f"{name} must be (B, H, j, D) with j the ragged dimension, got shape {tuple(x.shape)}")
    rows_first = x.transpose(1, 2)
    if rows_first.lengths() is not None:  # type: ignore[attr-defined]
        raise ValueError(f"{name} must have no holes between its sequences: call .contiguous() on it")
    return rows_first.values(), rows_first.offsets(), int(x._get_max_seqlen())  # type: ignore[attr-defined]
