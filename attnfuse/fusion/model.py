"""Model-level fusion: modalities meet inside the network, by attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnfuse.fusion.contract import ModalityFusion
from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.block import JointBlock
from attnfuse.nn.layers import AttentionOptions, MultiSourceCrossAttention
from attnfuse.nn.modalities import Modality, check_dims, masked_mean, positive, presence_matrix
from attnfuse.problem import AuxRequest

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


class TokenEmbedding(nn.Module):
    """A modality's features as tokens of the common width: projection + modality (+ position) embedding.

        (B, N, d) -> (B, N, E)

    max_length: size of a learned table of positions; None leaves positions to the encoder before.
    """

    def __init__(self, name: str, dim: int, embed_dim: int, max_length: int | None) -> None:
        super().__init__()
        self.name = name
        self.proj = nn.Linear(dim, embed_dim)
        self.modality = nn.Parameter(0.02 * torch.randn(embed_dim))
        self.position: nn.Parameter | None = None
        if max_length is not None:
            self.position = nn.Parameter(0.02 * torch.randn(max_length, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.proj(tokens) + self.modality
        if self.position is None:
            return embedded
        length, limit = tokens.shape[1], self.position.shape[0]
        if length > limit:
            raise ValueError(f"inputs[{self.name!r}] has {length} tokens, max_lengths allows {limit}")
        return embedded + self.position[:length]


class MultimodalTransformer(ModalityFusion):
    """Any modalities in, one representation out: a transformer over the tokens of all of them.

        x_s   = tokens_s·P_s + modality_s (+ position_s)
        x_s   = block(x_s attends to every x_t)                       num_layers times, weights shared
        fused = norm(query + attention(query -> norm x_1, ..., norm x_S))

    A single-stream encoder (Chen et al., 2020, "UNITER") with a pre-norm block, except that the streams stay
    apart: every attention runs over the list of modalities and nothing is concatenated. A learned query reads
    the result; its attention is `source_mass`.

    Args:
        dims: modality name -> feature size; the order of the dict is the order of `present`.
        embed_dim, num_heads, num_layers: size of the transformer.
        max_lengths: modality name -> longest sequence; gives that modality learned positions. Modalities not
            named are sets of tokens, or bring positions from their encoder.
        num_kv_heads, mlp_ratio, dropout, qk_norm, backend: as `attnfuse.nn.JointBlock`.

    forward(inputs, mask=None, present=None) -> FusionOutput(fused, per_modality, source_mass):
        inputs  name -> (B, N, d), or (B, d), which is one token
        mask    name -> (B, N) bool, True = real token, or (B,) integer lengths
        present (B, S) bool, or name -> (B,) bool
        fused (B, E); per_modality name -> (B, N, E) tokens; source_mass (B, S), mean over heads.
    All absent: fused is a learned constant, the same for every such sample, and source_mass is 0.
    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        *,
        max_lengths: Mapping[str, int] | None = None,
        mlp_ratio: float = 4.0,
        **attention: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dims)
        positive(num_layers, "num_layers")
        self.embed = embeddings(self.dims, embed_dim, max_lengths)
        self.blocks = nn.ModuleList(
            JointBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, **attention) for _ in range(num_layers)
        )
        self.token_norm = nn.LayerNorm(embed_dim)
        self.query = nn.Parameter(0.02 * torch.randn(1, embed_dim))
        self.readout = MultiSourceCrossAttention(embed_dim, num_heads, dict.fromkeys(self.dims, embed_dim), **attention)
        self.fused_norm = nn.LayerNorm(embed_dim)

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        masks = [view.mask for view in views.values()]
        present = [view.present for view in views.values()]
        streams = [self.embed[name](view.tokens) for name, view in views.items()]
        for block in self.blocks:
            streams = block(streams, masks, present)
        tokens = visible_only(views, [self.token_norm(x) for x in streams])

        query, read, mass = read_out(self.query, self.readout, tokens, views)
        fused = self.fused_norm(query + read).squeeze(1)
        return FusionOutput(fused=fused, per_modality=tokens, source_mass=mass)


