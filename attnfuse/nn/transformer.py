"""The residual branches of pre-norm transformer layers, and the layer that reads other modalities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from attnfuse.nn.layers import BranchOptions, MultiSourceCrossAttention, SelfAttention
from attnfuse.nn.modalities import Modality, presence_matrix
from attnfuse.problem import AuxRequest

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


class SelfBranch(nn.Module):
    """x + attention(norm x), over x itself.

    Args: as `SelfAttention`; dropout is on attention probabilities and on the branch.

    forward(x, mask=None): x (B, N, E), mask (B, N) bool, True = real token -> (B, N, E).
    """

    def __init__(self, embed_dim: int, num_heads: int, **attention: Unpack[BranchOptions]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.attn = SelfAttention(embed_dim, num_heads, **attention)
        self.drop = nn.Dropout(self.attn.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.drop(self.attn(self.norm(x), mask))


class CrossBranch(nn.Module):
    """x + attention(norm x -> norm_s y_s of every source), one softmax over all of them.

    Each source has a norm and a key and value projection of its own, and stays a source of its own: nothing
    is concatenated. Where no source is present the branch adds 0, not the bias of its output projection, so
    that sample goes by unchanged.

    Args: as `MultiSourceCrossAttention`; dropout is on attention probabilities and on the branch.

    forward(x, views, return_mass=False):
        x     (B, N, E)
        views name -> `Modality` for every name of kv_dims, in their order; tokens must be finite, padding
              included
        -> (B, N, E) and the source mass (B, S), mean over heads and queries; None if not asked for.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, kv_dims: Mapping[str, int], **attention: Unpack[BranchOptions]
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.attn = MultiSourceCrossAttention(embed_dim, num_heads, kv_dims, **attention)
        self.source_norms = nn.ModuleDict({name: nn.LayerNorm(dim) for name, dim in kv_dims.items()})
        self.drop = nn.Dropout(self.attn.dropout)

    def forward(
        self, x: Tensor, views: Mapping[str, Modality], return_mass: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        presence = presence_matrix(views)
        tokens = {name: self.source_norms[name](view.tokens) for name, view in views.items()}
        masks = {name: view.mask for name, view in views.items()}
        read, aux = self.attn(self.norm(x), tokens, masks, presence, AuxRequest(source_mass=return_mass))
        nobody = ~presence.any(1)[:, None, None]
        mass = aux.source_mass.mean((1, 2)) if return_mass else None
        return x + self.drop(read.masked_fill(nobody, 0.0)), mass


class MLPBranch(nn.Module):
    """x + W2 · gelu(W1 · norm x); dropout after the activation and on the branch."""

    def __init__(self, embed_dim: int, *, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.norm = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, embed_dim)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.mlp(self.norm(x)))


class CrossBlock(nn.Module):
    """A pre-norm layer of a stream that reads other modalities.

        x = x + cross(norm x -> norm_s y_s of every source)
        x = x + self(norm x)                                    if self_attention
        x = x + mlp(norm x)

    Args: as `CrossBranch`, and
        self_attention: whether the stream attends to itself after it has read the others.
        mlp_ratio: hidden size of the MLP over embed_dim.

    forward(x, views, mask=None): x (B, N, E), views as in `CrossBranch`, mask (B, N) bool over x for its
    self-attention, True = real token -> (B, N, E). Padded rows come out finite and mean nothing.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kv_dims: Mapping[str, int],
        *,
        self_attention: bool = False,
        mlp_ratio: float = 4.0,
        **attention: Unpack[BranchOptions],
    ) -> None:
        super().__init__()
        self.cross = CrossBranch(embed_dim, num_heads, kv_dims, **attention)
        self.own: SelfBranch | None = None
        if self_attention:
            self.own = SelfBranch(embed_dim, num_heads, **attention)
        self.mlp = MLPBranch(embed_dim, mlp_ratio=mlp_ratio, dropout=self.cross.attn.dropout)

    def forward(self, x: Tensor, views: Mapping[str, Modality], mask: Tensor | None = None) -> Tensor:
        x, _ = self.cross(x, views)
        if self.own is not None:
            x = self.own(x, mask)
        return self.mlp(x)
