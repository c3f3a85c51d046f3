"""Every fusion layer of the library as a classifier of AV-digits: the same encoders below, a linear layer above.

    tokens_s = encoder_s(x_s)            a linear layer, learned positions, one transformer layer, a norm
    fused    = the layer under test, at its smallest depth
    logits   = Linear(fused)             at decision level: logits_s = Linear_s(mean tokens_s), then the layer

`LAYERS` is the table; `bench/fusion_study.py` trains what it names. `ALONE` is the one model without encoders below:
a whole multimodal transformer of one layer, whose attention is between the raw tokens of both modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnfuse import AuxRequest
from attnfuse.cli.demo import DIMS, HEADS, MAX_LENGTHS, NUM_CLASSES, WIDTH, JointClassifier, Loss, cross_entropy
from attnfuse.fusion import (
    AttentionPoolFusion,
    BottleneckFusion,
    CoAttentionBlock,
    ConcatFusion,
    CrossmodalTransformer,
    DecoupledCrossAttention,
    EvidentialFusion,
    FiLM,
    FusionOutput,
    GatedCrossAttentionBlock,
    GatedMultimodalUnit,
    JointAttention,
    LateFusion,
    LowRankTensorFusion,
    MissingModalityToken,
    MMDiTBlock,
    MultimodalTransformer,
    MultiSourceCrossAttention,
    PerceiverResampler,
    ProductOfExperts,
    QFormer,
    StackingFusion,
    SumFusion,
    TensorFusion,
    evidential_loss,
)
from attnfuse.fusion.model import TokenEmbedding
from attnfuse.nn import JointBlock
from attnfuse.nn.modalities import Modality, gather_modalities, presence_matrix

Views = dict[str, Modality]
NAMES = list(DIMS)
WIDTHS = dict.fromkeys(NAMES, WIDTH)
HEAD_DIM = WIDTH // HEADS
SQUEEZED = 8  # features of each modality that the outer product multiplies, RANK terms where it is in low rank
RANK = 4
QUERIES = 4  # latents, queries and bottlenecks of the layers that have several


class Encoder(nn.Module):
    """One modality's tokens in, tokens (B, N, WIDTH) out; 0 where padded or absent."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.embed = TokenEmbedding(name, DIMS[name], WIDTH, MAX_LENGTHS[name])
        self.block = JointBlock(WIDTH, HEADS)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, view: Modality) -> Modality:
        (x,) = self.block([self.embed(view.tokens)], [view.mask], [view.present])
        return Modality(self.norm(x).masked_fill(~view.visible[..., None], 0.0), view.mask, view.present)


class Classifier(nn.Module):
    """`top` on the encoders of all modalities: the face that `attnfuse.cli.demo` trains and tests."""

    def __init__(self, top: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: Encoder(name) for name in NAMES})
        self.top = top

    def forward(self, inputs: Mapping[str, Tensor], mask: Mapping[str, Tensor], present: Tensor) -> FusionOutput:
        views = gather_modalities(inputs, DIMS, mask, present)
        out: FusionOutput = self.top({name: self.encoders[name](view) for name, view in views.items()})
        return out


class Headed(nn.Module):
    """A layer and a linear classifier of what it makes; subclasses say how the layer is called."""

    def __init__(self, layer: nn.Module, size: int = WIDTH) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(size, NUM_CLASSES)

    def forward(self, views: Views) -> FusionOutput:
        out = self.fuse(views)
        return out._replace(logits=self.head(out.fused))

    def fuse(self, views: Views) -> FusionOutput:
        """Modules with the library's own signature."""
        inputs, mask = tokens(views), masks(views)
        out: FusionOutput = self.layer(inputs, mask, presence_matrix(views))
        return out


class Squeezed(Headed):
    """TensorFusion after a projection to a few features each, as in its paper."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.squeeze = nn.ModuleDict({name: nn.Linear(WIDTH, SQUEEZED) for name in NAMES})

    def fuse(self, views: Views) -> FusionOutput:
        few = {name: self.squeeze[name](x) for name, x in pooled(views).items()}
        out: FusionOutput = self.layer(few, present=presence_matrix(views))
        return out


class Conditioned(Headed):
    """FiLM: the sound scales and shifts the features of the image, which are 0 where there is none."""

    def fuse(self, views: Views) -> FusionOutput:
        image, audio = views.values()
        return FusionOutput(fused=self.layer(image.pooled(), audio.tokens, audio.present, audio.mask))


class Queried(Headed):
    """Cross-attention layers: one learned query reads both modalities."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.query = nn.Parameter(torch.randn(1, WIDTH))

    def fuse(self, views: Views) -> FusionOutput:
        presence = presence_matrix(views)
        query, request = self.query.expand(len(presence), 1, -1), AuxRequest(source_mass=True)
        read, aux = self.layer(query, tokens(views), masks(views), presence, request)
        return FusionOutput(fused=read.squeeze(1), source_mass=aux.source_mass.mean((1, 2)))


