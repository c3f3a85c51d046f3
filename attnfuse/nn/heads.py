"""How an embedding is cut into heads, and the projections that do it: heads are views, not copies."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Heads(NamedTuple):
    """query heads, key/value heads (fewer under grouped-query attention) and the size of one head."""

    query: int
    key: int
    dim: int


def plan_heads(embed_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> Heads:
    """Fill in the defaults and check that the numbers fit together."""
    for name, value in (
        ("embed_dim", embed_dim), ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads), ("head_dim", head_dim),
    ):  # fmt: skip
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if head_dim is None:
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_heads unless head_dim is given, "
                f"got embed_dim={embed_dim} and num_heads={num_heads}"
            )
        head_dim = embed_dim // num_heads
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be divisible by num_kv_heads, got num_heads={num_heads} and "
            f"num_kv_heads={num_kv_heads}"
        )
    return Heads(num_heads, num_kv_heads, head_dim)


def check_dropout(dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")
    return dropout


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H*D) -> (B, N, H, D), a view."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(out: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H*D); a view when the kernel kept the query's (B, N, H, D) memory order."""
    return out.transpose(1, 2).flatten(2)


HEAD_NORM_EPS = 1e-6


class HeadNorm(nn.RMSNorm):
    """RMSNorm over each head of (B, N, H, D), in the dtype it was given.

    Query-key normalisation keeps attention logits bounded (Henry et al., 2020, "Query-Key Normalization for
    Transformers"; with RMSNorm as in today's large models). Under autocast the norm runs in float32 and the
    values do not pass through it, so the cast back is what keeps q, k and v in one dtype.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, eps=HEAD_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class QueryProjection(nn.Module):
    """(B, N, embed_dim) -> query (B, Hq, N, D)."""

    def __init__(self, embed_dim: int, heads: Heads, *, bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.proj = nn.Linear(embed_dim, heads.query * heads.dim, bias=bias)
        self.norm: nn.Module = HeadNorm(heads.dim) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query: Tensor = self.norm(split_heads(self.proj(x), self.heads.query))
        return query.transpose(1, 2)


class KeyValueProjection(nn.Module):
    """(B, N, kv_dim) -> key and value (B, Hkv, N, D), two views of one matrix product."""

    def __init__(self, kv_dim: int, heads: Heads, *, bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.proj = nn.Linear(kv_dim, 2 * heads.key * heads.dim, bias=bias)
        self.norm: nn.Module = HeadNorm(heads.dim) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = split_heads(self.proj(x), 2 * self.heads.key).chunk(2, dim=2)
        return self.norm(key).transpose(1, 2), value.transpose(1, 2)
