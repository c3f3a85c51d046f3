"""Feature-level fusion: representations in, one representation out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.modalities import check_dims, gather_modalities


class ConcatFusion(nn.Module):
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
        super().__init__()
        self.dims = check_dims(dims)
        if out_dim <= 0:
            raise ValueError(f"out_dim must be positive, got {out_dim}")
        self.slots = nn.ModuleDict(
            {name: nn.Linear(dim, out_dim, bias=False) for name, dim in self.dims.items()}
        )
        self.bias = nn.Parameter(torch.empty(out_dim))
        # the bounds nn.Linear would use on the concatenation: its fan-in is all the modalities together
        bound = sum(self.dims.values()) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        mask: Mapping[str, Tensor | None] | None = None,
        present: Tensor | Mapping[str, Tensor] | None = None,
    ) -> FusionOutput:
        views = gather_modalities(inputs, self.dims, mask, present)
        # A missing modality goes through its slot as zeros: its weights then have gradient 0 rather than
        # none, which is what DistributedDataParallel expects of every parameter.
        slots = {name: self.slots[name](view.pooled()) for name, view in views.items()}
        fused = torch.stack(list(slots.values())).sum(0)
        return FusionOutput(fused=fused + self.bias.to(fused.dtype), per_modality=slots)