class Gated(Queried):
    """GatedCrossAttentionBlock: the learned query stands for the text, and both modalities are media."""

    def fuse(self, views: Views) -> FusionOutput:
        presence = presence_matrix(views)
        media, visible = side_by_side(views)
        query, request = self.query.expand(len(presence), 1, -1), AuxRequest(source_mass=True)
        x, aux = self.layer(query, media, mask=visible, present=presence, return_aux=request)
        return FusionOutput(fused=x.squeeze(1), source_mass=aux.source_mass.mean((1, 2)))


class Resampled(Headed):
    """PerceiverResampler: image and sound are two frames of one medium, which the latents read together."""

    def fuse(self, views: Views) -> FusionOutput:
        media, visible = side_by_side(views)
        return FusionOutput(fused=self.layer(media[:, None], visible[:, None]).mean((1, 2)))


class Streamed(Headed):
    """Blocks that take and give two streams: their means, averaged over those that are present."""

    def fuse(self, views: Views) -> FusionOutput:
        streams = self.layer(*self.arguments(list(views.values())))
        after = [Modality(x, view.mask, view.present) for x, view in zip(streams, views.values(), strict=True)]
        count = presence_matrix(views).sum(1, keepdim=True).clamp_min(1)
        return FusionOutput(fused=torch.stack([view.pooled() for view in after]).sum(0) / count)

    def arguments(self, views: list[Modality]) -> tuple[object, ...]:
        """of CoAttentionBlock"""
        return (*(v.tokens for v in views), *(v.mask for v in views), *(v.present for v in views))


class Listed(Streamed):
    """JointAttention, and MMDiTBlock without a condition."""

    def __init__(self, layer: nn.Module, *more: object) -> None:
        super().__init__(layer)
        self.more = more

    def arguments(self, views: list[Modality]) -> tuple[object, ...]:
        lists = ([v.tokens for v in views], [v.mask for v in views], *self.more, [v.present for v in views])
        return lists


class Filled(Headed):
    """MissingModalityToken, and ConcatFusion of what it fills in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.after = ConcatFusion(WIDTHS, WIDTH)

    def fuse(self, views: Views) -> FusionOutput:
        out: FusionOutput = self.after(*self.layer(tokens(views), masks(views), presence_matrix(views)))
        return out


class Decided(nn.Module):
    """A linear classifier for each modality, and a layer that fuses what they say."""

    def __init__(self, layer: nn.Module, size: int = NUM_CLASSES) -> None:
        super().__init__()
        self.layer = layer
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name in NAMES})

    def forward(self, views: Views) -> FusionOutput:
        said = {name: self.heads[name](x) for name, x in pooled(views).items()}
        out: FusionOutput = self.layer(said, present=presence_matrix(views))
        return out


class Believed(Decided):
    """ProductOfExperts: each modality says a Gaussian, and the mean of their product is classified."""

    def __init__(self, layer: ProductOfExperts) -> None:
        super().__init__(layer, 2 * layer.dim)
        self.head = nn.Linear(layer.dim, NUM_CLASSES)

    def forward(self, views: Views) -> FusionOutput:
        out = super().forward(views)
        return out._replace(logits=self.head(out.fused))


def tokens(views: Views) -> dict[str, Tensor]:
    return {name: view.tokens for name, view in views.items()}


def masks(views: Views) -> dict[str, Tensor | None]:
    return {name: view.mask for name, view in views.items()}


def pooled(views: Views) -> dict[str, Tensor]:
    return {name: view.pooled() for name, view in views.items()}


def side_by_side(views: Views) -> tuple[Tensor, Tensor]:
    """(B, S, N, WIDTH), padded to the longest, and which of it is real (B, S, N)."""
    longest = max(view.tokens.shape[1] for view in views.values())
    padded = [(view, longest - view.tokens.shape[1]) for view in views.values()]
    media = torch.stack([F.pad(view.tokens, (0, 0, 0, short)) for view, short in padded], 1)
    return media, torch.stack([F.pad(view.visible, (0, short)) for view, short in padded], 1)


def of_evidence(method: str, out: FusionOutput, label: Tensor, present: Tensor, epoch: int) -> Tensor:
    """The loss of Han et al., 2021: of the fused evidence and of each modality's own, its penalty annealed."""
    assert out.fused is not None and out.per_modality is not None
    alphas = [out.fused, *(1 + evidence for evidence in out.per_modality.values())]
    return torch.stack([evidential_loss(alpha, label, epoch, method=method) for alpha in alphas]).sum()


