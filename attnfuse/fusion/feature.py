"""Feature-level fusion: representations in, one representation out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attnfuse.fusion.contract import ModalityFusion
from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.modalities import Modality, key_mask, masked_mean, positive, presence_matrix


class ConcatFusion(ModalityFusion):
    """A linear layer over the concatenated modalities, computed without concatenating.

        fused = b + Σ_s W_s · mean of the real tokens of x_s

    which is Linear(concat(x_1, ..., x_S)) with W cut into one slot per modality. The slot of an absent
    modality contributes nothing, and the others are not rescaled: what they add does not depend on who else
    is there. All absent: the bias b.

    Args:
        dims: modality name -> feature size; the order of the dict is the order of `present`.
        out_dim: size E of the result.

    forward(inputs, mask=None, present=None) -> FusionOutput(fused (B, E), per_modality name -> (B, E)):
        inputs  name -> (B, d), or (B, N, d), which is averaged over its real tokens
        mask    name -> (B, N) bool, True = real token, or (B,) integer lengths
        present (B, S) bool, or name -> (B,) bool
    per_modality holds each slot's contribution. Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, dims: Mapping[str, int], out_dim: int) -> None:
        super().__init__(dims)
        positive(out_dim, "out_dim")
        self.slots = nn.ModuleDict(
            {name: nn.Linear(dim, out_dim, bias=False) for name, dim in self.dims.items()}
        )
        self.bias = nn.Parameter(torch.empty(out_dim))
        # the bounds nn.Linear would use on the concatenation: its fan-in is all the modalities together
        bound = sum(self.dims.values()) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        # A missing modality goes through its slot as zeros: its weights then have gradient 0 rather than
        # none, which is what DistributedDataParallel expects of every parameter.
        slots = {name: self.slots[name](view.pooled()) for name, view in views.items()}
        fused = torch.stack(list(slots.values())).sum(0)
        return FusionOutput(fused=fused + self.bias.to(fused.dtype), per_modality=slots)


class SumFusion(ModalityFusion):
    """Each modality projected to a common size, then added up over those that are present.

        h_s   = W_s · mean of the real tokens of x_s + b_s
        fused = Σ over present s of h_s                       reduction="sum", the default
        fused = mean over present s of h_s                    reduction="mean"

    A sum lets evidence accumulate: what a modality adds does not depend on who else is there, and how many
    were there can be read from the result. Take the mean where modalities are alternatives, several views of
    one thing, and what comes next should see the same scale whether one or all of them are present. Unlike in
    `ConcatFusion`, every modality brings a bias of its own, so one that is present with zero features is not
    the same as one that is absent. All absent: 0.

    Args:
        dims: modality name -> feature size; the order of the dict is the order of `present`.
        out_dim: size E of the result.
        reduction: "sum" or "mean".

    forward(inputs, mask=None, present=None) -> FusionOutput(fused (B, E), per_modality name -> (B, E)):
        inputs  name -> (B, d), or (B, N, d), which is averaged over its real tokens
        mask    name -> (B, N) bool, True = real token, or (B,) integer lengths
        present (B, S) bool, or name -> (B,) bool
    per_modality holds h_s, 0 where absent. Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, dims: Mapping[str, int], out_dim: int, *, reduction: str = "sum") -> None:
        super().__init__(dims)
        positive(out_dim, "out_dim")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.reduction = reduction
        self.proj = nn.ModuleDict({name: nn.Linear(dim, out_dim) for name, dim in self.dims.items()})

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        # the bias of an absent modality must not stay
        parts = {
            name: self.proj[name](view.pooled()).masked_fill(~view.present[:, None], 0.0)
            for name, view in views.items()
        }
        fused = torch.stack(list(parts.values())).sum(0)
        if self.reduction == "mean":
            fused = fused / presence_matrix(views).sum(1, keepdim=True).clamp_min(1).to(fused.dtype)
        return FusionOutput(fused=fused, per_modality=parts)


class GatedMultimodalUnit(ModalityFusion):
    """Each feature of the result is a mixture of the modalities, in proportions that they decide together.

        h_s   = tanh(W_s x_s + b_s)                  x_s the mean of the modality's real tokens
        z     = softmax over present s of (c_s + Σ over present t of G_st x_t)
        fused = Σ over present s of z_s * h_s        z_s (B, E): every feature has a gate of its own

    The GMU of Arevalo, Solorio, Montes-y-Gómez and González, 2017, "Gated Multimodal Units for Information
    Fusion", for any number of modalities: with two, both present, z is the paper's sigmoid of a linear map of
    [x_1, x_2], whose weights are G_1 - G_2. The paper has no biases. The softmax runs over who is there, so
    the gates of the present sum to 1 and a modality that is alone gets all of them. All absent: fused is 0.

    Args:
        dims: modality name -> feature size; the order of the dict is the order of `present`.
        out_dim: size E of the result.

    forward(inputs, mask=None, present=None) -> FusionOutput(fused, per_modality, source_mass):
        inputs  name -> (B, d), or (B, N, d), which is averaged over its real tokens
        mask    name -> (B, N) bool, True = real token, or (B,) integer lengths
        present (B, S) bool, or name -> (B,) bool
        fused (B, E); per_modality name -> h_s (B, E), 0 where absent; source_mass (B, S), the gates averaged
        over features, float32 or wider.
    Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, dims: Mapping[str, int], out_dim: int) -> None:
        super().__init__(dims)
        positive(out_dim, "out_dim")
        self.hidden = nn.ModuleDict({name: nn.Linear(dim, out_dim) for name, dim in self.dims.items()})
        self.gates = ConcatFusion(self.dims, len(self.dims) * out_dim)

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        presence = presence_matrix(views)
        pooled = {name: view.pooled() for name, view in views.items()}
        hidden = torch.stack([torch.tanh(self.hidden[name](x)) for name, x in pooled.items()], 1)
        hidden = hidden.masked_fill(~presence[..., None], 0.0)

        logits = self.gates(pooled).fused.view(hidden.shape)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Where nobody is present all count, and their gates are dropped afterwards: a softmax over nothing
        # would be NaN, and so would its gradient.
        active = presence | ~presence.any(1, keepdim=True)
        gates = torch.softmax(logits.masked_fill(~active[..., None], -torch.inf), dim=1)
        gates = gates.masked_fill(~presence[..., None], 0.0)
        return FusionOutput(
            fused=(gates * hidden).sum(1).to(hidden.dtype),
            per_modality=dict(zip(views, hidden.unbind(1), strict=True)),
            source_mass=gates.mean(-1),
        )


