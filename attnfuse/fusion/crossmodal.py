"""Model-level fusion in which every modality keeps a stream of its own and reads the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnfuse.fusion.contract import ModalityFusion
from attnfuse.fusion.model import embedded, embeddings, mean_over_present, read_out, visible_only
from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.block import JointBlock
from attnfuse.nn.layers import AttentionOptions, BranchOptions, MultiSourceCrossAttention
from attnfuse.nn.modalities import Modality, gather_modalities, key_mask, positive, presence_matrix
from attnfuse.nn.transformer import CrossBlock

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


class _Route(nn.Module):
    """The layers by which one stream reads `sources`, all of them reading the same views.

    (x (B, N, E), views) -> x (B, N, E), and (B,) bool: whether there was anybody to read.
    """

    def __init__(self, sources: Sequence[str], layers: Iterable[CrossBlock]) -> None:
        super().__init__()
        self.sources = tuple(sources)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, views: Mapping[str, Modality]) -> tuple[Tensor, Tensor]:
        read = {name: views[name] for name in self.sources}
        for layer in self.layers:
            x = layer(x, read)
        return x, presence_matrix(read).any(1)


class _Stream(nn.Module):
    """What becomes of one modality: the mean of its routes, then its own layers, then a norm."""

    def __init__(self, routes: Iterable[_Route], own: Iterable[JointBlock], embed_dim: int) -> None:
        super().__init__()
        self.routes = nn.ModuleDict({"+".join(route.sources): route for route in routes})
        self.own = nn.ModuleList(own)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, target: str, views: Mapping[str, Modality]) -> Tensor:
        view = views[target]
        x = self._read_others(view.tokens, views)
        for block in self.own:
            (x,) = block([x], [view.mask], [view.present])
        return self.norm(x)

    def _read_others(self, x: Tensor, views: Mapping[str, Modality]) -> Tensor:
        """(B, N, E): the mean over the routes with anybody to read; x where there are none."""
        if not self.routes:
            return x
        results, heard = zip(*(route(x, views) for route in self.routes.values()), strict=True)
        anybody = torch.stack(heard, 1)
        mean = mean_over_present(torch.stack(results, 1), anybody)
        return torch.where(anybody.any(1)[:, None, None], mean, x)


class CrossmodalTransformer(ModalityFusion):
    """Every modality's stream is updated by every other modality, then by itself.

        y_s   = tokens_s·P_s + modality_s (+ position_s)
        x_s   = y_s
        x_s   = x_s + attention(norm x_s -> norm y_t of every t != s)     ┐ num_layers times
        x_s   = x_s + mlp(norm x_s)                                       ┘
        x_s   = block_s(x_s attends to x_s)                               num_self_layers times
        fused = norm(query + attention(query -> norm x_1, ..., norm x_S))

    MulT of Tsai et al., 2019, "Multimodal Transformer for Unaligned Multimodal Language Sequences". As there,
    all layers read the others as they came in (y_t), so the order of the modalities does not matter and none
    has to be aligned with another. What differs from the paper:

    - The paper has one directional transformer for each ordered pair, S·(S-1) of them, and concatenates the
      results of a target along the features, so its width grows with S. Here a stream reads all the others in
      one attention call, each other modality a source with its own key and value projection; one softmax
      decides between modalities as well as between tokens. Nothing is concatenated.
    - `pairwise=True` is the paper's form: one directional transformer for each ordered pair. The results of a
      target are averaged over the partners that are present rather than concatenated, so that an absent
      partner leaves no hole. With two modalities both forms are the same.
    - A learned query reads the streams, where the paper takes their last elements, which padding would move;
      its attention is `source_mass`. Features come in by a linear layer and not by a convolution.

    A stream with no other modality present for its sample has nobody to read and skips the layers that read.

    Args:
        dims: modality name -> feature size; the order of the dict is the order of `present`.
        embed_dim, num_heads, num_layers: size of the layers that read the other modalities.
        num_self_layers: layers of self-attention over each stream after that; may be 0.
        pairwise: one stack of layers for each ordered pair, as above.
        max_lengths: modality name -> longest sequence; gives that modality learned positions. Modalities not
            named are sets of tokens, or bring positions from their encoder.
        num_kv_heads, mlp_ratio, dropout, qk_norm, backend: as `attnfuse.nn.JointBlock`.

    forward(inputs, mask=None, present=None) -> FusionOutput(fused, per_modality, source_mass):
        inputs  name -> (B, N, d), or (B, d), which is one token
        mask    name -> (B, N) bool, True = real token, or (B,) integer lengths
        present (B, S) bool, or name -> (B,) bool
        fused (B, E); per_modality name -> (B, N, E) tokens; source_mass (B, S), mean over heads.
    All absent: fused is norm(query), a learned constant, and source_mass is 0. Raises TypeError or ValueError
    naming the argument.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        *,
        num_self_layers: int = 1,
        pairwise: bool = False,
        max_lengths: Mapping[str, int] | None = None,
        mlp_ratio: float = 4.0,
        **attention: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dims)
        positive(num_layers, "num_layers")
        if num_self_layers < 0:
            raise ValueError(f"num_self_layers must not be negative, got {num_self_layers}")

        def route(sources: Sequence[str]) -> _Route:
            layers = [
                CrossBlock(
                    embed_dim, num_heads, dict.fromkeys(sources, embed_dim), mlp_ratio=mlp_ratio, **attention
                )
                for _ in range(num_layers)
            ]
            return _Route(sources, layers)

        def stream(target: str) -> _Stream:
            others = [name for name in self.dims if name != target]
            together = [[name] for name in others] if pairwise else [others] if others else []
            own = [
                JointBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, **attention) for _ in range(num_self_layers)
            ]
            return _Stream([route(sources) for sources in together], own, embed_dim)

        self.embed = embeddings(self.dims, embed_dim, max_lengths)
        self.streams = nn.ModuleDict({name: stream(name) for name in self.dims})
        self.query = nn.Parameter(0.02 * torch.randn(1, embed_dim))
        self.readout = MultiSourceCrossAttention(embed_dim, num_heads, dict.fromkeys(self.dims, embed_dim), **attention)
        self.fused_norm = nn.LayerNorm(embed_dim)

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        known = embedded(self.embed, views)
        tokens = visible_only(views, [stream(name, known) for name, stream in self.streams.items()])

        query, read, mass = read_out(self.query, self.readout, tokens, views)
        read = read.masked_fill(~presence_matrix(views).any(1)[:, None, None], 0.0)
        fused = self.fused_norm(query + read).squeeze(1)
        return FusionOutput(fused=fused, per_modality=tokens, source_mass=mass)


