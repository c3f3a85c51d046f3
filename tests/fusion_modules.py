"""Every fusion module of the package, in one table: how to build it, what to feed it, what it promises.

`CASES` is what the contract tests run over. A module that takes a dict and returns a FusionOutput is built as it
is; a building block that works on token tensors comes in a thin adapter that gives it the same face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import attnfuse.fusion
from attnfuse import AuxRequest
from attnfuse.fusion import FusionOutput
from attnfuse.nn.modalities import key_mask

# Each of these must have a case below: a name that cannot be found fails its tests, it does not leave them out.
LISTED = (
    "ConcatFusion",
    "SumFusion",
    "GatedMultimodalUnit",
    "FiLM",
    "TensorFusion",
    "LowRankTensorFusion",
    "AttentionPoolFusion",
    "MultiSourceCrossAttention",
    "CrossmodalTransformer",
    "CoAttentionBlock",
    "BottleneckFusion",
    "PerceiverResampler",
    "GatedCrossAttentionBlock",
    "QFormer",
    "JointAttention",
    "MMDiTBlock",
    "DecoupledCrossAttention",
    "MultimodalTransformer",
    "LateFusion",
    "StackingFusion",
    "ProductOfExperts",
    "EvidentialFusion",
    "MissingModalityToken",
)

B, C, E = 4, 5, 16
DIMS = {"text": 6, "image": 10, "audio": 4}
NAMES = list(DIMS)
TOKENS = {"text": 7, "audio": 9}  # how many; image is one vector

# Who is there: everybody, two of three, one, nobody. Cases with fewer modalities take the first columns.
PRESENT = torch.tensor([[True, True, True], [True, True, False], [False, True, False], [False, False, False]])


def public(name: str) -> Any:
    """The class of that name, looked up only when a test runs, so that a missing one fails there and by name."""
    return getattr(attnfuse.fusion, name)


@dataclass(frozen=True)
class Case:
    """One way to build one module.

    name:      the public name of the class under test
    build:     a module that takes (inputs, mask, present) and returns a FusionOutput
    size:      shape of the result of one sample
    dims:      modality -> feature size, in the order of `present`
    tokens:    modality -> number of tokens; the others are vectors (B, d)
    anchors:   input that is always there, such as the query -> its shape without the batch
    neutral:   (module, inputs) -> the documented result when all is absent, broadcastable to (B, *size); None
               where the documentation promises a constant and no more
    still:     parts of the names of parameters that get gradient 0 if nobody has the last modality
    moves:     and of those that must not, unless they are also in `still`
    flat:      the result may stay the same when an input changes (a maximum, a vote)
    masses:    what a row of source_mass sums to, for that many modalities present
    logits_in: the inputs are predictions, which a classifier for each modality has to make first
    """

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...] = (E,)
    dims: Mapping[str, int] = field(default_factory=lambda: DIMS)
    tokens: Mapping[str, int] = field(default_factory=lambda: TOKENS)
    anchors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    neutral: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] | None = None
    still: tuple[str, ...] = (".audio.",)
    moves: tuple[str, ...] = (".image.",)
    flat: bool = False
    masses: Callable[[Tensor], Tensor] = torch.ones_like
    logits_in: bool = False

    @property
    def names(self) -> list[str]:
        return list(self.dims)


# adapters


class Adapter(nn.Module):
    """A block that takes token tensors, with the signature of a fusion module."""

    def __init__(self, block: nn.Module, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.block = block
        self.dims = dict(dims)

    def columns(self, present: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """`present` in either form as name -> (B,)."""
        if present is None:
            return {}
        return dict(present) if isinstance(present, Mapping) else dict(zip(self.dims, present.unbind(1), strict=True))

    def matrix(self, present: Tensor | Mapping[str, Tensor] | None, batch: int) -> Tensor | None:
        """`present` in either form as (B, S)."""
        if present is None or isinstance(present, Tensor):
            return present
        everybody = torch.ones(batch, dtype=torch.bool)
        return torch.stack([present.get(name, everybody) for name in self.dims], 1)


class OnCondition(Adapter):
    """FiLM: one condition, x is always there."""

    def forward(self, inputs, mask=None, present=None):
        (name,) = self.dims
        here, real = self.columns(present), mask or {}
        return FusionOutput(fused=self.block(inputs["x"], inputs.get(name), here.get(name), real.get(name)))


class OnQuery(Adapter):
    """A cross-attention: the query is always there."""

    def forward(self, inputs, mask=None, present=None):
        sources = {name: x for name, x in inputs.items() if name != "query"}
        out, aux = self.block(inputs["query"], sources, mask, present, AuxRequest(source_mass=True))
        return FusionOutput(fused=out, source_mass=aux.source_mass.mean((1, 2)))


class OnStreams(Adapter):
    """Blocks of several streams in and as many out. The result is the mean token of each, side by side."""

    def __init__(self, block: nn.Module, dims: Mapping[str, int], passes_by: bool = False) -> None:
        super().__init__(block, dims)
        self.passes_by = passes_by  # absent rows come out as they went in, so what is poisoned must be cleared here

    def forward(self, inputs, mask=None, present=None):
        given = next(iter(inputs.values()), None)
        anchor = torch.zeros(len(present), 0, 0) if given is None else given
        streams = {name: inputs.get(name, anchor.new_zeros(len(anchor), 0, d)) for name, d in self.dims.items()}
        masks = {name: (mask or {}).get(name) for name in self.dims}
        here = self.columns(present)
        outs = self.call(streams, masks, {name: here.get(name) for name in self.dims}, inputs.get("time"))
        outs = dict(zip(self.dims, outs, strict=True))
        if self.passes_by:
            outs = {name: self._visible(x, masks[name], here.get(name)) for name, x in outs.items()}
        counts = {name: self._count(x, masks[name]) for name, x in outs.items()}
        pooled = [x.sum(1) / counts[name].to(x.dtype) for name, x in outs.items()]
        return FusionOutput(fused=torch.cat(pooled, 1), per_modality=outs)

    @staticmethod
    def _visible(x: Tensor, mask: Tensor | None, here: Tensor | None) -> Tensor:
        if mask is not None:
            x = x.masked_fill(~key_mask(mask, *x.shape[:2])[..., None], 0.0)
        return x if here is None else x.masked_fill(~here[:, None, None], 0.0)

    @staticmethod
    def _count(x: Tensor, mask: Tensor | None) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else key_mask(mask, *x.shape[:2])
        return real.sum(1, keepdim=True).clamp_min(1)


class OnTwoStreams(OnStreams):
    """CoAttentionBlock."""

    def call(self, streams, masks, here, time):
        return self.block(*streams.values(), *masks.values(), *here.values())


class OnListedStreams(OnStreams):
    """JointAttention and MMDiTBlock."""

    def call(self, streams, masks, here, time):
        condition = {} if time is None else {"time_cond": time}
        return self.block(tuple(streams.values()), tuple(masks.values()), present=tuple(here.values()), **condition)


class OnMedia(Adapter):
    """Blocks that take media (B, T, n, d): each modality is one medium, and all have the same n."""

    def media(self, inputs, mask, present):
        """media, which of their tokens are real (B, T, n), and who is there (B, T)."""
        given = {name: x for name, x in inputs.items() if name in self.dims}
        like = next(iter(given.values()), None)
        batch, length = (len(present), 1) if like is None else like.shape[:2]
        dtype = next(self.parameters()).dtype if like is None else like.dtype
        # what is missing holds something nobody may see
        media = torch.full((batch, len(self.dims), length, next(iter(self.dims.values()))), torch.nan, dtype=dtype)
        real = torch.ones(media.shape[:3], dtype=torch.bool)
        here = self.matrix(present, batch)
        here = torch.ones(media.shape[:2], dtype=torch.bool) if here is None else here.clone()
        for t, name in enumerate(self.dims):
            if name in given:
                media[:, t] = given[name]
            else:
                here[:, t] = False
            if mask is not None and mask.get(name) is not None and name in given:
                real[:, t] = key_mask(mask[name], batch, length)
        return media, real, here


class OnResampledMedia(OnMedia):
    """PerceiverResampler: latents for each medium, side by side."""

    def forward(self, inputs, mask=None, present=None):
        media, real, here = self.media(inputs, mask, present)
        latents = self.block(media[:, :, None], real[:, :, None], here)
        return FusionOutput(fused=latents, per_modality=dict(zip(self.dims, latents.unbind(1), strict=True)))


class OnGatedMedia(OnMedia):
    """GatedCrossAttentionBlock: the text is always there."""

    def forward(self, inputs, mask=None, present=None):
        if any(name in inputs for name in self.dims):
            media, real, here = self.media(inputs, mask, present)
        else:
            media = real = here = None
        request = AuxRequest(source_mass=True)
        out, aux = self.block(inputs["x"], media, mask=real, present=here, return_aux=request)
        mass = aux.source_mass.mean((1, 2))
        return FusionOutput(fused=out, source_mass=mass.expand(-1, len(self.dims)))


class TokenThenSum(Adapter):
    """MissingModalityToken, with a fusion module after it to make a representation of what it fills in."""

    def __init__(self, block: nn.Module, dims: Mapping[str, int]) -> None:
        super().__init__(block, dims)
        self.after = public("ConcatFusion")(dims, E)

    def forward(self, inputs, mask=None, present=None):
        return FusionOutput(fused=self.after(*self.block(inputs, mask, present)).fused)


def opened(block: nn.Module, *gates: str) -> nn.Module:
    """Gates that start at zero hide everything behind them."""
    with torch.no_grad():
        for name in gates:
            nn.init.normal_(block.get_parameter(name)).add_(0.7)
    return block


# the table


def _late(method: str) -> Case:
    return Case(
        "LateFusion",
        lambda: public("LateFusion")(NAMES, C, method),
        neutral=lambda module, inputs: torch.full((C,), 1 / C).log(),
        flat=method in ("max", "vote"),
        **PREDICTIONS,
    )


def _first(number: int) -> dict[str, int]:
    return {name: DIMS[name] for name in NAMES[:number]}


PREDICTIONS: dict[str, Any] = {
    "size": (C,),
    "dims": dict.fromkeys(NAMES, C),
    "tokens": {},
    "logits_in": True,
}
QUERY = {"query": (3, E)}
PAIR = _first(2)
PAIR_TOKENS = {"text": 7, "image": 4}
MEDIA = {"text": 8, "image": 8}
MEDIA_TOKENS = {"text": 7, "image": 7}
BELIEFS: dict[str, Any] = PREDICTIONS | {"size": (4,), "dims": dict.fromkeys(NAMES, 8)}

# Of each class the last case is the one that is also compiled: keep it small.
CASES: dict[str, Case] = {
    # feature level
    "concat": Case(
        "ConcatFusion",
        lambda: public("ConcatFusion")(DIMS, E),
        neutral=lambda module, inputs: module.bias,
    ),
    "sum": Case(
        "SumFusion",
        lambda: public("SumFusion")(DIMS, E),
        neutral=lambda module, inputs: torch.zeros(E),
    ),
    "sum-mean": Case(
        "SumFusion",
        lambda: public("SumFusion")(DIMS, E, reduction="mean"),
        neutral=lambda module, inputs: torch.zeros(E),
    ),
    "gmu": Case(
        "GatedMultimodalUnit",
        lambda: public("GatedMultimodalUnit")(DIMS, E),
        neutral=lambda module, inputs: torch.zeros(E),
    ),
    "film": Case(
        "FiLM",
        lambda: OnCondition(public("FiLM")(E, 6), _first(1)),
        size=(3, E),
        dims=_first(1),
        tokens={"text": 7},
        anchors={"x": (3, E)},
        neutral=lambda module, inputs: inputs["x"],
        still=("proj",),
    ),
    "tensor": Case(
        "TensorFusion",
        lambda: public("TensorFusion")(DIMS, E),
        neutral=lambda module, inputs: module.proj.bias + module.proj.weight[:, 0],
        # columns of one matrix belong to products: none to a single modality
        still=(),
        moves=("proj",),
    ),
    "tensor-whole": Case(
        "TensorFusion",
        lambda: public("TensorFusion")(DIMS),
        size=(7 * 11 * 5,),
        neutral=lambda module, inputs: torch.eye(7 * 11 * 5)[0],
    ),
    "low-rank": Case(
        "LowRankTensorFusion",
        lambda: public("LowRankTensorFusion")(DIMS, E, 3),
        neutral=lambda module, inputs: module.bias + module.weight.sum(0),
    ),
    "pool": Case(
        "AttentionPoolFusion",
        lambda: public("AttentionPoolFusion")(DIMS, E, 4, 2),
    ),
    # model level
    "cross": Case(
        "MultiSourceCrossAttention",
        lambda: OnQuery(public("MultiSourceCrossAttention")(E, 4, DIMS, num_kv_heads=2, qk_norm=True), DIMS),
        size=(3, E),
        anchors=QUERY,
        neutral=lambda module, inputs: module.block.out_proj.bias,
    ),
    "cross-per-source": Case(
        "MultiSourceCrossAttention",
        lambda: OnQuery(public("MultiSourceCrossAttention")(E, 4, DIMS, normalization="per_source"), DIMS),
        size=(3, E),
        anchors=QUERY,
        neutral=lambda module, inputs: module.block.out_proj.bias,
        masses=lambda count: count,
    ),
    "decoupled": Case(
        "DecoupledCrossAttention",
        lambda: OnQuery(
            public("DecoupledCrossAttention")(E, 4, DIMS, scales={"image": 0.5}, learn_scales=True), DIMS
        ),
        size=(3, E),
        anchors=QUERY,
        neutral=lambda module, inputs: module.block.out_proj.bias,
        masses=lambda count: count,
    ),
    "crossmodal-pairwise": Case(
        "CrossmodalTransformer",
        lambda: public("CrossmodalTransformer")(DIMS, E, 2, 1, pairwise=True, num_self_layers=0),
        tokens=TOKENS | {"image": 3},  # one image token would leave a route to it nothing to choose between
        neutral=lambda module, inputs: module.fused_norm(module.query),
    ),
    "crossmodal": Case(
        "CrossmodalTransformer",
        lambda: public("CrossmodalTransformer")(DIMS, E, 4, 1, max_lengths={"text": 12}),
        neutral=lambda module, inputs: module.fused_norm(module.query),
    ),
    "co-attention": Case(
        "CoAttentionBlock",
        lambda: OnTwoStreams(public("CoAttentionBlock")(*PAIR.values(), 2, self_attention=True), PAIR),
        size=(16,),
        dims=PAIR,
        tokens=PAIR_TOKENS,
        neutral=lambda module, inputs: torch.zeros(16),
        # a reads nobody when b is not there
        still=("block_b", "block_a.cross"),
        moves=("block_a.own", "block_a.mlp"),
    ),
    "bottleneck": Case(
        "BottleneckFusion",
        lambda: public("BottleneckFusion")(DIMS, E, 4, 3, num_bottlenecks=2, fusion_layer=1),
        neutral=lambda module, inputs: torch.zeros(E),
    ),
    "bottleneck-everywhere": Case(
        "BottleneckFusion",
        lambda: public("BottleneckFusion")(DIMS, E, 4, 1, 2),
        neutral=lambda module, inputs: torch.zeros(E),
    ),
    "resampler": Case(
        "PerceiverResampler",
        lambda: OnResampledMedia(
            public("PerceiverResampler")(
                dim=8, depth=1, dim_head=4, heads=2, num_latents=3, max_num_media=2, max_num_frames=1
            ),
            MEDIA,
        ),
        size=(2, 3, 8),
        dims=MEDIA,
        tokens=MEDIA_TOKENS,
        neutral=lambda module, inputs: torch.zeros(8),
        still=(),
        moves=("layers", "latents"),
    ),
    "gated": Case(
        "GatedCrossAttentionBlock",
        lambda: OnGatedMedia(
            opened(
                public("GatedCrossAttentionBlock")(dim=E, dim_visual=8, dim_head=4, heads=2), "attn_gate", "ff_gate"
            ),
            MEDIA,
        ),
        size=(3, E),
        dims=MEDIA,
        tokens=MEDIA_TOKENS,
        anchors={"x": (3, E)},
        neutral=lambda module, inputs: inputs["x"],
        still=(),
        moves=("block",),
    ),
    "qformer": Case(
        "QFormer",
        lambda: public("QFormer")(DIMS, E, 4, 2, 3, max_lengths={"text": 12}),
    ),
    "joint": Case(
        "JointAttention",
        lambda: OnListedStreams(public("JointAttention")(tuple(PAIR.values()), 4, 2, qk_rmsnorm=True), PAIR),
        size=(16,),
        dims=PAIR,
        tokens=PAIR_TOKENS,
        neutral=lambda module, inputs: torch.zeros(16),
        still=("to_qkv.1", "to_out.1", "rmsnorms.1"),
        moves=("to_qkv.0", "to_out.0"),
    ),
    "mmdit": Case(
        "MMDiTBlock",
        lambda: OnListedStreams(
            opened(
                public("MMDiTBlock")(tuple(PAIR.values()), 4, 2, 5, ff_mult=2),
                *(f"to_cond.{s}.{part}" for s in range(2) for part in ("weight", "bias")),
            ),
            PAIR,
            passes_by=True,
        ),
        size=(16,),
        dims=PAIR,
        tokens=PAIR_TOKENS,
        anchors={"time": (5,)},
        neutral=lambda module, inputs: torch.zeros(16),
        still=("to_qkv.1", "to_out.1", "feedforwards.1", "to_cond.1"),
        moves=("to_qkv.0", "to_out.0", "feedforwards.0", "to_cond.0"),
    ),
    "transformer": Case(
        "MultimodalTransformer",
        lambda: public("MultimodalTransformer")(DIMS, E, 4, 2, max_lengths={"text": 12}),
    ),
    "transformer-gqa-qknorm": Case(
        "MultimodalTransformer",
        lambda: public("MultimodalTransformer")(DIMS, E, 4, 1, num_kv_heads=2, qk_norm=True),
    ),
    # decision level
    "late-mean": _late("mean"),
    "late-weighted": _late("weighted"),
    "late-product": _late("product"),
    "late-max": _late("max"),
    "late-vote": _late("vote"),
    "stacking": Case(
        "StackingFusion",
        lambda: public("StackingFusion")(NAMES, C),
        neutral=lambda module, inputs: module.bias.log_softmax(-1),
        **PREDICTIONS,
    ),
    "stacking-hidden": Case(
        "StackingFusion",
        lambda: public("StackingFusion")(NAMES, C, 8),
        neutral=lambda module, inputs: module.head(module.bias).log_softmax(-1),
        **PREDICTIONS,
    ),
    "experts": Case(
        "ProductOfExperts",
        lambda: public("ProductOfExperts")(NAMES, 4),
        neutral=lambda module, inputs: torch.zeros(4),
        **BELIEFS,
    ),
    "experts-no-prior": Case(
        "ProductOfExperts",
        lambda: public("ProductOfExperts")(NAMES, 4, prior=False),
        neutral=lambda module, inputs: torch.zeros(4),
        **BELIEFS,
    ),
    "evidential": Case(
        "EvidentialFusion",
        lambda: public("EvidentialFusion")(C, names=NAMES),
        neutral=lambda module, inputs: torch.ones(C),
        **PREDICTIONS,
    ),
    # training
    "missing-token": Case(
        "MissingModalityToken",
        lambda: TokenThenSum(public("MissingModalityToken")(DIMS), DIMS),
        # the other way round than elsewhere: a token learns where its modality is absent
        still=("tokens.text.", "tokens.image."),
        moves=("tokens.audio.", "slots.image."),
    ),
}


def make(case: Case) -> nn.Module:
    """The module with all its parameters moved: zero biases and equal scores would let mistakes pass."""
    module = case.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def make_inputs(case: Case, batch: int = B) -> dict[str, Tensor]:
    inputs = {}
    for name, dim in case.dims.items():
        shape = (batch, case.tokens[name], dim) if name in case.tokens else (batch, dim)
        inputs[name] = torch.randn(shape)
    return inputs | {name: torch.randn(batch, *shape) for name, shape in case.anchors.items()}


def presence(case: Case) -> Tensor:
    """(B, S): `PRESENT` for the modalities of the case."""
    return PRESENT[:, : len(case.dims)]


def result(output: FusionOutput) -> Tensor:
    """The fused representation, or the prediction of modules that make none."""
    return output.logits if output.fused is None else output.fused


def tensors(output: FusionOutput) -> list[Tensor]:
    """Everything the module returned."""
    per_modality: Iterable[Tensor] = (output.per_modality or {}).values()
    fields = (output.fused, output.logits, output.uncertainty, output.source_mass)
    return [x for x in fields if x is not None] + list(per_modality)


def loss_of(output: FusionOutput) -> Tensor:
    """A loss that reads everything the module returned."""
    return sum(
        (x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in tensors(output) if x.numel()
    )