class FiLM(nn.Module):
    """Feature-wise linear modulation: one input decides how the features of another are scaled and shifted.

        out = gamma(c) * x + beta(c)        gamma(c) = 1 + W_gamma c + b_gamma,  beta(c) = W_beta c + b_beta

    Perez, Strub, de Vries, Dumoulin and Courville, 2018, "FiLM: Visual Reasoning with a General Conditioning
    Layer"; gamma is written around 1 as there, so that a small W does not silence x. Where the condition is
    absent, out is x itself and no parameter gets a gradient from that sample.

    Args:
        dim: size of a feature vector of x.
        cond_dim: size of the condition.

    forward(x, cond, present=None, mask=None) -> the shape of x:
        x       (B, ..., dim), features last; must be finite, padding included
        cond    (B, cond_dim), or (B, N, cond_dim), which is averaged over its real tokens; None = all absent
        present (B,) bool: False = this sample has no condition
        mask    (B, N) bool, True = real token of cond, or (B,) integer lengths; none left = no condition
    Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, dim: int, cond_dim: int) -> None:
        super().__init__()
        self.dim, self.cond_dim = positive(dim, "dim"), positive(cond_dim, "cond_dim")
        self.proj = nn.Linear(cond_dim, 2 * dim)

    def forward(
        self, x: Tensor, cond: Tensor | None, present: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {_kind(x)}")
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (B, ..., {self.dim}), got {tuple(x.shape)}")
        pooled, here = self._condition(x, cond, present, mask)
        film = self.proj(pooled).masked_fill(~here[:, None], 0.0).to(x.dtype)
        shift_of_gamma, beta = film.view(x.shape[0], *(1,) * (x.dim() - 2), 2 * self.dim).chunk(2, dim=-1)
        return (1 + shift_of_gamma) * x + beta

    def _condition(
        self, x: Tensor, cond: Tensor | None, present: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The pooled condition (B, cond_dim), 0 where absent, and who has one (B,)."""
        batch = x.shape[0]
        if present is not None:
            if not isinstance(present, Tensor) or present.dtype != torch.bool:
                raise TypeError(f"present must be a bool tensor, got {_kind(present)}")
            if present.shape != (batch,):
                raise ValueError(f"present must have shape {(batch,)}, got {tuple(present.shape)}")
        if cond is None:
            # zeros go through the projection, whose gradient is then 0 rather than none
            nobody = torch.zeros(batch, dtype=torch.bool, device=x.device)
            return self.proj.weight.new_zeros(batch, self.cond_dim), nobody
        if not isinstance(cond, Tensor) or not cond.is_floating_point():
            raise TypeError(f"cond must be a floating-point tensor or None, got {_kind(cond)}")
        if cond.dim() not in (2, 3) or cond.shape[-1] != self.cond_dim or cond.shape[0] != batch:
            size = self.cond_dim
            raise ValueError(
                f"cond must have shape ({batch}, {size}) or ({batch}, N, {size}), got {tuple(cond.shape)}"
            )
        if mask is not None and cond.dim() == 2:
            raise ValueError("mask was given for a vector cond (B, cond_dim); use present to leave it out")
        tokens = cond[:, None] if cond.dim() == 2 else cond
        visible = torch.ones(tokens.shape[:2], dtype=torch.bool, device=cond.device)
        if mask is not None:
            visible = key_mask(mask, batch, tokens.shape[1]).to(cond.device)
        if present is not None:
            visible = visible & present.to(cond.device)[:, None]
        return masked_mean(tokens.masked_fill(~visible[..., None], 0.0), visible), visible.any(1)


def _kind(given: object) -> str:
    return str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