class CoAttentionBlock(nn.Module):
    """Two streams that read each other: a attends to b and b attends to a, both as they came in.

        a', b' = a + attention(norm a -> norm b),  b + attention(norm b -> norm a)
        a', b' = a' + self(norm a'),               b' + self(norm b')               if self_attention
        a', b' = a' + mlp(norm a'),                b' + mlp(norm b')

    The co-attention layer of Lu et al., 2019, "ViLBERT: Pretraining Task-Agnostic Visiolinguistic
    Representations for Vision-and-Language Tasks"; with self_attention=True the cross-modality layer of Tan
    and Bansal, 2019, "LXMERT: Learning Cross-Modality Encoder Representations from Transformers". Pre-norm,
    where both papers norm after the residual. The streams may differ in width and length, and share no
    weights. Softmax runs over the keys of one sample: no sample moves another.

    Args:
        dim_a, dim_b: width of each stream.
        num_heads: heads of both directions; must divide both widths unless head_dim is given.
        self_attention: whether each stream attends to itself after it has read the other.
        num_kv_heads, head_dim, dropout, qk_norm, backend: as `attnfuse.nn.SelfAttention`; dropout also on the
            residual branches.
        mlp_ratio: hidden size of each MLP over its stream's width.

    forward(a, b, mask_a=None, mask_b=None, present_a=None, present_b=None) -> (a, b):
        a         (B, Na, dim_a)
        b         (B, Nb, dim_b)
        mask_*    (B, N) bool, True = real token, or (B,) integer lengths
        present_* (B,) bool
    A partner that is absent, or has no real token, adds 0 to the stream that would read it. Padded rows and
    absent samples come out as 0 and get gradient 0. Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        dim_a: int,
        dim_b: int,
        num_heads: int,
        *,
        self_attention: bool = False,
        mlp_ratio: float = 4.0,
        **attention: Unpack[BranchOptions],
    ) -> None:
        super().__init__()

        def side(dim: int, partner: str, partner_dim: int) -> CrossBlock:
            return CrossBlock(
                dim,
                num_heads,
                {partner: partner_dim},
                self_attention=self_attention,
                mlp_ratio=mlp_ratio,
                **attention,
            )

        self.dims = {"a": positive(dim_a, "dim_a"), "b": positive(dim_b, "dim_b")}
        self.block_a = side(dim_a, "b", dim_b)
        self.block_b = side(dim_b, "a", dim_a)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        mask_a: Tensor | None = None,
        mask_b: Tensor | None = None,
        present_a: Tensor | None = None,
        present_b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        inputs, masks = {"a": a, "b": b}, {"a": mask_a, "b": mask_b}
        present = {name: x for name, x in (("a", present_a), ("b", present_b)) if x is not None}
        self._check(inputs, masks, present)
        views = gather_modalities(inputs, self.dims, masks, present)
        out_a = self.block_a(views["a"].tokens, {"b": views["b"]}, views["a"].mask)
        out_b = self.block_b(views["b"].tokens, {"a": views["a"]}, views["b"].mask)
        visible = visible_only(views, [out_a, out_b])
        return visible["a"], visible["b"]

    def _check(
        self, inputs: Mapping[str, Tensor], masks: Mapping[str, Tensor | None], present: Mapping[str, Tensor]
    ) -> None:
        """What `gather_modalities` would refuse, in the words of this signature."""
        for name, x in inputs.items():
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name} must be a floating-point tensor, got {got}")
            if x.dim() != 3 or x.shape[2] != self.dims[name]:
                raise ValueError(f"{name} must have shape (B, N, {self.dims[name]}), got {tuple(x.shape)}")
        batch = inputs["a"].shape[0]
        if inputs["b"].shape[0] != batch:
            raise ValueError(f"b has batch size {inputs['b'].shape[0]}, a has {batch}")
        for name, mask in masks.items():
            if mask is not None:
                key_mask(mask, batch, inputs[name].shape[1], f"mask_{name}")
        for name, here in present.items():
            if not isinstance(here, Tensor) or here.dtype != torch.bool:
                got = here.dtype if isinstance(here, Tensor) else type(here).__name__
                raise TypeError(f"present_{name} must be a bool tensor, got {got}")
            if here.shape != (batch,):
                raise ValueError(f"present_{name} must have shape {(batch,)}, got {tuple(here.shape)}")
