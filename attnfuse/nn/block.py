"""A pre-norm transformer block over several token streams that share its weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from attnfuse.functional import joint_attention
from attnfuse.nn.heads import merge_heads
from attnfuse.nn.layers import SelfAttention
from attnfuse.nn.rope import RotaryEmbedding
from attnfuse.problem import Stream


class JointBlock(nn.Module):
    """Every token of every stream attends to all streams; one set of weights, nothing concatenated.

        x_s = x_s + Wo · attention(q(norm x_s), all k(norm x_t), all v(norm x_t))
        x_s = x_s + mlp(norm x_s)

    With one stream this is the ordinary pre-norm block (Xiong et al., 2020, "On Layer Normalization in the
    Transformer Architecture"); with several it computes what the block would on their concatenation.

    Args: embed_dim, num_heads, num_kv_heads, qk_norm, rope, rope_interleaved and backend as `SelfAttention`;
    mlp_ratio: hidden size of the MLP over embed_dim; dropout: on attention probabilities and on both residual
    branches.

    forward(streams, masks=None, present=None, positions=None):
        streams list of (B, N_s, embed_dim); must be finite, padding included
        masks   list of (B, N_s) bool or None, True = real token
        present list of (B,) bool or None
        positions list of (N_s,) or (B, N_s) or None, which counts from 0 in each stream; with several axes
                (..., axes). Streams share the embedding: tokens of two streams at one position are at distance 0.
        -> list of (B, N_s, embed_dim). Padded rows come out finite and mean nothing.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        qk_norm: bool = False,
        rope: RotaryEmbedding | None = None,
        rope_interleaved: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = SelfAttention(
            embed_dim, num_heads, num_kv_heads=num_kv_heads, dropout=dropout, qk_norm=qk_norm, rope=rope,
            rope_interleaved=rope_interleaved, backend=backend,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(embed_dim)
        hidden = int(embed_dim * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, embed_dim)
        )
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        streams: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        present: Sequence[Tensor | None] | None = None,
        positions: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        for name, given in (("masks", masks), ("present", present), ("positions", positions)):
            if given is not None and len(given) != len(streams):
                raise ValueError(
                    f"{name} must have one entry per stream, got {len(given)} for {len(streams)}"
                )
        nothing = [None] * len(streams)
        parts = [
            Stream(*self.attn.project(self.norm1(x), where), mask=mask, present=here)
            for x, mask, here, where in zip(
                streams, masks or nothing, present or nothing, positions or nothing, strict=True
            )
        ]
        outs = joint_attention(
            parts,
            dropout_p=self.attn.dropout if self.training else 0.0,
            enable_gqa=self.attn.heads.query != self.attn.heads.key,
            backend=self.attn.backend,
        )
        mixed = [
            x + self.drop(self.attn.out_proj(merge_heads(out))) for x, out in zip(streams, outs, strict=True)
        ]
        return [x + self.drop(self.mlp(self.norm2(x))) for x in mixed]
