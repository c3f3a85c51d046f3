"""Decision-level fusion: one prediction per modality in, one prediction out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.modalities import check_dims, gather_modalities, presence_matrix

METHODS = ("mean", "weighted", "product", "max", "vote")


class LateFusion(nn.Module):
    """Combine the class probabilities p_s = softmax(logits_s) of the modalities that are present.

        mean      p ∝ Σ_s p_s
        weighted  p = Σ_s w_s p_s      w = softmax of learned scores over the present modalities
        product   p ∝ Π_s p_s
        max       p ∝ max_s p_s
        vote      p ∝ number of s whose best class it is + mean_s p_s

    The rules of Kittler et al., 1998, "On Combining Classifiers". In vote the mean, which is below 1, breaks
    ties and keeps every class possible and the result differentiable.

    Args:
        modalities: the names, in the order of `present`.
        num_classes: C.
        method: one of the above.

    forward(inputs, mask=None, present=None) -> FusionOutput(logits, per_modality):
        inputs  name -> (B, C) logits; missing names are absent
        mask    accepted for the common signature; predictions have no tokens, so an entry raises
        present (B, S) bool, or name -> (B,) bool
        logits are log p (B, C), normalised, float32 or wider: give them to cross_entropy or nll_loss.
        per_modality holds log p_s (B, C), 0 where absent.
    All absent: the uniform distribution. Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, modalities: Sequence[str], num_classes: int, method: str = "mean") -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if isinstance(modalities, str):
            raise TypeError(f"modalities must be a sequence of names, got the single str {modalities!r}")
        if len(set(modalities)) != len(modalities):
            raise ValueError(f"modalities must not repeat a name, got {list(modalities)}")
        if num_classes <= 0:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        self.dims = check_dims(dict.fromkeys(modalities, num_classes), "modalities")
        self.method = method
        self.scores = nn.Parameter(torch.zeros(len(self.dims))) if method == "weighted" else None

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        mask: Mapping[str, Tensor | None] | None = None,
        present: Tensor | Mapping[str, Tensor] | None = None,
    ) -> FusionOutput:
        views = gather_modalities(inputs, self.dims, mask, present, vectors_only=True)
        presence = presence_matrix(views)
        logits = torch.stack([view.pooled() for view in views.values()], 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_p = torch.log_softmax(logits.to(wide), dim=-1)
        # A sample with nothing present counts all its modalities, which are uniform there because absent
        # logits are 0: no reduction below meets an empty set, so none can make a NaN, not even backwards.
        nobody = ~presence.any(1, keepdim=True)
        fused = self._combine(log_p, presence | nobody)
        uniform = torch.log_softmax(torch.zeros_like(fused), dim=-1)
        silent = log_p.masked_fill(~presence[..., None], 0.0)
        return FusionOutput(
            logits=torch.where(nobody, uniform, fused),
            per_modality=dict(zip(views, silent.unbind(1), strict=True)),
        )

    def _combine(self, log_p: Tensor, active: Tensor) -> Tensor:
        """log p (B, C) from log p_s (B, S, C) and who counts (B, S), at least one in each row."""
        left_out = ~active[..., None]
        if self.scores is not None:
            log_w = torch.log_softmax(self.scores.to(log_p.dtype).masked_fill(~active, -torch.inf), dim=-1)
            score = torch.logsumexp(log_p + log_w[..., None], dim=1)
        elif self.method == "product":
            score = log_p.masked_fill(left_out, 0.0).sum(1)
        elif self.method == "max":
            score = log_p.masked_fill(left_out, -torch.inf).amax(1)
        elif self.method == "vote":
            probability = log_p.exp().masked_fill(left_out, 0.0)
            ballots = torch.zeros_like(log_p).scatter(-1, log_p.argmax(-1, keepdim=True), 1.0)
            votes = ballots.masked_fill(left_out, 0.0).sum(1)
            mean = probability.sum(1) / active.sum(1, keepdim=True)
            score = torch.log((votes + mean).clamp_min(torch.finfo(log_p.dtype).tiny))
        else:
            score = torch.logsumexp(log_p.masked_fill(left_out, -torch.inf), dim=1)
        return torch.log_softmax(score, dim=-1)