class BottleneckFusion(ModalityFusion):
    """Multimodal bottleneck transformer: modalities meet in a few tokens only.

        layers before fusion_layer    x_s = block_s(x_s attends to x_s)
        the others                    x_s, z_s = block_s((x_s, z) attend to both),  z = mean of present z_s
        fused                         mean over present s of the mean over tokens of norm x_s

    MBT of Nagrani et al., 2021, "Attention Bottlenecks for Multimodal Fusion". Modalities never see one
    another: all of them read the same few bottleneck tokens z (K, E), each writes its own update, and the
    updates of the modalities present are averaged. Tokens and bottleneck are two sources of one attention,
    not a concatenation. What one modality writes in a layer the others read in the next, so information
    crosses if at least two layers have a bottleneck. The last update of z is read by nobody, as in the paper,
    which averages per-modality predictions; here the representations are averaged, token means standing for
    CLS.

    Args:
        dims: modality name -> feature size; the order of the dict is the order of `present`.
        embed_dim, num_heads, num_layers: size of each modality's transformer.
        num_bottlenecks: K, 4 in the paper.
        fusion_layer: first layer (from 0) with a bottleneck; the paper's best is 8 of 12. Default: all.
        max_lengths, num_kv_heads, mlp_ratio, dropout, qk_norm, backend: as `MultimodalTransformer`.

    forward as `MultimodalTransformer`, without source_mass -> FusionOutput(fused (B, E), per_modality name ->
    (B, N, E) tokens). All absent: fused is 0. Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        num_bottlenecks: int = 4,
        fusion_layer: int = 0,
        *,
        max_lengths: Mapping[str, int] | None = None,
        mlp_ratio: float = 4.0,
        **attention: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dims)
        positive(num_bottlenecks, "num_bottlenecks")
        if not 0 <= fusion_layer < num_layers:
            raise ValueError(
                f"fusion_layer must be in 0..num_layers-1 = {num_layers - 1}, got {fusion_layer}"
            )
        self.fusion_layer = fusion_layer
        self.embed = embeddings(self.dims, embed_dim, max_lengths)
        self.bottleneck = nn.Parameter(0.02 * torch.randn(num_bottlenecks, embed_dim))
        # layers[name][depth]: every modality has a transformer of its own
        self.layers = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    JointBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, **attention) for _ in range(num_layers)
                )
                for name in self.dims
            }
        )
        self.norms = nn.ModuleDict({name: nn.LayerNorm(embed_dim) for name in self.dims})

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        presence = presence_matrix(views)
        streams = {name: self.embed[name](view.tokens) for name, view in views.items()}
        bottleneck = self.bottleneck.expand(presence.shape[0], -1, -1)
        for depth, blocks in enumerate(zip(*self.layers.values(), strict=True)):
            updates = []
            for (name, view), block in zip(views.items(), blocks, strict=True):
                if depth < self.fusion_layer:
                    (streams[name],) = block([streams[name]], [view.mask], [view.present])
                    continue
                pair = [streams[name], bottleneck]
                streams[name], update = block(pair, [view.mask, None], [view.present, None])
                updates.append(update)
            if updates:
                bottleneck = mean_over_present(torch.stack(updates, 1), presence)

        tokens = visible_only(views, [self.norms[name](x) for name, x in streams.items()])
        pooled = [masked_mean(tokens[name], view.visible) for name, view in views.items()]
        fused = mean_over_present(torch.stack(pooled, 1), presence)
        return FusionOutput(fused=fused, per_modality=tokens)


def embeddings(dims: dict[str, int], embed_dim: int, max_lengths: Mapping[str, int] | None) -> nn.ModuleDict:
    lengths = {} if max_lengths is None else check_dims(max_lengths, "max_lengths") if max_lengths else {}
    unknown = [name for name in lengths if name not in dims]
    if unknown:
        raise ValueError(f"max_lengths has unknown modalities {unknown}, accepted are {list(dims)}")
    return nn.ModuleDict(
        {name: TokenEmbedding(name, dim, embed_dim, lengths.get(name)) for name, dim in dims.items()}
    )


def embedded(embed: nn.ModuleDict, views: Mapping[str, Modality]) -> dict[str, Modality]:
    """The views with their tokens embedded."""
    return {name: Modality(embed[name](view.tokens), view.mask, view.present) for name, view in views.items()}


def read_out(
    queries: Tensor, attention: MultiSourceCrossAttention, tokens: dict[str, Tensor], views: Mapping[str, Modality]
) -> tuple[Tensor, Tensor, Tensor]:
    """Learned queries (K, E), one set a sample: they, what they read, both (B, K, E), and the source mass (B, S)."""
    presence = presence_matrix(views)
    masks = {name: view.mask for name, view in views.items()}
    queries = queries.expand(presence.shape[0], -1, -1)
    read, aux = attention(queries, tokens, masks, presence, AuxRequest(source_mass=True))
    return queries, read, aux.source_mass.mean((1, 2))


def visible_only(views: Mapping[str, Modality], streams: list[Tensor]) -> dict[str, Tensor]:
    """Tokens by name, 0 where padded or absent: past this point nobody can read a row that means nothing."""
    return {
        name: x.masked_fill(~view.visible[..., None], 0.0)
        for (name, view), x in zip(views.items(), streams, strict=True)
    }


def mean_over_present(stacked: Tensor, presence: Tensor) -> Tensor:
    """(B, S, ..., E), (B, S) -> (B, ..., E): the mean over present modalities, 0 where there are none."""
    shape = presence.shape + (1,) * (stacked.dim() - 2)
    count = presence.sum(1).clamp_min(1).view(-1, *(1,) * (stacked.dim() - 2))
    return stacked.masked_fill(~presence.view(shape), 0.0).sum(1) / count
