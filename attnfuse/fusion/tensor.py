"""Multiplicative feature fusion: every product of features across modalities, in full and in low rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from attnfuse.fusion.contract import ModalityFusion
from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.modalities import Modality, positive


class TensorFusion(ModalityFusion):
    """The outer product of all modalities, each with a constant 1 in front.

        z     = [1; x_1] ⊗ ... ⊗ [1; x_S]            x_s the mean of the modality's real tokens
        fused = z, flattened                         out_dim=None
        fused = W z + b                              out_dim=E

    Zadeh, Chen, Poria, Cambria and Morency, 2017, "Tensor Fusion Network for Multimodal Sentiment Analysis".
    The 1 keeps the products of fewer modalities in z: single features, pairs, and so on up to all S. An
    absent modality contributes its 1 only: every product it takes part in is 0, and the others are what they
    would be without it. All absent: z is 1 at its first place and 0 elsewhere, so fused is that, or
    b + W[:, 0].

    z has Π (d_s + 1) entries, which grows with the product of the sizes: project the modalities to a few
    features each before it, as the paper does, or see `LowRankTensorFusion`.

    Args:
        dims: modality name -> feature size; the order of the dict is the order of `present` and of z.
        out_dim: size E of the result; None gives z itself. The attribute `out_dim` holds the size either way.

    forward(inputs, mask=None, present=None) -> FusionOutput(fused (B, out_dim), per_modality name -> (B, d)):
        inputs  name -> (B, d), or (B, N, d), which is averaged over its real tokens
        mask    name -> (B, N) bool, True = real token, or (B,) integer lengths
        present (B, S) bool, or name -> (B,) bool
    per_modality holds x_s, 0 where absent. Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, dims: Mapping[str, int], out_dim: int | None = None) -> None:
        super().__init__(dims)
        if out_dim is not None and out_dim <= 0:
            raise ValueError(f"out_dim must be positive or None, got {out_dim}")
        entries = math.prod(dim + 1 for dim in self.dims.values())
        self.out_dim = entries if out_dim is None else out_dim
        self.proj: nn.Module = nn.Identity() if out_dim is None else nn.Linear(entries, out_dim)

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        pooled = {name: view.pooled() for name, view in views.items()}
        first, *others = (F.pad(x, (1, 0), value=1.0) for x in pooled.values())
        product = first
        for x in others:
            product = (product[:, :, None] * x[:, None, :]).flatten(1)
        return FusionOutput(fused=self.proj(product), per_modality=pooled)


class LowRankTensorFusion(ModalityFusion):
    """Tensor fusion with its weight in low rank: the outer product is never formed.

        fused = b + Σ_r w_r * Π over present s of (1 + U_rs x_s)         * and Π feature by feature, r <= rank

    Liu, Shen, Lakshminarasimhan, Liang, Zadeh and Morency, 2018, "Efficient Low-rank Multimodal Fusion with
    Modality-Specific Factors": the weight of `TensorFusion` as a sum of `rank` outer products of the factors
    [1; U_rs], at a cost that grows with the sum of the sizes. In the paper the constant of [1; x_s] has a
    learned weight in every factor and w_r is a number; here that weight is moved out of the product into
    w_r (E,), which makes the constant exactly 1. So an absent modality is the factor 1, as it is in
    `TensorFusion`, and its parameters stay out of it. All absent: b + Σ_r w_r.

    Args:
        dims: modality name -> feature size; the order of the dict is the order of `present`.
        out_dim: size E of the result.
        rank: number of terms.

    forward(inputs, mask=None, present=None) -> FusionOutput(fused (B, E), per_modality name -> (B, E)):
        inputs  name -> (B, d), or (B, N, d), which is averaged over its real tokens
        mask    name -> (B, N) bool, True = real token, or (B,) integer lengths
        present (B, S) bool, or name -> (B,) bool
    per_modality holds Σ_r w_r * U_rs x_s, the part of fused that the modality makes on its own, 0 where
    absent. Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, dims: Mapping[str, int], out_dim: int, rank: int) -> None:
        super().__init__(dims)
        positive(out_dim, "out_dim")
        positive(rank, "rank")
        self.factors = nn.ModuleDict(
            {name: nn.Linear(dim, rank * out_dim, bias=False) for name, dim in self.dims.items()}
        )
        self.weight = nn.Parameter(rank**-0.5 * torch.randn(rank, out_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        # 0 for an absent modality, and then 1 + 0 is the factor that changes nothing
        factors = [self.factors[name](view.pooled()) for name, view in views.items()]
        stacked = torch.stack(factors, 1).unflatten(2, self.weight.shape)
        dtype = stacked.dtype
        # 1 + u and the products of S of them would lose what a narrow dtype has of u
        wide = stacked.to(torch.promote_types(dtype, torch.float32))
        weight = self.weight.to(wide.dtype)
        # one by one: the backward of Tensor.prod asks the device whether there is a zero, and waits
        terms = weight
        for factor in wide.unbind(1):
            terms = terms * (1 + factor)
        fused = self.bias.to(wide.dtype) + terms.sum(1)
        own = (weight * wide).sum(2).to(dtype)
        return FusionOutput(fused=fused.to(dtype), per_modality=dict(zip(views, own.unbind(1), strict=True)))
