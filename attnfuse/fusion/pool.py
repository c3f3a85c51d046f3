"""Pooling by attention: a few learned queries read the tokens of all modalities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from attnfuse.fusion.contract import ModalityFusion
from attnfuse.fusion.model import read_out
from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.layers import AttentionOptions, MultiSourceCrossAttention
from attnfuse.nn.modalities import Modality, positive

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


class AttentionPoolFusion(ModalityFusion):
    """Learned queries attend to the tokens of every modality at once; what they read is the representation.

        y_s   = norm_s(x_s·P_s)
        r_k   = norm(attention(query_k -> y_1, ..., y_S))         one softmax over all modalities
        fused = mean over k of r_k

    Pooling by multi-head attention of Lee, Lee, Kim, Kosiorek, Choi and Teh, 2019, "Set Transformer", less its
    residual of the query and its feed-forward part, over a list of sources that are never concatenated. Each
    modality is normalised on its own first: sharing one softmax, they should not compete by the scale of their
    features.

    fused is (B, embed_dim) whatever num_queries is, so that the number can be tuned without touching what
    follows: each query may look for something else, and the norm, taken before the mean, makes this more than
    one query with more heads. To keep the queries apart as tokens, use a resampler.

    Args:
        dims: modality name -> feature size; the order of the dict is the order of `present`.
        embed_dim: size E of the common width and of the result.
        num_heads: query heads.
        num_queries: K.
        num_kv_heads, dropout, qk_norm, backend: as `attnfuse.nn.MultiSourceCrossAttention`.

    forward(inputs, mask=None, present=None) -> FusionOutput(fused, per_modality, source_mass):
        inputs  name -> (B, N, d), or (B, d), which is one token
        mask    name -> (B, N) bool, True = real token, or (B,) integer lengths
        present (B, S) bool, or name -> (B,) bool
        fused (B, E); per_modality name -> y_s (B, N, E), 0 where absent or padded; source_mass (B, S), mean
        over heads and queries.
    All absent: fused is a learned constant, the same for every such sample, and source_mass is 0.
    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        embed_dim: int,
        num_heads: int,
        num_queries: int = 1,
        **attention: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dims)
        positive(num_queries, "num_queries")
        # first, because it checks the sizes it shares with what follows
        widths = dict.fromkeys(self.dims, embed_dim)
        self.attention = MultiSourceCrossAttention(embed_dim, num_heads, widths, **attention)
        self.embed = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(dim, embed_dim), nn.LayerNorm(embed_dim))
                for name, dim in self.dims.items()
            }
        )
        # as large as the tokens, which are normalised: queries that start near 0 would all read the same mean
        self.queries = nn.Parameter(torch.randn(num_queries, embed_dim))
        self.norm = nn.LayerNorm(embed_dim)

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        # Padded rows are 0 again after the bias of P_s and the norm, and carry no gradient into either.
        tokens = {
            name: self.embed[name](view.tokens).masked_fill(~view.visible[..., None], 0.0)
            for name, view in views.items()
        }
        _, read, mass = read_out(self.queries, self.attention, tokens, views)
        return FusionOutput(fused=self.norm(read).mean(1), per_modality=tokens, source_mass=mass)
