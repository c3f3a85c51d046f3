"""Model-level fusion by learned queries that read every modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnfuse.fusion.contract import ModalityFusion
from attnfuse.fusion.model import embedded, embeddings, visible_only
from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.layers import AttentionOptions
from attnfuse.nn.modalities import Modality, positive
from attnfuse.nn.transformer import CrossBranch, MLPBranch, SelfBranch

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


class QFormerLayer(nn.Module):
    """Queries attend to one another, then to the modalities if the layer has a `cross` branch, then MLP."""

    def __init__(self, own: SelfBranch, cross: CrossBranch | None, mlp: MLPBranch) -> None:
        super().__init__()
        self.own, self.cross, self.mlp = own, cross, mlp

    def forward(self, x: Tensor, views: Mapping[str, Modality]) -> tuple[Tensor, Tensor | None]:
        """x (B, Q, E) -> (B, Q, E), and the source mass (B, S) of the cross branch, None without one."""
        x, mass = self.own(x), None
        if self.cross is not None:
            x, mass = self.cross(x, views, return_mass=True)
        return self.mlp(x), mass


class QFormer(ModalityFusion):
    """A fixed number of learned queries reads all modalities: Q vectors out, however many tokens came in.

        y_s   = tokens_s·P_s + modality_s (+ position_s)
        x     = queries                                             (Q, E), learned
        x     = x + attention(norm x -> norm x)                     ┐
        x     = x + attention(norm x -> norm y_1, ..., norm y_S)    │ num_layers times, the middle line
        x     = x + mlp(norm x)                                     ┘ in every cross_attention_every-th layer
        fused = mean over queries of norm x

    The querying transformer of Li et al., 2023, "BLIP-2: Bootstrapping Language-Image Pre-training with
    Frozen Image Encoders and Large Language Models", for any number of modalities: the queries read them in
    one attention call as a list of sources, each with its own key and value projection, and nothing is
    concatenated. Pre-norm, where the paper starts from BERT's post-norm; the paper's text branch, which
    shares the self-attention, is not here: give text as a modality.

    Args:
        dims: modality name -> feature size; the order of the dict is the order of `present`.
        embed_dim, num_heads, num_layers: size of the transformer.
        num_queries: Q, 32 in the paper.
        cross_attention_every: layers 0, n, 2n, ... read the modalities; 2 in the paper.
        max_lengths: modality name -> longest sequence; gives that modality learned positions. Modalities not
            named are sets of tokens, or bring positions from their encoder.
        num_kv_heads, mlp_ratio, dropout, qk_norm, backend: as `attnfuse.nn.JointBlock`.

    forward(inputs, mask=None, present=None) -> FusionOutput(fused, per_modality, source_mass):
        inputs  name -> (B, N, d), or (B, d), which is one token
        mask    name -> (B, N) bool, True = real token, or (B,) integer lengths
        present (B, S) bool, or name -> (B,) bool
        fused (B, E); per_modality name -> (B, N, E), the tokens y_s that the queries read; source_mass (B, S),
        mean over heads, queries and the layers that read.
    `queries`, with the same arguments, returns what became of each query, (B, Q, E).
    All absent: the queries see only one another, so fused is a learned constant; source_mass is 0.
    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        num_queries: int = 32,
        *,
        cross_attention_every: int = 2,
        max_lengths: Mapping[str, int] | None = None,
        mlp_ratio: float = 4.0,
        **attention: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dims)
        for argument, value in (
            ("num_layers", num_layers),
            ("num_queries", num_queries),
            ("cross_attention_every", cross_attention_every),
        ):
            positive(value, argument)

        def layer(reads: bool) -> QFormerLayer:
            own = SelfBranch(embed_dim, num_heads, **attention)
            cross = None
            if reads:
                cross = CrossBranch(embed_dim, num_heads, dict.fromkeys(self.dims, embed_dim), **attention)
            return QFormerLayer(own, cross, MLPBranch(embed_dim, mlp_ratio=mlp_ratio, dropout=own.attn.dropout))

        self.embed = embeddings(self.dims, embed_dim, max_lengths)
        self.query = nn.Parameter(0.02 * torch.randn(num_queries, embed_dim))
        self.layers = nn.ModuleList(layer(depth % cross_attention_every == 0) for depth in range(num_layers))
        self.norm = nn.LayerNorm(embed_dim)

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        known = embedded(self.embed, views)
        x, mass = self._read(known)
        tokens = visible_only(views, [view.tokens for view in known.values()])
        return FusionOutput(fused=x.mean(1), per_modality=tokens, source_mass=mass)

    def queries(
        self,
        inputs: Mapping[str, Tensor],
        mask: Mapping[str, Tensor | None] | None = None,
        present: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The queries' outputs (B, Q, E), whose mean is `fused`: a language model's soft prompt, for one.

        Arguments as `forward`. A plain method: hooks on the module's call do not run.
        """
        return self._read(embedded(self.embed, self.views(inputs, mask, present)))[0]

    def _read(self, views: Mapping[str, Modality]) -> tuple[Tensor, Tensor]:
        """The normed queries (B, Q, E) after all layers, and the mean source mass (B, S)."""
        batch = next(iter(views.values())).tokens.shape[0]
        x = self.query.expand(batch, -1, -1)
        masses = []
        for layer in self.layers:
            x, mass = layer(x, views)
            if mass is not None:
                masses.append(mass)
        return self.norm(x), torch.stack(masses).mean(0)