class Layer(NamedTuple):
    """level, what to put on the encoders, and the loss it is trained with."""

    level: str
    build: Callable[[], nn.Module]
    loss: Loss = cross_entropy


def late(method: str) -> Layer:
    return Layer("decision", lambda: Decided(LateFusion(NAMES, NUM_CLASSES, method)))


def evidential(method: str) -> Layer:
    fusion = lambda: Decided(EvidentialFusion(NUM_CLASSES, names=NAMES))  # noqa: E731
    return Layer("decision", fusion, partial(of_evidence, method))


LAYERS: dict[str, Layer] = {
    "ConcatFusion": Layer("feature", lambda: Headed(ConcatFusion(WIDTHS, WIDTH))),
    "SumFusion": Layer("feature", lambda: Headed(SumFusion(WIDTHS, WIDTH))),
    "GatedMultimodalUnit": Layer("feature", lambda: Headed(GatedMultimodalUnit(WIDTHS, WIDTH))),
    "FiLM": Layer("feature", lambda: Conditioned(FiLM(WIDTH, WIDTH))),
    "TensorFusion": Layer("feature", lambda: Squeezed(TensorFusion(dict.fromkeys(NAMES, SQUEEZED), WIDTH))),
    "LowRankTensorFusion": Layer("feature", lambda: Headed(LowRankTensorFusion(WIDTHS, WIDTH, RANK))),
    "AttentionPoolFusion": Layer("feature", lambda: Headed(AttentionPoolFusion(WIDTHS, WIDTH, HEADS))),
    "MultiSourceCrossAttention": Layer("model", lambda: Queried(MultiSourceCrossAttention(WIDTH, HEADS, WIDTHS))),
    "DecoupledCrossAttention": Layer(
        "model", lambda: Queried(DecoupledCrossAttention(WIDTH, HEADS, WIDTHS, learn_scales=True))
    ),
    "CrossmodalTransformer": Layer(
        "model", lambda: Headed(CrossmodalTransformer(WIDTHS, WIDTH, HEADS, 1, num_self_layers=0))
    ),
    "CoAttentionBlock": Layer("model", lambda: Streamed(CoAttentionBlock(WIDTH, WIDTH, HEADS))),
    # two layers: what one modality writes in a layer the other reads in the next
    "BottleneckFusion": Layer("model", lambda: Headed(BottleneckFusion(WIDTHS, WIDTH, HEADS, 2, QUERIES))),
    "PerceiverResampler": Layer(
        "model",
        lambda: Resampled(
            PerceiverResampler(
                dim=WIDTH, depth=1, dim_head=HEAD_DIM, heads=HEADS, num_latents=QUERIES, max_num_frames=len(NAMES)
            )
        ),
    ),
    "GatedCrossAttentionBlock": Layer(
        "model",
        lambda: Gated(GatedCrossAttentionBlock(dim=WIDTH, dim_visual=WIDTH, dim_head=HEAD_DIM, heads=HEADS)),
    ),
    "QFormer": Layer("model", lambda: Headed(QFormer(WIDTHS, WIDTH, HEADS, 1, QUERIES))),
    "JointAttention": Layer("model", lambda: Listed(JointAttention((WIDTH,) * len(NAMES), HEAD_DIM, HEADS))),
    "MMDiTBlock": Layer("model", lambda: Listed(MMDiTBlock((WIDTH,) * len(NAMES), HEAD_DIM, HEADS), None)),
    "MultimodalTransformer": Layer("model", lambda: Headed(MultimodalTransformer(WIDTHS, WIDTH, HEADS, 1))),
    "LateFusion, mean": late("mean"),
    "LateFusion, weighted": late("weighted"),
    "LateFusion, product": late("product"),
    "LateFusion, max": late("max"),
    "LateFusion, vote": late("vote"),
    "StackingFusion": Layer("decision", lambda: Decided(StackingFusion(NAMES, NUM_CLASSES))),
    "ProductOfExperts": Layer("decision", lambda: Believed(ProductOfExperts(NAMES, WIDTH))),
    "EvidentialFusion, mse": evidential("mse"),
    "EvidentialFusion, digamma": evidential("digamma"),
    "MissingModalityToken": Layer("training", lambda: Filled(MissingModalityToken(WIDTHS))),
}

ALONE = "MultimodalTransformer without encoders"


def build(name: str) -> nn.Module:
    """The classifier of that name: one of LAYERS, or ALONE."""
    if name == ALONE:
        return JointClassifier(MultimodalTransformer(DIMS, WIDTH, HEADS, 1, max_lengths=MAX_LENGTHS))
    return Classifier(LAYERS[name].build())
