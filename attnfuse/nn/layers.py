"""Attention layers: a projection in, one attention call, a projection out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from attnfuse.functional import multi_source_attention
from attnfuse.nn.heads import (
    HEAD_NORM_EPS,
    HeadNorm,
    KeyValueProjection,
    QueryProjection,
    check_dropout,
    merge_heads,
    plan_heads,
    split_heads,
)
from attnfuse.nn.modalities import check_dims, gather_modalities, key_mask
from attnfuse.nn.rope import RotaryEmbedding, check_rope, rotation
from attnfuse.problem import AuxOutput, AuxRequest, Source
from attnfuse.rope import qk_norm_rope

Window = tuple[int | None, int | None]


class AttentionOptions(TypedDict, total=False):
    """What a module hands down, as it is, to the attention layers it is made of: see `SelfAttention`.

    Their defaults stand in those layers, and those layers refuse a keyword that they do not know.
    """

    num_kv_heads: int | None
    dropout: float
    qk_norm: bool
    backend: str | None


class BranchOptions(AttentionOptions, total=False):
    """The same for modules whose heads may have a size of their own."""

    head_dim: int | None


class SelfAttention(nn.Module):
    """Multi-head self-attention with every switch of today's models.

        q, k, v = x·Wq, x·Wk, x·Wv        out = Wo · attention(rotate(norm(q)), rotate(norm(k)), v)

    Args:
        embed_dim: size E of a token.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads (GQA: Ainslie et al., 2023); default num_heads.
        head_dim: size of a head; default embed_dim / num_heads.
        bias: whether the projections have a bias.
        dropout: on attention probabilities, in training only.
        qk_norm: RMSNorm on each head of q and k before the product.
        rope: rotary position embedding of q and k, of at most the head's size; one `RotaryEmbedding` may serve all
            layers, it has nothing to train or save. Norm and rotation are one pass: `attnfuse.rope.qk_norm_rope`.
        rope_interleaved: which elements of a head form a pair, as `interleaved` in `qk_norm_rope`.
        is_causal, window: the mask by position; window is (left, right), None or -1 unbounded.
        softcap: z -> softcap · tanh(z / softcap) on the logits (Gemma 2).
        backend: name of a backend, or None for the documented order.

    forward(x, mask=None, positions=None): x (B, N, E) -> (B, N, E). mask is (B,) integer lengths, (B, N) bool, or
    anything that broadcasts to (B, H, N, N), bool or additive float; True = attend. Tokens that a length or a (B, N)
    mask leaves out are set to 0 first: what padding holds reaches neither outputs nor gradients. positions is what
    `rope` turns by, as it takes them: (N,) or (B, N), with several axes (..., axes); default 0 .. N - 1.

    Raises ValueError for sizes that do not fit together, and for positions without a rope.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        qk_norm: bool = False,
        rope: RotaryEmbedding | None = None,
        rope_interleaved: bool = False,
        is_causal: bool = False,
        window: Window | None = None,
        softcap: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.heads = plan_heads(embed_dim, num_heads, num_kv_heads, head_dim)
        self.dropout = check_dropout(dropout)
        self.is_causal, self.window, self.softcap, self.backend = is_causal, window, softcap, backend
        self.rope, self.rope_interleaved = check_rope(rope, self.heads.dim), rope_interleaved
        inner = self.heads.query * self.heads.dim
        self.qkv_proj = nn.Linear(embed_dim, inner + 2 * self.heads.key * self.heads.dim, bias=bias)
        self.q_norm: nn.Module = HeadNorm(self.heads.dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = HeadNorm(self.heads.dim) if qk_norm else nn.Identity()
        self.out_proj = nn.Linear(inner, embed_dim, bias=bias)

    def project(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """query (B, Hq, N, D), key and value (B, Hkv, N, D): views of one matrix product, or normed and rotated."""
        hq, hk, _ = self.heads
        parts = split_heads(self.qkv_proj(x), hq + 2 * hk).transpose(1, 2).split_with_sizes((hq, hk, hk), dim=1)
        query, key, value = parts
        cos, sin = rotation(self.rope, x.shape[1], positions)
        if isinstance(self.q_norm, HeadNorm) or cos is not None:
            query, key = qk_norm_rope(
                query,
                key,
                getattr(self.q_norm, "weight", None),
                getattr(self.k_norm, "weight", None),
                cos,
                sin,
                eps=HEAD_NORM_EPS,
                interleaved=self.rope_interleaved,
                backend="reference" if self.backend == "reference" else None,
            )
        return query, key, value

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        _check_tokens("x", x, self.embed_dim)
        x, mask = _drop_padding(x, mask)
        query, key, value = self.project(x, positions)
        out = multi_source_attention(
            query,
            [Source(key, value, mask=mask, is_causal=self.is_causal, window=self.window)],
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.heads.query != self.heads.key,
            softcap=self.softcap,
            backend=self.backend,
        )
        return self.out_proj(merge_heads(out))


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another.

        out = Wo · attention(x·Wq, context·Wk, context·Wv)

    Arguments as `SelfAttention`, and kv_dim: size of a context token, default embed_dim.

    forward(query, context, mask=None, present=None, return_aux=None):
        query   (B, Nq, embed_dim)
        context (B, Ns, kv_dim)
        mask    as in SelfAttention, over the context: lengths (B,), keys (B, Ns), or (B, H, Nq, Ns)
        present (B,) bool: False = this sample has no context; its output is the bias of out_proj
        -> (B, Nq, embed_dim), or with return_aux=AuxRequest(...) a pair of that and an AuxOutput.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        qk_norm: bool = False,
        softcap: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.kv_dim = embed_dim, embed_dim if kv_dim is None else kv_dim
        self.heads = plan_heads(embed_dim, num_heads, num_kv_heads, head_dim)
        self.dropout = check_dropout(dropout)
        self.softcap, self.backend = softcap, backend
        self.query = QueryProjection(embed_dim, self.heads, bias=bias, qk_norm=qk_norm)
        self.key_value = KeyValueProjection(self.kv_dim, self.heads, bias=bias, qk_norm=qk_norm)
        self.out_proj = nn.Linear(self.heads.query * self.heads.dim, embed_dim, bias=bias)

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        present: Tensor | None = None,
        return_aux: AuxRequest | None = None,
    ) -> Tensor | tuple[Tensor, AuxOutput]:
        _check_tokens("query", query, self.embed_dim)
        _check_tokens("context", context, self.kv_dim)
        if context.shape[0] != query.shape[0]:
            raise ValueError(f"context has batch size {context.shape[0]}, query has {query.shape[0]}")
        if present is not None:
            if present.dtype != torch.bool or present.shape != context.shape[:1]:
                raise ValueError(
                    f"present must be bool of shape {tuple(context.shape[:1])}, "
                    f"got {present.dtype} of shape {tuple(present.shape)}"
                )
            context = context.masked_fill(~present[:, None, None], 0.0)
        context, mask = _drop_padding(context, mask)
        key, value = self.key_value(context)
        result = multi_source_attention(
            self.query(query),
            [Source(key, value, mask=mask, present=present)],
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.heads.query != self.heads.key,
            softcap=self.softcap,
            return_aux=return_aux,
            backend=self.backend,
        )
        if return_aux is None:
            return self.out_proj(merge_heads(result))
        out, aux = result
        return self.out_proj(merge_heads(out)), aux


class MultiSourceCrossAttention(nn.Module):
    """One query attending to several modalities at once, each with its own key and value projection.

        k_s, v_s = x_s·Wk_s, x_s·Wv_s      p = softmax over every token of every present modality
        out = Wo · Σ_s Σ_j p_sj v_sj

    Keys and values are never concatenated: each modality stays its own source of one attention call.
    `normalization="per_source"` softmaxes each modality alone and sums them with the learned `source_weights`
    (S,), which start at 1 (decoupled cross-attention: Ye et al., 2023, "IP-Adapter").

    Args: as `SelfAttention`, and
        kv_dims: modality name -> size of its tokens; the order of the dict is the order of the sources.

    forward(query, sources, mask=None, present=None, return_aux=None):
        query   (B, Nq, embed_dim)
        sources name -> (B, Ns, d) or (B, d); a missing name is an absent modality
        mask    name -> (B, Ns) bool, True = real token, or (B,) integer lengths
        present (B, S) bool in the order of kv_dims, or name -> (B,) bool
        -> (B, Nq, embed_dim), or with return_aux=AuxRequest(...) a pair of that and an AuxOutput whose
        source_mass (B, H, Nq, S) has a column for every modality of kv_dims, 0 where absent.
    An absent modality contributes nothing and gets gradient 0; with all absent the output is out_proj's bias.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kv_dims: Mapping[str, int],
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        qk_norm: bool = False,
        normalization: str = "joint",
        softcap: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if normalization not in ("joint", "per_source"):
            raise ValueError(f"normalization must be 'joint' or 'per_source', got {normalization!r}")
        self.embed_dim = embed_dim
        self.kv_dims = check_dims(kv_dims, "kv_dims")
        self.heads = plan_heads(embed_dim, num_heads, num_kv_heads, head_dim)
        self.dropout = check_dropout(dropout)
        self.normalization, self.softcap, self.backend = normalization, softcap, backend
        self.query = QueryProjection(embed_dim, self.heads, bias=bias, qk_norm=qk_norm)
        self.key_value = nn.ModuleDict(
            {
                name: KeyValueProjection(dim, self.heads, bias=bias, qk_norm=qk_norm)
                for name, dim in self.kv_dims.items()
            }
        )
        self.out_proj = nn.Linear(self.heads.query * self.heads.dim, embed_dim, bias=bias)
        self.source_weights: nn.Parameter | None = None
        if normalization == "per_source":
            self.source_weights = nn.Parameter(torch.ones(len(self.kv_dims)))

    def forward(
        self,
        query: Tensor,
        sources: Mapping[str, Tensor],
        mask: Mapping[str, Tensor | None] | None = None,
        present: Tensor | Mapping[str, Tensor] | None = None,
        return_aux: AuxRequest | None = None,
    ) -> Tensor | tuple[Tensor, AuxOutput]:
        _check_tokens("query", query, self.embed_dim)
        views = gather_modalities(sources, self.kv_dims, mask, present, like=query, argument="sources")
        listed = []
        for name, view in views.items():
            key, value = self.key_value[name](view.tokens)
            listed.append(Source(key, value, mask=view.mask, present=view.present))
        result = multi_source_attention(
            self.query(query),
            listed,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.heads.query != self.heads.key,
            softcap=self.softcap,
            normalization=self.normalization,
            source_weights=self.source_weights,
            return_aux=return_aux,
            backend=self.backend,
        )
        if return_aux is None:
            return self.out_proj(merge_heads(result))
        out, aux = result
        return self.out_proj(merge_heads(out)), aux


def _check_tokens(argument: str, x: Tensor, dim: int) -> None:
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"{argument} must have shape (B, N, {dim}), got {tuple(x.shape)}")


def _drop_padding(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Zero the tokens a per-key mask leaves out; a mask with a query dimension is passed on as it is."""
    if mask is None or mask.is_floating_point() or (mask.dtype == torch.bool and mask.dim() != 2):
        return x, mask
    keys = key_mask(mask, x.shape[0], x.shape[1]).to(x.device)
    return x.masked_fill(~keys[..., None], 0.0), keys
